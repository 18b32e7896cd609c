//! [`super::avx512::tile`] by tiles (AMX): 16 rows of activations by 16 of weights, a group at a time, to the same sums in the same
//! order.

use std::arch::asm;
use std::arch::x86_64::*;

use super::super::activations::{GROUP, Row};
use super::avx2::unsigned;
use super::avx512::{narrow, wide};
use super::panel::{Both, GROUPS, Panel};

/// Rows of activations of a tile.
pub const TOKENS: usize = 16;

/// A group's products: `[TOKENS, ROWS]`.
type Products = [[i32; 16]; TOKENS];

/// What [`tile`] works with: sums, activations, weights.
pub const TILES: [(usize, usize); 8] = {
    let mut tiles = [(0, 0); 8];
    tiles[0] = (TOKENS, 64);
    tiles[1] = (TOKENS, GROUP);
    tiles[2] = (GROUP / 4, 64);
    tiles
};

/// `sums [M, ROWS] +=` all rows of weights with the first of `x`, `span` entries each.
///
/// # Safety
/// [`TILES`] are configured, and the codes of [`TOKENS`] rows stand from those of the first of `x` on, `stride` bytes each.
///
/// # Panics
/// When there are more.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub unsafe fn tile<'a, const KIND: u8>(
    panel: &Panel,
    x: impl Fn(usize) -> Row<'a>,
    stride: usize,
    span: usize,
    sums: &mut [Both],
) {
    #[repr(align(64))]
    struct Found([Products; GROUPS]);
    assert!(sums.len() <= TOKENS && span <= GROUP * GROUPS && span > 0);
    let mut found = std::mem::MaybeUninit::<Found>::uninit();
    let groups = span.div_ceil(GROUP);
    // SAFETY: the caller's promise; the panel has the codes of all groups, and there is room for their products.
    unsafe {
        asm!(
            "2:",
            "tilezero tmm0",
            "tileloadd tmm1, [{x} + {stride}]",
            "tileloadd tmm2, [{w} + {line}]",
            "tdpbssd tmm0, tmm1, tmm2",
            "tilestored [{found} + {line}], tmm0",
            "add {x}, 32",
            "add {w}, 512",
            "add {found}, 1024",
            "dec {n}",
            "jnz 2b",
            x = inout(reg) x(0).codes.as_ptr() => _, stride = in(reg) stride,
            w = inout(reg) panel.codes.as_ptr() => _, line = in(reg) 64u64,
            found = inout(reg) found.as_mut_ptr() => _, n = inout(reg) groups => _,
            options(nostack)
        );
    }
    for (n, sum) in sums.iter_mut().enumerate() {
        let x = x(n);
        let mut lanes = [_mm512_setzero_ps(); GROUPS];
        for g in 0..groups {
            // SAFETY: the tiles of these groups are written.
            let found = unsafe { _mm512_load_si512((&raw const (*found.as_ptr()).0[g][n]).cast()) };
            let scale = _mm512_mul_ps(wide(&panel.scales[g]), _mm512_set1_ps(x.scales[g]));
            lanes[g] = _mm512_mul_ps(_mm512_cvtepi32_ps(found), scale);
            if unsigned(KIND) {
                let own = _mm512_set1_ps(x.sums[g]);
                lanes[g] = _mm512_fnmadd_ps(wide(&panel.mins[g]), own, lanes[g]);
            }
        }
        // By halves, as lanes are added up.
        for half in [8, 4, 2, 1] {
            for g in 0..half {
                lanes[g] = _mm512_add_ps(lanes[g], lanes[g + half]);
            }
        }
        *sum = narrow(_mm512_add_ps(wide(sum), lanes[0]));
    }
}
