//! Gradients of the recurrence.

use super::SsdShape;
use super::cpu::{Columns, Head, Ssd, gather};
use super::lanes::{LANES, Lanes, Panel, Tile, inner_product, sweep};
use crate::op::cpu::{Rows, fma};
use rayon::prelude::*;

pub(super) struct Gradients {
    pub xbc: Vec<f32>,
    pub dt: Vec<f32>,
    pub params: Vec<f32>,
}

/// A head on its way through the sequence.
struct Run {
    h: usize,
    head: Head,
    /// `[P, N]`
    state: Vec<Tile>,
    /// The state after every chunk.
    ends: Vec<Vec<Tile>>,
    /// `⟨dy, S C⟩`, `[T]`
    readout: Vec<f32>,
    /// The adjoint `[P, N]`, and again `[N, P]`: each runs its sums down its own rows.
    adjoint: Vec<Tile>,
    adjoint_transposed: Vec<Tile>,
    /// A_log, dt_bias, D
    dparams: [f64; 3],
}

impl Ssd<'_> {
    /// Gradients of all operands from `dy [B, T, H·P]`.
    pub(super) fn backward(&self, dy: Rows) -> Gradients {
        let SsdShape {
            heads: h,
            groups: g,
            ..
        } = self.shape;
        let [b, t, channels] = self.xbc.dims;
        let (mut dxbc, mut ddt) = (vec![0f32; b * t * channels], vec![0f32; b * t * h]);
        let outputs = [Columns::of(&mut dxbc, channels), Columns::of(&mut ddt, h)];
        let parts: Vec<Vec<[f64; 3]>> = (0..b * g)
            .into_par_iter()
            .map(|task| self.backward_group(task / g, task % g, dy, &outputs))
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
    /// The states run again for the gradient of C; then their adjoint runs backward,
    /// `G_t = decay_{t+1} G_{t+1} + dy_t ⊗ C_t`, for those of x and B. The gradient of the logarithm of
    /// `decay_t`, `r_t = decay_t ⟨G_t, S_{t−1}⟩`, takes a product of whole states at the ends of chunks
    /// only; between them `r_t = r_{t+1} + ⟨dy_t, S_t C_t⟩ − ⟨G_t, Δ_t x_t ⊗ B_t⟩`.
    #[allow(unsafe_code)]
    fn backward_group(
        &self,
        b: usize,
        g: usize,
        dy_rows: Rows,
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
        let mut runs: Vec<Run> = (0..heads / groups)
            .map(|i| Run::new(self, b, g * (heads / groups) + i))
            .collect();
        let [x_column, b_column, _] = runs[0].head.columns;

        for first in (0..t).step_by(chunk) {
            let positions = first..t.min(first + chunk);
            let len = positions.len();
            gather(&mut x, self.xbc, b, positions.clone(), x_column, p);
            gather(&mut b_in, self.xbc, b, positions.clone(), b_column, n);
            for Run {
                h,
                head,
                state,
                ends,
                readout,
                ..
            } in &mut runs
            {
                let c_column = head.columns[2];
                gather(&mut dy, dy_rows, b, positions.clone(), *h * p, p);
                gather(&mut c_out, self.xbc, b, positions.clone(), c_column, n);
                scale(&mut u, &x, &head.delta[positions.clone()]);
                dc.clear();
                sweep(
                    state,
                    0..len,
                    &head.decay[first..],
                    [&u, &dy],
                    &b_in,
                    &mut dc,
                );
                for i in 0..len {
                    readout[first + i] = dc.dot(&c_out, i);
                    // SAFETY: the columns of this head in this sequence are this task's alone.
                    dc.store(i, unsafe { dxbc.slice(b * t + first + i, c_column, n) });
                }
                ends.push(state.clone());
            }
        }

        for first in (0..t).step_by(chunk).rev() {
            let positions = first..t.min(first + chunk);
            let len = positions.len();
            gather(&mut x, self.xbc, b, positions.clone(), x_column, p);
            gather(&mut b_in, self.xbc, b, positions.clone(), b_column, n);
            dx.clear();
            db.clear();
            for Run {
                h,
                head,
                ends,
                readout,
                adjoint,
                adjoint_transposed,
                dparams,
                ..
            } in &mut runs
            {
                gather(&mut dy, dy_rows, b, positions.clone(), *h * p, p);
                gather(
                    &mut c_out,
                    self.xbc,
                    b,
                    positions.clone(),
                    head.columns[2],
                    n,
                );
                scale(&mut u, &x, &head.delta[positions.clone()]);
                let next_decay = &head.decay[first + 1..];
                let end = ends.pop().expect("a state for every chunk");
                let mut r = next_decay[len - 1] as f64 * inner_product(adjoint, &end);
                let backward = (0..len).rev();
                du.clear();
                sweep(
                    adjoint_transposed,
                    backward.clone(),
                    next_decay,
                    [&c_out, &b_in],
                    &dy,
                    &mut du,
                );
                sweep(
                    adjoint,
                    backward.clone(),
                    next_decay,
                    [&dy, &u],
                    &c_out,
                    &mut db,
                );
                for i in backward {
                    let position = first + i;
                    let delta = head.delta[position];
                    let input = x.dot(&du, i);
                    r += (readout[position] - delta * input) as f64;
                    if head.decay[position] == 0. {
                        r = 0.;
                    }
                    let ddelta = head.a as f64 * r + input as f64;
                    let draw = ddelta * head.slope[position] as f64;
                    dparams[0] += r * (head.a * delta) as f64;
                    dparams[1] += draw;
                    dparams[2] += dy.dot(&x, i) as f64;
                    // SAFETY: as above.
                    let ddt = unsafe { ddt.slice(b * t + position, *h, 1) };
                    ddt[0] = draw as f32;
                    let inputs = du.row(i).iter().zip(dy.row(i));
                    for (dx, (du, dy)) in dx.row_mut(i).iter_mut().zip(inputs) {
                        for l in 0..LANES {
                            dx.0[l] += fma(delta, du.0[l], head.skip * dy.0[l]);
                        }
                    }
                }
            }
            for i in 0..len {
                let row = b * t + first + i;
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

impl Run {
    fn new(ssd: &Ssd, b: usize, h: usize) -> Self {
        let tiles = ssd.shape.head_dim.div_ceil(LANES) * ssd.shape.d_state.div_ceil(LANES);
        let zeros = vec![[Lanes::ZERO; LANES]; tiles];
        let [_, t, _] = ssd.xbc.dims;
        Self {
            h,
            head: ssd.head(b, h),
            state: zeros.clone(),
            ends: Vec::with_capacity(t.div_ceil(ssd.shape.chunk)),
            readout: vec![0f32; t],
            adjoint: zeros.clone(),
            adjoint_transposed: zeros,
            dparams: [0.; 3],
        }
    }
}

/// `u = Δ x`
fn scale(u: &mut Panel, x: &Panel, delta: &[f32]) {
    for (i, &delta) in delta.iter().enumerate() {
        for (u, x) in u.row_mut(i).iter_mut().zip(x.row(i)) {
            for l in 0..LANES {
                u.0[l] = delta * x.0[l];
            }
        }
    }
}
