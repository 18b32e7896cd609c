//! Products of matrices in f32 by tiles of a processor that has them (AMX): 32 rows by 32 columns, 32 entries of a sum at a time.
//!
//! Tiles multiply bf16 only, so an entry is two numbers: what bf16 holds of it, and what is left, rounded; 17 bits together. A product is
//! `hi hi + lo hi + hi lo`, summed up in f32 from the first entry to the last, whatever else is multiplied beside it: PyTorch's
//! `set_float32_matmul_precision("high")`. An entry that is infinite, or near it, is no number in it.

use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::RefCell;
use std::mem::MaybeUninit;

use rayon::prelude::*;

use super::View;
use crate::op::amx::{configure, release};
use crate::op::team::Scatter;

/// Lines of a tile: rows of the left matrix, columns of the right one.
const LINES: usize = 16;
/// Lines of two tiles.
const STRIP: usize = 2 * LINES;
/// Entries of a line that a tile takes at once.
const STEP: usize = 32;
/// What bf16 holds of an entry, and what is left.
const PARTS: usize = 2;
/// Rows of the left matrix that are one task, where there are enough.
const ROWS: usize = 4 * STRIP;
/// Columns of the right matrix that are packed together.
const COLUMNS: usize = 512;
/// Entries of them all: they stay in the second cache.
const PACKED: usize = 1 << 18;
/// Rows of the left matrix that are packed together where they meet several blocks of columns.
const TOGETHER: usize = 2048;
/// Entries of a line that are packed together, at the most.
const DEPTH: usize = 1024;
/// Steps that are multiplied with all rows of a task before the next.
const SPAN: usize = 16;

/// 16 lines of 16 pairs of bf16 (left), or 16 pairs of 16 lines (right).
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Tile([u32; 256]);

impl Tile {
    const ZERO: Self = Self([0; 256]);
}

/// What is multiplied at a step of a strip, by part.
type Step = [[Tile; 2]; PARTS];

/// Entries of a right matrix that is worth its tiles.
const WORTH: usize = 1 << 11;

/// Whether a product is worth its tiles, and stands so that they can be filled. However many rows it has: a row is the same among others.
pub(super) fn take(a: View, b: View) -> bool {
    let [k, n] = b.dims;
    let near = |view: View| view.strides.contains(&1);
    n >= LINES / 2 && k >= LINES && n * k >= WORTH && near(a) && near(b)
}

/// `out = a · b` (or `out += a · b`), `out` row after row; `alone`: by this thread.
///
/// # Safety
/// The processor has tiles, and this process the permission to use them ([`crate::op::isa::Level::Amx`]). Both views fit, and there is room for
/// the product's entries at `out`, apart from both; with `accumulate` they have been written.
#[allow(unsafe_code)]
pub(super) unsafe fn multiply(out: *mut f32, a: View, b: View, accumulate: bool, alone: bool) {
    thread_local! {
        static RIGHT: RefCell<Vec<Step>> = const { RefCell::new(Vec::new()) };
        static LEFT: RefCell<Vec<Step>> = const { RefCell::new(Vec::new()) };
    }
    let ([m, k], n) = (a.dims, b.dims[1]);
    // SAFETY: the caller's promise; what was not written stays so until a block of the product is.
    let out = unsafe { std::slice::from_raw_parts_mut(out.cast::<MaybeUninit<f32>>(), m * n) };
    let out = Scatter::of(out);
    let columns = n.min(COLUMNS).next_multiple_of(STRIP);
    let depth = (PACKED / columns).min(DEPTH).next_multiple_of(STEP);
    // Rows that meet several blocks of columns are packed once for all of them, others by who multiplies them.
    let often = n > columns;
    let together = if often { TOGETHER } else { m.max(1) };
    let even = m.div_ceil(2 * rayon::current_num_threads());
    let task_rows = even.next_multiple_of(STRIP).clamp(2 * STRIP, ROWS);
    // Buffers are taken out: while this thread waits for others it may multiply for somebody else.
    let (mut left, mut right) = (Vec::new(), RIGHT.take());
    if often {
        left = LEFT.take();
    }
    for top in (0..m).step_by(together) {
        let height = together.min(m - top);
        for from in (0..k).step_by(depth) {
            let steps = depth.min(k - from).div_ceil(STEP);
            // SAFETY: the caller's promise.
            let pack_left = |row: usize, packed: &mut [Step]| unsafe {
                pack::<false>(&Lines::of(a, row, from), packed);
            };
            if often {
                let left = room(&mut left, height.div_ceil(STRIP) * steps);
                in_strips(alone, left, steps, |strip, packed| {
                    pack_left(top + strip * STRIP, packed);
                });
            }
            for first in (0..n).step_by(columns) {
                let count = columns.min(n - first);
                let right = room(&mut right, count.div_ceil(STRIP) * steps);
                in_strips(alone, right, steps, |strip, packed| {
                    let b = Lines::of(b.transposed(), first + strip * STRIP, from);
                    // SAFETY: the caller's promise.
                    unsafe { pack::<true>(&b, packed) };
                });
                let (left, right) = (&left, &*right);
                let multiplied = |task: usize| {
                    let row = task * task_rows;
                    let rows = task_rows.min(height - row);
                    let strips = rows.div_ceil(STRIP);
                    let run = |left: &[Step]| {
                        let block = Block {
                            left,
                            right,
                            steps,
                            begun: accumulate || from > 0,
                            // SAFETY: tasks have rows of their own.
                            out: unsafe { out.slice((top + row) * n, rows * n) },
                            width: n,
                            at: first,
                            dims: [rows, count],
                        };
                        // SAFETY: the caller's promise.
                        unsafe { block.run() };
                    };
                    if often {
                        return run(&left[row / STRIP * steps..][..strips * steps]);
                    }
                    let mut own = LEFT.take();
                    let left = room(&mut own, strips * steps);
                    for (strip, packed) in left.chunks_mut(steps).enumerate() {
                        pack_left(top + row + strip * STRIP, packed);
                    }
                    run(left);
                    LEFT.set(own);
                };
                let tasks = 0..height.div_ceil(task_rows);
                match alone {
                    true => tasks.into_iter().for_each(multiplied),
                    false => tasks.into_par_iter().for_each(multiplied),
                }
            }
        }
    }
    RIGHT.set(right);
    if often {
        LEFT.set(left);
    }
}

