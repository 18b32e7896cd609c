//! 32 weights at a time: magnitudes times activations that take the weights' signs (`vpmaddubsw`), four products a lane.

use std::arch::x86_64::*;

use super::super::BlockType;
use super::super::activations::Row;
use super::super::plain::half;

/// # Safety
/// The processor has what [`super::Isa`] says of it, `w` is whole blocks, and the rows of `x` are as wide as `w`.
#[allow(unsafe_code)]
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn dot<const N: usize>(kind: BlockType, w: &[u8], x: [Row; N]) -> [f32; N] {
    // Two sums, so that an addition need not wait for the one before.
    let mut sums = [[_mm256_setzero_ps(); 2]; N];
    for (i, block) in w.chunks_exact(kind.bytes()).enumerate() {
        match kind {
            BlockType::Q8_0 => small(load(&block[2..]), block, i, &x, &mut sums),
            BlockType::Q4_0 => {
                // SAFETY: sixteen bytes, as the slice is cut.
                let packed = unsafe { _mm_loadu_si128(block[2..18].as_ptr().cast()) };
                let both = _mm256_set_m128i(_mm_srli_epi16::<4>(packed), packed);
                let codes = _mm256_and_si256(both, _mm256_set1_epi8(15));
                let codes = _mm256_sub_epi8(codes, _mm256_set1_epi8(8));
                small(codes, block, i, &x, &mut sums);
            }
            BlockType::Q4K => q4_k(block, i, &x, &mut sums),
            BlockType::Q6K => q6_k(block, i, &x, &mut sums),
        }
    }
    sums.map(|[a, b]| total(_mm256_add_ps(a, b)))
}

/// A block of 32 signed codes with one scale.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn small<const N: usize>(
    codes: __m256i,
    block: &[u8],
    i: usize,
    x: &[Row; N],
    sums: &mut [[__m256; 2]; N],
) {
    let scale = wide_half(block);
    for (sums, x) in sums.iter_mut().zip(x) {
        let scale = _mm256_mul_ps(scale, _mm256_set1_ps(x.scales[i]));
        sums[i % 2] = _mm256_fmadd_ps(signed(codes, x, 32 * i), scale, sums[i % 2]);
    }
}

/// The half at the beginning in all lanes; broadcast, for an insertion would wait for what the register held before.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn wide_half(bytes: &[u8]) -> __m256 {
    let bits = i16::from_le_bytes([bytes[0], bytes[1]]);
    _mm256_cvtph_ps(_mm_set1_epi16(bits))
}

/// The sum of the lanes, by halves.
#[inline]
#[target_feature(enable = "avx2")]
fn total(a: __m256) -> f32 {
    let four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}

/// The first 32 bytes.
#[allow(unsafe_code)]
#[inline]
#[target_feature(enable = "avx2")]
fn load(bytes: &[u8]) -> __m256i {
    // SAFETY: as many as the slice is cut to.
    unsafe { _mm256_loadu_si256(bytes[..32].as_ptr().cast()) }
}

/// Pairs of products to sums of four.
#[inline]
#[target_feature(enable = "avx2")]
fn fours(pairs: __m256i) -> __m256 {
    _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
}

/// 32 signed codes times `x` from entry `at` on.
#[allow(unsafe_code)]
#[inline]
#[target_feature(enable = "avx2")]
fn signed(codes: __m256i, x: &Row, at: usize) -> __m256 {
    // SAFETY: as many as the slice is cut to.
    let q = unsafe { _mm256_loadu_si256(x.codes[at..at + 32].as_ptr().cast()) };
    fours(_mm256_maddubs_epi16(
        _mm256_abs_epi8(codes),
        _mm256_sign_epi8(q, codes),
    ))
}

/// Eight entries from `at` on.
#[allow(unsafe_code)]
#[inline]
#[target_feature(enable = "avx2")]
fn eight(entries: &[f32], at: usize) -> __m256 {
    // SAFETY: as many as the slice is cut to.
    unsafe { _mm256_loadu_ps(entries[at..at + 8].as_ptr()) }
}

