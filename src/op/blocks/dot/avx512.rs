//! 512 weights at a time, in sixteen groups of 32 whose products with activations are whole numbers: `vpdpbusd` multiplies unsigned
//! with signed bytes, four products to a lane. What an unsigned code is too large by comes in as the accumulator's first value, or,
//! of codes of 4 bits, as a minimum. A group is a lane, which becomes `scale · product − minimum`; the lanes are added up.
//!
//! No vectors through closures and `map`: what the compiler does not inline has no vector registers.

use std::arch::x86_64::*;

use super::super::BlockType;
use super::super::activations::{Activations, GROUP, Row, Span};
use super::SPAN;
use super::avx2::{self, Q4_0, Q4_K, Q6_K, Q8_0, eight_bytes, filled, unsigned};
use super::panel::{Both, GROUPS, Panel, STEPS, TOGETHER};

/// Bytes from those that are computed with to those that are asked for.
const AHEAD: usize = 2048;

/// Weights of a vector of codes.
const CHUNK: usize = 64;
/// Groups of half a span.
const HALF: usize = GROUPS / 2;

/// # Safety
/// The processor has what [`super::Isa`] says of it, `w` is whole blocks, and the rows of `x` are as wide as `w`.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub unsafe fn dot<const R: usize, const N: usize>(
    kind: BlockType,
    w: [&[u8]; R],
    x: [Row; N],
) -> [[f32; N]; R] {
    match kind {
        BlockType::Q8_0 => rows::<Q8_0, R, N>(w, x),
        BlockType::Q6K => rows::<Q6_K, R, N>(w, x),
        BlockType::Q4K => rows::<Q4_K, R, N>(w, x),
        BlockType::Q4_0 => rows::<Q4_0, R, N>(w, x),
    }
}

#[allow(unsafe_code)]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn rows<const KIND: u8, const R: usize, const N: usize>(
    w: [&[u8]; R],
    x: [Row; N],
) -> [[f32; N]; R] {
    let bytes = const { 2 * eight_bytes(KIND) };
    let width = w[0].len();
    let spans = width.div_ceil(bytes);
    let long = |x: &Row| x.codes.len() >= SPAN * spans && x.scales.len() >= GROUPS * spans;
    assert!(x.iter().all(|x| long(x) && x.sums.len() == x.scales.len()));
    assert!(x.iter().all(|x| x.negated.len() == x.codes.len() / 4));
    assert!(w.iter().all(|w| w.len() == width));
    let mut totals = [[0.; N]; R];
    let mut room = [0; 544];
    for i in 0..spans {
        let part = bytes * i..width.min(bytes * (i + 1));
        for r in 0..R {
            let w = &w[r][part.clone()];
            ask_behind(w);
            let w = match w.len() < bytes {
                true => filled(w, &mut room),
                false => w,
            };
            let found = span::<KIND, N>(w, &x, i);
            for n in 0..N {
                totals[r][n] += found[n];
            }
        }
    }
    totals
}

