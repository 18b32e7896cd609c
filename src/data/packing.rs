//! Documents packed into windows of equal length.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::Tokenizer;
use super::shard::Draft;
use super::tokenize::{Packing, Reading, tokens};
use super::tokens::{Tokens, Windows};
use crate::op::Documents;
use crate::watch::Quiet;
use crate::{Error, Result};

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

/// The order of examples: every epoch is a fresh permutation of all, less the few that fill no batch. The last epoch's is kept.
#[derive(Debug, Default)]
pub(super) struct Shuffle(Mutex<Option<Epoch>>);

#[derive(Debug)]
struct Epoch {
    /// Examples, seed, number.
    of: (usize, u64, u64),
    order: Vec<u32>,
}

impl Shuffle {
    /// The examples of batch `index`.
    pub fn batch(&self, count: usize, seed: u64, index: u64, rows: usize) -> Vec<usize> {
        let per_epoch = (count / rows) as u64;
        let of = (count, seed, index / per_epoch);
        // A thread that panicked with it has left a whole epoch, or none.
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.as_ref().is_none_or(|epoch| epoch.of != of) {
            let mut order: Vec<u32> = (0..count as u32).collect();
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            random.set_stream(of.2);
            order.shuffle(&mut random);
            *kept = Some(Epoch { of, order });
        }
        let order = kept.as_ref().map_or(&[][..], |epoch| &epoch.order);
        let at = (index % per_epoch) as usize * rows;
        order[at..at + rows].iter().map(|i| *i as usize).collect()
    }
}

/// # Errors
/// More examples than an order can name.
pub(super) fn check_count(examples: usize) -> Result<()> {
    match u32::try_from(examples) {
        Ok(_) => Ok(()),
        Err(_) => Err(Error::invalid(format!(
            "the data has {examples} examples, and an epoch has at most 2^32: raise --seq-len"
        ))),
    }
}

/// Tokenised documents, one after the other.
#[derive(Debug)]
pub struct Corpus {
    tokens: Tokens,
    shuffle: Shuffle,
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
    /// Reads a file of texts, or what is kept of its tokens.
    ///
    /// # Errors
    /// Names the record that cannot be used; [`Error::Interrupted`].
    pub fn open(path: &Path, reading: &Reading) -> Result<Self> {
        Ok(Self::of(tokens(path, reading)?))
    }

    /// Reads a file of texts into memory.
    ///
    /// # Errors
    /// Names the record that cannot be used.
    pub fn load(path: &Path, tokenizer: &Tokenizer, packing: Packing) -> Result<Self> {
        let reading = Reading {
            tokenizer,
            packing,
            cache: None,
            watch: &Quiet::default(),
        };
        Self::open(path, &reading)
    }

    pub fn new(documents: &[Vec<u32>], packing: Packing) -> Self {
        let mut draft = Draft::default();
        for document in documents {
            let begins = packing == Packing::Documents || draft.records() == 0;
            draft.push(document.iter().map(|id| (*id, true)), begins);
        }
        Self::of(Tokens::new(vec![draft.shard()], None))
    }

    pub(super) fn of(tokens: Tokens) -> Self {
        Self {
            tokens,
            shuffle: Shuffle::default(),
        }
    }

    pub fn tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Whole windows of `len` tokens; the rest is left out.
    pub fn windows(&self, len: usize) -> usize {
        self.tokens().checked_div(len).unwrap_or(0)
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
        let mut found = Windows::default();
        for window in windows {
            self.tokens.window(window * len, len, &mut found);
        }
        Batch {
            examples: windows.to_vec(),
            ..Batch::new(found.ids, found.starts, &found.learned, len)
        }
    }
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
                self.tokens()
            )));
        }
        check_count(windows)
    }

    fn examples(&self, len: usize) -> usize {
        self.windows(len)
    }

    fn hash(&self) -> String {
        self.tokens.hash().to_string()
    }

    fn batch(&self, seed: u64, index: u64, rows: usize, len: usize) -> Result<Batch> {
        self.check(rows, len)?;
        let windows = self.shuffle.batch(self.windows(len), seed, index, rows);
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
        let ids = |corpus: &Corpus| corpus.ordered(0, 1, corpus.tokens()).unwrap().input_ids;
        assert_eq!(ids(&whole), ids(&asked));
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

    /// The order of batches is part of what kept results are of: as `rand` shuffles all numbers at once.
    #[test]
    fn orders_are_those_of_one_permutation_an_epoch() {
        let shuffle = Shuffle::default();
        for (seed, epoch) in [(9, 0), (9, 1), (2, 1), (9, 0)] {
            let mut order: Vec<usize> = (0..50).collect();
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            random.set_stream(epoch);
            order.shuffle(&mut random);
            for batch in 0..7 {
                let found = shuffle.batch(50, seed, epoch * 7 + batch, 7);
                let at = batch as usize * 7;
                assert_eq!(found, order[at..at + 7]);
            }
        }
        assert_eq!(Shuffle::default().batch(5, 0, 0, 5), [2, 0, 4, 1, 3]);
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
