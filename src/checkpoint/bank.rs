//! A bank: models that ILD has trained side by side, each with one kind of layer in all places.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Checkpoint, write_atomic};
use crate::mixer::LayerKind;
use crate::{Error, Result};

/// Names the candidates, in order; each stands in a folder beside it.
pub(super) const INDEX: &str = "bank.json";
/// What a bank without an index holds (those of zebroid 0.1).
const UNNAMED: [LayerKind; 2] = [LayerKind::MLA, LayerKind::Mamba2];

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Index {
    candidates: Vec<LayerKind>,
}

/// Opened candidates, in order.
#[derive(Debug)]
pub struct Bank {
    pub folder: PathBuf,
    pub candidates: Vec<(LayerKind, Checkpoint)>,
}

impl Bank {
    /// # Errors
    /// A folder that is no bank, or a candidate that cannot be opened.
    pub fn open(folder: &Path) -> Result<Self> {
        let index = folder.join(INDEX);
        let kinds = match index.exists() {
            true => {
                let index = super::read_json(&index).and_then(|value| {
                    serde_json::from_value::<Index>(value).map_err(|e| Error::file(&index, e))
                })?;
                index.candidates
            }
            false => {
                let mut kinds = UNNAMED.to_vec();
                kinds.retain(|kind| folder.join(kind.folder()).is_dir());
                kinds
            }
        };
        if kinds.is_empty() {
            let message = "not a bank (train ild without --student makes one)";
            return Err(Error::file(folder, message));
        }
        let open = |kind: LayerKind| Ok((kind, Checkpoint::open(&folder.join(kind.folder()))?));
        Ok(Self {
            folder: folder.to_owned(),
            candidates: kinds.into_iter().map(open).collect::<Result<_>>()?,
        })
    }

    /// Writes the index beside the candidates' folders.
    pub fn write_index(folder: &Path, candidates: Vec<LayerKind>) -> Result<()> {
        let index = serde_json::to_string_pretty(&Index { candidates }).expect("kinds serialise");
        write_atomic(&folder.join(INDEX), (index + "\n").as_bytes())
    }

    pub fn kinds(&self) -> Vec<LayerKind> {
        self.candidates.iter().map(|(kind, _)| *kind).collect()
    }
}
