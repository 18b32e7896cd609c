//! Both norms over slices. Rows go to threads in blocks of a fixed size, whose partial weight gradients
//! are added in order, so that sums do not depend on the number of threads.

use crate::op::cpu::exp;
use crate::op::isa::vectorised;
use rayon::prelude::*;

/// Rows a task.
const ROWS: usize = 128;

/// Sums in this many lanes, so that the compiler may use vectors.
const LANES: usize = 16;

/// `Σ f(i)` over `0..n`.
#[inline(always)]
fn sum(n: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let whole = n / LANES * LANES;
    for at in (0..whole).step_by(LANES) {
        for (lane, total) in lanes.iter_mut().enumerate() {
            *total += f(at + lane);
        }
    }
    lanes.iter().sum::<f32>() + (whole..n).map(f).sum::<f32>()
}

#[inline(always)]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1. / (sum(x.len(), |i| x[i] * x[i]) / x.len() as f32 + eps).sqrt()
}

pub fn forward(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let d = weight.len();
    let mut y = vec![0.; x.len()];
    y.par_chunks_mut(ROWS * d)
        .zip(x.par_chunks(ROWS * d))
        .for_each(|(y, x)| {
            for (y, x) in y.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
                norm_row(x, weight, eps, y);
            }
        });
    y
}

/// One row of the norm.
#[inline]
pub fn norm_row(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    vectorised!({
        let r = inverse_rms(x, eps);
        for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
            *y = x * r * w;
        }
    })
}

/// Every row of `x` where it stands; `room` for one row.
pub fn norm_rows(x: &mut [f32], weight: &[f32], eps: f32, room: &mut [f32]) {
    let d = weight.len();
    let room = &mut room[..d.min(x.len())];
    for x in x.chunks_exact_mut(d) {
        norm_row(x, weight, eps, room);
        x.copy_from_slice(room);
    }
}

/// One row of the gated norm: `y` in, the norm of its groups out.
#[inline]
pub fn gated_row(y: &mut [f32], z: &[f32], weight: &[f32], group: usize, eps: f32) {
    vectorised!({
        for (y, z) in y.iter_mut().zip(z) {
            *y = *y * z * sigmoid(*z);
        }
        for (y, w) in y.chunks_exact_mut(group).zip(weight.chunks_exact(group)) {
            let r = inverse_rms(y, eps);
            for (y, w) in y.iter_mut().zip(w) {
                *y *= r * w;
            }
        }
    })
}

/// Adds the blocks' partial sums in order.
fn total(blocks: Vec<Vec<f32>>, d: usize) -> Vec<f32> {
    blocks.into_iter().fold(vec![0.; d], |mut sum, block| {
        for (s, b) in sum.iter_mut().zip(block) {
            *s += b;
        }
        sum
    })
}

/// Gradients of `x` and `weight`.
pub fn backward(x: &[f32], weight: &[f32], dy: &[f32], eps: f32) -> (Vec<f32>, Vec<f32>) {
    let d = weight.len();
    let mut dx = vec![0.; x.len()];
    let blocks = dx
        .par_chunks_mut(ROWS * d)
        .zip(x.par_chunks(ROWS * d).zip(dy.par_chunks(ROWS * d)))
        .map(|(dx, (x, dy))| {
            vectorised!({
                let mut dw = vec![0.; d];
                let rows = dx
                    .chunks_exact_mut(d)
                    .zip(x.chunks_exact(d))
                    .zip(dy.chunks_exact(d));
                for ((dx, x), dy) in rows {
                    let r = inverse_rms(x, eps);
                    // Along the row itself the norm takes the gradient away.
                    let along = sum(d, |i| dy[i] * weight[i] * x[i]) * r * r / d as f32;
                    for i in 0..d {
                        dx[i] = r * (dy[i] * weight[i] - x[i] * along);
                        dw[i] += dy[i] * x[i] * r;
                    }
                }
                dw
            })
        })
        .collect();
    (dx, total(blocks, d))
}

#[inline(always)]
fn sigmoid(z: f32) -> f32 {
    1. / (1. + exp(-z))
}

pub fn gated_forward(y: &[f32], z: &[f32], weight: &[f32], group: usize, eps: f32) -> Vec<f32> {
    let d = weight.len();
    let mut out = vec![0.; y.len()];
    out.par_chunks_mut(ROWS * d)
        .zip(y.par_chunks(ROWS * d).zip(z.par_chunks(ROWS * d)))
        .for_each(|(out, (y, z))| {
            out.copy_from_slice(y);
            for (row, z) in out.chunks_exact_mut(d).zip(z.chunks_exact(d)) {
                gated_row(row, z, weight, group, eps);
            }
        });
    out
}

/// Gradients of `y`, `z` and `weight`.
pub fn gated_backward(
    y: &[f32],
    z: &[f32],
    weight: &[f32],
    dout: &[f32],
    group: usize,
    eps: f32,
) -> [Vec<f32>; 3] {
    let d = weight.len();
    let (mut dy, mut dz) = (vec![0.; y.len()], vec![0.; y.len()]);
    let blocks = dy
        .par_chunks_mut(ROWS * d)
        .zip(dz.par_chunks_mut(ROWS * d))
        .zip(
            y.par_chunks(ROWS * d)
                .zip(z.par_chunks(ROWS * d))
                .zip(dout.par_chunks(ROWS * d)),
        )
        .map(|((dy, dz), ((y, z), dout))| {
            vectorised!({
                let mut dw = vec![0.; d];
                // dy holds v = y · silu(z), then dv; dz holds silu(z), then its own gradient.
                for i in 0..y.len() {
                    dz[i] = z[i] * sigmoid(z[i]);
                    dy[i] = y[i] * dz[i];
                }
                for (at, v) in dy.chunks_exact_mut(group).enumerate() {
                    let channel = at * group % d;
                    let w = &weight[channel..][..group];
                    let dout = &dout[at * group..][..group];
                    let dw = &mut dw[channel..][..group];
                    let r = inverse_rms(v, eps);
                    let along = sum(group, |i| dout[i] * w[i] * v[i]) * r * r / group as f32;
                    for i in 0..group {
                        dw[i] += dout[i] * v[i] * r;
                        v[i] = r * (dout[i] * w[i] - v[i] * along);
                    }
                }
                for i in 0..y.len() {
                    let s = sigmoid(z[i]);
                    let silu = dz[i];
                    dz[i] = dy[i] * y[i] * (s + silu * (1. - s));
                    dy[i] *= silu;
                }
                dw
            })
        })
        .collect();
    [dy, dz, total(blocks, d)]
}
