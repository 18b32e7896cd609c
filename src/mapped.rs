//! Files seen as memory.

use std::fs::File;
use std::path::Path;

use memmap2::Mmap;

use crate::{Error, Result};

/// A file's bytes, read when they are looked at.
///
/// # Errors
/// A file that is not there, or is none (a folder).
pub fn map(path: &Path) -> Result<Mmap> {
    let file = File::open(path).map_err(Error::io("cannot open", path))?;
    if !file.metadata().is_ok_and(|about| about.is_file()) {
        return Err(Error::file(path, "not a file"));
    }
    // SAFETY: the map is read-only; a file that another process cuts while it is mapped is the one way to
    // fault, as with every reader of such files.
    #[allow(unsafe_code)]
    let map = unsafe { Mmap::map(&file) };
    map.map_err(Error::io("cannot map", path))
}

/// Pages that were looked at count as this process's memory no more; they are read again when they are looked at again.
pub fn release(map: &Mmap) {
    // SAFETY: the map is read-only and of a file, so pages that are dropped come back with the same bytes.
    #[cfg(unix)]
    #[allow(unsafe_code)]
    let _ = unsafe { map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
    #[cfg(not(unix))]
    let _ = map;
}
