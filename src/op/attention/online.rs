//! Attention over keys and values that come a block at a time (Milakov & Gimelshein 2018, arXiv 1805.02867): what decoding does over
//! the pages of a cache. A query's result depends on the blocks alone, not on the queries beside it.

use crate::op::cpu::{exp, fma};
use crate::op::isa::Isa;
use crate::op::linear::dot::scores;

/// Keys and values of some positions, one after the other.
#[derive(Clone, Copy)]
pub struct Block<'a> {
    /// Rows of which the first entries are a key's.
    pub keys: &'a [f32],
    pub key_stride: usize,
    /// Rows of which the first entries are a value's.
    pub values: &'a [f32],
    pub value_stride: usize,
}

/// Queries on their way over blocks.
#[derive(Default)]
pub struct Online {
    dim: usize,
    v_dim: usize,
    /// `[Q, K]`, scaled.
    pub queries: Vec<f32>,
    /// `[Q]`
    largest: Vec<f32>,
    sums: Vec<f32>,
    /// `[Q, V]`
    totals: Vec<f32>,
    /// `[Q, positions]`
    weights: Vec<f32>,
}

impl Online {
    /// Begins with the queries that stand in `queries [Q, dim]`.
    ///
    /// # Panics
    /// When they are no whole rows.
    pub fn begin(&mut self, dim: usize, v_dim: usize) {
        let rows = self.queries.len() / dim;
        assert!(self.queries.len() == rows * dim);
        (self.dim, self.v_dim) = (dim, v_dim);
        self.largest.clear();
        self.largest.resize(rows, f32::NEG_INFINITY);
        self.sums.clear();
        self.sums.resize(rows, 0.);
        self.totals.clear();
        self.totals.resize(rows * v_dim, 0.);
    }

    /// A block of which query `i` sees the first `seen(i)` positions.
    ///
    /// # Panics
    /// When the block has fewer.
    pub fn add(&mut self, isa: Isa, block: Block, seen: impl Fn(usize) -> usize) {
        let rows = self.largest.len();
        let most = (0..rows).map(&seen).max().unwrap_or(0);
        if most == 0 {
            return;
        }
        self.weights.resize(rows * most, 0.);
        let (keys, stride) = (block.keys, block.key_stride);
        scores(
            isa,
            &self.queries,
            self.dim,
            keys,
            stride,
            &mut self.weights,
        );
        isa.run(
            #[inline(always)]
            || {
                for row in 0..rows {
                    let (first, seen) = (row * most, seen(row));
                    self.weights[first + seen..first + most].fill(0.);
                    let own = first..first + seen;
                    let largest = by_lanes(
                        &self.weights[own.clone()],
                        self.largest[row],
                        #[inline(always)]
                        |a, b| a.max(b),
                    );
                    let factor = self.rise(row, largest);
                    let weights = &mut self.weights[own];
                    for weight in weights.iter_mut() {
                        *weight = exp(*weight - largest);
                    }
                    let sum = by_lanes(
                        weights,
                        0.,
                        #[inline(always)]
                        |a, b| a + b,
                    );
                    self.sums[row] = fma(self.sums[row], factor, sum);
                }
            },
        );
        let (values, stride) = (block.values, block.value_stride);
        add_products(
            isa,
            &self.weights,
            values,
            stride,
            self.v_dim,
            &mut self.totals,
        );
    }

    /// A row's largest score is `largest` from now on; what its sum is to be multiplied by, as its total has been.
    #[inline(always)]
    fn rise(&mut self, row: usize, largest: f32) -> f32 {
        if largest <= self.largest[row] {
            return 1.;
        }
        let factor = exp(self.largest[row] - largest);
        let totals = &mut self.totals[row * self.v_dim..][..self.v_dim];
        for total in totals {
            *total *= factor;
        }
        self.largest[row] = largest;
        factor
    }

    /// Entries of [`Online::put`], for each query.
    pub fn entries(v_dim: usize) -> usize {
        2 + v_dim
    }

    /// What has been found so far, `[Q, 2 + V]`: the largest score, the sum and the total.
    ///
    /// # Panics
    /// When `out` has another size.
    pub fn put(&self, out: &mut [f32]) {
        assert!(out.len() == self.largest.len() * Self::entries(self.v_dim));
        let rows = out.chunks_exact_mut(Self::entries(self.v_dim)).enumerate();
        for (row, out) in rows {
            out[0] = self.largest[row];
            out[1] = self.sums[row];
            out[2..].copy_from_slice(&self.totals[row * self.v_dim..][..self.v_dim]);
        }
    }