/// The products of a whole span with the activations' span `i`, which is there.
#[allow(unsafe_code)]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn span<const KIND: u8, const N: usize>(w: &[u8], x: &[Row; N], i: usize) -> [f32; N] {
    let mut halves = [[_mm512_setzero_si512(); N]; 2];
    for (half, fours_of) in halves.iter_mut().enumerate() {
        let mut chunks = [_mm512_setzero_si512(); 4];
        let mut of_chunks = chunks;
        for j in 0..4 {
            chunks[j] = codes::<KIND>(w, 4 * half + j);
            if KIND == Q6_K {
                of_chunks[j] = q6_k_scales(w, 4 * half + j);
            }
        }
        for n in 0..N {
            let mut sums = [_mm512_setzero_si512(); 4];
            for j in 0..4 {
                let at = SPAN * i + CHUNK * (4 * half + j);
                // SAFETY: [`rows`] has asserted their number.
                sums[j] = unsafe { products::<KIND>(chunks[j], &x[n], at) };
                if KIND == Q6_K {
                    sums[j] = _mm512_mullo_epi32(sums[j], of_chunks[j]);
                }
            }
            fours_of[n] = fours(sums);
        }
    }
    let (low, high) = w.split_at(const { eight_bytes(KIND) });
    let (scales, mins) = avx2::scales::<KIND>(low);
    let (next_scales, next_mins) = avx2::scales::<KIND>(high);
    let (scales, mins) = (join(scales, next_scales), join(mins, next_mins));
    let mut totals = [0.; N];
    for n in 0..N {
        // SAFETY: as above.
        let (own, sums) = unsafe {
            (
                _mm512_loadu_ps(x[n].scales.as_ptr().add(GROUPS * i)),
                _mm512_loadu_ps(x[n].sums.as_ptr().add(GROUPS * i)),
            )
        };
        let found = _mm512_cvtepi32_ps(groups([halves[0][n], halves[1][n]]));
        let mut found = _mm512_mul_ps(found, _mm512_mul_ps(scales, own));
        if unsigned(KIND) {
            found = _mm512_fnmadd_ps(mins, sums, found);
        }
        totals[n] = total(found);
    }
    totals
}

/// Asks for what comes [`AHEAD`] behind a span, of this row or the next.
#[inline]
#[target_feature(enable = "avx512f")]
fn ask_behind(span: &[u8]) {
    for at in (0..span.len()).step_by(64) {
        _mm_prefetch::<_MM_HINT_T0>(span.as_ptr().wrapping_add(AHEAD + at).cast());
    }
}

/// Chunk `i` of a span's codes, unsigned.
#[allow(unsafe_code)]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2")]
fn codes<const KIND: u8>(w: &[u8], i: usize) -> __m512i {
    match KIND {
        Q8_0 | Q4_0 => {
            let both = two(
                avx2::codes::<KIND>(w, 2 * i),
                avx2::codes::<KIND>(w, 2 * i + 1),
            );
            match KIND {
                Q8_0 => _mm512_xor_si512(both, _mm512_set1_epi8(-128)),
                _ => both,
            }
        }
        Q4_K => {
            let at = i / 4 * 144 + 16 + 32 * (i % 4);
            // SAFETY: 32 bytes, as the slice is cut.
            let packed = unsafe { _mm256_loadu_si256(w[at..][..32].as_ptr().cast()) };
            let both = two(packed, _mm256_srli_epi16::<4>(packed));
            _mm512_and_si512(both, _mm512_set1_epi8(15))
        }
        _ => {
            let (block, part) = (&w[i / 4 * 210..][..210], i % 4 / 2);
            // SAFETY: 64 bytes of low bits and 32 of high ones a half.
            let (low, high) = unsafe {
                (
                    _mm512_loadu_si512(block[64 * part..][..64].as_ptr().cast()),
                    _mm256_loadu_si256(block[128 + 32 * part..][..32].as_ptr().cast()),
                )
            };
            // Two bits each, of the first 32 codes and the next, moved to bits 4 and 5.
            let (low, high) = match i % 2 {
                0 => (
                    low,
                    two(_mm256_slli_epi16::<4>(high), _mm256_slli_epi16::<2>(high)),
                ),
                _ => (
                    _mm512_srli_epi16::<4>(low),
                    two(high, _mm256_srli_epi16::<2>(high)),
                ),
            };
            let low = _mm512_and_si512(low, _mm512_set1_epi8(15));
            _mm512_or_si512(low, _mm512_and_si512(high, _mm512_set1_epi8(0x30)))
        }
    }
}

