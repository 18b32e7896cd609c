//! What a corpus is made of, so that the same batches can be made again.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::ngrams::Decontamination;
use super::tokenize::{Eos, Packing};
use crate::{Error, Result};

/// Beside what was trained, and read in a corpus' place.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of the form.
    zebroid_data: u32,
    /// Of tokens, borders, what is learned, and weights: all that batches depend on besides their seed.
    pub hash: String,
    /// Hash of the tokenizer.
    pub tokenizer: String,
    pub packing: Packing,
    pub eos: Eos,
    pub decontaminate: Option<Decontamination>,
    pub data: Vec<Listed>,
}

/// A data set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listed {
    /// The file, or what the program writes itself.
    pub text: String,
    /// Of the file's bytes.
    pub hash: Option<String>,
    /// Those that were dropped are among them.
    pub records: usize,
    pub dropped: usize,
    pub tokens: usize,
    pub weight: Option<f64>,
    /// Of `tokens`, as it was asked for.
    pub limit: Option<usize>,
}

const VERSION: u32 = 1;

impl Manifest {
    /// Of a corpus with that hash, so far without data sets.
    pub(super) fn new(hash: String, tokenizer: String, packing: Packing, eos: Eos) -> Self {
        Self {
            zebroid_data: VERSION,
            hash,
            tokenizer,
            packing,
            eos,
            decontaminate: None,
            data: Vec::new(),
        }
    }

    /// # Errors
    /// A file that is no manifest.
    pub fn open(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io("cannot read", path))?;
        let read: Self = serde_json::from_str(&text)
            .map_err(|e| Error::file(path, format!("no manifest of data ({e})")))?;
        match read.zebroid_data {
            VERSION => Ok(read),
            other => Err(Error::file(
                path,
                format!("a manifest of version {other}; this program reads {VERSION}"),
            )),
        }
    }
}
