//! Sixteen rows of weights that are unpacked for many rows of activations, [`SPAN`] weights of each, `BY` AVX2, AVX-512 or tiles: a lane
//! is a row and nothing is added across lanes. Sums are those of [`super::avx2`] or [`super::avx512`], in its order.
//!
//! Codes of 4 bits, which are unsigned, are multiplied as bytes, four to a lane (their sums of a group fit 16 bits), and so are those of
//! 8 bits with tiles, and with AVX-512, moved by 128. Others are multiplied as 16 bits, two to a lane, Q6_K's with their scales in them.

use std::arch::x86_64::*;

use super::super::activations::{Activations, GROUP, Row};
use super::SPAN;
use super::avx2::{
    Q4_0, Q6_K, Q8_0, ask_for, codes, eight_bytes, eight_halves, filled, ones, scales, unsigned,
};

pub const AVX2: u8 = 0;
pub const AVX512: u8 = 1;
pub const AMX: u8 = 2;

/// Rows of weights in two vectors.
pub(super) const ROWS: usize = 16;
pub(super) const GROUPS: usize = SPAN / GROUP;
/// Rows of activations that share a reading of a panel with AVX-512.
pub(super) const TOGETHER: usize = 8;
/// Vectors of a group's unsigned codes of eight rows.
pub(super) const STEPS: usize = GROUP / 4;

/// Steps that are written out: counting them takes as long as a load.
const TURN: usize = 2;
const _: () = assert!(STEPS.is_multiple_of(TURN));

/// Of [`ROWS`] rows.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Both(pub [__m256; 2]);

/// Weights of [`ROWS`] rows, at most [`SPAN`] of each.
#[repr(align(64))]
pub(super) struct Panel {
    /// Group after group: of each step (four weights, or two in 16 bits) both vectors.
    pub codes: [__m256i; GROUPS * 2 * STEPS * 2],
    pub scales: [Both; GROUPS],
    pub mins: [Both; GROUPS],
    /// Sums on their way: of every eighth group and row of activations.
    pub lanes: [[Both; TOGETHER]; GROUPS / 2],
    /// Blocks of eight rows that are fewer than a whole number of eight groups.
    rooms: [[u8; 272]; 8],
}

/// Whether codes are multiplied as bytes.
const fn as_bytes(kind: u8, by: u8) -> bool {
    unsigned(kind) || by != AVX2 && kind == Q8_0
}

/// Steps of a group with AVX2, where signed codes are words.
const fn steps_of(kind: u8) -> usize {
    match as_bytes(kind, AVX2) {
        true => STEPS,
        false => 2 * STEPS,
    }
}

/// Whether tiles are used, which have no 16 bits.
pub(super) const fn tiled(kind: u8, by: u8) -> bool {
    by == AMX && kind != Q6_K
}

