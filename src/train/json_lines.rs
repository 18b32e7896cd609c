//! Files of JSON lines that a run adds to: `metrics.jsonl`, `samples.jsonl`.

use std::fs;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{Error, Result};

/// One line of a file of JSON lines.
pub(super) fn line(of: &impl Serialize) -> String {
    serde_json::to_string(of).expect("numbers and texts serialise") + "\n"
}

/// The lines of such a file, none where it is not there; a line that is no `T` was cut off by a crash, after the last save.
///
/// # Errors
/// A file that cannot be read.
pub(super) fn read_lines<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = fs::read_to_string(path).map_err(Error::io("cannot read", path))?;
    let lines = text.lines();
    Ok(lines
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect())
}