/// The first `len` steps of a buffer.
fn room(buffer: &mut Vec<Step>, len: usize) -> &mut [Step] {
    if buffer.len() < len {
        buffer.resize(len, [[Tile::ZERO; 2]; PARTS]);
    }
    &mut buffer[..len]
}

/// `work` on every strip, by this thread alone or by all.
fn in_strips(
    alone: bool,
    packed: &mut [Step],
    steps: usize,
    work: impl Fn(usize, &mut [Step]) + Sync,
) {
    match alone {
        true => (packed.chunks_mut(steps).enumerate()).for_each(|(i, strip)| work(i, strip)),
        false => {
            let strips = packed.par_chunks_mut(steps).enumerate();
            strips.for_each(|(i, strip)| work(i, strip));
        }
    }
}

/// Lines of a matrix from one of them, and from one of their entries on.
struct Lines<'a> {
    view: View<'a>,
    first: usize,
    from: usize,
}

impl<'a> Lines<'a> {
    fn of(view: View<'a>, first: usize, from: usize) -> Self {
        Self { view, first, from }
    }

    /// Sixteen entries in a row, zeros where the matrix ends: along a line, or of one entry's lines.
    ///
    /// # Safety
    /// The processor has AVX-512.
    #[allow(unsafe_code)]
    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn load(&self, line: usize, entry: usize, along: bool) -> __m512 {
        let (line, entry) = (self.first + line, self.from + entry);
        let [lines, entries] = self.view.dims;
        if line >= lines || entry >= entries {
            return _mm512_setzero_ps();
        }
        let left = match along {
            true => entries - entry,
            false => lines - line,
        };
        let here = line * self.view.strides[0] + entry * self.view.strides[1];
        let here = self.view.data[here..].as_ptr();
        match left {
            // SAFETY: the view fits, so all of its entries stand in the slice; what is masked is not read.
            0..16 => unsafe { _mm512_maskz_loadu_ps((1 << left) - 1, here) },
            _ => unsafe { _mm512_loadu_ps(here) },
        }
    }
}