    /// Adds what was found over positions behind these: [`Online::put`]'s.
    ///
    /// # Panics
    /// When it is of other queries.
    pub fn join(&mut self, isa: Isa, part: &[f32]) {
        let v_dim = self.v_dim;
        assert!(part.len() == self.largest.len() * Self::entries(v_dim));
        isa.run(
            #[inline(always)]
            || {
                let parts = part.chunks_exact(Self::entries(v_dim)).enumerate();
                for (row, part) in parts {
                    if part[0] == f32::NEG_INFINITY {
                        // It saw none of them.
                        continue;
                    }
                    let before = self.rise(row, part[0]);
                    let factor = exp(part[0] - self.largest[row]);
                    self.sums[row] = fma(part[1], factor, before * self.sums[row]);
                    let totals = &mut self.totals[row * v_dim..][..v_dim];
                    for (total, part) in totals.iter_mut().zip(&part[2..]) {
                        *total = fma(*part, factor, *total);
                    }
                }
            },
        );
    }

    /// `[Q, V]`
    ///
    /// # Panics
    /// When `out` has another size.
    pub fn finish(&self, out: &mut [f32]) {
        assert!(out.len() == self.totals.len());
        let rows = out.chunks_exact_mut(self.v_dim);
        let totals = self.totals.chunks_exact(self.v_dim);
        for ((out, totals), sum) in rows.zip(totals).zip(&self.sums) {
            for (out, total) in out.iter_mut().zip(totals) {
                *out = total / sum;
            }
        }
    }
}

