//! Products with rows in bf16 by tiles of a processor that has them (AMX): 16 rows of weights by 8 of activations, 32 entries at a time.
//!
//! Tiles multiply bf16 only, so an entry of the activations is two columns: what bf16 holds of it, and what is left, rounded. Together
//! they have 17 bits; a product is `W hi + W lo`, each summed up in f32 from the first entry to the last.

use std::arch::asm;
use std::cell::RefCell;
use std::ops::Range;

use super::lines;
use crate::op::amx::{configure, release};
use crate::op::isa::vectorised;
use crate::op::team::fill;

/// Rows of weights of a tile.
const ROWS: usize = 16;
/// Rows of activations of a tile, each two columns.
const TOKENS: usize = 8;
/// Entries of a row that a tile takes at once.
const STEP: usize = 32;
/// Entries of rows of weights that are multiplied with all activations before the next: [`BLOCK`] rows of them stay in the second cache.
const CHUNK: usize = 2048;
/// Entries of rows of weights that stay in the first cache while activations pass.
const SPAN: usize = 512;
/// Rows of weights that stay in the second cache.
const BLOCK: usize = 256;
/// Tiles of activations that stay there with them.
const GROUP: usize = 8;
/// Entries below which other threads are not worth waking.
const ALONE: usize = 1 << 14;

/// Rows of activations as tiles: `[tiles, K / STEP, STEP / 2, columns, 2]` in bf16, zeros behind the last row and entry.
#[derive(Default)]
pub struct Activations {
    /// Pairs of bf16, neighbours in their row.
    pairs: Vec<u32>,
    rows: usize,
    /// Tiles' columns: two a row.
    columns: usize,
    /// Steps of a row.
    steps: usize,
}

impl Activations {
    /// `x [M, width]` in the place of these.
    pub fn set(&mut self, x: &[f32], width: usize) {
        self.rows = x.len() / width;
        self.columns = 2 * self.rows.min(TOKENS);
        self.steps = width.div_ceil(STEP);
        let tile = self.tile_pairs();
        self.pairs.clear();
        self.pairs.resize(self.rows.div_ceil(TOKENS) * tile, 0);
        let columns = self.columns;
        fill(x.len() >= ALONE, &mut self.pairs, tile, |at, pairs| {
            let rows = x[at * TOKENS * width..].chunks_exact(width).take(TOKENS);
            vectorised!(for (token, x) in rows.enumerate() {
                let places = pairs.chunks_exact_mut(columns);
                for (x, places) in x.chunks(2).zip(places) {
                    let [a, b] = [x[0], x.get(1).copied().unwrap_or(0.)].map(parts);
                    places[2 * token] = a.0 | b.0 << 16;
                    places[2 * token + 1] = a.1 | b.1 << 16;
                }
            });
        });
    }

    /// Pairs of all steps of a tile.
    fn tile_pairs(&self) -> usize {
        self.steps * STEP / 2 * self.columns
    }

    fn tiles(&self) -> usize {
        self.rows.div_ceil(TOKENS)
    }

    /// From step `step` of tile `tile` on.
    fn from(&self, tile: usize, step: usize) -> *const u32 {
        self.pairs[tile * self.tile_pairs() + step * STEP / 2 * self.columns..].as_ptr()
    }
}

/// The bits of the bf16 next to `x`, and of that next to what is left.
#[inline(always)]
fn parts(x: f32) -> (u32, u32) {
    let nearest = |x: f32| {
        let bits = x.to_bits();
        match x.is_nan() {
            true => 0x7fc0,
            false => (bits + 0x7fff + (bits >> 16 & 1)) >> 16,
        }
    };
    let high = nearest(x);
    (high, nearest(x - f32::from_bits(high << 16)))
}

#[derive(Default)]
struct Work {
    /// `[rows / ROWS, tiles, ROWS, columns]`
    sums: Vec<f32>,
    /// Rows of weights with zeros behind them.
    filled: Vec<u8>,
    /// Of a tile's tokens, row by row.
    found: Vec<[f32; BLOCK]>,
}