/// A strip's steps; `RIGHT`: as the right matrix has them.
///
/// # Safety
/// The processor has AVX-512 with bf16, and the view's stride is 1 in one direction.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn pack<const RIGHT: bool>(lines: &Lines, steps: &mut [Step]) {
    let along = lines.view.strides[1] == 1;
    for (step, packed) in steps.iter_mut().enumerate() {
        for half in [0, 1] {
            let mut tiles = [[_mm512_setzero_si512(); LINES]; PARTS];
            for i in 0..LINES {
                let (line, entry, next) = match along {
                    // A line's pairs.
                    true => (half * LINES + i, step * STEP, LINES),
                    // A pair of all lines.
                    false => (half * LINES, step * STEP + 2 * i, 1),
                };
                // SAFETY: the caller's promise.
                let (low, high) = unsafe {
                    (
                        lines.load(line, entry, along),
                        lines.load(line, entry + next, along),
                    )
                };
                let parts = split(low, high);
                for (tile, part) in tiles.iter_mut().zip(parts) {
                    tile[i] = match along {
                        true => part,
                        false => beside(part),
                    };
                }
            }
            for (part, mut tile) in tiles.into_iter().enumerate() {
                if along == RIGHT {
                    tile = turned(tile);
                }
                let place = packed[part][half].0.as_chunks_mut::<16>().0;
                for (place, line) in place.iter_mut().zip(tile) {
                    // SAFETY: sixteen numbers.
                    unsafe { _mm512_store_si512(place.as_mut_ptr().cast(), line) };
                }
            }
        }
    }
}

/// The parts of 32 numbers in bf16, in their order.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[inline]
fn split(low: __m512, high: __m512) -> [__m512i; PARTS] {
    let nearest = bits(_mm512_cvtne2ps_pbh(high, low));
    let wide =
        |half: __m256i| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)));
    let held = [
        wide(_mm512_castsi512_si256(nearest)),
        wide(_mm512_extracti64x4_epi64::<1>(nearest)),
    ];
    let left = _mm512_cvtne2ps_pbh(_mm512_sub_ps(high, held[1]), _mm512_sub_ps(low, held[0]));
    [nearest, bits(left)]
}

#[allow(unsafe_code)]
#[inline(always)]
fn bits(x: __m512bh) -> __m512i {
    // SAFETY: both are 512 bits, all of which mean something.
    unsafe { std::mem::transmute(x) }
}

/// Sixteen numbers and sixteen others as pairs of one and one.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn beside(x: __m512i) -> __m512i {
    let even = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(x));
    let odd = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64::<1>(x));
    _mm512_or_si512(even, _mm512_slli_epi32::<16>(odd))
}

/// Rows as columns.
#[target_feature(enable = "avx512f")]
#[inline]
fn turned(mut x: [__m512i; 16]) -> [__m512i; 16] {
    let mut y = x;
    for i in 0..8 {
        y[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
        y[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
    }
    for i in 0..4 {
        let y = &y[4 * i..4 * i + 4];
        x[4 * i] = _mm512_unpacklo_epi64(y[0], y[2]);
        x[4 * i + 1] = _mm512_unpackhi_epi64(y[0], y[2]);
        x[4 * i + 2] = _mm512_unpacklo_epi64(y[1], y[3]);
        x[4 * i + 3] = _mm512_unpackhi_epi64(y[1], y[3]);
    }
    for i in 0..4 {
        for half in [0, 1] {
            let [a, b] = [x[8 * half + i], x[8 * half + 4 + i]];
            y[8 * half + i] = _mm512_shuffle_i32x4::<0x88>(a, b);
            y[8 * half + 4 + i] = _mm512_shuffle_i32x4::<0xdd>(a, b);
        }
    }
    for i in 0..8 {
        x[i] = _mm512_shuffle_i32x4::<0x88>(y[i], y[8 + i]);
        x[8 + i] = _mm512_shuffle_i32x4::<0xdd>(y[i], y[8 + i]);
    }
    x
}

/// Rows of a task with all packed columns.
struct Block<'a> {
    /// `[rows / STRIP, steps]`
    left: &'a [Step],
    /// `[columns / STRIP, steps]`
    right: &'a [Step],
    steps: usize,
    /// Whether the product's entries have sums already.
    begun: bool,
    /// Whole rows of the product, of `width`; its columns from `at` on are meant.
    out: &'a mut [MaybeUninit<f32>],
    width: usize,
    at: usize,
    dims: [usize; 2],
}

impl Block<'_> {
    /// # Safety
    /// The processor has tiles; what `begun` says is so.
    #[allow(unsafe_code)]
    unsafe fn run(self) {
        let [rows, columns] = self.dims;
        // SAFETY: the caller's promise.
        unsafe { configure([(LINES, 2 * STEP); 8]) };
        let mut aside = Aside([[0.; STRIP]; STRIP]);
        for column in (0..columns).step_by(STRIP) {
            for from in (0..self.steps).step_by(SPAN) {
                let steps = SPAN.min(self.steps - from);
                let begun = self.begun || from > 0;
                for row in (0..rows).step_by(STRIP) {
                    let step = |strip: usize| strip / STRIP * self.steps + from;
                    let left = &self.left[step(row)..][..steps];
                    let right = &self.right[step(column)..][..steps];
                    let place = row * self.width + self.at + column;
                    let whole = [rows - row, columns - column].map(|left| left.min(STRIP));
                    if whole == [STRIP; 2] {
                        let last = place + (STRIP - 1) * self.width + STRIP;
                        assert!(last <= self.out.len());
                        let out = self.out[place..].as_mut_ptr().cast();
                        // SAFETY: 32 rows of the product stand there, as just asserted; the rest is the caller's promise.
                        unsafe { multiply_add(left, right, out, self.width, begun) };
                        continue;
                    }
                    let [rows, columns] = whole;
                    let lines = aside.0.iter_mut().take(rows).enumerate();
                    if begun {
                        for (r, line) in lines {
                            let sums = &self.out[place + r * self.width..][..columns];
                            for (aside, sum) in line.iter_mut().zip(sums) {
                                // SAFETY: the caller's promise.
                                *aside = unsafe { sum.assume_init() };
                            }
                        }
                    }
                    let out = aside.0.as_mut_ptr().cast();
                    // SAFETY: 32 rows of 32 sums; the rest is the caller's promise.
                    unsafe { multiply_add(left, right, out, STRIP, begun) };
                    for (r, line) in aside.0.iter().take(rows).enumerate() {
                        let sums = &mut self.out[place + r * self.width..][..columns];
                        for (sum, aside) in sums.iter_mut().zip(line) {
                            sum.write(*aside);
                        }
                    }
                }
            }
        }
        // SAFETY: the caller's promise.
        unsafe { release() };
    }
}

