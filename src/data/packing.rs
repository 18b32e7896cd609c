//! Documents packed into windows of equal length.

use std::path::Path;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::{Tokenizer, read_texts};
use crate::hash::Hash;
use crate::op::Documents;
use crate::{Error, Result};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Packing {
    /// Attention, convolution and state stop at document borders.
    Documents,
    /// One long text, as the reference packs.
    Stream,
}

/// Tokenised documents, one after the other.
#[derive(Debug, Clone)]
pub struct Corpus {
    tokens: Vec<u32>,
    /// For every token, where its document begins in `tokens`.
    starts: Vec<u32>,
}

/// Windows for one forward pass, row by row (`B` rows of `T`).
#[derive(Debug, Clone)]
pub struct Batch {
    pub input_ids: Vec<u32>,
    /// The next token of each position; 0 where there is none.
    pub targets: Vec<u32>,
    /// 1 where the next token is in the same window and document, else 0.
    pub mask: Vec<f32>,
    pub documents: Documents,
    pub rows: usize,
    pub len: usize,
}

impl Corpus {
    /// Reads JSON lines and tokenises each text.
    ///
    /// # Errors
    /// Names the line that cannot be used.
    pub fn load(path: &Path, tokenizer: &Tokenizer, packing: Packing) -> Result<Self> {
        let texts = read_texts(path)?;
        let documents = texts
            .iter()
            .map(|text| tokenizer.encode(text))
            .collect::<Result<Vec<_>>>()?;
        Ok(Self::new(&documents, packing))
    }

    pub fn new(documents: &[Vec<u32>], packing: Packing) -> Self {
        let mut corpus = Self {
            tokens: Vec::new(),
            starts: Vec::new(),
        };
        for document in documents {
            let start = match packing {
                Packing::Documents => corpus.tokens.len() as u32,
                Packing::Stream => 0,
            };
            corpus.tokens.extend(document);
            corpus.starts.resize(corpus.tokens.len(), start);
        }
        corpus
    }

    pub fn tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Whole windows of `len` tokens; the rest is left out.
    pub fn windows(&self, len: usize) -> usize {
        self.tokens.len().checked_div(len).unwrap_or(0)
    }

    /// # Errors
    /// When there is not one batch of windows.
    pub fn check(&self, rows: usize, len: usize) -> Result<()> {
        let windows = self.windows(len);
        if windows < rows.max(1) {
            return Err(Error::invalid(format!(
                "the data has {} tokens: {windows} windows of {len}, a batch needs {rows}; \
                 give more data, or lower --batch-size or --seq-len",
                self.tokens.len()
            )));
        }
        Ok(())
    }

    /// A fingerprint of tokens and borders, the same on every machine.
    pub fn hash(&self) -> String {
        let values = self.tokens.iter().chain(&self.starts);
        values
            .fold(Hash::new(), |hash, v| hash.with(&v.to_le_bytes()))
            .to_string()
    }

    /// Batch `index` of an endless shuffled order: every epoch is a fresh permutation of the windows, less
    /// the few that fill no batch. A pure function of its arguments, so that a run resumes exactly.
    ///
    /// # Errors
    /// As [`Corpus::check`].
    pub fn batch(&self, seed: u64, index: u64, rows: usize, len: usize) -> Result<Batch> {
        self.check(rows, len)?;
        let mut order: Vec<usize> = (0..self.windows(len)).collect();
        let per_epoch = (order.len() / rows) as u64;
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        random.set_stream(index / per_epoch);
        order.shuffle(&mut random);
        let at = (index % per_epoch) as usize * rows;
        Ok(self.gather(&order[at..at + rows], len))
    }

    /// Up to `rows` windows from window `from` on, in the data's order.
    ///
    /// # Errors
    /// When there is no such window.
    pub fn ordered(&self, from: usize, rows: usize, len: usize) -> Result<Batch> {
        let windows = self.windows(len);
        self.check(from + 1, len)?;
        let order: Vec<usize> = (from..windows.min(from + rows)).collect();
        Ok(self.gather(&order, len))
    }

    fn gather(&self, windows: &[usize], len: usize) -> Batch {
        let count = windows.len() * len;
        let mut batch = Batch {
            input_ids: Vec::with_capacity(count),
            targets: Vec::with_capacity(count),
            mask: Vec::with_capacity(count),
            documents: Documents::new(Vec::new(), 1),
            rows: windows.len(),
            len,
        };
        let mut starts = Vec::with_capacity(count);
        for window in windows {
            let from = window * len;
            for at in from..from + len {
                let next = at + 1;
                let follows = next < from + len && self.starts[next] == self.starts[at];
                batch.input_ids.push(self.tokens[at]);
                batch
                    .targets
                    .push(if follows { self.tokens[next] } else { 0 });
                batch.mask.push(if follows { 1.0 } else { 0.0 });
                starts.push((self.starts[at] as usize).saturating_sub(from) as u32);
            }
        }
        batch.documents = Documents::new(starts, len);
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn documents() -> Vec<Vec<u32>> {
        vec![vec![1, 2, 3], vec![4, 5], vec![6, 7, 8, 9, 10, 11, 12]]
    }

    #[test]
    fn borders_mask_targets_and_restart_documents() {
        let batch = Corpus::new(&documents(), Packing::Documents)
            .ordered(0, 2, 6)
            .unwrap();
        assert_eq!(batch.input_ids, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
        assert_eq!(batch.targets, [2, 3, 0, 5, 0, 0, 8, 9, 10, 11, 12, 0]);
        assert_eq!(batch.mask, [1., 1., 0., 1., 0., 0., 1., 1., 1., 1., 1., 0.]);
        assert_eq!(batch.documents.row(0), [0, 0, 0, 3, 3, 5]);
        assert_eq!(batch.documents.row(1), [0; 6]);
        let stream = Corpus::new(&documents(), Packing::Stream)
            .ordered(0, 1, 6)
            .unwrap();
        assert_eq!(stream.documents.row(0), [0; 6]);
        assert_eq!(stream.mask, [1., 1., 1., 1., 1., 0.]);
    }

    #[test]
    fn every_epoch_sees_every_window_in_a_new_order() {
        let corpus = Corpus::new(&[(0..64).collect()], Packing::Documents);
        let epoch = |epoch: u64| {
            let mut firsts = Vec::new();
            for i in 0..4 {
                let batch = corpus.batch(9, epoch * 4 + i, 4, 4).unwrap();
                firsts.extend(batch.input_ids.chunks(4).map(|row| row[0]));
            }
            firsts
        };
        let (first, second) = (epoch(0), epoch(1));
        assert_ne!(first, second);
        assert_eq!(first, epoch(0));
        let mut sorted = first.clone();
        sorted.sort();
        assert_eq!(sorted, (0..16).map(|i| i * 4).collect::<Vec<u32>>());
    }

    #[test]
    fn too_little_data_is_said() {
        let corpus = Corpus::new(&documents(), Packing::Documents);
        let message = corpus.batch(0, 0, 4, 6).unwrap_err().to_string();
        assert!(
            message.contains("12 tokens: 2 windows of 6, a batch needs 4"),
            "{message}"
        );
    }
}
