//! Products of rows in blocks with activations, by the instructions at hand.

use std::ops::Range;

use super::activations::{GROUP, Row};
use super::plain::{half, scale_min};
use super::{Activations, BlockType};
use crate::op::cpu::apart;
use crate::op::isa::{Isa, Level};

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod many;
#[cfg(target_arch = "x86_64")]
mod panel;

/// Weights of a row whose sum is finished before the next begins, where vectors compute.
#[cfg(target_arch = "x86_64")]
const SPAN: usize = 512;

/// Activation rows that share one reading of a row of blocks.
const TOGETHER: usize = 4;

/// Rows `rows` of `W`, blocks of `[N, K]` weights, with all of `x [M, K]`; `write` gets a row of `W`, one of `x`, and the products of
/// that and the rows of `W` behind it with the latter.
/// Every product is one sum in one order, whatever it is computed beside.
///
/// # Panics
/// When the sizes do not fit: callers have checked them.
pub fn rows(
    isa: Isa,
    kind: BlockType,
    w: &[u8],
    x: &Activations,
    rows: Range<usize>,
    write: impl Fn(usize, usize, &[f32]),
) {
    let row_bytes = x.width / kind.weights() * kind.bytes();
    assert!(x.width.is_multiple_of(kind.weights()) && row_bytes > 0);
    assert!(rows.end * row_bytes <= w.len());
    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code)]
    if isa.level() >= Level::Avx2 && x.rows() >= super::activations::MANY {
        // SAFETY: an `Isa` is of this processor.
        return unsafe {
            match isa.level() {
                Level::Avx512 => {
                    many::rows::<{ panel::AVX512 }>(kind, w, row_bytes, x, rows, write)
                }
                Level::Amx => many::rows::<{ panel::AMX }>(kind, w, row_bytes, x, rows, write),
                _ => many::rows::<{ panel::AVX2 }>(kind, w, row_bytes, x, rows, write),
            }
        };
    }
    let w = |row: usize| &w[row * row_bytes..][..row_bytes];
    // Without vectors weights are read once more for every few rows: loops are slower than memory.
    for first in (0..x.rows()).step_by(TOGETHER) {
        match x.rows() - first {
            1 => few::<1>(isa, kind, w, x, first, rows.clone(), &write),
            2 => few::<2>(isa, kind, w, x, first, rows.clone(), &write),
            3 => few::<3>(isa, kind, w, x, first, rows.clone(), &write),
            _ => few::<TOGETHER>(isa, kind, w, x, first, rows.clone(), &write),
        }
    }
}

/// Writes the products of rows `rows` of `w` with `N` rows of `x`, from `first` on.
fn few<'a, const N: usize>(
    isa: Isa,
    kind: BlockType,
    w: impl Fn(usize) -> &'a [u8],
    x: &Activations,
    first: usize,
    rows: Range<usize>,
    write: impl Fn(usize, usize, &[f32]),
) {
    let x = std::array::from_fn(|n| x.row(first + n));
    let write = |row: usize, sums: [f32; N]| {
        for (n, sum) in sums.into_iter().enumerate() {
            write(row, first + n, &[sum]);
        }
    };
    let (together, left) = apart(rows);
    for places in together {
        let sums = dot::<_, N>(isa, kind, places.map(&w), x);
        (places.into_iter().zip(sums)).for_each(|(row, sums)| write(row, sums));
    }
    for row in left {
        let [sums] = dot(isa, kind, [w(row)], x);
        write(row, sums);
    }
}

/// `R` rows of blocks with `N` rows of activations.
fn dot<const R: usize, const N: usize>(
    isa: Isa,
    kind: BlockType,
    w: [&[u8]; R],
    x: [Row; N],
) -> [[f32; N]; R] {
    match isa.level() {
        Level::Portable => w.map(|w| x.map(|x| portable(kind, w, x))),
        // SAFETY: an `Isa` is of this processor; rows were cut to whole blocks, as wide as those of `x`.
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code)]
        Level::Avx2 => unsafe { avx2::dot(kind, w, x) },
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code)]
        Level::Avx512 | Level::Amx => unsafe { avx512::dot(kind, w, x) },
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