/// Eight whole numbers in the bytes of a word.
#[inline]
#[target_feature(enable = "avx2")]
fn bytes(word: u64) -> __m256 {
    _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_set1_epi64x(word as i64)))
}

#[allow(unsafe_code)]
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn q4_k<const N: usize>(block: &[u8], i: usize, x: &[Row; N], sums: &mut [[__m256; 2]; N]) {
    let (scales, mins) = scales_mins(&block[4..16]);
    let scales = _mm256_mul_ps(wide_half(block), bytes(scales));
    let mins = _mm256_mul_ps(wide_half(&block[2..]), bytes(mins));
    let own: [__m256; N] =
        std::array::from_fn(|n| _mm256_mul_ps(scales, eight(x[n].scales, 8 * i)));
    for (sums, x) in sums.iter_mut().zip(x) {
        sums[0] = _mm256_fnmadd_ps(mins, eight(x.sums, 8 * i), sums[0]);
    }
    for j in 0..8 {
        let packed = load(&block[16 + 32 * (j / 2)..]);
        let moved = match j % 2 {
            0 => packed,
            _ => _mm256_srli_epi16::<4>(packed),
        };
        let codes = _mm256_and_si256(moved, _mm256_set1_epi8(15));
        for ((sums, x), own) in sums.iter_mut().zip(x).zip(&own) {
            let at = 256 * i + 32 * j;
            // SAFETY: as many as the slice is cut to.
            let q = unsafe { _mm256_loadu_si256(x.codes[at..at + 32].as_ptr().cast()) };
            let found = fours(_mm256_maddubs_epi16(codes, q));
            let scale = _mm256_permutevar8x32_ps(*own, _mm256_set1_epi32(j as i32));
            sums[j % 2] = _mm256_fmadd_ps(found, scale, sums[j % 2]);
        }
    }
}

/// The eight scales and the eight minima of 6 bits, a byte each.
#[inline]
fn scales_mins(packed: &[u8]) -> (u64, u64) {
    const SIX: u32 = 0x3f3f_3f3f;
    const FOUR: u32 = 0x0f0f_0f0f;
    const TWO: u32 = 0x0303_0303;
    let [a, b, c] = [0, 4, 8]
        .map(|at| u32::from_le_bytes([packed[at], packed[at + 1], packed[at + 2], packed[at + 3]]));
    let join = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    let scales = join(a & SIX, (c & FOUR) | (a >> 6 & TWO) << 4);
    let mins = join(b & SIX, (c >> 4 & FOUR) | (b >> 6 & TWO) << 4);
    (scales, mins)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn q6_k<const N: usize>(block: &[u8], i: usize, x: &[Row; N], sums: &mut [[__m256; 2]; N]) {
    let d = half(&block[208..]);
    for j in 0..8 {
        let (part, quarter) = (j / 4, j % 4);
        let low = load(&block[64 * part + 32 * (quarter % 2)..]);
        let low = match quarter / 2 {
            0 => low,
            _ => _mm256_srli_epi16::<4>(low),
        };
        let high = load(&block[128 + 32 * part..]);
        let high = match quarter {
            0 => _mm256_slli_epi16::<4>(high),
            1 => _mm256_slli_epi16::<2>(high),
            2 => high,
            _ => _mm256_srli_epi16::<2>(high),
        };
        let codes = _mm256_or_si256(
            _mm256_and_si256(low, _mm256_set1_epi8(15)),
            _mm256_and_si256(high, _mm256_set1_epi8(0x30)),
        );
        let codes = _mm256_sub_epi8(codes, _mm256_set1_epi8(32));
        let scale = |k: usize| d * f32::from(block[192 + k] as i8);
        let (s0, s1) = (scale(2 * j), scale(2 * j + 1));
        let scales = _mm256_set_ps(s1, s1, s1, s1, s0, s0, s0, s0);
        for (sums, x) in sums.iter_mut().zip(x) {
            let own = _mm256_mul_ps(scales, _mm256_set1_ps(x.scales[8 * i + j]));
            sums[j % 2] = _mm256_fmadd_ps(signed(codes, x, 256 * i + 32 * j), own, sums[j % 2]);
        }
    }
}
