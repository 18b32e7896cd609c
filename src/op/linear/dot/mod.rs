//! Products of some rows of weights with some rows of activations, the weights in f32, f16 or bf16 and widened in registers. Every
//! product is one sum in one order, whatever it is computed beside: of `K` entries, [`SPAN`] at a time.

use super::storage::Storage;
use crate::op::isa::{Isa, Level};

#[cfg(target_arch = "x86_64")]
mod x86;

/// Entries that are summed up before their sum is added to that of those before: what a tile of rows keeps in the first cache.
pub const SPAN: usize = 512;

/// `R` rows of weights (`count` of them a row) with `N` of activations; `count` is at most [`SPAN`].
///
/// # Panics
/// A row that is too short.
#[inline]
pub fn tile<const R: usize, const N: usize>(
    isa: Isa,
    storage: Storage,
    w: [&[u8]; R],
    x: [&[f32]; N],
    count: usize,
) -> [[f32; N]; R] {
    let bytes = count * storage.entry_bytes();
    assert!(w.iter().all(|w| w.len() >= bytes) && x.iter().all(|x| x.len() >= count));
    match isa.level() {
        Level::Portable => {
            std::array::from_fn(|r| std::array::from_fn(|n| portable(storage, w[r], x[n], count)))
        }
        // SAFETY: an `Isa` is of this processor; the rows are long enough, as just asserted.
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code)]
        Level::Avx2 => unsafe {
            x86::avx2::tile(
                storage,
                w.map(<[u8]>::as_ptr),
                x.map(<[f32]>::as_ptr),
                count,
            )
        },
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code)]
        Level::Avx512 => unsafe {
            x86::avx512::tile(
                storage,
                w.map(<[u8]>::as_ptr),
                x.map(<[f32]>::as_ptr),
                count,
            )
        },
        #[cfg(not(target_arch = "x86_64"))]
        _ => unreachable!("not on this architecture"),
    }
}

/// `sums [M, rows] += x [M, span] panelᵀ`, `panel [rows, span]` in f32; `span` is at most [`SPAN`].
///
/// # Panics
/// When sizes do not fit.
pub fn pass(isa: Isa, panel: &[f32], x: &[f32], span: usize, sums: &mut [f32]) {
    let rows = panel.len() / span;
    assert!(panel.len() == rows * span && sums.len() == x.len() / span * rows);
    match isa.level() {
        Level::Portable => {
            for (x, sums) in x.chunks_exact(span).zip(sums.chunks_exact_mut(rows)) {
                for (w, sum) in panel.chunks_exact(span).zip(sums) {
                    *sum += portable(Storage::F32, bytemuck::cast_slice(w), x, span);
                }
            }
        }
        // SAFETY: an `Isa` is of this processor.
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code)]
        Level::Avx2 => unsafe { x86::avx2::pass(panel, x, span, sums, rows) },
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code)]
        Level::Avx512 => unsafe { x86::avx512::pass(panel, x, span, sums, rows) },
        #[cfg(not(target_arch = "x86_64"))]
        _ => unreachable!("not on this architecture"),
    }
}

/// Lanes that the portable sum is kept in.
const LANES: usize = 16;

fn portable(storage: Storage, w: &[u8], x: &[f32], count: usize) -> f32 {
    let bytes = storage.entry_bytes();
    let mut sums = [0f32; LANES];
    let mut wide = [0f32; LANES];
    for (w, x) in w[..count * bytes]
        .chunks(LANES * bytes)
        .zip(x[..count].chunks(LANES))
    {
        storage.widen(w, &mut wide[..x.len()]);
        for ((sum, w), x) in sums.iter_mut().zip(&wide).zip(x) {
            *sum += w * x;
        }
    }
    sums.iter().sum()
}
