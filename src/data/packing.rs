//! Documents packed into windows of equal length.

use std::path::Path;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::{Tokenizer, texts};
use crate::hash::Hash;
use crate::op::Documents;
use crate::{Error, Result};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Packing {
    /// Attention, convolution and state stop at document borders.
    #[default]
    Documents,
    /// One long text, as AMD packs.
    Stream,
}

/// Where a training step's examples come from.
pub trait Batches {
    /// # Errors
    /// When there is not one batch of `rows` examples of `len` tokens.
    fn check(&self, rows: usize, len: usize) -> Result<()>;

    /// Examples of an epoch: windows of `len` tokens, or pairs.
    fn examples(&self, len: usize) -> usize;

    /// A fingerprint of all examples, the same on every machine.
    fn hash(&self) -> String;

    /// Batch `index` of an endless shuffled order: a pure function of its arguments, so that a run resumes
    /// exactly.
    ///
    /// # Errors
    /// As [`Batches::check`].
    fn batch(&self, seed: u64, index: u64, rows: usize, len: usize) -> Result<Batch>;
}

/// The examples of batch `index`: every epoch is a fresh permutation of all, less the few that fill no batch.
pub(super) fn shuffled(count: usize, seed: u64, index: u64, rows: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    let per_epoch = (count / rows) as u64;
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(index / per_epoch);
    order.shuffle(&mut random);
    let at = (index % per_epoch) as usize * rows;
    order[at..at + rows].to_vec()
}

/// Tokenised documents, one after the other.
#[derive(Debug, Clone)]
pub struct Corpus {
    tokens: Vec<u32>,
    /// Where documents begin in `tokens`, in order; a stream has one.
    starts: Vec<usize>,
    /// For every token, whether it is to be learned: all, but those of a prompt.
    learned: Vec<bool>,
}

/// Windows for one forward pass, row by row (`B` rows of `T`).
#[derive(Debug, Clone)]
pub struct Batch {
    pub input_ids: Vec<u32>,
    /// The next token of each position; 0 where there is none.
    pub targets: Vec<u32>,
    /// 1 where the next token is in the same window and document and is to be learned (not part of a
    /// prompt or of padding), else 0.
    pub mask: Vec<f32>,
    pub documents: Documents,
    /// Which window or example each row is.
    pub examples: Vec<usize>,
    pub rows: usize,
    pub len: usize,
}

impl Corpus {
    /// Reads a file of texts and tokenises each.
    ///
    /// # Errors
    /// Names the record that cannot be used.
    pub fn load(path: &Path, tokenizer: &Tokenizer, packing: Packing) -> Result<Self> {
        let mut corpus = Self::empty();
        for text in texts(path, tokenizer)? {
            corpus.push(text?.tokens(tokenizer)?.into_iter(), packing);
        }
        Ok(corpus)
    }

    pub fn new(documents: &[Vec<u32>], packing: Packing) -> Self {
        let mut corpus = Self::empty();
        for document in documents {
            corpus.push(document.iter().map(|id| (*id, true)), packing);
        }
        corpus
    }

    fn empty() -> Self {
        Self {
            tokens: Vec::new(),
            starts: Vec::new(),
            learned: Vec::new(),
        }
    }

    /// A document's ids, and whether each is to be learned.
    fn push(&mut self, document: impl Iterator<Item = (u32, bool)>, packing: Packing) {
        if packing == Packing::Documents || self.starts.is_empty() {
            self.starts.push(self.tokens.len());
        }
        for (id, learned) in document {
            self.tokens.push(id);
            self.learned.push(learned);
        }
    }

    pub fn tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Whole windows of `len` tokens; the rest is left out.
    pub fn windows(&self, len: usize) -> usize {
        self.tokens.len().checked_div(len).unwrap_or(0)
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
        let (mut ids, mut starts, mut learned) = (
            Vec::with_capacity(count),
            Vec::with_capacity(count),
            Vec::with_capacity(count),
        );
        for window in windows {
            let from = window * len;
            ids.extend_from_slice(&self.tokens[from..from + len]);
            learned.extend_from_slice(&self.learned[from..from + len]);
            starts.extend(starts_within(&self.starts, from, len));
        }
        Batch {
            examples: windows.to_vec(),
            ..Batch::new(ids, starts, &learned, len)
        }
    }
}

/// For each of the `len` tokens from token `from` on, where its document begins in that window: 0 if it began
/// before. `starts`: where documents begin, counted from the corpus' first token, in order.
fn starts_within(starts: &[usize], from: usize, len: usize) -> Vec<u32> {
    let mut within = vec![0; len];
    let first = starts.partition_point(|start| *start <= from);
    for start in starts[first..].iter().map(|start| start - from) {
        if start >= len {
            break;
        }
        within[start..].fill(start as u32);
    }
    within
}

