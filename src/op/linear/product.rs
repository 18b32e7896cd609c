//! Products of matrices as they are stored with any number of rows of activations: what decodes and what reads a prompt. A row of
//! activations gives the same bits whatever it is multiplied beside.

use std::cell::RefCell;
use std::ops::Range;

use smallvec::SmallVec;

#[cfg(target_arch = "x86_64")]
use super::dot::amx;
use super::dot::{PADDED, Rows, SPAN, column, has_vectors, lines, pass, tile};
use super::storage::Storage;
use super::stored::Stored;
use crate::op::blocks::{self, Activations, Forms};
use crate::op::cpu::apart;
use crate::op::isa::{Isa, Level};
use crate::op::team::{Scatter, team};

/// Rows of activations up to which weights are widened as they are read.
const FEW: usize = 8;
/// Rows of activations that share one widening of weights in registers.
const TOGETHER: usize = 4;
/// Rows of weights that are widened for many rows of activations: what stays in the second cache.
const PANEL: usize = 48;
/// Rows of activations that stay in the first cache while a panel passes.
const GROUP: usize = 8;
/// Entries between rows of a span: rows that stand a power of two apart share a few places of the cache, which do not hold them all.
const GAP: usize = 16;
/// Multiplications below which other threads are not worth waking.
const ALONE: usize = 1 << 14;
/// Bytes of a matrix that is in a cache when it is wanted again: several of its rows are read at once.
const CACHED: usize = 1 << 20;
/// Sums of rows of such a matrix that are written at once.
const COLUMN: usize = 64;
/// Tasks a thread, so that one that lost its processor holds nobody up.
const TASKS: usize = 6;

/// What products need beside their operands; kept from one to the next.
#[derive(Default)]
pub struct Scratch {
    /// Entries of [`Packed`].
    packed: Vec<f32>,
    codes: Activations,
    #[cfg(target_arch = "x86_64")]
    tiles: amx::Activations,
}

/// A matrix and where its product goes: `W [N, K]`, `y [M, N]`.
pub struct Part<'a> {
    pub w: &'a Stored,
    pub y: &'a mut [f32],
}

/// A matrix whose bytes have been asked for.
#[derive(Clone, Copy)]
struct Weights<'a> {
    bytes: &'a [u8],
    storage: Storage,
    width: usize,
    rows: usize,
    row_bytes: usize,
    scales: Option<&'a [f32]>,
}

impl<'a> Weights<'a> {
    fn of(w: &'a Stored) -> Self {
        let bytes = w.bytes();
        Self {
            bytes,
            storage: w.storage(),
            width: w.width(),
            rows: w.rows(),
            row_bytes: bytes.len() / w.rows().max(1),
            scales: w.scales(),
        }
    }

    #[inline]
    fn row(&self, row: usize) -> &'a [u8] {
        &self.bytes[row * self.row_bytes..][..self.row_bytes]
    }
}

/// Whether so many bytes of weights are multiplied by tiles, which take bf16 alone. One row of activations goes faster with a small matrix by
/// vectors, and what one does all must.
pub(super) fn tiled(isa: Isa, storage: Storage, bytes: usize) -> bool {
    isa.level() == Level::Amx && storage == Storage::Bf16 && bytes >= CACHED
}

/// `y = x Wᵀ` of every part, `x [M, K]`.
///
/// # Panics
/// When sizes do not fit: callers have checked them.
pub fn products(x: &[f32], parts: &mut [Part], scratch: &mut Scratch) {
    products_by(Isa::here(), x, parts, scratch);
}

