//! The convolution over rows `[C]`, channels side by side in vectors.

use super::Documents;
use crate::op::cpu::{Rows, exp, fma};
use crate::op::isa::vectorised;
use rayon::prelude::*;

/// Positions a task: fixed, so that sums over positions do not depend on the threads.
const BLOCK: usize = 64;

/// What forward and backward share.
pub(super) struct Conv<'a> {
    pub x: Rows<'a>,
    /// `[W, C]`: tap rows, the last of the present.
    pub taps: &'a [f32],
    pub bias: &'a [f32],
    pub silu: bool,
    pub documents: Option<&'a Documents>,
}

impl Conv<'_> {
    /// The taps that position `t` of row `b` reaches, from the present back: (input position, tap).
    #[inline(always)]
    fn reach(&self, b: usize, t: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
        let last = self.taps.len() / self.bias.len() - 1;
        let start = self
            .documents
            .map_or(0, |documents| documents.row(b)[t] as usize);
        (0..=last.min(t - start)).map(move |back| (t - back, last - back))
    }

    #[inline(always)]
    fn tap(&self, tap: usize) -> &[f32] {
        let c = self.bias.len();
        &self.taps[tap * c..][..c]
    }

    #[inline(always)]
    fn before_activation(&self, b: usize, t: usize, out: &mut [f32]) {
        out.copy_from_slice(self.bias);
        for (from, tap) in self.reach(b, t) {
            add_product(out, self.tap(tap), self.x.row(b, from));
        }
    }

    /// `[B, T, C]`
    pub(super) fn forward(&self) -> Vec<f32> {
        let [b, t, c] = self.x.dims;
        let mut y = vec![0f32; b * t * c];
        y.par_chunks_mut(BLOCK * c)
            .enumerate()
            .for_each(|(block, rows)| {
                vectorised!(for (i, y) in rows.chunks_exact_mut(c).enumerate() {
                    let position = block * BLOCK + i;
                    self.before_activation(position / t, position % t, y);
                    if self.silu {
                        y.iter_mut().for_each(|y| *y *= sigmoid(*y));
                    }
                })
            });
        y
    }

    /// From `dy [B, T, C]` the gradients of x (`[B, T, C]`) and of taps and bias (`[W + 1, C]`, the bias
    /// last); those not wanted are zero.
    pub(super) fn backward(
        &self,
        dy: &[f32],
        want_x: bool,
        want_taps: bool,
    ) -> (Vec<f32>, Vec<f32>) {
        let [b, t, c] = self.x.dims;
        let mut dx = vec![0f32; b * t * c];
        let tasks: Vec<_> = dx
            .chunks_exact_mut(t * c)
            .enumerate()
            .flat_map(|(b, dx)| {
                dx.chunks_mut(BLOCK * c)
                    .enumerate()
                    .map(move |(i, dx)| (b, i * BLOCK, dx))
            })
            .collect();
        let parts: Vec<Vec<f32>> = tasks
            .into_par_iter()
            .map(|(b, first, dx)| {
                let dy = &dy[b * t * c..][..t * c];
                vectorised!(self.backward_block(b, first, dx, dy, want_x, want_taps))
            })
            .collect();
        let mut dtaps = vec![0f32; self.taps.len() + c];
        for part in parts {
            dtaps
                .iter_mut()
                .zip(part)
                .for_each(|(sum, part)| *sum += part);
        }
        (dx, dtaps)
    }

    /// Fills `dx` of the positions from `first` on; returns their part of the sums over positions.
    #[inline(always)]
    fn backward_block(
        &self,
        b: usize,
        first: usize,
        dx: &mut [f32],
        dy: &[f32],
        want_x: bool,
        want_taps: bool,
    ) -> Vec<f32> {
        let [_, t, c] = self.x.dims;
        let end = first + dx.len() / c;
        let width = self.taps.len() / c;
        let mut dtaps = vec![0f32; self.taps.len() + c];
        let mut slope = vec![1f32; c];
        let mut d = vec![0f32; c];
        // Positions up to a width behind the block still read from it.
        for position in first..t.min(end + width - 1) {
            if self.silu {
                self.before_activation(b, position, &mut slope);
                slope.iter_mut().for_each(|x| *x = silu_slope(*x));
            }
            for ((d, &dy), &slope) in d.iter_mut().zip(&dy[position * c..]).zip(&slope) {
                *d = dy * slope;
            }
            for (from, tap) in self.reach(b, position) {
                if want_x && (first..end).contains(&from) {
                    add_product(&mut dx[(from - first) * c..][..c], self.tap(tap), &d);
                }
                if want_taps && position < end {
                    add_product(&mut dtaps[tap * c..][..c], self.x.row(b, from), &d);
                }
            }
            if want_taps && position < end {
                let dbias = &mut dtaps[width * c..];
                dbias.iter_mut().zip(&d).for_each(|(sum, d)| *sum += d);
            }
        }
        dtaps
    }
}

/// `sum += a · b`
#[inline(always)]
pub(super) fn add_product(sum: &mut [f32], a: &[f32], b: &[f32]) {
    for ((sum, &a), &b) in sum.iter_mut().zip(a).zip(b) {
        *sum = fma(a, b, *sum);
    }
}

#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    1. / (1. + exp(-x))
}

/// The derivative of `x · sigmoid(x)`.
#[inline(always)]
fn silu_slope(x: f32) -> f32 {
    let s = sigmoid(x);
    s * (1. + x * (1. - s))
}
