//! One process at a time on one output: an advisory lock on `.zebroid-NAME.lock` beside it, which the system
//! releases with the process, however that ends.

use std::ffi::OsStr;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use super::output::check_output;
use crate::atomic::parent;
use crate::{Error, Result};

/// An output that is ours until this is dropped.
#[must_use = "the output is free again as soon as this is dropped"]
#[derive(Debug)]
pub struct Lock {
    path: PathBuf,
    /// Holds the lock.
    _file: File,
}

/// Locks `out` (a folder or file that need not exist yet).
///
/// # Errors
/// When another process has it, or its parent cannot hold the lock.
pub fn lock(out: &Path) -> Result<Lock> {
    let Some(name) = out.file_name() else {
        return Err(Error::file(out, "not a name for an output"));
    };
    let parent = parent(out);
    fs::create_dir_all(&parent).map_err(Error::io("cannot create", &parent))?;
    let path = lock_file(&parent, name);
    loop {
        // Not truncated: it may be another's.
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(Error::io("cannot open", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Error::file(
                    out,
                    "another zebroid process is working on this output: wait until it has ended, or choose another",
                ));
            }
            // Some network file systems know no locks.
            Err(TryLockError::Error(error)) => tracing::warn!(
                "{}: cannot be locked ({error}); do not start a second process on it",
                out.display()
            ),
        }
        if is_at(&file, &path) {
            return Ok(Lock { path, _file: file });
        }
    }
}

fn lock_file(parent: &Path, name: &OsStr) -> PathBuf {
    parent.join(format!(".zebroid-{}.lock", name.to_string_lossy()))
}

/// Whether a process works on `out` now; nothing is written to find out.
pub fn is_locked(out: &Path) -> bool {
    let file = out
        .file_name()
        .and_then(|name| File::open(lock_file(&parent(out), name)).ok());
    let tried = file.map(|file| file.try_lock_shared());
    matches!(tried, Some(Err(TryLockError::WouldBlock)))
}

/// [`check_output`] of an output that is ours from then on.
///
/// # Errors
/// Those of [`lock`] and of [`check_output`].
pub fn claim(out: &Path, force: bool, inputs: &[&Path]) -> Result<Lock> {
    let lock = lock(out)?;
    check_output(out, force, inputs)?;
    Ok(lock)
}

/// Whether the opened file still stands at `path`: the process that had it may just have removed it.
#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let place = |m: fs::Metadata| (m.dev(), m.ino());
    match (file.metadata(), fs::metadata(path)) {
        (Ok(opened), Ok(there)) => place(opened) == place(there),
        _ => false,
    }
}

#[cfg(not(unix))]
fn is_at(_: &File, _: &Path) -> bool {
    true
}

impl Drop for Lock {
    /// While it is still locked, so that nobody else's is removed.
    fn drop(&mut self) {
        if cfg!(unix) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_output_has_one_owner_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("deep/out");
        assert!(!is_locked(&out));
        let first = lock(&out).unwrap();
        assert!(is_locked(&out));
        let refused = lock(&out).unwrap_err();
        assert_eq!(refused.exit_code(), 2);
        let said = refused.to_string();
        assert!(said.contains("deep/out: another zebroid process"), "{said}");
        let other = lock(&folder.path().join("deep/other")).unwrap();
        drop((first, other));
        // What a killed process leaves behind is nobody's.
        fs::write(folder.path().join("deep/.zebroid-out.lock"), "").unwrap();
        assert!(!is_locked(&out));
        drop(claim(&out, false, &[]).unwrap());
        let left = fs::read_dir(folder.path().join("deep")).unwrap().count();
        assert_eq!(left, 0);
        assert!(
            lock(Path::new("/"))
                .unwrap_err()
                .to_string()
                .contains("not a name")
        );
    }

    /// Owners come and go in any order: never two at once.
    #[test]
    fn threads_never_own_it_together() {
        use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let (owners, owned) = (AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        let Ok(held) = lock(&out) else { continue };
                        assert_eq!(owners.fetch_add(1, SeqCst), 0, "two owners");
                        owned.fetch_add(1, SeqCst);
                        owners.fetch_sub(1, SeqCst);
                        drop(held);
                    }
                });
            }
        });
        assert!(owned.into_inner() > 0);
    }
}
