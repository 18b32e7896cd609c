//! Attention over slices. A task holds the scores of a block of queries: the `H/G` heads that share a
//! key/value head for a few positions, as one matrix. Scores never leave it.

use super::Sight;
use crate::op::cpu::exp;
use crate::op::isa::vectorised;
use crate::op::matmul::{View, matmul};
use candle_core::{CpuStorage, Layout, Result, bail};
use rayon::prelude::*;

/// Queries (positions times heads of a group) a block.
const QUERIES: usize = 64;

/// Keys or values `[B, S, G, X]`, possibly a view, heads contiguous.
#[derive(Clone, Copy)]
pub struct Heads<'a> {
    entries: &'a [f32],
    dims: [usize; 4],
    /// Of batch, position and head.
    strides: [usize; 3],
}

impl<'a> Heads<'a> {
    pub fn of(storage: &'a CpuStorage, layout: &Layout) -> Result<Self> {
        let (b, s, g, x) = layout.shape().dims4()?;
        match layout.stride() {
            &[batch, position, head, 1] => Ok(Self {
                entries: &storage.as_slice::<f32>()?[layout.start_offset()..],
                dims: [b, s, g, x],
                strides: [batch, position, head],
            }),
            _ => bail!("attention: heads of contiguous dims are wanted, not {layout:?}"),
        }
    }

    /// Head `g` of positions `from..to`: `[to − from, X]`.
    fn block(&self, b: usize, g: usize, from: usize, to: usize) -> View<'a> {
        let [batch, position, head] = self.strides;
        View {
            data: &self.entries[b * batch + from * position + g * head..],
            dims: [to - from, self.dims[3]],
            strides: [position, 1],
        }
    }
}

pub struct Problem<'a> {
    /// Contiguous.
    pub q: &'a [f32],
    /// `[B, T, H, K]`
    pub q_dims: [usize; 4],
    pub k: Heads<'a>,
    pub v: Heads<'a>,
    pub scale: f32,
    pub sight: &'a Sight,
}

/// Positions `first..first + count` of batch `b`, for kv head `g`.
#[derive(Clone, Copy)]
struct Block {
    b: usize,
    g: usize,
    first: usize,
    count: usize,
}

