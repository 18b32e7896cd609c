//! Gradients of the recurrence.

use super::SsdShape;
use super::cpu::{Columns, Head, Ssd, gather};
use super::lanes::{self, Inputs, LANES, Lanes, Panel, Tile};
use crate::op::cpu::{Rows, fma};
use crate::op::isa::vectorised;
use rayon::prelude::*;

pub(super) struct Gradients {
    pub xbc: Vec<f32>,
    pub dt: Vec<f32>,
    pub params: Vec<f32>,
}

/// A head on its way back through the sequence.
struct Run<'a> {
    h: usize,
    head: Head,
    /// The states before every chunk, in tiles of `[N, P]`.
    chunk_starts: &'a [Tile],
    /// The adjoint in tiles of `[P, N]`, and again of `[N, P]`: each sums down its own rows.
    adjoint: Vec<Tile>,
    adjoint_transposed: Vec<Tile>,
    /// A_log, dt_bias, D
    dparams: [f64; 3],
}

impl Ssd<'_> {
    /// Gradients of all operands from `dy [B, T, H·P]` and what the forward pass kept.
    pub(super) fn backward(&self, dy: Rows, chunk_starts: &[Vec<Tile>]) -> Gradients {
        let SsdShape {
            heads: h,
            groups: g,
            ..
        } = self.shape;
        let [b, t, channels] = self.xbc.dims;
        let (mut dxbc, mut ddt) = (vec![0f32; b * t * channels], vec![0f32; b * t * h]);
        let outputs = [Columns::of(&mut dxbc, channels), Columns::of(&mut ddt, h)];
        let parts: Vec<Vec<[f64; 3]>> = chunk_starts
            .par_chunks_exact(h / g)
            .enumerate()
            .map(|(task, starts)| {
                vectorised!(self.backward_group(task / g, task % g, dy, starts, &outputs))
            })
            .collect();
        // Sums over sequences, always in their order.
        let mut dparams = vec![0f64; 3 * h];
        for (i, part) in parts.iter().flatten().enumerate() {
            for (row, value) in part.iter().enumerate() {
                dparams[row * h + i % h] += value;
            }
        }
        let params = dparams.iter().map(|&value| value as f32).collect();
        Gradients {
            xbc: dxbc,
            dt: ddt,
            params,
        }
    }

    /// One group of heads, whose gradients of x and B sum. Returns those of `params` for each head.
    ///
    /// Chunk by chunk from the last: the states run again, for the gradient of C; then their adjoint
    /// runs backward, `G_t = decay_{t+1} G_{t+1} + dy_t ⊗ C_t`, for those of x, of B and of the logarithm
    /// of the decay, `decay_t ⟨G_t, S_{t−1}⟩`. (The last also follows without a product of states from
    /// those of x and C, but as a small difference of large sums: too inexact where decay is strong.)
    #[allow(unsafe_code)]
    #[inline(always)]
    fn backward_group(
        &self,
        b: usize,
        g: usize,
        dy_rows: Rows,
        chunk_starts: &[Vec<Tile>],
        [dxbc, ddt]: &[Columns; 2],
    ) -> Vec<[f64; 3]> {
        let SsdShape {
            heads,
            groups,
            head_dim: p,
            d_state: n,
            ..
        } = self.shape;
        let [_, t, _] = self.xbc.dims;
        let chunk = self.shape.chunk.min(t);
        let [mut x, mut u, mut dy, mut du, mut dx] = [p; 5].map(|k| Panel::zeros(chunk, k));
        let [mut b_in, mut c_out, mut db, mut dc] = [n; 4].map(|k| Panel::zeros(chunk, k));
        let [p_tiles, n_tiles] = [x.width, b_in.width];
        let zero = [Lanes::ZERO; LANES];
        let mut trace = vec![zero; chunk + 1];
        let mut products = vec![Lanes::ZERO; chunk];
        let mut runs: Vec<Run> = chunk_starts
            .iter()
            .zip(g * (heads / groups)..)
            .map(|(chunk_starts, h)| Run {
                h,
                head: self.head(b, h),
                chunk_starts,
                adjoint: vec![zero; p_tiles * n_tiles],
                adjoint_transposed: vec![zero; p_tiles * n_tiles],
                dparams: [0.; 3],
            })
            .collect();
        let [x_column, b_column, _] = runs[0].head.columns;

        for first in (0..t).step_by(chunk).rev() {
            let positions = first..t.min(first + chunk);
            let len = positions.len();
            gather(&mut x, self.xbc, b, positions.clone(), x_column, p);
            gather(&mut b_in, self.xbc, b, positions.clone(), b_column, n);
            dx.clear();
            db.clear();
            for run in &mut runs {
                let Run { h, head, .. } = run;
                let c_column = head.columns[2];
                gather(&mut dy, dy_rows, b, positions.clone(), *h * p, p);
                gather(&mut c_out, self.xbc, b, positions.clone(), c_column, n);
                scale(&mut u, &x, &head.delta[positions.clone()]);
                let decay = &head.decay[first..];
                let states = Inputs {
                    decay,
                    outer: &u,
                    spread: &b_in,
                    read: &dy,
                };
                let by_row = Inputs {
                    decay: &decay[1..],
                    outer: &dy,
                    spread: &c_out,
                    read: &u,
                };
                let by_column = Inputs {
                    decay: &decay[1..],
                    outer: &c_out,
                    spread: &dy,
                    read: &b_in,
                };
                let starts = &run.chunk_starts[first / chunk * p_tiles * n_tiles..];
                dc.clear();
                du.clear();
                products.fill(Lanes::ZERO);
                for i in 0..p_tiles {
                    for j in 0..n_tiles {
                        trace[0] = lanes::transposed(&starts[j * p_tiles + i]);
                        lanes::forward_tracing(&mut trace[..len + 1], [i, j], states, &mut dc);
                        let tile = &mut run.adjoint[i * n_tiles + j];
                        let products = &mut products[..len];
                        lanes::backward_against(&trace, products, tile, [i, j], by_row, &mut db);
                        let tile = &mut run.adjoint_transposed[j * p_tiles + i];
                        lanes::backward(tile, [j, i], len, by_column, &mut du);
                    }
                }
                for (i, position) in positions.clone().enumerate() {
                    let delta = head.delta[position];
                    let dlog_decay = decay[i] * products[i].sum();
                    let ddelta = head.a * dlog_decay + x.dot(&du, i);
                    let draw = ddelta * head.slope[position];
                    run.dparams[0] += (dlog_decay * head.a * delta) as f64;
                    run.dparams[1] += draw as f64;
                    run.dparams[2] += dy.dot(&x, i) as f64;
                    let inputs = du.row(i).iter().zip(dy.row(i));
                    for (dx, (du, dy)) in dx.row_mut(i).iter_mut().zip(inputs) {
                        let passed = dx.with(*dy, |dx, dy| fma(head.skip, dy, dx));
                        *dx = passed.with(*du, |dx, du| fma(delta, du, dx));
                    }
                    let row = b * t + position;
                    // SAFETY: the columns of this head in this sequence are this task's alone.
                    let (ddt, dc_out) =
                        unsafe { (ddt.slice(row, *h, 1), dxbc.slice(row, c_column, n)) };
                    ddt[0] = draw;
                    dc.store(i, dc_out);
                }
            }
            for (i, position) in positions.enumerate() {
                let row = b * t + position;
                // SAFETY: the columns of this group in this sequence are this task's alone.
                unsafe {
                    dx.store(i, dxbc.slice(row, x_column, p));
                    db.store(i, dxbc.slice(row, b_column, n));
                }
            }
        }
        runs.into_iter().map(|run| run.dparams).collect()
    }
}

/// `u = Δ x`
#[inline(always)]
fn scale(u: &mut Panel, x: &Panel, delta: &[f32]) {
    for (i, &delta) in delta.iter().enumerate() {
        for (u, x) in u.row_mut(i).iter_mut().zip(x.row(i)) {
            *u = x.scaled(delta);
        }
    }
}
