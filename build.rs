//! Tells tests whether the shared reference material is there: those that need it are counted as ignored where
//! it is not.

use std::path::PathBuf;

fn main() {
    let folder =
        std::env::var_os("ZEBROID_SHARED").map_or_else(|| "../shared".into(), PathBuf::from);
    let golden = folder.join("golden");
    println!("cargo::rustc-check-cfg=cfg(shared)");
    println!("cargo::rerun-if-env-changed=ZEBROID_SHARED");
    println!("cargo::rerun-if-changed=build.rs");
    // A folder that is not there may not be named: cargo would build everything anew each time.
    if golden.is_dir() {
        println!("cargo::rerun-if-changed={}", golden.display());
        println!("cargo::rustc-cfg=shared");
    }
}