/// Of chunk `i`, the scale of every lane: one for sixteen codes.
#[allow(unsafe_code)]
#[inline]
#[target_feature(enable = "avx512f")]
fn q6_k_scales(w: &[u8], i: usize) -> __m512i {
    let at = i / 4 * 210 + 192 + 4 * (i % 4);
    let four = i32::from_le_bytes([w[at], w[at + 1], w[at + 2], w[at + 3]]);
    // Each of the four in four lanes.
    let lanes = _mm_set_epi8(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    _mm512_cvtepi8_epi32(_mm_shuffle_epi8(_mm_set1_epi32(four), lanes))
}

/// The products of 64 weights with `x` from entry `at` on, four to a lane.
///
/// # Safety
/// They are there.
#[allow(unsafe_code)]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn products<const KIND: u8>(codes: __m512i, x: &Row, at: usize) -> __m512i {
    // SAFETY: the caller's promise.
    let (q, negated) = unsafe {
        (
            _mm512_loadu_si512(x.codes.as_ptr().add(at).cast()),
            _mm512_loadu_si512(x.negated.as_ptr().add(at / 4).cast()),
        )
    };
    let first = match KIND {
        Q8_0 => _mm512_slli_epi32::<7>(negated),
        Q6_K => _mm512_slli_epi32::<5>(negated),
        _ => _mm512_setzero_si512(),
    };
    _mm512_dpbusd_epi32(first, codes, q)
}

/// Of each quarter, the sums of four vectors' lanes.
#[inline]
#[target_feature(enable = "avx512f")]
fn fours(sums: [__m512i; 4]) -> __m512i {
    let [a, b, c, d] = sums;
    let ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    let cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd))
}

/// The whole numbers of sixteen groups in their order, from those of quarters of eight chunks.
#[inline]
#[target_feature(enable = "avx512f")]
fn groups(halves: [__m512i; 2]) -> __m512i {
    let [a, b] = halves;
    let even = _mm512_shuffle_i32x4::<0b10_00_10_00>(a, b);
    let odd = _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b);
    let order = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    _mm512_permutexvar_epi32(order, _mm512_add_epi32(even, odd))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn two(low: __m256i, high: __m256i) -> __m512i {
    _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high)
}

#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn join(low: __m256, high: __m256) -> __m512 {
    _mm512_insertf32x8::<1>(_mm512_castps256_ps512(low), high)
}

/// The sum of the lanes, by halves.
#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx2")]
fn total(a: __m512) -> f32 {
    let (low, high) = (_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
    avx2::total(_mm256_add_ps(low, high))
}

/// What [`Panel`] does with AVX2: `sums [M, ROWS] +=` all rows of weights with those of `x` from row `first` on that there are sums for, at
/// most [`TOGETHER`], a span of each from entry `from` on.
///
/// # Panics
/// When there are more.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub fn tile<const KIND: u8>(
    panel: &mut Panel,
    x: &Activations,
    first: usize,
    from: usize,
    sums: &mut [Both],
) {
    match sums.len() {
        1 => tile_of::<KIND, 1>(panel, x, first, from, sums),
        2 => tile_of::<KIND, 2>(panel, x, first, from, sums),
        3 => tile_of::<KIND, 3>(panel, x, first, from, sums),
        4 => tile_of::<KIND, 4>(panel, x, first, from, sums),
        5 => tile_of::<KIND, 5>(panel, x, first, from, sums),
        6 => tile_of::<KIND, 6>(panel, x, first, from, sums),
        7 => tile_of::<KIND, 7>(panel, x, first, from, sums),
        _ => tile_of::<KIND, TOGETHER>(panel, x, first, from, sums),
    }
}

