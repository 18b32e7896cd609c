//! Where things are kept that would be found again: `ZEBROID_CACHE`, or the system's place for caches.

use std::path::PathBuf;

pub fn folder() -> PathBuf {
    let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty());
    if let Some(folder) = var("ZEBROID_CACHE") {
        return folder.into();
    }
    let root = var("XDG_CACHE_HOME").map(PathBuf::from);
    let root = root.or_else(|| var("HOME").map(|home| PathBuf::from(home).join(".cache")));
    root.unwrap_or_else(std::env::temp_dir).join("zebroid")
}
