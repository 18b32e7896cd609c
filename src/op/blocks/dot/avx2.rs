//! 32 weights at a time: magnitudes times activations that take the weights' signs (`vpmaddubsw`), four products a lane.

use std::arch::x86_64::*;

use super::super::BlockType;
use super::super::activations::Row;
use super::super::plain::{half, scale_min};

/// # Safety
/// The processor has what [`super::Isa::Avx2`] says, `w` is whole blocks, and the rows of `x` are as wide as `w`.
#[allow(unsafe_code)]
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn dot<const N: usize>(kind: BlockType, w: &[u8], x: [Row; N]) -> [f32; N] {
    let mut sum = [_mm256_setzero_ps(); N];
    for (i, block) in w.chunks_exact(kind.bytes()).enumerate() {
        // SAFETY: `block` is a whole one, and `x` has its entries.
        unsafe {
            match kind {
                BlockType::Q8_0 => {
                    let codes = load(&block[2..]);
                    for (sum, x) in sum.iter_mut().zip(&x) {
                        let scale = _mm256_set1_ps(half(block) * x.scales[i]);
                        *sum = _mm256_fmadd_ps(signed(codes, x, 32 * i), scale, *sum);
                    }
                }
                BlockType::Q4_0 => {
                    let packed = _mm_loadu_si128(block[2..18].as_ptr().cast());
                    let both = _mm256_set_m128i(_mm_srli_epi16::<4>(packed), packed);
                    let codes = _mm256_and_si256(both, _mm256_set1_epi8(15));
                    let codes = _mm256_sub_epi8(codes, _mm256_set1_epi8(8));
                    for (sum, x) in sum.iter_mut().zip(&x) {
                        let scale = _mm256_set1_ps(half(block) * x.scales[i]);
                        *sum = _mm256_fmadd_ps(signed(codes, x, 32 * i), scale, *sum);
                    }
                }
                BlockType::Q4K => q4_k(block, i, &x, &mut sum),
                BlockType::Q6K => q6_k(block, i, &x, &mut sum),
            }
        }
    }
    sum.map(|sum| {
        let mut lanes = [0f32; 8];
        // SAFETY: eight lanes.
        unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), sum) };
        lanes.iter().sum()
    })
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

#[allow(unsafe_code)]
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn q4_k<const N: usize>(block: &[u8], i: usize, x: &[Row; N], sum: &mut [__m256; N]) {
    let (d, min) = (half(block), half(&block[2..]));
    for j in 0..8 {
        let (s, m) = scale_min(&block[4..16], j);
        let packed = load(&block[16 + 32 * (j / 2)..]);
        let moved = match j % 2 {
            0 => packed,
            _ => _mm256_srli_epi16::<4>(packed),
        };
        let codes = _mm256_and_si256(moved, _mm256_set1_epi8(15));
        for (sum, x) in sum.iter_mut().zip(x) {
            let at = 256 * i + 32 * j;
            // SAFETY: as many as the slice is cut to.
            let q = unsafe { _mm256_loadu_si256(x.codes[at..at + 32].as_ptr().cast()) };
            let found = fours(_mm256_maddubs_epi16(codes, q));
            let scale = d * f32::from(s) * x.scales[8 * i + j];
            *sum = _mm256_fmadd_ps(found, _mm256_set1_ps(scale), *sum);
            let taken = -min * f32::from(m) * x.sums[8 * i + j];
            *sum = _mm256_add_ps(*sum, first_lane(taken));
        }
    }
}

/// `x` in the first lane, zeros in the others.
#[inline]
#[target_feature(enable = "avx2")]
fn first_lane(x: f32) -> __m256 {
    _mm256_set_ps(0., 0., 0., 0., 0., 0., 0., x)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn q6_k<const N: usize>(block: &[u8], i: usize, x: &[Row; N], sum: &mut [__m256; N]) {
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
        for (sum, x) in sum.iter_mut().zip(x) {
            let own = _mm256_mul_ps(scales, _mm256_set1_ps(x.scales[8 * i + j]));
            *sum = _mm256_fmadd_ps(signed(codes, x, 256 * i + 32 * j), own, *sum);
        }
    }
}
