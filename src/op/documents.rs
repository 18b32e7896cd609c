//! Document boundaries in packed sequences.

use std::ops::Range;
use std::sync::Arc;

/// For every position of a packed batch `[B, T]`, the position in its row where its document begins.
/// A query at `t` may look at keys `start(b, t)..=t`; convolution and state restart at `start`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Documents {
    starts: Arc<[u32]>,
    len: usize,
}

impl Documents {
    /// `starts` holds `B * len` entries, row by row, each at most its own position.
    pub fn new(starts: Vec<u32>, len: usize) -> Self {
        assert!(
            len > 0 && starts.len().is_multiple_of(len),
            "{} starts do not fill rows of {len}",
            starts.len()
        );
        debug_assert!(
            starts
                .iter()
                .enumerate()
                .all(|(i, &s)| s as usize <= i % len)
        );
        Self {
            starts: starts.into(),
            len,
        }
    }

    /// Rows (`B`).
    pub fn batch(&self) -> usize {
        self.starts.len() / self.len
    }

    /// Positions a row (`T`).
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.starts.is_empty()
    }

    /// Some of the rows.
    pub fn rows(&self, range: Range<usize>) -> Self {
        Self {
            starts: self.starts[range.start * self.len..range.end * self.len].into(),
            len: self.len,
        }
    }

    /// The starts of row `b`, `[T]`.
    pub fn row(&self, b: usize) -> &[u32] {
        &self.starts[b * self.len..][..self.len]
    }
}
