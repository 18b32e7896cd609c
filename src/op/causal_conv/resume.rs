//! The convolution over the next inputs of one sequence.

use super::cpu::{add_product, sigmoid};
use crate::op::isa::vectorised;
use crate::op::team::fill;

/// Entries of work below which other threads are not worth waking.
const ALONE: usize = 1 << 15;
/// Positions a task.
const BLOCK: usize = 16;

/// `x [T, C]`, `taps [W, C]` (the last of the present), `bias [C]`, `state [W − 1, C]` the inputs before, which moves on → `y [T, C]`,
/// with SiLU. The bits are those of the kernel for whole sequences.
///
/// # Panics
/// When sizes do not fit: callers have checked them.
pub fn resume(x: &[f32], taps: &[f32], bias: &[f32], state: &mut [f32], y: &mut [f32]) {
    let c = bias.len();
    let before = taps.len() / c - 1;
    assert!(state.len() == before * c && y.len() == x.len() && taps.len() == (before + 1) * c);
    let input = |i: usize| match i < before {
        true => &state[i * c..][..c],
        false => &x[(i - before) * c..][..c],
    };
    let work = |block: usize, y: &mut [f32]| {
        vectorised!(for (i, y) in y.chunks_exact_mut(c).enumerate() {
            let t = block * BLOCK + i;
            y.copy_from_slice(bias);
            for back in 0..=before {
                add_product(
                    y,
                    &taps[(before - back) * c..][..c],
                    input(t + before - back),
                );
            }
            y.iter_mut().for_each(|y| *y *= sigmoid(*y));
        })
    };
    fill(x.len() >= ALONE, y, BLOCK * c, work);
    let new = x.len() / c;
    match new < before {
        true => {
            state.copy_within(new * c.., 0);
            state[(before - new) * c..].copy_from_slice(x);
        }
        false => state.copy_from_slice(&x[(new - before) * c..]),
    }
}
