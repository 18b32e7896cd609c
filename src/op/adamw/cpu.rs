//! The update over slices, threads over fixed blocks.

use crate::op::isa::vectorised;
use rayon::prelude::*;

/// Entries a task: fixed, so that sums do not depend on the threads.
const BLOCK: usize = 1 << 14;
const LANES: usize = 8;

/// `moment ← β moment + (1 − β) value(grad_scale · grad)` for the first (the gradient itself) and the
/// second moment (its square); `moments` holds both, one after the other.
pub(super) fn update_moments(
    moments: &mut [f32],
    grad: &[f32],
    grad_scale: f32,
    betas: [f32; 2],
    rests: [f32; 2],
) {
    let (first, second) = moments.split_at_mut(grad.len());
    first
        .par_chunks_mut(BLOCK)
        .zip(second.par_chunks_mut(BLOCK))
        .zip(grad.par_chunks(BLOCK))
        .for_each(|((first, second), grad)| {
            vectorised!({
                for ((first, second), &grad) in first.iter_mut().zip(second).zip(grad) {
                    let grad = grad * grad_scale;
                    *first = betas[0] * *first + rests[0] * grad;
                    *second = betas[1] * *second + rests[1] * grad * grad;
                }
            })
        });
}

/// The factors of one step, bias corrections included.
pub(super) struct Factors {
    /// `1 − lr · weight_decay`
    pub keep: f32,
    /// `lr / (1 − β₁ᵗ)`
    pub rate: f32,
    /// `1 / √(1 − β₂ᵗ)`
    pub deviation: f32,
    pub eps: f32,
}

pub(super) fn update_param(param: &mut [f32], moments: &[f32], factors: &Factors) {
    let &Factors {
        keep,
        rate,
        deviation,
        eps,
    } = factors;
    let (first, second) = moments.split_at(param.len());
    param
        .par_chunks_mut(BLOCK)
        .zip(first.par_chunks(BLOCK))
        .zip(second.par_chunks(BLOCK))
        .for_each(|((param, first), second)| {
            vectorised!({
                for ((param, &first), &second) in param.iter_mut().zip(first).zip(second) {
                    *param = keep * *param - rate * first / (second.sqrt() * deviation + eps);
                }
            })
        });
}

pub(super) fn sum_of_squares(x: &[f32]) -> f64 {
    let block_sum = |block: &[f32]| {
        vectorised!({
            let (full, rest) = block.as_chunks::<LANES>();
            let mut lanes = [0f64; LANES];
            for entries in full {
                for (lane, &x) in lanes.iter_mut().zip(entries) {
                    *lane += x as f64 * x as f64;
                }
            }
            lanes.iter().sum::<f64>() + rest.iter().map(|&x| x as f64 * x as f64).sum::<f64>()
        })
    };
    let sums: Vec<f64> = x.par_chunks(BLOCK).map(block_sum).collect();
    sums.iter().sum()
}