/// Rows `rows` of `w [N, width]` in bf16 with all of `x`; `write` gets a row of `w`, one of `x`, and the products of that and
/// the rows of `w` behind it with the latter.
///
/// # Safety
/// The processor has tiles, and the process the permission to use them ([`crate::op::isa::Level::Amx`]).
///
/// # Panics
/// When sizes do not fit.
#[allow(unsafe_code)]
pub unsafe fn rows(
    w: &[u8],
    width: usize,
    x: &Activations,
    rows: Range<usize>,
    write: impl Fn(usize, usize, &[f32]),
) {
    thread_local! {
        static WORK: RefCell<Work> = RefCell::default();
    }
    let row_bytes = 2 * width;
    assert!(rows.end * row_bytes <= w.len() && x.steps == width.div_ceil(STEP));
    let (tiles, sum) = (x.tiles(), ROWS * x.columns);
    WORK.with_borrow_mut(|work| {
        let Work {
            sums,
            filled,
            found,
        } = work;
        found.resize(TOKENS, [0.; BLOCK]);
        // SAFETY: the caller's promise.
        unsafe { configure(tiles_of(x.columns)) };
        for first in rows.clone().step_by(BLOCK) {
            let count = BLOCK.min(rows.end - first);
            let strips = count.div_ceil(ROWS);
            let strip_of = Strips::of(&w[first * row_bytes..], width, count, filled);
            let sums = lines(sums, strips * tiles * sum);
            for chunk in (0..x.steps).step_by(CHUNK / STEP) {
                let chunk_end = x.steps.min(chunk + CHUNK / STEP);
                for group in (0..tiles).step_by(GROUP) {
                    let group_end = tiles.min(group + GROUP);
                    for strip in (0..strips).step_by(2) {
                        for from in (chunk..chunk_end).step_by(SPAN / STEP) {
                            let steps = (chunk_end - from).min(SPAN / STEP);
                            for tile in (group..group_end).step_by(2) {
                                let (r, n) = ((strips - strip).min(2), (group_end - tile).min(2));
                                let next = |i: usize, of: usize| i.min(of - 1);
                                let strip_at = |i: usize| {
                                    let (strip, row_bytes) = strip_of.at(strip + next(i, r));
                                    (strip[from * 2 * STEP..].as_ptr(), row_bytes)
                                };
                                let a = [strip_at(0), strip_at(1)];
                                let b = |i: usize| x.from(tile + next(i, n), from);
                                let c = |i: usize, j: usize| {
                                    (strip + next(i, r)) * tiles + tile + next(j, n)
                                };
                                let at = [c(0, 0), c(0, 1), c(1, 0), c(1, 1)].map(|c| c * sum);
                                assert!(at.iter().all(|at| at + sum <= sums.len()));
                                // SAFETY: `steps` steps of every row stand behind each pointer, and a tile of sums at each place.
                                unsafe {
                                    let c = at.map(|at| sums.as_mut_ptr().add(at));
                                    let of = Block {
                                        a: a.map(|(a, _)| a),
                                        row_bytes: a.map(|(_, row_bytes)| row_bytes),
                                        b: [b(0), b(1)],
                                        columns: x.columns,
                                        steps,
                                        c,
                                    };
                                    match (r, n) {
                                        (1, 1) => of.one_one(from == 0),
                                        (1, _) => of.one_two(from == 0),
                                        (_, 1) => of.two_one(from == 0),
                                        _ => of.two_two(from == 0),
                                    }
                                }
                            }
                        }
                    }
                }
            }
            for tile in 0..tiles {
                for strip in 0..strips {
                    let sums = &sums[(strip * tiles + tile) * sum..][..sum];
                    for (r, sums) in sums.chunks_exact(x.columns).enumerate() {
                        for (found, sum) in found.iter_mut().zip(sums.as_chunks::<2>().0) {
                            found[strip * ROWS + r] = sum[0] + sum[1];
                        }
                    }
                }
                for (token, found) in (tile * TOKENS..x.rows).zip(&*found) {
                    write(first, token, &found[..count]);
                }
            }
        }
        // SAFETY: the caller's promise.
        unsafe { release() };
    });
}

/// Rows by tiles: of a strip whose last step ends inside of the matrix where they stand (what is behind a row meets zeros, so that it must
/// be finite), of the others filled up to whole steps and tiles.
struct Strips<'a> {
    w: &'a [u8],
    row_bytes: usize,
    /// Strips that are read where they stand.
    here: usize,
    filled: &'a [u8],
    filled_row_bytes: usize,
}

impl<'a> Strips<'a> {
    /// The first `count` rows of `w [.., width]`.
    fn of(w: &'a [u8], width: usize, count: usize, filled: &'a mut Vec<u8>) -> Self {
        let (row_bytes, filled_row_bytes) = (2 * width, 2 * width.next_multiple_of(STEP));
        let behind = filled_row_bytes - row_bytes;
        let rows = count.min((w.len() - behind.min(w.len())) / row_bytes);
        let here = rows / ROWS;
        let rest = &w[here * ROWS * row_bytes..count * row_bytes];
        filled.clear();
        filled.resize(
            (count - here * ROWS).next_multiple_of(ROWS) * filled_row_bytes,
            0,
        );
        let rows = filled.chunks_exact_mut(filled_row_bytes);
        for (w, filled) in rest.chunks_exact(row_bytes).zip(rows) {
            filled[..row_bytes].copy_from_slice(w);
        }
        Self {
            w,
            row_bytes,
            here,
            filled,
            filled_row_bytes,
        }
    }