impl Problem<'_> {
    fn heads_per_group(&self) -> usize {
        self.q_dims[2] / self.k.dims[2]
    }

    /// Positions a block of queries spans.
    fn positions(&self) -> usize {
        (QUERIES / self.heads_per_group()).max(1)
    }

    /// Keys before those of the first query.
    fn past(&self) -> usize {
        self.k.dims[1] - self.q_dims[1]
    }

    /// The span of keys that queries of the block see.
    fn keys(&self, block: Block) -> (usize, usize) {
        let past = self.past();
        // Starts and windows move along a row, so the first query reaches back the furthest.
        let start = self.sight.start(block.b, block.first);
        let from = match self.sight.bounds(start, past + block.first) {
            (far, near) if far == start => near,
            _ => start,
        };
        (from, past + block.first + block.count)
    }

    /// Rows of `x [B, T, H, X]` that belong to the block, positions first: `[count · H/G, X]`, times
    /// `factor`.
    fn gather(&self, x: &[f32], dim: usize, block: Block, factor: f32) -> Vec<f32> {
        let [_, t, h, _] = self.q_dims;
        let rep = self.heads_per_group();
        let mut rows = Vec::with_capacity(block.count * rep * dim);
        for position in block.first..block.first + block.count {
            let at = ((block.b * t + position) * h + block.g * rep) * dim;
            rows.extend(x[at..at + rep * dim].iter().map(|x| x * factor));
        }
        rows
    }

    /// Scores of the block's queries (already scaled) over `keys`, `−∞` where a key is not seen.
    fn scores(&self, queries: &[f32], block: Block) -> Vec<f32> {
        let (from, to) = self.keys(block);
        let (width, rep) = (to - from, self.heads_per_group());
        let rows = block.count * rep;
        let mut scores = vec![0.; rows * width];
        let queries = View::rows(queries, rows, self.q_dims[3]);
        let keys = self.k.block(block.b, block.g, from, to);
        matmul(&mut scores, queries, keys.transposed(), false);
        let past = self.past();
        for (row, scores) in scores.chunks_exact_mut(width).enumerate() {
            let position = block.first + row / rep;
            let (start, at) = (self.sight.start(block.b, position), past + position);
            let (far, near) = self.sight.bounds(start, at);
            scores[..start.saturating_sub(from)].fill(f32::NEG_INFINITY);
            scores[far.max(from) - from..near - from].fill(f32::NEG_INFINITY);
            scores[at + 1 - from..].fill(f32::NEG_INFINITY);
        }
        scores
    }

    /// `y [B, T, H, V]` and the logarithm of each query's sum of exponentials, `[B, T, H]`.
    pub fn forward(&self) -> (Vec<f32>, Vec<f32>) {
        let [b, t, h, _] = self.q_dims;
        let (g, v_dim) = (self.k.dims[2], self.v.dims[3]);
        let (mut y, mut log_sums) = (vec![0.; b * t * h * v_dim], vec![0.; b * t * h]);
        let positions = self.positions();
        let rows = y
            .par_chunks_mut((t * h * v_dim).max(1))
            .zip(log_sums.par_chunks_mut(t * h));
        rows.enumerate().for_each(|(b, (y, log_sums))| {
            let tasks = y
                .par_chunks_mut((positions * h * v_dim).max(1))
                .zip(log_sums.par_chunks_mut(positions * h));
            tasks.enumerate().for_each(|(i, (y, log_sums))| {
                for g in 0..g {
                    let block = Block {
                        b,
                        g,
                        first: i * positions,
                        count: log_sums.len() / h,
                    };
                    self.forward_block(block, y, log_sums);
                }
            });
        });
        (y, log_sums)
    }

    /// Fills the group's heads of `y [count, H, V]` and `log_sums [count, H]`.
    fn forward_block(&self, block: Block, y: &mut [f32], log_sums: &mut [f32]) {
        let [_, _, h, dim] = self.q_dims;
        let (v_dim, rep) = (self.v.dims[3], self.heads_per_group());
        let queries = self.gather(self.q, dim, block, self.scale);
        let mut scores = self.scores(&queries, block);
        let (from, to) = self.keys(block);
        let rows = block.count * rep;
        let mut sums = Vec::with_capacity(rows);
        vectorised!(for scores in scores.chunks_exact_mut(to - from) {
            let largest = scores.iter().fold(f32::NEG_INFINITY, |m, s| m.max(*s));
            let mut sum = 0.;
            for block in scores.chunks_mut(LANES) {
                let mut lanes = [0f32; LANES];
                for (score, lane) in block.iter_mut().zip(&mut lanes) {
                    *score = exp(*score - largest);
                    *lane = *score;
                }
                sum += lanes.iter().sum::<f32>();
            }
            sums.push((sum, largest));
        });
        let mut out = vec![0.; rows * v_dim];
        let values = self.v.block(block.b, block.g, from, to);
        matmul(
            &mut out,
            View::rows(&scores, rows, to - from),
            values,
            false,
        );
        for (row, out) in out.chunks_exact(v_dim).enumerate() {
            let (sum, largest) = sums[row];
            let head = row / rep * h + block.g * rep + row % rep;
            for (y, o) in y[head * v_dim..].iter_mut().zip(out) {
                *y = o / sum;
            }
            log_sums[head] = largest + sum.ln();
        }
    }

    /// Gradients of q, k and v, contiguous.
    pub fn backward(&self, y: &[f32], dy: &[f32], log_sums: &[f32]) -> [Vec<f32>; 3] {
        let [b, t, h, dim] = self.q_dims;
        let [_, s, g, v_dim] = self.v.dims;
        let rep = self.heads_per_group();
        let mut dq = vec![0.; b * t * h * dim];
        let (mut dk, mut dv) = (vec![0.; b * s * g * dim], vec![0.; b * s * g * v_dim]);
        let batches = dq.par_chunks_mut(t * h * dim).zip(
            dk.par_chunks_mut(s * g * dim)
                .zip(dv.par_chunks_mut(s * g * v_dim)),
        );
        batches.enumerate().for_each(|(b, (dq, (dk, dv)))| {
            let groups: Vec<[Vec<f32>; 3]> = (0..g)
                .into_par_iter()
                .map(|g| self.backward_group(b, g, y, dy, log_sums))
                .collect();
            for (group, [dq_part, dk_part, dv_part]) in groups.iter().enumerate() {
                scatter(dq, dq_part, rep * dim, h * dim, group);
                scatter(dk, dk_part, dim, g * dim, group);
                scatter(dv, dv_part, v_dim, g * v_dim, group);
            }
        });
        [dq, dk, dv]
    }

    /// `dq [T, H/G, K]`, `dk [S, K]`, `dv [S, V]` of one kv head.
    fn backward_group(
        &self,
        b: usize,
        g: usize,
        y: &[f32],
        dy: &[f32],
        log_sums: &[f32],
    ) -> [Vec<f32>; 3] {
        let [_, t, _, dim] = self.q_dims;
        let [_, s, _, v_dim] = self.v.dims;
        let rep = self.heads_per_group();
        let mut dq = Vec::with_capacity(t * rep * dim);
        let (mut dk, mut dv) = (vec![0.; s * dim], vec![0.; s * v_dim]);
        let positions = self.positions();
        for first in (0..t).step_by(positions) {
            let block = Block {
                b,
                g,
                first,
                count: positions.min(t - first),
            };
            let (from, to) = self.keys(block);
            let (width, rows) = (to - from, block.count * rep);
            let queries = self.gather(self.q, dim, block, self.scale);
            let douts = self.gather(dy, v_dim, block, 1.);
            let outs = self.gather(y, v_dim, block, 1.);
            let log_sums = self.gather(log_sums, 1, block, 1.);
            let mut weights = self.scores(&queries, block);
            vectorised!(
                for (weights, log_sum) in weights.chunks_exact_mut(width).zip(&log_sums) {
                    for w in weights {
                        *w = exp(*w - log_sum);
                    }
                }
            );
            let dout = View::rows(&douts, rows, v_dim);
            let dv = &mut dv[from * v_dim..to * v_dim];
            matmul(
                dv,
                View::rows(&weights, rows, width).transposed(),
                dout,
                true,
            );
            let mut dscores = vec![0.; rows * width];
            let values = self.v.block(b, g, from, to);
            matmul(&mut dscores, dout, values.transposed(), false);
            vectorised!(for row in 0..rows {
                let at = row * v_dim..(row + 1) * v_dim;
                let along: f32 = douts[at.clone()]
                    .iter()
                    .zip(&outs[at])
                    .map(|(d, o)| d * o)
                    .sum();
                let weights = &weights[row * width..][..width];
                for (d, w) in dscores[row * width..][..width].iter_mut().zip(weights) {
                    *d = w * (*d - along);
                }
            });
            let dscores = View::rows(&dscores, rows, width);
            let mut dqueries = vec![0.; rows * dim];
            matmul(&mut dqueries, dscores, self.k.block(b, g, from, to), false);
            dq.extend(dqueries.iter().map(|d| d * self.scale));
            let dk = &mut dk[from * dim..to * dim];
            matmul(
                dk,
                dscores.transposed(),
                View::rows(&queries, rows, dim),
                true,
            );
        }
        [dq, dk, dv]
    }
}

/// Exponentials are summed in this many lanes.
const LANES: usize = 16;

/// Copies rows of `width` into place `group` of rows of `stride`.
fn scatter(to: &mut [f32], from: &[f32], width: usize, stride: usize, group: usize) {
    for (to, from) in to.chunks_exact_mut(stride).zip(from.chunks_exact(width)) {
        to[group * width..][..width].copy_from_slice(from);
    }
}
