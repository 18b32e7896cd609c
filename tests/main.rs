//! The one integration-test binary. Tests that need the shared reference material look for it in
//! `ZEBROID_SHARED` or `../shared` and say so when it is absent.

mod arrows;
mod cli;
mod eval;
mod golden;
mod output;
mod pipeline;

use std::path::PathBuf;

/// The shared reference folder, or `None` (with a line that says what is skipped).
fn shared(what: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("ZEBROID_SHARED")
        .map_or_else(|| PathBuf::from("../shared"), PathBuf::from);
    if folder.join("golden").is_dir() {
        return Some(folder);
    }
    eprintln!(
        "SKIPPED {what}: no reference material in {} (set ZEBROID_SHARED)",
        folder.display()
    );
    None
}
