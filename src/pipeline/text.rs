//! Texts, as a recipe or a flag names them.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::checkpoint;
use crate::data::{Records, stories};
use crate::{Error, Result};

/// A file of JSON lines, or `stories:SEED:COUNT`, which the program writes itself; with `#K/N` behind it every N-th line,
/// from the K-th (from 1).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Text {
    source: Source,
    part: Option<Part>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Source {
    File(PathBuf),
    Stories { seed: u64, count: usize },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Part {
    /// From 1.
    number: usize,
    of: usize,
}

impl Text {
    /// The file that must be there.
    pub fn source(&self) -> Option<&Path> {
        match &self.source {
            Source::File(path) => Some(path),
            Source::Stories { .. } => None,
        }
    }

    /// Of the text as it lies there (one that is still to be written, about), a part's share of it; none where there is no file.
    pub(super) fn bytes(&self) -> Option<u64> {
        const SOME: usize = 100;
        let all = match &self.source {
            Source::File(path) => std::fs::metadata(path).ok().filter(|m| m.is_file())?.len(),
            Source::Stories { seed, count } => {
                (stories::to_jsonl(*seed, SOME).len() * count / SOME) as u64
            }
        };
        Some(all / self.part.map_or(1, |part| part.of as u64))
    }

    /// Relative paths start at `folder`.
    pub(super) fn settle(&mut self, folder: &Path) {
        if let Source::File(path) = &mut self.source {
            *path = folder.join(&*path);
        }
    }

    /// The text as a file; what is written for it goes into `made`.
    ///
    /// # Errors
    /// A file that cannot be read or written.
    pub(super) fn file(&self, made: &Path, preferences: bool) -> Result<PathBuf> {
        let write = |name: String, lines: String| {
            let path = made.join(format!("{name}.jsonl"));
            checkpoint::write_atomic(&path, lines.as_bytes())?;
            Ok(path)
        };
        let path = match &self.source {
            Source::File(path) => path.clone(),
            Source::Stories { seed, count } if preferences => write(
                format!("preferences-{seed}-{count}"),
                stories::preferences_to_jsonl(*seed, *count),
            )?,
            Source::Stories { seed, count } => write(
                format!("stories-{seed}-{count}"),
                stories::to_jsonl(*seed, *count),
            )?,
        };
        let Some(Part { number, of }) = self.part else {
            return Ok(path);
        };
        let records = Records::open(&path, "a JSON object")?;
        let mut lines = String::new();
        for (i, record) in records.enumerate() {
            // What another part has must be whole too.
            let record = record?;
            if i % of == number - 1 {
                lines += &record.to_string();
                lines.push('\n');
            }
        }
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        write(format!("part-{stem}-{number}-{of}"), lines)
    }

    /// Whether a file's name is one that [`Text::file`] gives.
    pub(super) fn is_made(name: &str) -> bool {
        let Some(name) = name.strip_suffix(".jsonl") else {
            return false;
        };
        let mut words = name.rsplit('-');
        let mut number = || words.next().is_some_and(|word| word.parse::<u64>().is_ok());
        let numbers = number() && number();
        let kind = name.split('-').next();
        numbers && kind.is_some_and(|kind| ["stories", "preferences", "part"].contains(&kind))
    }
}

impl FromStr for Text {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        let (name, part) = match text.rsplit_once('#') {
            None => (text, None),
            Some((name, share)) => {
                let numbers = share.split_once('/');
                let part = numbers.and_then(|(number, of)| {
                    let (number, of) = (number.parse().ok()?, of.parse().ok()?);
                    (1..=of).contains(&number).then_some(Part { number, of })
                });
                let wrong = || {
                    Error::invalid(format!(
                        "data {text:?}: give TEXT#K/N, the K-th (from 1) of N parts"
                    ))
                };
                (name, Some(part.ok_or_else(wrong)?))
            }
        };
        let source = match name.strip_prefix("stories:") {
            None => Source::File(name.into()),
            Some(rest) => {
                let numbers = rest.split_once(':');
                let numbers = numbers
                    .and_then(|(seed, count)| Some((seed.parse().ok()?, count.parse().ok()?)));
                let wrong = || Error::invalid(format!("data {text:?}: give stories:SEED:COUNT"));
                let (seed, count) = numbers.ok_or_else(wrong)?;
                Source::Stories { seed, count }
            }
        };
        Ok(Self { source, part })
    }
}

impl TryFrom<String> for Text {
    type Error = Error;
    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            Source::File(path) => write!(f, "{}", path.display())?,
            Source::Stories { seed, count } => write!(f, "stories:{seed}:{count}")?,
        }
        match self.part {
            Some(Part { number, of }) => write!(f, "#{number}/{of}"),
            None => Ok(()),
        }
    }
}

impl From<Text> for String {
    fn from(text: Text) -> String {
        text.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_file_share_no_line_and_leave_none_out() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("all.jsonl");
        std::fs::write(&path, "1\n2\n3\n4\n5\n").unwrap();
        let part = |share: &str| {
            let text: Text = format!("{}#{share}", path.display()).parse().unwrap();
            let file = text.file(root.path(), false).unwrap();
            assert!(Text::is_made(file.file_name().unwrap().to_str().unwrap()));
            std::fs::read_to_string(file).unwrap()
        };
        assert_eq!(
            [part("1/3"), part("2/3"), part("3/3")],
            ["1\n4\n", "2\n5\n", "3\n"]
        );
        for wrong in ["a#0/3", "a#4/3", "a#1", "a#x/y", "stories:1"] {
            let error = wrong.parse::<Text>().unwrap_err().to_string();
            assert!(error.contains(wrong), "{error}");
        }
        assert!(!Text::is_made("stories.jsonl") && !Text::is_made("mine-1-2.jsonl"));
    }
}
