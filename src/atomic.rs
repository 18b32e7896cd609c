//! Files that appear whole or not at all: written beside their place first, then renamed.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::{Error, Result};

pub(crate) fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

pub(crate) fn private(prefix: &str) -> tempfile::Builder<'_, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(prefix);
    builder
}

/// Older than this, nobody writes to it any more.
const STALE: Duration = Duration::from_secs(24 * 60 * 60);

/// Removes what killed processes were writing into a folder, by its age. What stood in an output's place before (`.zebroid-old-..`) and
/// locks stay: the one may be wanted, the others take no room.
pub(crate) fn remove_stale(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let random = name.strip_prefix(".zebroid-");
        if random.is_some_and(|random| random.bytes().all(|b| b.is_ascii_alphanumeric()))
            && is_stale(&entry.path())
        {
            let path = entry.path();
            let removed = match entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                true => fs::remove_dir_all(&path),
                false => fs::remove_file(&path),
            };
            match removed {
                Ok(()) => tracing::info!("{}: removed, left by a killed process", path.display()),
                Err(error) => tracing::info!("{}: {error}", path.display()),
            }
        }
    }
}

/// Whether neither an entry nor what is in it was written to of late.
fn is_stale(path: &Path) -> bool {
    let inside = fs::read_dir(path).into_iter().flatten().flatten();
    let mut all = inside.map(|entry| entry.path()).chain([path.to_owned()]);
    all.all(|path| {
        let written = fs::symlink_metadata(path).and_then(|about| about.modified());
        written.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > STALE))
    })
}

/// Temporary entries are made for their owner alone; what is kept gets the usual mode.
#[cfg(unix)]
pub(crate) fn usual(mode: u32) -> fs::Permissions {
    std::os::unix::fs::PermissionsExt::from_mode(mode)
}

/// Writes a file, whole or not at all.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomic_with(path, |file| file.write_all(bytes))
}

/// The same, of what is not held in memory as a whole.
pub(crate) fn write_atomic_with(
    path: &Path,
    content: impl FnOnce(&mut fs::File) -> io::Result<()>,
) -> Result<()> {
    let parent = parent(path);
    let write = || -> io::Result<()> {
        let mut file = private(".zebroid-").tempfile_in(&parent)?;
        #[cfg(unix)]
        file.as_file().set_permissions(usual(0o644))?;
        content(file.as_file_mut())?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        sync_folder(&parent)
    };
    write().map_err(Error::io("cannot write", path))
}

/// The names in a folder, onto the disk.
#[cfg(unix)]
pub(crate) fn sync_folder(folder: &Path) -> io::Result<()> {
    match fs::File::open(folder)?.sync_all() {
        // Some network file systems cannot, and have no need to.
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported
            ) =>
        {
            Ok(())
        }
        done => done,
    }
}

#[cfg(not(unix))]
pub(crate) fn sync_folder(_: &Path) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_killed_processes_leave_goes_after_a_day() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        let old = std::time::SystemTime::now() - 2 * STALE;
        let age = |path: &Path| fs::File::open(path).unwrap().set_modified(old).unwrap();
        for file in [".zebroid-Ab3", ".zebroid-out.lock", ".zebroid-new", "kept"] {
            fs::write(at(file), "").unwrap();
        }
        for folder in [".zebroid-dir", ".zebroid-fresh", ".zebroid-old-x"] {
            fs::create_dir(at(folder)).unwrap();
            fs::write(at(folder).join("config.json"), "").unwrap();
        }
        age(&at(".zebroid-dir/config.json"));
        for old in [
            ".zebroid-Ab3",
            ".zebroid-out.lock",
            ".zebroid-dir",
            ".zebroid-fresh",
            ".zebroid-old-x",
            "kept",
        ] {
            age(&at(old));
        }
        remove_stale(root.path());
        let left = fs::read_dir(root.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name());
        let mut left: Vec<_> = left.map(|name| name.into_string().unwrap()).collect();
        left.sort();
        assert_eq!(
            left,
            [
                ".zebroid-fresh",
                ".zebroid-new",
                ".zebroid-old-x",
                ".zebroid-out.lock",
                "kept"
            ]
        );
    }
}