    /// A strip, and the bytes from one of its rows to the next.
    fn at(&self, strip: usize) -> (&[u8], usize) {
        match strip < self.here {
            true => (&self.w[strip * ROWS * self.row_bytes..], self.row_bytes),
            false => {
                let at = (strip - self.here) * ROWS * self.filled_row_bytes;
                (&self.filled[at..], self.filled_row_bytes)
            }
        }
    }
}

/// Four tiles of sums, two of weights, two of activations.
fn tiles_of(columns: usize) -> [(usize, usize); 8] {
    let (weights, rest) = ((ROWS, 2 * STEP), (ROWS, 4 * columns));
    [rest, rest, rest, rest, weights, weights, rest, rest]
}

/// Up to two tiles of weights with up to two of activations.
struct Block {
    a: [*const u8; 2],
    row_bytes: [usize; 2],
    b: [*const u32; 2],
    columns: usize,
    steps: usize,
    /// Of the first weights with both activations, then of the second.
    c: [*mut f32; 4],
}

/// A method of [`Block`]: which of its tiles there are, and what is done with them at every step.
macro_rules! block {
    ($name:ident, [$($c:literal $tile:literal),*], $step:literal) => {
        /// # Safety
        /// Tiles are configured for `columns`, and all that is pointed to is there.
        #[allow(unsafe_code)]
        #[inline]
        unsafe fn $name(&self, first: bool) {
            // SAFETY: the caller's promise.
            unsafe {
                $(match first {
                    true => asm!(concat!("tilezero ", $tile), options(nostack, nomem)),
                    false => asm!(
                        concat!("tileloadd ", $tile, ", [{} + {}]"),
                        in(reg) self.c[$c], in(reg) 4 * self.columns, options(nostack, readonly)
                    ),
                })*
                asm!(
                    "2: /* one tile of weights leaves {la1} alone */",
                    $step,
                    "add {a0}, 64",
                    "add {a1}, 64",
                    "add {b0}, {step}",
                    "add {b1}, {step}",
                    "dec {n}",
                    "jnz 2b",
                    a0 = inout(reg) self.a[0] => _, a1 = inout(reg) self.a[1] => _, la0 = in(reg) self.row_bytes[0], la1 = in(reg) self.row_bytes[1],
                    b0 = inout(reg) self.b[0] => _, b1 = inout(reg) self.b[1] => _, lb = in(reg) 4 * self.columns,
                    step = in(reg) ROWS * 4 * self.columns, n = inout(reg) self.steps => _,
                    options(nostack, readonly)
                );
                $(asm!(
                    concat!("tilestored [{} + {}], ", $tile),
                    in(reg) self.c[$c], in(reg) 4 * self.columns, options(nostack)
                );)*
            }
        }
    };
}

impl Block {
    block!(
        one_one,
        [0 "tmm0"],
        "tileloadd tmm4, [{a0} + {la0}]
         tileloadd tmm6, [{b0} + {lb}]
         tdpbf16ps tmm0, tmm4, tmm6"
    );
    block!(
        one_two,
        [0 "tmm0", 1 "tmm1"],
        "tileloadd tmm4, [{a0} + {la0}]
         tileloadd tmm6, [{b0} + {lb}]
         tdpbf16ps tmm0, tmm4, tmm6
         tileloadd tmm7, [{b1} + {lb}]
         tdpbf16ps tmm1, tmm4, tmm7"
    );
    block!(
        two_one,
        [0 "tmm0", 2 "tmm2"],
        "tileloadd tmm4, [{a0} + {la0}]
         tileloadd tmm6, [{b0} + {lb}]
         tdpbf16ps tmm0, tmm4, tmm6
         tileloadd tmm5, [{a1} + {la1}]
         tdpbf16ps tmm2, tmm5, tmm6"
    );
    block!(
        two_two,
        [0 "tmm0", 1 "tmm1", 2 "tmm2", 3 "tmm3"],
        "tileloadd tmm4, [{a0} + {la0}]
         tileloadd tmm6, [{b0} + {lb}]
         tdpbf16ps tmm0, tmm4, tmm6
         tileloadd tmm7, [{b1} + {lb}]
         tdpbf16ps tmm1, tmm4, tmm7
         tileloadd tmm5, [{a1} + {la1}]
         tdpbf16ps tmm2, tmm5, tmm6
         tdpbf16ps tmm3, tmm5, tmm7"
    );
}
