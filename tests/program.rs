//! The program, as tests run it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

pub const TEACHER: &str = "assets/teacher";

pub fn zebroid(args: &[&str]) -> Output {
    command().args(args).output().unwrap()
}

pub fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_zebroid"));
    command.env_remove("RUST_LOG").env("ZEBROID_CACHE", cache());
    command
}

/// A cache of this test run alone.
fn cache() -> &'static Path {
    static CACHE: OnceLock<PathBuf> = OnceLock::new();
    CACHE.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache");
        let _ = std::fs::remove_dir_all(&folder);
        folder
    })
}

/// Runs and expects exit code `code`; returns what was said on standard error.
pub fn fails(code: i32, args: &[&str]) -> String {
    let output = zebroid(args);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
    assert!(!said.contains("panicked"), "{args:?}: {said}");
    said
}

pub fn succeeds(args: &[&str]) -> String {
    let output = zebroid(args);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