/// Sums of a block at the product's edge.
#[repr(align(64))]
struct Aside([[f32; STRIP]; STRIP]);

/// 32 rows by 32 columns of sums at `out`, `width` from one row to the next; those before count if they have `begun`.
///
/// # Safety
/// Tiles are configured, and the sums' places are there, and written if they have `begun`.
///
/// # Panics
/// Where both have not as many steps.
#[allow(unsafe_code)]
#[inline]
unsafe fn multiply_add(left: &[Step], right: &[Step], out: *mut f32, width: usize, begun: bool) {
    assert!(left.len() == right.len() && !left.is_empty());
    let below = out.wrapping_add(LINES * width);
    // SAFETY: the caller's promise; as many steps are read as both have.
    unsafe {
        match begun {
            true => asm!(
                "tileloadd tmm0, [{out} + {width}]",
                "tileloadd tmm1, [{out} + {width} + 64]",
                "tileloadd tmm2, [{below} + {width}]",
                "tileloadd tmm3, [{below} + {width} + 64]",
                out = in(reg) out, below = in(reg) below, width = in(reg) 4 * width, options(nostack, readonly)
            ),
            false => asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                options(nostack, nomem)
            ),
        }
        asm!(
            "2:",
            "tileloadd tmm6, [{b} + {line}]",
            "tileloadd tmm7, [{b} + {line} + 1024]",
            "tileloadd tmm4, [{a} + {line} + 2048]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{a} + {line} + 3072]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "tileloadd tmm4, [{a} + {line}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{a} + {line} + 1024]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "tileloadd tmm6, [{b} + {line} + 2048]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tileloadd tmm7, [{b} + {line} + 3072]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a}, 4096",
            "add {b}, 4096",
            "dec {n}",
            "jnz 2b",
            a = inout(reg) left.as_ptr() => _, b = inout(reg) right.as_ptr() => _, n = inout(reg) left.len() => _, line = in(reg) 64usize,
            options(nostack, readonly)
        );
        asm!(
            "tilestored [{out} + {width}], tmm0",
            "tilestored [{out} + {width} + 64], tmm1",
            "tilestored [{below} + {width}], tmm2",
            "tilestored [{below} + {width} + 64], tmm3",
            out = in(reg) out, below = in(reg) below, width = in(reg) 4 * width, options(nostack)
        );
    }
}