#[allow(unsafe_code)]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn tile_of<const KIND: u8, const N: usize>(
    panel: &mut Panel,
    x: &Activations,
    first: usize,
    from: usize,
    sums: &mut [Both],
) {
    assert!(sums.len() == N);
    let spans: &[Span; N] = x.spans(first, N, from).first_chunk().expect("as many");
    // Of both halves of a span: words are twice as long as bytes.
    let width = if KIND == Q6_K { 2 } else { 1 };
    let mut rows = [std::ptr::null::<i8>(); N];
    for n in 0..N {
        rows[n] = match KIND {
            Q6_K => x.row(first + n).wide[from..][..SPAN].as_ptr().cast(),
            _ => spans[n].codes.as_ptr(),
        };
    }
    // A number that the compiler does not know: it would unroll all steps, and run out of registers.
    let steps = std::hint::black_box(width * STEPS);
    for g in 0..HALF {
        // Lanes are added up by halves: first a group and the eighth after it.
        let mut found = [[_mm512_setzero_si512(); N]; 2];
        if KIND == Q8_0 {
            for n in 0..N {
                found[0][n] = _mm512_set1_epi32(128 * spans[n].negated[g]);
                found[1][n] = _mm512_set1_epi32(128 * spans[n].negated[g + HALF]);
            }
        }
        let codes = panel.codes[2 * width * STEPS * g..][..2 * width * STEPS * (HALF + 1)].as_ptr();
        let (low_row, high_row) = (width * GROUP * g, width * GROUP * (g + HALF));
        for s in 0..steps {
            // SAFETY: the panel holds them, as the slice was cut.
            let [low, high] = unsafe {
                [
                    wide_at(codes, 2 * s),
                    wide_at(codes, 2 * (width * HALF * STEPS + s)),
                ]
            };
            for n in 0..N {
                // SAFETY: four bytes of the groups each, of rows that are a span long.
                let [a, b] =
                    unsafe { [low_row, high_row].map(|group| four_at(rows[n], group + 4 * s)) };
                let [a, b] = [_mm512_set1_epi32(a), _mm512_set1_epi32(b)];
                if KIND == Q6_K {
                    found[0][n] = _mm512_dpwssd_epi32(found[0][n], low, a);
                    found[1][n] = _mm512_dpwssd_epi32(found[1][n], high, b);
                } else {
                    found[0][n] = _mm512_dpbusd_epi32(found[0][n], low, a);
                    found[1][n] = _mm512_dpbusd_epi32(found[1][n], high, b);
                }
            }
        }
        for (i, found) in found.iter().enumerate() {
            let g = g + HALF * i;
            let (scales, mins) = (wide(&panel.scales[g]), wide(&panel.mins[g]));
            for n in 0..N {
                let scale = _mm512_mul_ps(scales, _mm512_set1_ps(spans[n].scales[g]));
                let mut found = _mm512_mul_ps(_mm512_cvtepi32_ps(found[n]), scale);
                if unsigned(KIND) {
                    found = _mm512_fnmadd_ps(mins, _mm512_set1_ps(spans[n].sums[g]), found);
                }
                let lane = &mut panel.lanes[g % HALF][n];
                *lane = narrow(match i {
                    0 => found,
                    _ => _mm512_add_ps(wide(lane), found),
                });
            }
        }
    }
    for (n, sum) in sums.iter_mut().enumerate() {
        let mut four = [_mm512_setzero_ps(); 4];
        for (i, four) in four.iter_mut().enumerate() {
            *four = _mm512_add_ps(wide(&panel.lanes[i][n]), wide(&panel.lanes[i + 4][n]));
        }
        let even = _mm512_add_ps(four[0], four[2]);
        let odd = _mm512_add_ps(four[1], four[3]);
        *sum = narrow(_mm512_add_ps(wide(sum), _mm512_add_ps(even, odd)));
    }
}

/// Two vectors from the `i`th on.
///
/// # Safety
/// They are there.
#[allow(unsafe_code)]
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn wide_at(codes: *const __m256i, i: usize) -> __m512i {
    // SAFETY: as above.
    unsafe { _mm512_loadu_si512(codes.add(i).cast()) }
}

/// Four bytes from the `i`th on.
///
/// # Safety
/// They are there.
#[allow(unsafe_code)]
#[inline(always)]
unsafe fn four_at(codes: *const i8, i: usize) -> i32 {
    // SAFETY: as above.
    unsafe { codes.add(i).cast::<i32>().read_unaligned() }
}

#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
pub(super) fn wide(both: &Both) -> __m512 {
    join(both.0[0], both.0[1])
}

#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
pub(super) fn narrow(a: __m512) -> Both {
    Both([_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a)])
}
