//! Products of rows in blocks with activations, by the instructions at hand.

use rayon::prelude::*;

use super::activations::{GROUP, Row};
use super::plain::{half, scale_min};
use super::{Activations, BlockType};
use crate::op::isa::Isa;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

/// Output rows that one task takes at least: their bytes are worth more than handing them over.
const TASK: usize = 16;
/// Activation rows that share one reading of a row of blocks.
const TOGETHER: usize = 4;

/// `x [M, K]`, `W` of `[N, K]` weights in blocks → `y [M, N]`. Every entry is one sum in one order, whatever `M`.
///
/// # Panics
/// When the sizes do not fit: callers have checked them.
pub fn product(isa: Isa, kind: BlockType, w: &[u8], x: &Activations, y: &mut [f32]) {
    let row_bytes = x.width / kind.weights() * kind.bytes();
    assert!(x.width.is_multiple_of(kind.weights()) && row_bytes > 0);
    let outs = w.len() / row_bytes;
    assert!(w.len() == outs * row_bytes && y.len() == outs * x.rows && isa.is_here());
    let rows = |at: usize, found: &mut [f32]| {
        // found: [rows of W, M]
        for (i, found) in found.chunks_exact_mut(x.rows).enumerate() {
            let w = &w[(at + i) * row_bytes..][..row_bytes];
            for (m, found) in found.chunks_mut(TOGETHER).enumerate() {
                let row = |i: usize| x.row(m * TOGETHER + i);
                match found {
                    [a, b, c, d] => {
                        [*a, *b, *c, *d] = dot(isa, kind, w, [row(0), row(1), row(2), row(3)]);
                    }
                    rest => {
                        for (i, y) in rest.iter_mut().enumerate() {
                            [*y] = dot(isa, kind, w, [row(i)]);
                        }
                    }
                }
            }
        }
    };
    let task = TASK.max(outs.div_ceil(4 * rayon::current_num_threads()));
    match x.rows {
        1 => {
            let tasks = y.par_chunks_mut(task).enumerate();
            tasks.for_each(|(i, found)| rows(i * task, found));
        }
        m => {
            let mut turned = vec![0.; y.len()];
            let tasks = turned.par_chunks_mut(task * m).enumerate();
            tasks.for_each(|(i, found)| rows(i * task, found));
            for (i, y) in y.chunks_exact_mut(outs).enumerate() {
                for (j, y) in y.iter_mut().enumerate() {
                    *y = turned[j * m + i];
                }
            }
        }
    }
}

/// One row of blocks with `N` rows of activations.
fn dot<const N: usize>(isa: Isa, kind: BlockType, w: &[u8], x: [Row; N]) -> [f32; N] {
    match isa {
        Isa::Portable => x.map(|x| portable(kind, w, x)),
        // SAFETY: `product` asserts that the processor has these instructions.
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code)]
        Isa::Avx2 => unsafe { avx2::dot(kind, w, x) },
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code)]
        Isa::Avx512 => unsafe { avx512::dot(kind, w, x) },
        #[cfg(not(target_arch = "x86_64"))]
        _ => unreachable!("not on this architecture"),
    }
}

/// `Σ w q` over whole numbers.
fn integers(w: impl Iterator<Item = i32>, q: &[i8]) -> f32 {
    w.zip(q).map(|(w, q)| w * i32::from(*q)).sum::<i32>() as f32
}

fn portable(kind: BlockType, w: &[u8], x: Row) -> f32 {
    let weights = kind.weights();
    let mut sum = 0.;
    for (b, block) in w.chunks_exact(kind.bytes()).enumerate() {
        let groups = b * weights / GROUP;
        let codes = &x.codes[b * weights..][..weights];
        let (scales, sums) = (&x.scales[groups..], &x.sums[groups..]);
        match kind {
            BlockType::Q8_0 => {
                let found = integers(block[2..].iter().map(|q| i32::from(*q as i8)), codes);
                sum += half(block) * scales[0] * found;
            }
            BlockType::Q4_0 => {
                let (low, high) = codes.split_at(16);
                let four = |shift: u32| {
                    let nibble = move |q: &u8| i32::from(q >> shift & 15) - 8;
                    block[2..].iter().map(nibble)
                };
                let found = integers(four(0), low) + integers(four(4), high);
                sum += half(block) * scales[0] * found;
            }
            BlockType::Q4K => {
                let (d, min) = (half(block), half(&block[2..]));
                for (j, codes) in codes.chunks_exact(GROUP).enumerate() {
                    let (s, m) = scale_min(&block[4..16], j);
                    let nibbles = block[16 + 32 * (j / 2)..][..32].iter();
                    let nibbles = nibbles.map(|q| i32::from(q >> (4 * (j % 2)) & 15));
                    let found = integers(nibbles, codes);
                    sum += d * f32::from(s) * scales[j] * found - min * f32::from(m) * sums[j];
                }
            }
            BlockType::Q6K => {
                let d = half(&block[208..]);
                for (j, codes) in codes.chunks_exact(16).enumerate() {
                    // 16 codes of one quarter of one half.
                    let (half, quarter, at) = (j / 8, j % 8 / 2, 16 * (j % 2));
                    let low = &block[64 * half + 32 * (quarter % 2) + at..][..16];
                    let high = &block[128 + 32 * half + at..][..16];
                    let (down, up) = (4 * (quarter / 2), 2 * quarter);
                    let codes6 = low.iter().zip(high);
                    let codes6 =
                        codes6.map(|(l, h)| i32::from(l >> down & 15 | (h >> up & 3) << 4) - 32);
                    let s = f32::from(block[192 + j] as i8);
                    sum += d * s * scales[j / 2] * integers(codes6, codes);
                }
            }
        }
    }
    sum
}
