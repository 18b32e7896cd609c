//! The recurrence over slices. A chunk of positions is gathered into panels that stay in the cache;
//! every 16 × 16 tile of the state sweeps over it in registers. On a processor this plain form does
//! fewer operations than the products of the chunked form, at any size.

use super::lanes::{self, Inputs, LANES, Lanes, Panel, Tile};
use super::{Documents, SsdShape};
use crate::op::cpu::{Rows, exp, fma};
use crate::op::isa::vectorised;
use rayon::prelude::*;
use std::{marker::PhantomData, ops::Range};

pub(super) struct Ssd<'a> {
    /// `[B, T, G·P + G·N + H·N]`
    pub xbc: Rows<'a>,
    /// `[B, T, H]`
    pub dt: Rows<'a>,
    /// `[3, H]`
    pub params: &'a [f32],
    pub shape: SsdShape,
    pub documents: Option<&'a Documents>,
}

pub(super) struct Forward {
    /// `[B, T, H·P]`
    pub y: Vec<f32>,
    /// For each head of each sequence the states before every chunk, in tiles of `[N, P]`.
    pub chunk_starts: Vec<Vec<Tile>>,
}

/// One head of one sequence: its coefficients, and what every position makes of its `dt`.
pub(super) struct Head {
    /// `−exp(A_log)`
    pub a: f32,
    /// `D`
    pub skip: f32,
    /// First columns of x, B and C in a row of `xbc`.
    pub columns: [usize; 3],
    /// `Δ`, `[T]`
    pub delta: Vec<f32>,
    /// `dΔ/d dt`, `[T]`
    pub slope: Vec<f32>,
    /// The factor of the state on arrival, 0 where a document starts, `[T + 1]`: the last is 0 too, for
    /// nothing arrives after the end.
    pub decay: Vec<f32>,
}

impl Ssd<'_> {
    #[inline(always)]
    pub(super) fn head(&self, b: usize, h: usize) -> Head {
        let SsdShape {
            heads,
            groups,
            head_dim: p,
            d_state: n,
            ..
        } = self.shape;
        let [_, t, _] = self.dt.dims;
        let [a_log, dt_bias, skip] = [0, 1, 2].map(|row| self.params[row * heads + h]);
        let a = -a_log.exp();
        let g = h / (heads / groups);
        let (mut delta, mut slope, mut decay) = (vec![0.; t], vec![0.; t], vec![0.; t + 1]);
        for i in 0..t {
            (delta[i], slope[i]) = softplus(self.dt.row(b, i)[h] + dt_bias);
            decay[i] = exp(a * delta[i]);
        }
        if let Some(documents) = self.documents {
            for (position, (decay, &start)) in decay.iter_mut().zip(documents.row(b)).enumerate() {
                if position == start as usize {
                    *decay = 0.;
                }
            }
        }
        let columns = [g * p, groups * p + g * n, groups * (p + n) + h * n];
        Head {
            a,
            skip,
            columns,
            delta,
            slope,
            decay,
        }
    }

    /// `keep` keeps what the backward pass starts from.
    pub(super) fn forward(&self, keep: bool) -> Forward {
        let SsdShape {
            heads: h,
            head_dim: p,
            ..
        } = self.shape;
        let [b, t, _] = self.xbc.dims;
        let mut y = vec![0f32; b * t * h * p];
        let columns = Columns::of(&mut y, h * p);
        let chunk_starts = (0..b * h)
            .into_par_iter()
            .map(|task| vectorised!(self.forward_head(task / h, task % h, keep, &columns)))
            .collect();
        Forward { y, chunk_starts }
    }

    /// Returns the states before every chunk if they are to be kept.
    #[allow(unsafe_code)]
    #[inline(always)]
    fn forward_head(&self, b: usize, h: usize, keep: bool, y_columns: &Columns) -> Vec<Tile> {
        let SsdShape {
            head_dim: p,
            d_state: n,
            ..
        } = self.shape;
        let [_, t, _] = self.xbc.dims;
        let chunk = self.shape.chunk.min(t);
        let head = self.head(b, h);
        let [x_column, b_column, c_column] = head.columns;
        let [mut x, mut y] = [p; 2].map(|k| Panel::zeros(chunk, k));
        let [mut b_in, mut c_out] = [n; 2].map(|k| Panel::zeros(chunk, k));
        let mut tiles = vec![[Lanes::ZERO; LANES]; b_in.width * x.width]; // of [N, P]
        let mut chunk_starts = Vec::new();
        for first in (0..t).step_by(chunk) {
            if keep {
                chunk_starts.extend_from_slice(&tiles);
            }
            let positions = first..t.min(first + chunk);
            let len = positions.len();
            gather(&mut x, self.xbc, b, positions.clone(), x_column, p);
            gather(&mut b_in, self.xbc, b, positions.clone(), b_column, n);
            gather(&mut c_out, self.xbc, b, positions.clone(), c_column, n);
            for (i, &delta) in head.delta[positions].iter().enumerate() {
                for (x, y) in x.row_mut(i).iter_mut().zip(y.row_mut(i)) {
                    *y = x.scaled(head.skip);
                    *x = x.scaled(delta);
                }
            }
            let inputs = Inputs {
                decay: &head.decay[first..],
                outer: &b_in,
                spread: &x,
                read: &c_out,
            };
            for (k, tile) in tiles.iter_mut().enumerate() {
                lanes::forward(tile, [k / x.width, k % x.width], len, inputs, &mut y);
            }
            for i in 0..len {
                // SAFETY: the columns of this head in the rows of this sequence are this task's alone.
                y.store(i, unsafe { y_columns.slice(b * t + first + i, h * p, p) });
            }
        }
        chunk_starts
    }
}

