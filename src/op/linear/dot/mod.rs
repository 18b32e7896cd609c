//! Products of some rows of weights with some rows of activations, the weights in f32, f16 or bf16 and widened in registers. Every
//! product is one sum in one order, whatever it is computed beside: of `K` entries, [`SPAN`] at a time.

use half::f16;

use super::float8;
use super::storage::Storage;
use crate::op::cpu::fma;
use crate::op::isa::{Isa, Level};

#[cfg(target_arch = "x86_64")]
pub mod amx;
#[cfg(target_arch = "x86_64")]
mod x86;

/// Entries that are summed up before their sum is added to that of those before: what a tile of rows keeps in the first cache.
pub const SPAN: usize = 512;

/// Entries of a line of the cache.
const LINE: usize = 16;

/// Entries that rows of a panel are filled up to multiples of.
pub const PADDED: usize = 32;

/// `len` entries of `room` from a line of the cache on: vectors that lie across two cost twice.
pub fn lines(room: &mut Vec<f32>, len: usize) -> &mut [f32] {
    room.resize(len + LINE - 1, 0.);
    let start = room.as_ptr().align_offset(4 * LINE).min(LINE - 1);
    &mut room[start..][..len]
}

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
    if storage == Storage::F8E4M3 {
        let mut wide = [[0f32; SPAN]; R];
        (wide.iter_mut().zip(w)).for_each(|(wide, w)| float8::widen(&w[..count], wide));
        let wide = wide
            .each_ref()
            .map(|wide| bytemuck::cast_slice::<f32, u8>(wide));
        return tile(isa, Storage::F32, wide, x, count);
    }
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
        Level::Avx512 | Level::Amx => unsafe {
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

/// Whether [`column`] takes such weights.
pub fn has_vectors(isa: Isa, storage: Storage) -> bool {
    isa.level() > Level::Portable && storage != Storage::F8E4M3
}

/// `y [N] = W [N, K] x`.
///
/// # Panics
/// When there are fewer weights, or the processor has no vectors for them ([`has_vectors`]).
pub fn column(isa: Isa, storage: Storage, w: &[u8], x: &[f32], y: &mut [f32]) {
    assert!(w.len() >= y.len() * x.len() * storage.entry_bytes());
    assert!(has_vectors(isa, storage), "no vectors for {storage:?}");
    match isa.level() {
        Level::Portable => unreachable!("as just asserted"),
        // SAFETY: an `Isa` is of this processor; there are as many weights, as just asserted.
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code)]
        Level::Avx2 => unsafe { x86::avx2::column(storage, w.as_ptr(), x, y) },
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code)]
        Level::Avx512 | Level::Amx => unsafe {
            x86::avx512::column(storage, w.as_ptr(), x, y);
        },
        #[cfg(not(target_arch = "x86_64"))]
        _ => unreachable!("not on this architecture"),
    }
}

/// Rows of entries, `stride` entries from one to the next.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    pub entries: &'a [f32],
    pub stride: usize,
}

impl<'a> Rows<'a> {
    #[inline]
    pub fn count(self) -> usize {
        self.entries.len() / self.stride
    }

    #[inline]
    pub fn row(self, row: usize) -> &'a [f32] {
        &self.entries[row * self.stride..][..self.stride]
    }

    /// Those from `row` on.
    #[inline]
    pub fn from(self, row: usize) -> Self {
        Self {
            entries: &self.entries[row * self.stride..],
            ..self
        }
    }
}

