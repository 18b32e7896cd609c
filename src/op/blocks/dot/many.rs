//! Products of many rows of activations with rows in blocks, panel after panel: each is unpacked once for all that it is multiplied with.

use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;

use super::super::BlockType;
use super::super::activations::Activations;
use super::avx2::{Q4_0, Q4_K, Q6_K, Q8_0, ask_for};
use super::panel::{AVX2, Both, Panel, ROWS, TOGETHER, tiled};
use super::{SPAN, amx, avx512};
use crate::op::amx::{configure, release};

/// Rows of activations whose spans stay in the second cache while [`PANELS`] panels pass, and so do their sums: the more the faster the products
/// are, for every block has the weights unpacked once more.
const fn block(kind: u8, by: u8) -> usize {
    match by {
        _ if tiled(kind, by) => 512,
        AVX2 => 128,
        _ => 256,
    }
}
/// Panels whose rows of activations' products are written side by side.
const PANELS: usize = 16;

/// What [`super::rows`] does.
///
/// # Safety
/// The processor has what it is done by.
///
/// # Panics
/// When the sizes do not fit.
#[allow(unsafe_code)]
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn rows<const BY: u8>(
    kind: BlockType,
    w: &[u8],
    row_bytes: usize,
    x: &Activations,
    rows: Range<usize>,
    write: impl Fn(usize, usize, &[f32]),
) {
    match kind {
        BlockType::Q8_0 => panels::<Q8_0, BY>(w, row_bytes, x, rows, write),
        BlockType::Q6K => panels::<Q6_K, BY>(w, row_bytes, x, rows, write),
        BlockType::Q4K => panels::<Q4_K, BY>(w, row_bytes, x, rows, write),
        BlockType::Q4_0 => panels::<Q4_0, BY>(w, row_bytes, x, rows, write),
    }
}

#[allow(unsafe_code)]
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn panels<const KIND: u8, const BY: u8>(
    w: &[u8],
    row_bytes: usize,
    x: &Activations,
    rows: Range<usize>,
    write: impl Fn(usize, usize, &[f32]),
) {
    thread_local! {
        /// `[PANELS, M, ROWS]`
        static SUMS: RefCell<Vec<Both>> = const { RefCell::new(Vec::new()) };
    }
    let zero = Both([_mm256_setzero_ps(); 2]);
    let mut panel = Panel::new();
    if tiled(KIND, BY) {
        // SAFETY: the processor has tiles.
        unsafe { configure(amx::TILES) };
    }
    SUMS.with_borrow_mut(|sums| {
        for first in rows.clone().step_by(PANELS * ROWS) {
            let count = (PANELS * ROWS).min(rows.end - first);
            let block = const { block(KIND, BY) };
            for top in (0..x.rows()).step_by(block) {
                let m = block.min(x.rows() - top);
                sums.clear();
                sums.resize(count.div_ceil(ROWS) * m, zero);
                // What stays in the second cache while all panels pass.
                let entries = (block / m * SPAN).min(x.width);
                let panel_of = |p: usize, from: usize| {
                    let end = x.width.min(from + SPAN);
                    let part = row_bytes * from / x.width..row_bytes * end / x.width;
                    let mut parts = [&w[..0]; ROWS];
                    for (r, row) in parts.iter_mut().enumerate() {
                        // What is past the last row is computed and not written.
                        let r = first + (p * ROWS + r).min(count - 1);
                        *row = &w[r * row_bytes..][part.clone()];
                    }
                    parts
                };
                for start in (0..x.width).step_by(entries) {
                    let mut here = panel_of(0, start);
                    for (p, sums) in sums.chunks_exact_mut(m).enumerate() {
                        let end = x.width.min(start + entries);
                        for from in (start..end).step_by(SPAN) {
                            let span = SPAN.min(x.width - from);
                            let next = match from + SPAN < end {
                                true => panel_of(p, from + SPAN),
                                false => panel_of(p + 1, start),
                            };
                            if BY != AVX2 {
                                for row in next {
                                    ask_for(row);
                                }
                            }
                            panel.unpack::<KIND, BY>(here);
                            here = next;
                            let together = const {
                                match BY {
                                    _ if tiled(KIND, BY) => amx::TOKENS,
                                    AVX2 => TOGETHER / 2,
                                    _ => TOGETHER,
                                }
                            };
                            for (i, sums) in sums.chunks_mut(together).enumerate() {
                                let row = top + together * i;
                                if BY != AVX2 {
                                    // SAFETY: the processor has them; codes of rows stand one behind the other, filled up to whole tiles.
                                    unsafe {
                                        match tiled(KIND, BY) {
                                            true => amx::tile::<KIND>(&panel, x, row, from, sums),
                                            false => {
                                                avx512::tile::<KIND>(&mut panel, x, row, from, sums)
                                            }
                                        }
                                    }
                                    continue;
                                }
                                let next = if i == 0 { &next[..] } else { &[] };
                                match sums.len() {
                                    1 => panel.tile::<KIND, 1>(x, row, from, span, sums, next),
                                    2 => panel.tile::<KIND, 2>(x, row, from, span, sums, next),
                                    3 => panel.tile::<KIND, 3>(x, row, from, span, sums, next),
                                    _ => panel.tile::<KIND, 4>(x, row, from, span, sums, next),
                                }
                            }
                        }
                    }
                }
                // Row after row of `x`: a place for each would be in a page of its own.
                let mut found = [0.; PANELS * ROWS];
                for i in 0..m {
                    for (found, sums) in found.chunks_exact_mut(ROWS).zip(sums.chunks_exact(m)) {
                        found.copy_from_slice(&entries_of(&sums[i]));
                    }
                    write(first, top + i, &found[..count]);
                }
            }
        }
    });
    if tiled(KIND, BY) {
        // SAFETY: as above.
        unsafe { release() };
    }
}

#[allow(unsafe_code)]
#[inline]
#[target_feature(enable = "avx2")]
fn entries_of(a: &Both) -> [f32; ROWS] {
    // SAFETY: a vector is eight numbers.
    unsafe { std::mem::transmute(a.0) }
}