/// All of `row` and `first`, entry `i` in lane `i % 8`: a chain of all would wait for every step.
#[inline(always)]
fn by_lanes(row: &[f32], first: f32, join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [first; 8];
    let eights = row.chunks_exact(8);
    let rest = eights.remainder();
    for row in eights {
        for (lane, x) in lanes.iter_mut().zip(row) {
            *lane = join(*lane, *x);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane = join(*lane, *x);
    }
    for half in [4, 2, 1] {
        for lane in 0..half {
            lanes[lane] = join(lanes[lane], lanes[lane + half]);
        }
    }
    lanes[0]
}

/// `totals [Q, V] += weights [Q, P] values [P, V]`, every entry a sum in the order of the positions.
pub fn add_products(
    isa: Isa,
    weights: &[f32],
    values: &[f32],
    stride: usize,
    v_dim: usize,
    totals: &mut [f32],
) {
    isa.run(
        #[inline(always)]
        || by_tiles(weights, values, stride, v_dim, totals),
    );
}

/// Entries of a value that stay in registers.
const LANES: usize = 16;

#[inline(always)]
fn by_tiles(weights: &[f32], values: &[f32], stride: usize, v_dim: usize, totals: &mut [f32]) {
    let rows = totals.len() / v_dim;
    let positions = weights.len() / rows;
    let whole = v_dim / LANES * LANES;
    for first in (0..rows).step_by(4) {
        let weights = &weights[first * positions..];
        let totals = &mut totals[first * v_dim..];
        for at in (0..whole).step_by(LANES) {
            let values = &values[at..];
            match rows - first {
                1 => tile_of::<1>(weights, positions, values, stride, v_dim, at, totals),
                2 => tile_of::<2>(weights, positions, values, stride, v_dim, at, totals),
                3 => tile_of::<3>(weights, positions, values, stride, v_dim, at, totals),
                _ => tile_of::<4>(weights, positions, values, stride, v_dim, at, totals),
            }
        }
        for row in 0..4.min(rows - first) {
            for at in whole..v_dim {
                let total = &mut totals[row * v_dim + at];
                for p in 0..positions {
                    let (a, b) = (weights[row * positions + p], values[p * stride + at]);
                    *total = fma(a, b, *total);
                }
            }
        }
    }
}

#[inline(always)]
fn tile_of<const Q: usize>(
    weights: &[f32],
    positions: usize,
    values: &[f32],
    stride: usize,
    v_dim: usize,
    at: usize,
    totals: &mut [f32],
) {
    let mut sums = [[0f32; LANES]; Q];
    for (q, sums) in sums.iter_mut().enumerate() {
        sums.copy_from_slice(&totals[q * v_dim + at..][..LANES]);
    }
    let mut rows = [&weights[..0]; Q];
    for (q, row) in rows.iter_mut().enumerate() {
        *row = &weights[q * positions..][..positions];
    }
    for p in 0..positions {
        let value: &[f32; LANES] = values[p * stride..][..LANES].try_into().expect("as long");
        for (sums, row) in sums.iter_mut().zip(rows) {
            let weight = row[p];
            for (sum, value) in sums.iter_mut().zip(value) {
                *sum = fma(weight, *value, *sum);
            }
        }
    }
    for (q, sums) in sums.iter().enumerate() {
        totals[q * v_dim + at..][..LANES].copy_from_slice(sums);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(n: usize, seed: f32) -> Vec<f32> {
        (0..n).map(|i| ((i as f32 + seed) * 1.37).sin()).collect()
    }

    /// Blocks of several lengths, each query with a limit of its own, against the definition; a query alone gives the same bits.
    #[test]
    fn equals_softmax_over_all_that_is_seen() {
        for (rows, dim, v_dim) in [(1, 6, 6), (5, 16, 24), (7, 600, 33)] {
            let lens = [3, 8, 1, 5];
            let all: usize = lens.iter().sum();
            let (keys, values) = (random(all * dim, 1.), random(all * v_dim, 2.));
            let queries = random(rows * dim, 3.);
            let limit = |q: usize| 1 + (5 * q + 9) % all;
            for isa in Isa::found() {
                let run = |which: std::ops::Range<usize>| {
                    let mut online = Online {
                        queries: queries[which.start * dim..which.end * dim].to_vec(),
                        ..Online::default()
                    };
                    online.begin(dim, v_dim);
                    let mut from = 0;
                    for len in lens {
                        let block = Block {
                            keys: &keys[from * dim..],
                            key_stride: dim,
                            values: &values[from * v_dim..],
                            value_stride: v_dim,
                        };
                        let seen = |q: usize| limit(which.start + q).saturating_sub(from).min(len);
                        online.add(isa, block, seen);
                        from += len;
                    }
                    let mut out = vec![0.; which.len() * v_dim];
                    online.finish(&mut out);
                    out
                };
                let halves = || {
                    let mut online = Online::default();
                    let mut parts = [0, lens[0] + lens[1]].map(|first| {
                        online.queries = queries.clone();
                        online.begin(dim, v_dim);
                        let block = Block {
                            keys: &keys[first * dim..],
                            key_stride: dim,
                            values: &values[first * v_dim..],
                            value_stride: v_dim,
                        };
                        let most = [lens[0] + lens[1], all][usize::from(first > 0)] - first;
                        let seen = |q: usize| limit(q).saturating_sub(first).min(most);
                        online.add(isa, block, seen);
                        let mut part = vec![0.; rows * Online::entries(v_dim)];
                        online.put(&mut part);
                        part
                    });
                    online.begin(dim, v_dim);
                    parts.iter_mut().for_each(|part| online.join(isa, part));
                    let mut out = vec![0.; rows * v_dim];
                    online.finish(&mut out);
                    out
                };
                let joined = halves();
                let found = run(0..rows);
                for q in 0..rows {
                    let query = &queries[q * dim..][..dim];
                    let score = |p: usize| -> f64 {
                        let pairs = query.iter().zip(&keys[p * dim..]);
                        pairs.map(|(a, b)| f64::from(a * b)).sum()
                    };
                    let scores: Vec<f64> = (0..limit(q)).map(score).collect();
                    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
                    let sum: f64 = weights.iter().sum();
                    for v in 0..v_dim {
                        let terms = weights.iter().enumerate();
                        let truth: f64 = terms
                            .map(|(p, w)| w / sum * f64::from(values[p * v_dim + v]))
                            .sum();
                        let gap = (f64::from(found[q * v_dim + v]) - truth).abs();
                        assert!(gap < 1e-5, "{isa:?} {rows} {dim} {q} {v}: {gap}");
                        let gap = (f64::from(joined[q * v_dim + v]) - truth).abs();
                        assert!(gap < 1e-5, "{isa:?} {rows} {dim} {q} {v}, joined: {gap}");
                    }
                    assert_eq!(run(q..q + 1), found[q * v_dim..][..v_dim], "{isa:?} {q}");
                }
            }
        }
    }
}