/// `sums [M, rows] += x [M, span] panelᵀ`, `panel [rows, span]` in f32; `span` is at most [`SPAN`] and a multiple of [`PADDED`].
///
/// # Panics
/// When sizes do not fit.
pub fn pass(isa: Isa, panel: Rows, x: Rows, span: usize, sums: &mut [f32]) {
    let rows = panel.count();
    assert!(span.is_multiple_of(PADDED) && span <= panel.stride && span <= x.stride);
    assert!(sums.len() == x.count() * rows);
    match isa.level() {
        Level::Portable => {
            for (i, sums) in sums.chunks_exact_mut(rows).enumerate() {
                for (r, sum) in sums.iter_mut().enumerate() {
                    let w = bytemuck::cast_slice(panel.row(r));
                    *sum += portable(Storage::F32, w, x.row(i), span);
                }
            }
        }
        // SAFETY: an `Isa` is of this processor.
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code)]
        Level::Avx2 => unsafe { x86::avx2::pass(panel, x, span, sums) },
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code)]
        Level::Avx512 | Level::Amx => unsafe { x86::avx512::pass(panel, x, span, sums) },
        #[cfg(not(target_arch = "x86_64"))]
        _ => unreachable!("not on this architecture"),
    }
}

/// `out [Q, positions] = queries [Q, dim] keysᵀ`, a key `stride` entries behind the one before: sums in one order for each `dim`.
///
/// # Panics
/// When there are fewer keys.
pub fn scores(isa: Isa, queries: &[f32], dim: usize, keys: &[f32], stride: usize, out: &mut [f32]) {
    let count = queries.len() / dim;
    assert!(queries.len() == count * dim && count > 0 && out.len().is_multiple_of(count));
    let whole = dim.is_multiple_of(LANES);
    match isa.level() {
        // SAFETY: an `Isa` is of this processor.
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code)]
        Level::Avx2 if whole => unsafe { x86::avx2::scores(queries, dim, keys, stride, out) },
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code)]
        Level::Avx512 | Level::Amx if whole => unsafe {
            x86::avx512::scores(queries, dim, keys, stride, out)
        },
        _ => {
            let positions = (out.len() / count).max(1);
            isa.run(
                #[inline(always)]
                || scores_by_loops(queries, dim, keys, stride, out, positions),
            );
        }
    }
}

/// Those of `positions` a query, in loops that the compiler makes vectors of: of keys that are no whole vectors, or without vectors.
#[inline(always)]
fn scores_by_loops(
    queries: &[f32],
    dim: usize,
    keys: &[f32],
    stride: usize,
    out: &mut [f32],
    positions: usize,
) {
    let rows = out.chunks_exact_mut(positions);
    for (query, out) in queries.chunks_exact(dim).zip(rows) {
        let (queries, last_query) = query.as_chunks::<8>();
        for (p, out) in out.iter_mut().enumerate() {
            let (keys, last_key) = keys[p * stride..][..dim].as_chunks::<8>();
            let mut sums = [0f32; 8];
            for (query, key) in queries.iter().zip(keys) {
                for i in 0..8 {
                    sums[i] = fma(query[i], key[i], sums[i]);
                }
            }
            for ((sum, query), key) in sums.iter_mut().zip(last_query).zip(last_key) {
                *sum = fma(*query, *key, *sum);
            }
            let [a, b, c, d, e, f, g, h] = sums;
            *out = ((a + e) + (c + g)) + ((b + f) + (d + h));
        }
    }
}

/// Entries of f16 in f32.
pub(super) fn widen_f16(bytes: &[u8], out: &mut [f32]) {
    let done = match Isa::here().level() {
        Level::Portable => 0,
        // SAFETY: an `Isa` is of this processor.
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code)]
        Level::Avx2 => unsafe { x86::avx2::widen_f16(bytes, out) },
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code)]
        Level::Avx512 | Level::Amx => unsafe { x86::avx512::widen_f16(bytes, out) },
        #[cfg(not(target_arch = "x86_64"))]
        _ => unreachable!("not on this architecture"),
    };
    let rest = out[done..]
        .iter_mut()
        .zip(bytes[2 * done..].chunks_exact(2));
    for (x, b) in rest {
        *x = f16::from_le_bytes([b[0], b[1]]).to_f32();
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
