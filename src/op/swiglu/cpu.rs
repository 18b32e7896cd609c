//! SwiGLU over slices.

use rayon::prelude::*;

use crate::op::cpu::exp;
use crate::op::isa::vectorised;

/// Entries a task.
const BLOCK: usize = 1 << 14;

/// Any entries: `gate` in, `silu(gate) · up` out.
#[inline]
pub fn swiglu_row(gate: &mut [f32], up: &[f32]) {
    vectorised!(for (gate, up) in gate.iter_mut().zip(up) {
        *gate = silu(*gate) * up;
    })
}

#[inline(always)]
fn silu(x: f32) -> f32 {
    x / (1. + exp(-x))
}

/// `silu(gate) · up`
pub fn forward(gate: &[f32], up: &[f32]) -> Vec<f32> {
    let mut y = vec![0.; gate.len()];
    y.par_chunks_mut(BLOCK)
        .zip(gate.par_chunks(BLOCK).zip(up.par_chunks(BLOCK)))
        .for_each(|(y, (gate, up))| {
            vectorised!(
                for (y, (gate, up)) in y.iter_mut().zip(gate.iter().zip(up)) {
                    *y = silu(*gate) * up;
                }
            )
        });
    y
}

/// `gate` and `up` in, their gradients out.
pub fn backward(gate: &mut [f32], up: &mut [f32], dy: &[f32]) {
    gate.par_chunks_mut(BLOCK)
        .zip(up.par_chunks_mut(BLOCK))
        .zip(dy.par_chunks(BLOCK))
        .for_each(|((gate, up), dy)| {
            vectorised!(
                for (dy, (gate, up)) in dy.iter().zip(gate.iter_mut().zip(up)) {
                    let sigmoid = 1. / (1. + exp(-*gate));
                    let silu = *gate * sigmoid;
                    *gate = dy * *up * (sigmoid + silu * (1. - sigmoid));
                    *up = dy * silu;
                }
            )
        });
}