impl Panel {
    #[target_feature(enable = "avx2")]
    pub fn new() -> Self {
        let zero = Both([_mm256_setzero_ps(); 2]);
        Self {
            codes: [_mm256_setzero_si256(); GROUPS * 2 * STEPS * 2],
            scales: [zero; GROUPS],
            mins: [zero; GROUPS],
            lanes: [[zero; TOGETHER]; GROUPS / 2],
            rooms: [[0; 272]; 8],
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub fn unpack<const KIND: u8, const BY: u8>(&mut self, rows: [&[u8]; ROWS]) {
        let (bytes, zero) = (const { eight_bytes(KIND) }, _mm256_setzero_si256());
        if BY != AVX2 {
            // All groups of a span are computed with.
            self.scales = [Both([_mm256_setzero_ps(); 2]); GROUPS];
            self.mins = self.scales;
        }
        for i in 0..rows[0].len().div_ceil(bytes) {
            for strip in 0..2 {
                let mut w = [&rows[0][..0]; 8];
                for (r, room) in self.rooms.iter_mut().enumerate() {
                    let row = &rows[8 * strip + r][i * bytes..];
                    w[r] = match row.len() < bytes {
                        true => filled(row, room),
                        false => &row[..bytes],
                    };
                }
                let (of_scales, of_mins) = columns_of_scales::<KIND>(w);
                let sixteenths = match KIND {
                    Q6_K => q6_k_columns(w),
                    _ => [[zero; 2]; 8],
                };
                for j in 0..8 {
                    let g = 8 * i + j;
                    self.scales[g].0[strip] = of_scales[j];
                    self.mins[g].0[strip] = of_mins[j];
                    let mut steps = [zero; 8];
                    for r in 0..8 {
                        steps[r] = codes::<KIND>(w[r], j);
                    }
                    let steps = transposed(steps);
                    for s in 0..STEPS {
                        if as_bytes(KIND, BY) {
                            self.codes[2 * (g * STEPS + s) + strip] = match KIND {
                                Q8_0 if BY == AVX512 => {
                                    _mm256_xor_si256(steps[s], _mm256_set1_epi8(-128))
                                }
                                _ => steps[s],
                            };
                            continue;
                        }
                        // The first and third weight, the second and fourth.
                        let mut two = [
                            _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(steps[s])),
                            _mm256_srai_epi16::<8>(steps[s]),
                        ];
                        for (half, codes) in two.iter_mut().enumerate() {
                            if KIND == Q6_K {
                                *codes = _mm256_mullo_epi16(*codes, sixteenths[j][s / 4]);
                            }
                            self.codes[2 * ((g * STEPS + s) * 2 + half) + strip] = *codes;
                        }
                    }
                }
            }
        }
    }

    /// `sums [N, ROWS] +=` all rows of weights with `N` rows of `x` from `row` on, `span` entries each from `from` on. With each group a row of
    /// `next` is asked for, so a short span asks for fewer: memory gives them no faster at once than meanwhile.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub fn tile<const KIND: u8, const N: usize>(
        &mut self,
        x: &Activations,
        row: usize,
        from: usize,
        span: usize,
        sums: &mut [Both],
        next: &[&[u8]],
    ) {
        let mut rows = [Row::default(); N];
        for (n, part) in rows.iter_mut().enumerate() {
            *part = x.row(row + n).from(from);
        }
        let found = self.groups::<KIND, N>(&rows, span / GROUP, next);
        for (sums, found) in sums.iter_mut().zip(found) {
            for (sum, found) in sums.0.iter_mut().zip(found) {
                *sum = _mm256_add_ps(*sum, found);
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn groups<const KIND: u8, const N: usize>(
        &mut self,
        x: &[Row; N],
        groups: usize,
        next: &[&[u8]],
    ) -> [[__m256; 2]; N] {
        // A number that the compiler does not know: it would unroll all steps, and run out of registers.
        let steps = std::hint::black_box(const { steps_of(KIND) });
        for g in 0..groups.max(8) {
            let first = g < 8;
            if let Some(row) = next.get(g) {
                ask_for(row);
            }
            if g >= groups {
                self.lanes[g] = [Both([_mm256_setzero_ps(); 2]); TOGETHER];
                continue;
            }
            let found = self.sums::<KIND, N>(x, g, steps);
            for n in 0..N {
                let scale = _mm256_set1_ps(x[n].scales[g]);
                let own = _mm256_set1_ps(x[n].sums[g]);
                for strip in 0..2 {
                    let lane = &mut self.lanes[g % 8][n].0[strip];
                    let scale = _mm256_mul_ps(self.scales[g].0[strip], scale);
                    let found = _mm256_cvtepi32_ps(found[n][strip]);
                    let mut sum = match first {
                        true => _mm256_mul_ps(found, scale),
                        false => _mm256_fmadd_ps(found, scale, *lane),
                    };
                    if unsigned(KIND) {
                        sum = _mm256_fnmadd_ps(self.mins[g].0[strip], own, sum);
                    }
                    *lane = sum;
                }
            }
        }
        // By halves, as lanes are added up.
        let mut sums = [[_mm256_setzero_ps(); 2]; N];
        for (n, sums) in sums.iter_mut().enumerate() {
            for (strip, sum) in sums.iter_mut().enumerate() {
                let lane = |j: usize| &self.lanes[j][n].0[strip];
                let [a, b, c, d] = [
                    _mm256_add_ps(*lane(0), *lane(4)),
                    _mm256_add_ps(*lane(2), *lane(6)),
                    _mm256_add_ps(*lane(1), *lane(5)),
                    _mm256_add_ps(*lane(3), *lane(7)),
                ];
                *sum = _mm256_add_ps(_mm256_add_ps(a, b), _mm256_add_ps(c, d));
            }
        }
        sums
    }

    /// A group: unsigned bytes, at most 8 · 2 · 15 · 127 in 16 bits, or signed words. A step is four bytes of a row of activations.
    #[allow(unsafe_code)]
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn sums<const KIND: u8, const N: usize>(
        &self,
        x: &[Row; N],
        g: usize,
        steps: usize,
    ) -> [[__m256i; 2]; N] {
        let most = const { steps_of(KIND) };
        assert!(steps <= most);
        let codes = &self.codes[2 * most * g..][..2 * most];
        let mut rows = [std::ptr::null::<u8>(); N];
        for (row, x) in rows.iter_mut().zip(x) {
            *row = match unsigned(KIND) {
                true => x.codes[GROUP * g..][..GROUP].as_ptr().cast(),
                false => x.wide[GROUP * g..][..GROUP].as_ptr().cast(),
            };
        }
        let mut sums = [[_mm256_setzero_si256(); 2]; N];
        for first in (0..steps).step_by(TURN) {
            for s in first..first + TURN {
                // SAFETY: the panel holds them, as the slice was cut for so many steps.
                let w = unsafe { [*codes.get_unchecked(2 * s), *codes.get_unchecked(2 * s + 1)] };
                for n in 0..N {
                    // SAFETY: a step of the group's codes, as above.
                    let q = unsafe { rows[n].add(4 * s).cast::<i32>().read_unaligned() };
                    let q = _mm256_set1_epi32(q);
                    for strip in 0..2 {
                        let sum = &mut sums[n][strip];
                        *sum = match unsigned(KIND) {
                            true => _mm256_add_epi16(*sum, _mm256_maddubs_epi16(w[strip], q)),
                            false => _mm256_add_epi32(*sum, _mm256_madd_epi16(w[strip], q)),
                        };
                    }
                }
            }
        }
        if unsigned(KIND) {
            for sum in sums.as_flattened_mut() {
                *sum = ones(*sum);
            }
        }
        sums
    }
}

/// Eight rows of eight words as columns.
#[inline]
#[target_feature(enable = "avx2")]
fn transposed(rows: [__m256i; 8]) -> [__m256i; 8] {
    let mut halves = rows;
    for first in [0, 4] {
        let [a, b, c, d] = [
            rows[first],
            rows[first + 1],
            rows[first + 2],
            rows[first + 3],
        ];
        let (ab, cd) = (_mm256_unpacklo_epi32(a, b), _mm256_unpacklo_epi32(c, d));
        halves[first] = _mm256_unpacklo_epi64(ab, cd);
        halves[first + 1] = _mm256_unpackhi_epi64(ab, cd);
        let (ab, cd) = (_mm256_unpackhi_epi32(a, b), _mm256_unpackhi_epi32(c, d));
        halves[first + 2] = _mm256_unpacklo_epi64(ab, cd);
        halves[first + 3] = _mm256_unpackhi_epi64(ab, cd);
    }
    let mut columns = rows;
    for j in 0..4 {
        let (a, b) = (halves[j], halves[j + 4]);
        columns[j] = _mm256_permute2x128_si256::<0x20>(a, b);
        columns[j + 4] = _mm256_permute2x128_si256::<0x31>(a, b);
    }
    columns
}

/// The scales and minima of eight rows' groups, a lane a row.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn columns_of_scales<const KIND: u8>(w: [&[u8]; 8]) -> ([__m256; 8], [__m256; 8]) {
    let zero = _mm256_setzero_ps();
    let (mut of_scales, mut of_mins) = ([zero; 8], [zero; 8]);
    match KIND {
        Q8_0 | Q4_0 => {
            for j in 0..8 {
                of_scales[j] = eight_halves(w, j * eight_bytes(KIND) / 8);
                if KIND == Q4_0 {
                    of_mins[j] = _mm256_mul_ps(of_scales[j], _mm256_set1_ps(8.));
                }
            }
        }
        Q6_K => of_scales = [eight_halves(w, 208); 8],
        _ => {
            let (mut rows, mut mins) = ([_mm256_setzero_si256(); 8], [_mm256_setzero_si256(); 8]);
            for r in 0..8 {
                let (scales, of_mins) = scales::<KIND>(w[r]);
                rows[r] = _mm256_castps_si256(scales);
                mins[r] = _mm256_castps_si256(of_mins);
            }
            let (rows, mins) = (transposed(rows), transposed(mins));
            for j in 0..8 {
                of_scales[j] = _mm256_castsi256_ps(rows[j]);
                of_mins[j] = _mm256_castsi256_ps(mins[j]);
            }
        }
    }
    (of_scales, of_mins)
}

/// The scales of 16 weights of eight rows of Q6_K, twice in a lane: `[group][half]`, a lane a row.
#[allow(unsafe_code)]
#[inline]
#[target_feature(enable = "avx2")]
fn q6_k_columns(rows: [&[u8]; 8]) -> [[__m256i; 2]; 8] {
    let mut found = [[_mm256_setzero_si256(); 2]; 8];
    for first in [0, 8] {
        let mut words = [_mm256_setzero_si256(); 8];
        for r in 0..8 {
            // SAFETY: eight bytes, as the slice is cut.
            let bytes = unsafe { _mm_loadl_epi64(rows[r][192 + first..][..8].as_ptr().cast()) };
            let word = _mm256_cvtepi8_epi32(bytes);
            let low = _mm256_and_si256(word, _mm256_set1_epi32(0xffff));
            words[r] = _mm256_or_si256(low, _mm256_slli_epi32::<16>(word));
        }
        let words = transposed(words);
        for j in 0..8 {
            found[(first + j) / 2][j % 2] = words[j];
        }
    }
    found
}
