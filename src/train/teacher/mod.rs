//! Where the next-token distributions are from that a student learns: a model that reads every batch, or what was written down of one
//! before (`zebroid teach`), which takes neither its weights nor its passes. One that is served is written down too.

use std::ops::Range;

use candle_core::{Device, Tensor};

use crate::Result;
use crate::data::Batch;
use crate::model::Lm;
use crate::op::loss::{NO_TOKEN, top_k, with_rest};

mod record;
mod served;
mod store;
mod teach;

pub use record::Targets;
pub use served::Served;
pub use store::{About, Stored};
pub use teach::{Source, teach};

/// What is asked for the distribution behind every position of a batch.
pub enum Teacher {
    Model {
        lm: Box<Lm>,
        /// Of its weights.
        hash: String,
    },
    Stored(Stored),
}

impl Teacher {
    /// A fingerprint of what it says.
    pub fn hash(&self) -> String {
        match self {
            Self::Model { hash, .. } => hash.clone(),
            Self::Stored(stored) => format!("stored logits {}", stored.about.hash()),
        }
    }

    /// The model, where there is one.
    pub fn lm(&self) -> Option<&Lm> {
        match self {
            Self::Model { lm, .. } => Some(lm),
            Self::Stored(_) => None,
        }
    }

    /// Reads a batch, whose `ids [B, T]` are on the student's device.
    ///
    /// # Errors
    /// Stored targets that are damaged.
    pub fn read(&self, batch: &Batch, ids: &Tensor) -> Result<Taught<'_>> {
        Ok(match self {
            Self::Model { lm, .. } => {
                let hidden = lm.hidden(ids, Some(&batch.documents))?;
                Taught::Model { lm, hidden }
            }
            Self::Stored(stored) => Taught::Stored {
                targets: stored.read(&batch.examples)?,
                device: ids.device().clone(),
            },
        })
    }
}

/// What a teacher says of a batch.
pub enum Taught<'a> {
    /// Final-normed hidden states `[B·T, D]`.
    Model {
        lm: &'a Lm,
        hidden: Tensor,
    },
    Stored {
        targets: Targets,
        device: Device,
    },
}

impl Taught<'_> {
    /// Of some positions `0..B·T`.
    pub fn target(&self, range: &Range<usize>) -> Result<Target> {
        Ok(match self {
            Self::Model { lm, hidden } => Target::Whole(lm.logits(hidden, range)?),
            Self::Stored { targets, device } => {
                let Targets { k, tokens, logits } = targets.part(range.clone());
                let logits = Tensor::from_vec(logits, (range.len(), k + 1), device)?;
                Target::Likeliest { tokens, logits }
            }
        })
    }
}

/// The distributions of some positions.
pub enum Target {
    /// Logits `[M, V]`.
    Whole(Tensor),
    /// Of `k` tokens `[M, k]`, the likeliest first: their logits and that of all others together, `[M, k + 1]`.
    Likeliest { tokens: Vec<u32>, logits: Tensor },
}

impl Target {
    /// Logits of the teacher and of the `student [M, V]`, between which a divergence is: all, those of the teacher's `k` likeliest
    /// tokens, or those that are known and of all others together. The last is never more than the divergence of all, and its
    /// gradient the same where the student spreads what is left as the teacher does.
    pub fn beside(&self, student: &Tensor, k: Option<usize>) -> Result<(Tensor, Tensor)> {
        Ok(match (self, k) {
            (Self::Whole(teacher), None) => (teacher.clone(), student.clone()),
            (Self::Whole(teacher), Some(k)) => top_k(teacher, student, k)?,
            (Self::Likeliest { tokens, logits }, k) => {
                // Of more than 16 bits, as what is stored.
                let student = student.to_dtype(logits.dtype())?;
                let student = with_rest(&student, tokens)?;
                match k {
                    None => (logits.clone(), student),
                    Some(k) => (logits.narrow(1, 0, k)?, student.narrow(1, 0, k)?),
                }
            }
        })
    }

    /// The likeliest tokens `[M]`, of those that the student has.
    pub fn likeliest(&self) -> Result<Tensor> {
        Ok(match self {
            Self::Whole(logits) => logits.argmax(1)?,
            Self::Likeliest { tokens, logits } => {
                let rows = logits.dim(0)?;
                let known = |row: &[u32]| row.iter().find(|token| **token != NO_TOKEN).copied();
                let each = tokens.chunks(tokens.len() / rows);
                let first = each.map(|row| known(row).unwrap_or(NO_TOKEN));
                Tensor::from_iter(first, logits.device())?
            }
        })
    }
}
