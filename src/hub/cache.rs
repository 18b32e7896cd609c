//! The cache that Hugging Face's own tools share: `KIND--ORG--NAME/{refs/REVISION, blobs/ETAG, snapshots/COMMIT/FILE}`, where files of
//! snapshots are links to blobs, and locks in `.locks/KIND--ORG--NAME/ETAG.lock`.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use super::http::Failure;
use super::id::Id;
use crate::atomic::write_atomic;
use crate::watch::Watch;
use crate::{Error, Result};

/// What is kept of one repository.
pub(super) struct Folder {
    pub root: PathBuf,
    locks: PathBuf,
}

/// Whether a revision is a commit, which always means the same files.
pub(super) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_hexdigit())
}

impl Folder {
    pub fn new(cache: &Path, id: &Id) -> Self {
        let name = format!("{}--{}", id.plural(), id.repo.replace('/', "--"));
        Self {
            locks: cache.join(".locks").join(&name),
            root: cache.join(name),
        }
    }

    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    pub fn blob(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(etag)
    }

    /// The commit that a revision was when it was asked for last, if something of it is kept.
    pub fn commit(&self, revision: &str) -> Option<String> {
        let commit = match is_commit(revision) {
            true => revision.to_owned(),
            false => fs::read_to_string(self.root.join("refs").join(revision)).ok()?,
        };
        let commit = commit.trim();
        let plain = !commit.is_empty() && commit.bytes().all(|b| b.is_ascii_alphanumeric());
        (plain && self.snapshot(commit).is_dir()).then(|| commit.to_owned())
    }

    /// What [`Folder::commit`] finds from now on.
    pub fn remember(&self, revision: &str, commit: &str) -> Result<()> {
        let path = self.root.join("refs").join(revision);
        let known = fs::read_to_string(&path).is_ok_and(|text| text == commit);
        if known || revision == commit {
            return Ok(());
        }
        make_parent(&path)?;
        write_atomic(&path, commit.as_bytes())
    }

    /// Files of a commit, by their paths in it.
    pub fn files(&self, commit: &str) -> Vec<String> {
        let root = self.snapshot(commit);
        let (mut found, mut folders) = (Vec::new(), vec![root.clone()]);
        while let Some(folder) = folders.pop() {
            for path in fs::read_dir(folder).into_iter().flatten().flatten() {
                let path = path.path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.exists() {
                    let inner = path.strip_prefix(&root).ok();
                    let parts = inner.map(|p| p.iter().map(|part| part.to_string_lossy()));
                    found.extend(parts.map(|parts| parts.collect::<Vec<_>>().join("/")));
                }
            }
        }
        found.sort();
        found
    }

    /// Makes a blob a commit's file, by a link where the system has some.
    pub fn link(&self, etag: &str, commit: &str, file: &str) -> Result<()> {
        let path = self.snapshot(commit).join(file);
        make_parent(&path)?;
        // One that leads nowhere: its blob was removed.
        if path.is_symlink() && !path.exists() {
            fs::remove_file(&path).map_err(Error::io("cannot replace", &path))?;
        }
        let up = "../".repeat(2 + file.matches('/').count());
        let linked = symlink(Path::new(&format!("{up}blobs/{etag}")), &path);
        let made = linked.or_else(|error| match path.exists() {
            // By another process.
            true => Ok(()),
            false => fs::rename(self.blob(etag), &path).map_err(|_| error),
        });
        made.map_err(Error::io("cannot link", &path))
    }

    /// Makes this process the one that downloads a blob, for as long as the file is held; none on file systems that know no locks, where
    /// the checksum has the last word.
    pub fn lock(&self, etag: &str, watch: &dyn Watch) -> Result<Option<File>, Failure> {
        let path = self.locks.join(format!("{etag}.lock"));
        make_parent(&path)?;
        let mut options = File::options();
        let file = options.write(true).create(true).truncate(false).open(&path);
        let file = file.map_err(Error::io("cannot open", &path))?;
        let mut told = false;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Some(file)),
                Err(TryLockError::Error(_)) => return Ok(None),
                Err(TryLockError::WouldBlock) if watch.stop() => return Err(Failure::Interrupted),
                Err(TryLockError::WouldBlock) => {
                    if !told {
                        watch.note("waiting for another download of the same file");
                    }
                    told = true;
                    sleep(Duration::from_millis(100));
                }
            }
        }
    }
}

pub(super) fn make_parent(path: &Path) -> Result<()> {
    let parent = path.parent().unwrap_or(path);
    fs::create_dir_all(parent).map_err(Error::io("cannot create", parent))
}

#[cfg(unix)]
fn symlink(target: &Path, path: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, path)
}

/// Elsewhere links need rights that people do not have.
#[cfg(not(unix))]
fn symlink(_: &Path, _: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}
