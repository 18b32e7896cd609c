//! Products of matrices as they are stored with any number of rows of activations: what decodes and what reads a prompt. A row of
//! activations gives the same bits whatever it is multiplied beside.

use std::cell::RefCell;
use std::ops::Range;

use smallvec::SmallVec;

#[cfg(target_arch = "x86_64")]
use super::dot::amx;
use super::dot::{PADDED, SPAN, column, lines, pass, tile};
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
    /// `[K / SPAN, M, SPAN]`
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
    let packed = match m > FEW && !parts.iter().all(|part| blocks(part) || in_tiles(part)) {
        true => pack(x, width, packed),
        false => &[],
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
            _ if m <= FEW => few(isa, w, x, m, rows, write),
            _ => many(isa, w, packed, m, rows, write),
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

/// `x [M, K]` → `[K / SPAN, M, SPAN]`, the last span as long as is left, filled up with zeros.
fn pack<'a>(x: &[f32], width: usize, packed: &'a mut Vec<f32>) -> &'a [f32] {
    let m = x.len() / width;
    let packed = lines(packed, m * width.next_multiple_of(PADDED));
    let spans = (0..width).step_by(SPAN).zip(packed.chunks_mut(m * SPAN));
    for (from, packed) in spans {
        let span = SPAN.min(width - from);
        let rows = packed.chunks_exact_mut(span.next_multiple_of(PADDED));
        for (x, packed) in x.chunks_exact(width).zip(rows) {
            packed[..span].copy_from_slice(&x[from..][..span]);
            packed[span..].fill(0.);
        }
    }
    packed
}

/// Weights are widened in registers.
fn few(
    isa: Isa,
    w: &Weights,
    x: &[f32],
    m: usize,
    rows: Range<usize>,
    write: impl Fn(usize, usize, &[f32]),
) {
    let mut row = rows.start;
    if m == 1 && w.bytes.len() < CACHED {
        let mut sums = [0f32; COLUMN];
        while row < rows.end {
            let sums = &mut sums[..COLUMN.min(rows.end - row)];
            if !column(isa, w.storage, &w.bytes[row * w.row_bytes..], x, sums) {
                break;
            }
            write(row, 0, sums);
            row += sums.len();
        }
        while rows.end - row >= 4 {
            put::<4, 1>(row, 0, isa, w, x, &write);
            row += 4;
        }
    } else if m == 1 && isa.level() >= Level::Avx512 {
        let (together, left) = apart(rows.clone());
        for places in together {
            for (row, sum) in places.into_iter().zip(whole::<3, 1>(isa, w, places, x)) {
                write(row, 0, &sum);
            }
        }
        row = left.start;
    } else if m > TOGETHER && isa.level() >= Level::Avx512 {
        // Two rows of weights half a task apart, read once for all rows of activations.
        let half = rows.len() / 2;
        for first in rows.start..rows.start + half {
            let places = [first, first + half];
            for (row, sums) in places.into_iter().zip(whole::<2, FEW>(isa, w, places, x)) {
                for (n, sum) in sums[..m].iter().enumerate() {
                    write(row, n, &[*sum]);
                }
            }
        }
        row += 2 * half;
    } else if m > 1 {
        while rows.end - row >= 3 {
            near::<3>(row, m, isa, w, x, &write);
            row += 3;
        }
    }
    for row in row..rows.end {
        near::<1>(row, m, isa, w, x, &write);
    }
}

/// Writes the products of `R` rows from `row` on with all `m` of activations.
#[inline]
fn near<const R: usize>(
    row: usize,
    m: usize,
    isa: Isa,
    w: &Weights,
    x: &[f32],
    write: impl Fn(usize, usize, &[f32]),
) {
    for first in (0..m).step_by(TOGETHER) {
        let x = &x[first * w.width..];
        match m - first {
            1 => put::<R, 1>(row, first, isa, w, x, &write),
            2 => put::<R, 2>(row, first, isa, w, x, &write),
            3 => put::<R, 3>(row, first, isa, w, x, &write),
            _ => put::<R, TOGETHER>(row, first, isa, w, x, &write),
        }
    }
}

/// Writes the products of `R` rows from `row` on with `N` of activations, which are the ones from `first` on.
#[inline]
fn put<const R: usize, const N: usize>(
    row: usize,
    first: usize,
    isa: Isa,
    w: &Weights,
    x: &[f32],
    write: impl Fn(usize, usize, &[f32]),
) {
    let sums = whole::<R, N>(isa, w, std::array::from_fn(|r| row + r), x);
    for n in 0..N {
        write(row, first + n, &sums.map(|sums| sums[n]));
    }
}

/// `R` whole rows with `N` of activations, the last again where there are fewer.
#[inline]
fn whole<const R: usize, const N: usize>(
    isa: Isa,
    w: &Weights,
    rows: [usize; R],
    x: &[f32],
) -> [[f32; N]; R] {
    let (width, storage) = (w.width, w.storage);
    let (bytes, last) = (storage.entry_bytes(), x.len() / width - 1);
    let w: [&[u8]; R] = rows.map(|row| w.row(row));
    let mut sums = [[0f32; N]; R];
    for from in (0..width).step_by(SPAN) {
        let count = SPAN.min(width - from);
        let w = w.map(|w| &w[from * bytes..]);
        let x = std::array::from_fn(|n| &x[n.min(last) * width + from..]);
        let found: [[f32; N]; R] = tile(isa, storage, w, x, count);
        for (sums, found) in sums.iter_mut().zip(found) {
            for (sum, found) in sums.iter_mut().zip(found) {
                *sum += found;
            }
        }
    }
    sums
}

/// Weights are widened once for all rows of activations, which stand in spans.
fn many(
    isa: Isa,
    w: &Weights,
    packed: &[f32],
    m: usize,
    rows: Range<usize>,
    write: impl Fn(usize, usize, &[f32]),
) {
    thread_local! {
        static WORK: RefCell<[Vec<f32>; 2]> = const { RefCell::new([Vec::new(), Vec::new()]) };
    }
    let (width, storage) = (w.width, w.storage);
    let bytes = storage.entry_bytes();
    WORK.with_borrow_mut(|[panel, sums]| {
        let panel = lines(panel, PANEL * SPAN);
        for first in rows.clone().step_by(PANEL) {
            let count = PANEL.min(rows.end - first);
            sums.clear();
            sums.resize(m * count, 0.);
            for from in (0..width).step_by(SPAN) {
                let count_here = SPAN.min(width - from);
                let span = count_here.next_multiple_of(PADDED);
                for (r, wide) in panel.chunks_exact_mut(span).take(count).enumerate() {
                    let (wide, rest) = wide.split_at_mut(count_here);
                    storage.widen(
                        &w.row(first + r)[from * bytes..][..count_here * bytes],
                        wide,
                    );
                    rest.fill(0.);
                }
                let x = &packed[from * m..][..m * span];
                let groups = x.chunks(GROUP * span).zip(sums.chunks_mut(GROUP * count));
                for (x, sums) in groups {
                    pass(isa, &panel[..count * span], x, span, sums);
                }
            }
            for (i, sums) in sums.chunks_exact(count).enumerate() {
                write(first, i, sums);
            }
        }
    });
}