impl Batch {
    /// Rows of `len` tokens; `starts` says of each where its document begins in its row, `learned` whether
    /// it is to be learned.
    pub fn new(ids: Vec<u32>, starts: Vec<u32>, learned: &[bool], len: usize) -> Self {
        let follows = |at: usize| {
            let next = at + 1;
            !next.is_multiple_of(len) && starts[next] == starts[at]
        };
        let all = 0..ids.len();
        let target = |at: usize| if follows(at) { ids[at + 1] } else { 0 };
        let mask = |at: usize| f32::from(u8::from(follows(at) && learned[at + 1]));
        let rows = ids.len() / len;
        Self {
            targets: all.clone().map(target).collect(),
            mask: all.map(mask).collect(),
            documents: Documents::new(starts, len),
            input_ids: ids,
            examples: (0..rows).collect(),
            rows,
            len,
        }
    }
}

impl Batch {
    /// Some of the rows.
    pub fn part(&self, from: usize, rows: usize) -> Batch {
        let rows = rows.min(self.rows - from);
        let span = from * self.len..(from + rows) * self.len;
        let starts = (from..from + rows).flat_map(|row| self.documents.row(row).iter().copied());
        Batch {
            input_ids: self.input_ids[span.clone()].to_vec(),
            targets: self.targets[span.clone()].to_vec(),
            mask: self.mask[span].to_vec(),
            documents: Documents::new(starts.collect(), self.len),
            examples: self.examples[from..from + rows].to_vec(),
            rows,
            len: self.len,
        }
    }
}

impl Batches for Corpus {
    fn check(&self, rows: usize, len: usize) -> Result<()> {
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

    fn examples(&self, len: usize) -> usize {
        self.windows(len)
    }

    fn hash(&self) -> String {
        let prompts = self.learned.iter().enumerate().filter(|(_, l)| !**l);
        let places = self.starts.iter().copied().chain(prompts.map(|(at, _)| at));
        let sizes = [self.tokens.len(), self.starts.len()];
        let hash =
            (sizes.iter()).fold(Hash::new(), |hash, n| hash.with(&(*n as u64).to_le_bytes()));
        let hash = (self.tokens.iter()).fold(hash, |hash, id| hash.with(&id.to_le_bytes()));
        places
            .fold(hash, |hash, at| hash.with(&(at as u64).to_le_bytes()))
            .to_string()
    }

    fn batch(&self, seed: u64, index: u64, rows: usize, len: usize) -> Result<Batch> {
        self.check(rows, len)?;
        let windows = shuffled(self.windows(len), seed, index, rows);
        Ok(self.gather(&windows, len))
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

    /// Five documents on both sides of token 2^32, where 32 bits end.
    #[test]
    fn documents_keep_their_borders_past_four_billion_tokens() {
        let far = 1usize << 32;
        let starts = [0, far - 3, far, far + 2, far + 9];
        let within = |from: usize| starts_within(&starts, from, 6);
        assert_eq!(within(far - 4), [0, 1, 1, 1, 4, 4]);
        assert_eq!(within(far), [0, 0, 2, 2, 2, 2]);
        assert_eq!(within(far + 3), [0; 6]);
        assert_eq!(within(far - 10), [0; 6]);
    }

    #[test]
    fn prompts_are_read_but_not_learned() {
        let folder = tempfile::tempdir().unwrap();
        crate::data::stories::write_tokenizer(folder.path()).unwrap();
        let tokenizer = Tokenizer::open(folder.path()).unwrap();
        let load = |line: &str| {
            let path = folder.path().join("data.jsonl");
            std::fs::write(&path, line).unwrap();
            Corpus::load(&path, &tokenizer, Packing::Documents).unwrap()
        };
        let whole = load(r#"{"text": "Tom has a red ball."}"#);
        let asked = load(r#"{"prompt": "Tom has", "completion": " a red ball."}"#);
        assert_eq!(whole.tokens, asked.tokens);
        assert_ne!(whole.hash(), asked.hash());
        let prompt = tokenizer.encode("Tom has").unwrap().len();
        let mask = asked.ordered(0, 1, asked.tokens()).unwrap().mask;
        let expected = |at: usize| at + 1 >= prompt && at + 1 < asked.tokens();
        for (at, mask) in mask.into_iter().enumerate() {
            assert_eq!(mask == 1.0, expected(at), "{at}");
        }
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