/// The same by other instructions.
pub fn products_by(isa: Isa, x: &[f32], parts: &mut [Part], scratch: &mut Scratch) {
    let Some(width) = parts.first().map(|part| part.w.width()) else {
        return;
    };
    let m = x.len() / width;
    assert!(x.len() == m * width);
    if m == 0 {
        return;
    }
    let blocks = |part: &Part| matches!(part.w.storage(), Storage::Blocks(_));
    if parts.iter().any(blocks) {
        let forms = parts.iter().map(|part| match part.w.storage() {
            Storage::Blocks(kind) => Forms::of(isa, kind),
            _ => Forms::default(),
        });
        let forms = forms.fold(Forms::default(), Forms::and);
        scratch.codes.set(x, width, forms);
    }
    let in_tiles = |part: &Part| tiled(isa, part.w.storage(), part.w.bytes().len());
    #[cfg(target_arch = "x86_64")]
    if parts.iter().any(in_tiles) {
        scratch.tiles.set(x, width);
    }
    let Scratch { packed, codes, .. } = scratch;
    let packed = match m > 1 && !parts.iter().all(|part| blocks(part) || in_tiles(part)) {
        true => Packed::of(x, width, packed),
        // With more rows it is not read.
        false => Packed::one(&x[..width]),
    };
    let codes = &*codes;
    #[cfg(target_arch = "x86_64")]
    let tiles = &scratch.tiles;
    let rows: usize = parts.iter().map(|part| part.w.rows()).sum();
    let threads = match rows * width * m < ALONE {
        true => 1,
        false => team().threads(),
    };
    let matrices: SmallVec<[(Weights, Scatter<f32>); 4]> = (parts.iter_mut())
        .map(|part| {
            assert!(part.w.width() == width && part.y.len() == m * part.w.rows());
            (Weights::of(part.w), Scatter::of(part.y))
        })
        .collect();
    // Rows of the matrices as if they stood one above the other.
    let most = match threads {
        1 => rows.max(1),
        _ => (rows.div_ceil(tasks(rows * width * m, threads))).next_multiple_of(16),
    };
    let of_matrix = |w: &Weights, y: &Scatter<f32>, rows: Range<usize>| {
        let write = |row: usize, m: usize, found: &[f32]| {
            // SAFETY: every row of weights is one task's, and so are their columns of `y`.
            #[allow(unsafe_code)]
            let place = unsafe { y.slice(m * w.rows + row, found.len()) };
            match w.scales {
                None => place.copy_from_slice(found),
                Some(scales) => {
                    let scaled = scales[row..].iter().zip(found).map(|(s, found)| s * found);
                    place
                        .iter_mut()
                        .zip(scaled)
                        .for_each(|(y, scaled)| *y = scaled);
                }
            }
        };
        match w.storage {
            Storage::Blocks(kind) => blocks::rows(isa, kind, w.bytes, codes, rows, write),
            // SAFETY: an `Isa` is of this processor.
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            storage if tiled(isa, storage, w.bytes.len()) => unsafe {
                amx::rows(w.bytes, w.width, tiles, rows, write)
            },
            _ if m <= FEW => few(isa, w, packed, rows, write),
            _ => many(isa, w, packed, rows, write),
        }
    };
    let work = |task: usize| {
        let (mut rows, mut above) = (task * most..rows.min((task + 1) * most), 0);
        for (w, y) in &matrices {
            let end = rows.end.min(above + w.rows);
            if rows.start < end {
                of_matrix(w, y, rows.start - above..end - above);
                rows.start = end;
            }
            above += w.rows;
        }
    };
    match threads {
        1 => work(0),
        _ => team().run(rows.div_ceil(most), work),
    }
}

/// How many tasks so many multiplications are: as many for each thread, where there are enough to be worth it.
fn tasks(multiplications: usize, threads: usize) -> usize {
    let tasks = (multiplications / ALONE).clamp(1, TASKS * threads);
    match tasks > threads {
        true => tasks - tasks % threads,
        false => tasks,
    }
}

/// Activations `x [M, K]` as `[K / SPAN, M, SPAN + GAP]`, a row of the last span filled up to a multiple of [`PADDED`], zeros in all gaps; one row
/// alone stays as it stands.
#[derive(Clone, Copy)]
struct Packed<'a> {
    entries: &'a [f32],
    m: usize,
    in_spans: bool,
}

impl<'a> Packed<'a> {
    fn one(x: &'a [f32]) -> Self {
        Self {
            entries: x,
            m: 1,
            in_spans: false,
        }
    }

    fn of(x: &[f32], width: usize, room: &'a mut Vec<f32>) -> Self {
        let (m, whole) = (x.len() / width, width / SPAN * SPAN);
        let rest = match width - whole {
            0 => 0,
            rest => stride(rest),
        };
        let room = lines(room, m * (width / SPAN * stride(SPAN) + rest));
        let spans = room.chunks_mut(m * stride(SPAN));
        for (from, span) in (0..width).step_by(SPAN).zip(spans) {
            let count = SPAN.min(width - from);
            let rows = span.chunks_exact_mut(stride(count));
            for (x, row) in x.chunks_exact(width).zip(rows) {
                row[..count].copy_from_slice(&x[from..][..count]);
                row[count..].fill(0.);
            }
        }
        Self {
            entries: room,
            m,
            in_spans: true,
        }
    }

    /// The rows of the span from entry `from` on, of `count` entries.
    #[inline]
    fn span(self, from: usize, count: usize) -> Rows<'a> {
        let (start, stride) = match self.in_spans {
            true => (self.m * (from / SPAN) * stride(SPAN), stride(count)),
            false => (from, count),
        };
        Rows {
            entries: &self.entries[start..][..self.m * stride],
            stride,
        }
    }
}

/// From one row of a span of `count` entries to the next.
fn stride(count: usize) -> usize {
    count.next_multiple_of(PADDED) + GAP
}

/// Whether a row of weights is read once for all rows of activations, for which AVX-512 has registers.
fn at_once(isa: Isa, m: usize) -> bool {
    isa.level() >= Level::Avx512 && m > TOGETHER
}

