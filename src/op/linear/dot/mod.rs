//! Few rows of activations with rows of f32, f16 or bf16 weights, widened in registers.

use rayon::prelude::*;

use super::storage::Storage;
use crate::op::isa::Isa;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

/// Bytes of weights below which other threads would be woken for longer than one takes to read them.
const ALONE: usize = 1 << 20;
/// Rows of weights that one task takes at least.
const TASK: usize = 16;
/// Rows of activations that share one reading of a row of weights.
const TOGETHER: usize = 4;

/// `x [M, K]`, `W [N, K]` as stored → `y [M, N]`. Every entry is one sum in one order, whatever `M`.
///
/// # Panics
/// When the sizes do not fit, or for blocks: callers have checked.
pub fn product(isa: Isa, storage: Storage, w: &[u8], x: &[f32], width: usize, y: &mut [f32]) {
    let bytes = match storage {
        Storage::F32 => 4,
        Storage::F16 | Storage::Bf16 => 2,
        Storage::Blocks(_) => unreachable!("blocks have a product of their own"),
    };
    let (m, outs) = (x.len() / width, w.len() / (width * bytes));
    assert!(x.len() == m * width && w.len() == outs * width * bytes && y.len() == m * outs);
    assert!(isa.is_here());
    let row = |i: usize| &x[i * width..][..width];
    let rows = |at: usize, found: &mut [f32]| {
        for (i, found) in found.chunks_exact_mut(m).enumerate() {
            let w = &w[(at + i) * width * bytes..][..width * bytes];
            for (j, found) in found.chunks_mut(TOGETHER).enumerate() {
                let row = |i: usize| row(j * TOGETHER + i);
                match found {
                    [a, b, c, d] => {
                        [*a, *b, *c, *d] = dot(isa, storage, w, [row(0), row(1), row(2), row(3)]);
                    }
                    rest => {
                        for (i, y) in rest.iter_mut().enumerate() {
                            [*y] = dot(isa, storage, w, [row(i)]);
                        }
                    }
                }
            }
        }
    };
    let alone = w.len() < ALONE;
    let task = TASK.max(outs.div_ceil(4 * rayon::current_num_threads()));
    if m == 1 && alone {
        rows(0, y);
        return;
    }
    if m == 1 {
        let tasks = y.par_chunks_mut(task).enumerate();
        tasks.for_each(|(i, found)| rows(i * task, found));
        return;
    }
    let mut turned = vec![0.; y.len()];
    match alone {
        true => rows(0, &mut turned),
        false => {
            let tasks = turned.par_chunks_mut(task * m).enumerate();
            tasks.for_each(|(i, found)| rows(i * task, found));
        }
    }
    for (i, y) in y.chunks_exact_mut(outs).enumerate() {
        for (j, y) in y.iter_mut().enumerate() {
            *y = turned[j * m + i];
        }
    }
}

/// One row of weights with `N` of activations.
fn dot<const N: usize>(isa: Isa, storage: Storage, w: &[u8], x: [&[f32]; N]) -> [f32; N] {
    match isa {
        Isa::Portable => portable(storage, w, x),
        // SAFETY: `product` asserts that the processor has these instructions, and cuts all rows to one width.
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code)]
        Isa::Avx2 => unsafe { avx2::dot(storage, w, x) },
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code)]
        Isa::Avx512 => unsafe { avx512::dot(storage, w, x) },
        #[cfg(not(target_arch = "x86_64"))]
        _ => unreachable!("not on this architecture"),
    }
}

/// Lanes that the portable sum is kept in.
const LANES: usize = 16;

fn portable<const N: usize>(storage: Storage, w: &[u8], x: [&[f32]; N]) -> [f32; N] {
    let bytes = match storage {
        Storage::F32 => 4,
        _ => 2,
    };
    let mut sums = [[0f32; LANES]; N];
    let mut wide = [0f32; LANES];
    for (i, w) in w.chunks(LANES * bytes).enumerate() {
        let count = w.len() / bytes;
        storage.widen(w, &mut wide[..count]);
        for (sums, x) in sums.iter_mut().zip(&x) {
            let x = &x[i * LANES..][..count];
            for ((sum, w), x) in sums.iter_mut().zip(&wide[..count]).zip(x) {
                *sum += w * x;
            }
        }
    }
    sums.map(|sums| sums.iter().sum())
}
