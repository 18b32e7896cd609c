//! What training windows of text through a layer takes, counted from sizes: before anything runs, and to decide what is kept.

use std::ops::Range;

use serde::Serialize;

/// Windows that go through a model together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Windows {
    /// `B`
    pub rows: usize,
    /// `T`
    pub len: usize,
}

impl Windows {
    pub fn tokens(self) -> usize {
        self.rows.saturating_mul(self.len)
    }

    /// Groups of rows that are worth going through layers beside each other, each on a thread of its own: the same whatever threads there are,
    /// so that sums over them are.
    pub fn groups(self) -> impl Iterator<Item = Range<usize>> {
        let least = if self.tokens() < 2 * FEW { 1 } else { 2 };
        let count = (self.tokens() / MANY).max(least).min(self.rows).max(1);
        (0..count).map(move |i| i * self.rows / count..(i + 1) * self.rows / count)
    }

    /// Pairs of a token and one that it sees, itself among them, where it sees at most `reach`; borders of documents are not known
    /// beforehand.
    pub fn pairs(self, reach: usize) -> f64 {
        let (len, reach) = (self.len as f64, self.len.min(reach) as f64);
        self.rows as f64 * (reach * len - reach * (reach - 1.0) / 2.0)
    }
}

/// Tokens of each of two groups, about, at the least.
const FEW: usize = 512;
/// Tokens of a group where there are more than two.
const MANY: usize = 2048;

/// Of a mixer beyond its input, its output and the products with its weights; of a layer as a whole.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Pass {
    /// f32 entries that candle's graph keeps for the way back: the operands of every recorded operation.
    pub kept: usize,
    /// Entries that come and go on the way back beside these, at most. candle adds every gradient to one of zeros, so an operation has
    /// its own three times at once: the sum, the zeros or the sum before, the summand.
    pub back: usize,
    /// Multiplications and additions forward.
    pub flops: f64,
}

/// Attention with `heads` for queries and `kv_heads`, keys of `key` and values of `value` dims, from projections on: `kept` is
/// the output and a number a query; back come gradients of all, once more for the windows in work, and the queries' sums.
pub(super) fn attention_pass(
    windows: Windows,
    [heads, kv_heads]: [usize; 2],
    [key, value]: [usize; 2],
    reach: usize,
) -> Pass {
    let (n, t) = (windows.tokens(), windows.len);
    let (q, y) = (heads * key, heads * value);
    let kv = kv_heads * (key + value);
    Pass {
        kept: n * (y + heads),
        back: n * (y + 3 * q + kv) + t * (q + kv),
        flops: 2.0 * (q + y) as f64 * windows.pairs(reach),
    }
}