/// Weights are widened in registers.
fn few(isa: Isa, w: &Weights, x: Packed, rows: Range<usize>, write: impl Fn(usize, usize, &[f32])) {
    let mut rows = rows;
    if x.m == 1 && w.bytes.len() < CACHED && has_vectors(isa, w.storage) {
        let mut sums = [0f32; COLUMN];
        for first in rows.clone().step_by(COLUMN) {
            let sums = &mut sums[..COLUMN.min(rows.end - first)];
            let w_rows = &w.bytes[first * w.row_bytes..];
            column(isa, w.storage, w_rows, x.entries, sums);
            write(first, 0, sums);
        }
        return;
    }
    if at_once(isa, x.m) {
        // Two rows half a task apart.
        let half = rows.len() / 2;
        for row in rows.start..rows.start + half {
            whole(isa, w, [row, row + half], x, &write);
        }
        rows.start += 2 * half;
    } else if isa.level() > Level::Portable {
        let (together, left) = apart(rows);
        for places in together {
            whole(isa, w, places, x, &write);
        }
        rows = left;
    }
    for row in rows {
        whole(isa, w, [row], x, &write);
    }
}

/// Writes the products of `R` whole rows with all of activations, at most [`FEW`].
#[inline]
fn whole<const R: usize>(
    isa: Isa,
    w: &Weights,
    rows: [usize; R],
    x: Packed,
    write: impl Fn(usize, usize, &[f32]),
) {
    let bytes = w.storage.entry_bytes();
    let rows_of_w = rows.map(|row| w.row(row));
    let mut sums = [[0f32; FEW]; R];
    for from in (0..w.width).step_by(SPAN) {
        let count = SPAN.min(w.width - from);
        let x = x.span(from, count);
        let w_of = rows_of_w.map(|row| &row[from * bytes..]);
        if at_once(isa, x.count()) {
            add::<R, FEW>(isa, w.storage, w_of, x, count, 0, &mut sums);
            continue;
        }
        for first in (0..x.count()).step_by(TOGETHER) {
            let sums = &mut sums;
            match x.count() - first {
                1 => add::<R, 1>(isa, w.storage, w_of, x, count, first, sums),
                2 => add::<R, 2>(isa, w.storage, w_of, x, count, first, sums),
                3 => add::<R, 3>(isa, w.storage, w_of, x, count, first, sums),
                _ => add::<R, TOGETHER>(isa, w.storage, w_of, x, count, first, sums),
            }
        }
    }
    for (row, sums) in rows.into_iter().zip(sums) {
        for (n, sum) in sums[..x.m].iter().enumerate() {
            write(row, n, &[*sum]);
        }
    }
}

/// `sums[..][first..]` += the products of a span with `N` rows of activations from `first` on, the last again where there are fewer.
#[inline]
fn add<const R: usize, const N: usize>(
    isa: Isa,
    storage: Storage,
    w: [&[u8]; R],
    x: Rows,
    count: usize,
    first: usize,
    sums: &mut [[f32; FEW]; R],
) {
    let last = x.count() - 1;
    let x = std::array::from_fn(|n| x.row((first + n).min(last)));
    let found: [[f32; N]; R] = tile(isa, storage, w, x, count);
    for (sums, found) in sums.iter_mut().zip(found) {
        for (sum, found) in sums[first..].iter_mut().zip(found) {
            *sum += found;
        }
    }
}

/// Weights are widened once for all rows of activations, which stand in spans.
fn many(
    isa: Isa,
    w: &Weights,
    x: Packed,
    rows: Range<usize>,
    write: impl Fn(usize, usize, &[f32]),
) {
    thread_local! {
        static WORK: RefCell<[Vec<f32>; 2]> = const { RefCell::new([Vec::new(), Vec::new()]) };
    }
    let (width, storage, m) = (w.width, w.storage, x.m);
    let bytes = storage.entry_bytes();
    WORK.with_borrow_mut(|[panel, sums]| {
        let panel = lines(panel, PANEL * stride(SPAN));
        for first in rows.clone().step_by(PANEL) {
            let rows = PANEL.min(rows.end - first);
            sums.clear();
            sums.resize(m * rows, 0.);
            for from in (0..width).step_by(SPAN) {
                let count = SPAN.min(width - from);
                let x = x.span(from, count);
                for (r, wide) in panel.chunks_exact_mut(x.stride).take(rows).enumerate() {
                    let (wide, rest) = wide.split_at_mut(count);
                    let w = &w.row(first + r)[from * bytes..][..count * bytes];
                    storage.widen(w, wide);
                    rest.fill(0.);
                }
                let panel = Rows {
                    entries: &panel[..rows * x.stride],
                    ..x
                };
                let groups = x.entries.chunks(GROUP * x.stride);
                for (entries, sums) in groups.zip(sums.chunks_mut(GROUP * rows)) {
                    let x = Rows { entries, ..x };
                    pass(isa, panel, x, count.next_multiple_of(PADDED), sums);
                }
            }
            for (i, sums) in sums.chunks_exact(rows).enumerate() {
                write(first, i, sums);
            }
        }
    });
}
