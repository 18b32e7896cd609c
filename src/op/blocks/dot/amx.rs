//! [`super::avx512::tile`] by tiles (AMX): 16 rows of activations by 16 of weights, a group at a time, to the same sums in the same
//! order.

use std::arch::asm;
use std::arch::x86_64::*;

use super::super::activations::{Activations, GROUP, TILE};
use super::SPAN;
use super::avx2::unsigned;
use super::avx512::{narrow, wide};
use super::panel::{Both, GROUPS, Panel};

/// Rows of activations of a tile.
pub const TOKENS: usize = TILE;

/// A group's products: `[TOKENS, ROWS]`.
type Products = [[i32; 16]; TOKENS];

/// What [`tile`] works with: four of sums, two of activations, two of weights in turn.
pub const TILES: [(usize, usize); 8] = {
    let mut tiles = [(0, 0); 8];
    let (sums, activations, weights) = ((TOKENS, 64), (TOKENS, GROUP), (GROUP / 4, 64));
    (tiles[0], tiles[1], tiles[2], tiles[3]) = (sums, sums, sums, sums);
    (tiles[4], tiles[6]) = (activations, activations);
    (tiles[5], tiles[7]) = (weights, weights);
    tiles
};

/// `sums [M, ROWS] +=` all rows of weights with those of `x` from `row` on, a span from entry `from` on.
///
/// # Safety
/// [`TILES`] are configured.
///
/// # Panics
/// When there are more than [`TOKENS`], or not as many.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub unsafe fn tile<const KIND: u8>(
    panel: &Panel,
    x: &Activations,
    row: usize,
    from: usize,
    sums: &mut [Both],
) {
    #[repr(align(64))]
    struct Found([Products; GROUPS]);
    let mut found = std::mem::MaybeUninit::<Found>::uninit();
    let groups = x.groups();
    let codes = &x.tiles()[row * groups * GROUP + from * TOKENS..][..TOKENS * SPAN];
    assert!(sums.len() <= TOKENS && row.is_multiple_of(TOKENS) && from.is_multiple_of(GROUP));
    // SAFETY: the caller's promise; all groups' codes are there, the panel has as many, and there is room for their products.
    unsafe {
        asm!(
            "2:",
            "tilezero tmm0",
            "tileloadd tmm4, [{x} + {row}]",
            "tileloadd tmm5, [{w} + {line}]",
            "tdpbssd tmm0, tmm4, tmm5",
            "tilezero tmm1",
            "tileloadd tmm6, [{x} + {row} + 512]",
            "tileloadd tmm7, [{w} + {line} + 512]",
            "tdpbssd tmm1, tmm6, tmm7",
            "tilezero tmm2",
            "tileloadd tmm4, [{x} + {row} + 1024]",
            "tileloadd tmm5, [{w} + {line} + 1024]",
            "tdpbssd tmm2, tmm4, tmm5",
            "tilezero tmm3",
            "tileloadd tmm6, [{x} + {row} + 1536]",
            "tileloadd tmm7, [{w} + {line} + 1536]",
            "tdpbssd tmm3, tmm6, tmm7",
            "tilestored [{found} + {line}], tmm0",
            "tilestored [{found} + {line} + 1024], tmm1",
            "tilestored [{found} + {line} + 2048], tmm2",
            "tilestored [{found} + {line} + 3072], tmm3",
            "add {x}, 2048",
            "add {w}, 2048",
            "add {found}, 4096",
            "dec {n}",
            "jnz 2b",
            x = inout(reg) codes.as_ptr() => _, row = in(reg) GROUP,
            w = inout(reg) panel.codes.as_ptr() => _, line = in(reg) 64u64,
            found = inout(reg) found.as_mut_ptr() => _, n = inout(reg) GROUPS / 4 => _,
            options(nostack)
        );
    }
    // SAFETY: all is written.
    let Found(found) = unsafe { found.assume_init_ref() };
    let at = row * groups + from / GROUP;
    for (n, sum) in sums.iter_mut().enumerate() {
        let scales = &x.scales()[at + n * groups..][..GROUPS];
        let own = &x.sums()[at + n * groups..][..GROUPS];
        // Written out, so that all of it stays in registers.
        macro_rules! lane {
            ($g:expr) => {{
                // SAFETY: sixteen whole numbers.
                let found = unsafe { _mm512_load_si512((&raw const found[$g][n]).cast()) };
                let scale = _mm512_mul_ps(wide(&panel.scales[$g]), _mm512_set1_ps(scales[$g]));
                let product = _mm512_mul_ps(_mm512_cvtepi32_ps(found), scale);
                match unsigned(KIND) {
                    true => {
                        _mm512_fnmadd_ps(wide(&panel.mins[$g]), _mm512_set1_ps(own[$g]), product)
                    }
                    false => product,
                }
            }};
        }
        // By halves, as lanes are added up.
        macro_rules! four {
            ($g:expr) => {
                _mm512_add_ps(
                    _mm512_add_ps(lane!($g), lane!($g + 8)),
                    _mm512_add_ps(lane!($g + 4), lane!($g + 12)),
                )
            };
        }
        let (even, odd) = (
            _mm512_add_ps(four!(0), four!(2)),
            _mm512_add_ps(four!(1), four!(3)),
        );
        *sum = narrow(_mm512_add_ps(wide(sum), _mm512_add_ps(even, odd)));
    }
}
