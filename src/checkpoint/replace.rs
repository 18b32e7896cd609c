//! A finished folder takes its place: readers, and whoever comes after a crash, find the old output or the new
//! one, whole.

use std::path::{Path, PathBuf};
use std::{fs, io};

use super::output::replaceable;
use crate::atomic::{parent, private, sync_folder};
use crate::{Error, Result};

/// Moves `folder`, on the disk to its last byte, to `out`. What stood there (only with `force`) is exchanged for it
/// in one step where the system can do so (Linux, macOS), and goes last; else it stands aside until the new one
/// is in its place.
///
/// # Errors
/// What [`super::check_output`] says of `out`; a disk that does not take it. `out` then is what it was, or the
/// error says where that stands.
pub fn replace_folder(folder: &Path, out: &Path, force: bool) -> Result<()> {
    replace(folder, out, force, &System)
}

/// What is asked of the file system: the tests let it fail.
trait FileSystem {
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Each takes the other's place.
    fn exchange(&self, a: &Path, b: &Path) -> io::Result<()>;
}

struct System;

impl FileSystem for System {
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    #[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
    fn exchange(&self, a: &Path, b: &Path) -> io::Result<()> {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        Ok(renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE)?)
    }

    #[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple")))]
    fn exchange(&self, _: &Path, _: &Path) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

fn replace(folder: &Path, out: &Path, force: bool, files: &impl FileSystem) -> Result<()> {
    sync_all(folder).map_err(Error::io("cannot write", folder))?;
    let rename = |from: &Path, to: &Path| {
        files
            .rename(from, to)
            .map_err(Error::io("cannot rename", from))
    };
    let settled = || {
        sync_folder(&parent(folder))
            .and_then(|()| sync_folder(&parent(out)))
            .map_err(Error::io("cannot write beside", out))
    };
    if out.symlink_metadata().is_err() {
        rename(folder, out)?;
        return settled();
    }
    replaceable(out, force)?;
    let aside = private(".zebroid-old-")
        .tempdir_in(parent(out))
        .map_err(Error::io("cannot write beside", out))?;
    let old = aside.path().join("old");
    if files.exchange(folder, out).is_ok() {
        // Where the new one was, the old one stands now.
        rename(folder, &old)?;
    } else {
        rename(out, &old)?;
        if let Err(error) = rename(folder, out) {
            return Err(match rename(&old, out) {
                Ok(()) => error,
                Err(_) => stranded(error, out, aside.keep()),
            });
        }
    }
    // The old one goes when the new one is sure to stay.
    match settled() {
        Ok(()) => Ok(()),
        Err(error) => Err(stranded(error, out, aside.keep())),
    }
}

fn stranded(error: Error, out: &Path, aside: PathBuf) -> Error {
    Error::invalid(format!(
        "{error}; what {} held stands in {}: move it where you want it",
        out.display(),
        aside.join("old").display()
    ))
}

/// A folder with all that is in it, onto the disk.
fn sync_all(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => sync_all(&entry.path())?,
            false => fs::File::open(entry.path())?.sync_all()?,
        }
    }
    sync_folder(folder)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use super::*;

    /// A checkpoint folder as far as its names go, of one word.
    fn write(folder: &Path, word: &str) {
        fs::create_dir(folder).unwrap();
        fs::write(folder.join("config.json"), word).unwrap();
    }

    fn word(folder: &Path) -> io::Result<String> {
        fs::read_to_string(folder.join("config.json"))
    }

    struct Room {
        root: tempfile::TempDir,
    }

    impl Room {
        /// With an old output and a new folder.
        fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            write(&root.path().join("out"), "old");
            write(&root.path().join("new"), "new");
            Self { root }
        }

        fn replace(&self, files: &impl FileSystem) -> Result<()> {
            replace(&self.root.path().join("new"), &self.out(), true, files)
        }

        fn out(&self) -> PathBuf {
            self.root.path().join("out")
        }

        fn entries(&self) -> usize {
            fs::read_dir(self.root.path()).unwrap().count()
        }
    }

    /// A system without exchange, whose renames fail from the `fails`-th to before the `heals`-th (from 1).
    struct Failing {
        fails: usize,
        heals: usize,
        count: Cell<usize>,
    }

    impl Failing {
        fn between(fails: usize, heals: usize) -> Self {
            let count = Cell::new(0);
            Self {
                fails,
                heals,
                count,
            }
        }
    }

    impl FileSystem for Failing {
        fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
            self.count.set(self.count.get() + 1);
            match (self.fails..self.heals).contains(&self.count.get()) {
                true => Err(io::Error::other("the disk is gone")),
                false => fs::rename(from, to),
            }
        }

        fn exchange(&self, _: &Path, _: &Path) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }
    }

    #[test]
    fn the_new_folder_takes_the_place_of_the_old() {
        let room = Room::new();
        room.replace(&System).unwrap();
        assert_eq!(
            (word(&room.out()).unwrap().as_str(), room.entries()),
            ("new", 1)
        );
        let room = Room::new();
        room.replace(&Failing::between(9, 9)).unwrap();
        assert_eq!(
            (word(&room.out()).unwrap().as_str(), room.entries()),
            ("new", 1)
        );
        fs::remove_dir_all(room.out()).unwrap();
        write(&room.root.path().join("new"), "alone");
        room.replace(&System).unwrap();
        assert_eq!(
            (word(&room.out()).unwrap().as_str(), room.entries()),
            ("alone", 1)
        );
    }

    /// Whichever renames fail, the old output is at its place, or where the error says.
    #[test]
    fn the_old_folder_is_never_lost() {
        for (fails, heals) in [(1, 2), (2, 3), (2, 9)] {
            let room = Room::new();
            let message = room
                .replace(&Failing::between(fails, heals))
                .unwrap_err()
                .to_string();
            assert!(message.contains("the disk is gone"), "{message}");
            assert_eq!(word(&room.root.path().join("new")).unwrap(), "new");
            let old = match message.split_once("stands in ") {
                None => room.out(),
                Some((_, rest)) => PathBuf::from(rest.split_once(": move").unwrap().0),
            };
            assert_eq!(word(&old).unwrap(), "old", "{message}");
            assert_eq!(old != room.out(), (fails, heals) == (2, 9), "{message}");
        }
    }

    /// Killed at any moment, there is an output: whoever looks, finds one.
    #[cfg(any(target_os = "linux", target_vendor = "apple"))]
    #[test]
    fn there_is_an_output_at_every_moment() {
        let room = Room::new();
        let (out, done, looks) = (room.out(), AtomicBool::new(false), AtomicUsize::new(0));
        // Not every file system can.
        let [a, b] = ["a", "b"].map(|name| room.root.path().join(name));
        write(&a, "a");
        write(&b, "b");
        if System.exchange(&a, &b).is_err() {
            eprintln!("SKIPPED exchange: this file system cannot");
            return;
        }
        std::thread::scope(|scope| {
            let looker = scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    assert!(out.is_dir(), "no output after {looks:?} looks");
                    looks.fetch_add(1, Ordering::Relaxed);
                }
            });
            for i in 0..60 {
                let new = room.root.path().join("next");
                write(&new, &i.to_string());
                replace_folder(&new, &out, true).unwrap();
                // On a busy machine too there is a look between two.
                let before = looks.load(Ordering::Relaxed);
                while looks.load(Ordering::Relaxed) == before && !looker.is_finished() {
                    std::thread::yield_now();
                }
            }
            done.store(true, Ordering::Relaxed);
        });
        assert_eq!(word(&out).unwrap(), "59");
    }
}
