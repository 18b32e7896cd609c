//! Rotation over slices.

use super::RopeLayout;
use crate::op::isa::vectorised;
use rayon::prelude::*;

/// `x [B, T, H, K]` with `dims = [H, K]`, tables `[T, K/2]`; `sign` −1 turns back.
pub fn rope(
    x: &[f32],
    cos: &[f32],
    sin: &[f32],
    dims: [usize; 2],
    layout: RopeLayout,
    sign: f32,
) -> Vec<f32> {
    let [h, k] = dims;
    let mut y = vec![0.; x.len()];
    if y.is_empty() {
        return y;
    }
    let rows = cos.len() / (k / 2);
    // Positions a task; a position is all heads of one token.
    let positions = (1usize << 13).div_ceil(h * k);
    let block = positions * h * k;
    y.par_chunks_mut(block)
        .zip(x.par_chunks(block))
        .enumerate()
        .for_each(|(i, (y, x))| {
            let tokens = y.chunks_exact_mut(h * k).zip(x.chunks_exact(h * k));
            vectorised!(for (j, (y, x)) in tokens.enumerate() {
                let at = (i * positions + j) % rows * (k / 2);
                let (cos, sin) = (&cos[at..][..k / 2], &sin[at..][..k / 2]);
                for (y, x) in y.chunks_exact_mut(k).zip(x.chunks_exact(k)) {
                    turn(y, x, cos, sin, layout, sign);
                }
            })
        });
    y
}

/// One head where it stands.
pub fn turn_head(x: &mut [f32], cos: &[f32], sin: &[f32], layout: RopeLayout) {
    vectorised!(match layout {
        RopeLayout::Halves => {
            let (a, b) = x.split_at_mut(cos.len());
            for ((a, b), (cos, sin)) in a.iter_mut().zip(b).zip(cos.iter().zip(sin)) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
        RopeLayout::Interleaved => {
            for (x, (cos, sin)) in x.chunks_exact_mut(2).zip(cos.iter().zip(sin)) {
                let (a, b) = (x[0], x[1]);
                (x[0], x[1]) = (a * cos - b * sin, b * cos + a * sin);
            }
        }
    })
}

/// One head.
#[inline(always)]
fn turn(y: &mut [f32], x: &[f32], cos: &[f32], sin: &[f32], layout: RopeLayout, sign: f32) {
    match layout {
        RopeLayout::Halves => {
            let (a, b) = x.split_at(cos.len());
            let (ya, yb) = y.split_at_mut(cos.len());
            for i in 0..cos.len() {
                let s = sign * sin[i];
                ya[i] = a[i] * cos[i] - b[i] * s;
                yb[i] = b[i] * cos[i] + a[i] * s;
            }
        }
        RopeLayout::Interleaved => {
            for (i, (y, x)) in y.chunks_exact_mut(2).zip(x.chunks_exact(2)).enumerate() {
                let s = sign * sin[i];
                y[0] = x[0] * cos[i] - x[1] * s;
                y[1] = x[1] * cos[i] + x[0] * s;
            }
        }
    }
}