/// Panel rows from 0 ← `k` columns of the `positions` of sequence `b`.
#[inline(always)]
pub(super) fn gather(
    panel: &mut Panel,
    rows: Rows,
    b: usize,
    positions: Range<usize>,
    column: usize,
    k: usize,
) {
    for (i, position) in positions.enumerate() {
        panel.load(i, &rows.row(b, position)[column..][..k]);
    }
}

/// `ln(1 + e^x)` and its derivative, the logistic function.
#[inline(always)]
pub(super) fn softplus(x: f32) -> (f32, f32) {
    let e = exp(-x.abs());
    // ln(1 + e) = 2 atanh(z) with z ≤ 1/3, by its series: exact for small steps too.
    let z = e / (2. + e);
    let z_squared = z * z;
    let mut series = 1. / 15.;
    for odd in [13., 11., 9., 7., 5., 3., 1.] {
        series = fma(series, z_squared, 1. / odd);
    }
    let slope = if x > 0. { 1. } else { e } / (1. + e);
    (fma(2. * z, series, x.max(0.)), slope)
}

/// A matrix whose columns several tasks write.
pub(super) struct Columns<'a> {
    start: *mut f32,
    entries: usize,
    width: usize,
    matrix: PhantomData<&'a mut [f32]>,
}

impl<'a> Columns<'a> {
    pub(super) fn of(matrix: &'a mut [f32], width: usize) -> Self {
        let (start, entries) = (matrix.as_mut_ptr(), matrix.len());
        Self {
            start,
            entries,
            width,
            matrix: PhantomData,
        }
    }

    /// `count` entries of a row.
    ///
    /// # Safety
    /// While the slice lives no other slice of these entries may.
    #[allow(unsafe_code, clippy::mut_from_ref)]
    #[inline(always)]
    pub(super) unsafe fn slice(&self, row: usize, column: usize, count: usize) -> &mut [f32] {
        let first = row * self.width + column;
        assert!(column + count <= self.width && first + count <= self.entries);
        // SAFETY: within the matrix, which is borrowed for 'a; the caller keeps slices apart.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(first), count) }
    }
}

// SAFETY: entries are reached through `slice` only, whose callers keep them apart.
#[allow(unsafe_code)]
unsafe impl Sync for Columns<'_> {}
