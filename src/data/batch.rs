//! Batches: examples for one forward pass, and where they come from.

use super::manifest::Manifest;
use crate::Result;
use crate::op::Documents;

/// Where a training step's examples come from.
pub trait Batches {
    /// # Errors
    /// When there is not one batch of `rows` examples of `len` tokens.
    fn check(&self, rows: usize, len: usize) -> Result<()>;

    /// Examples of an epoch: windows of `len` tokens, or pairs.
    fn examples(&self, len: usize) -> usize;

    /// A fingerprint of all examples, the same on every machine.
    fn hash(&self) -> String;

    /// What they are made of, where files are.
    fn manifest(&self) -> Option<Manifest> {
        None
    }

    /// Batch `index` of an endless shuffled order: a pure function of its arguments, so that a run resumes
    /// exactly.
    ///
    /// # Errors
    /// As [`Batches::check`].
    fn batch(&self, seed: u64, index: u64, rows: usize, len: usize) -> Result<Batch>;
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
