//! 64 weights at a time: unsigned codes times signed activations (`vpdpbusd`), four products a lane.
//! What an unsigned code is too large by comes in as the accumulator's first value.

use std::arch::x86_64::*;

use super::super::BlockType;
use super::super::activations::Row;

/// # Safety
/// The processor has what [`super::Isa::Avx512`] says, `w` is whole blocks, and the rows of `x` are as wide as `w`, filled up to 64.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub unsafe fn dot<const N: usize>(kind: BlockType, w: &[u8], x: [Row; N]) -> [f32; N] {
    // SAFETY: the caller's promise is each function's.
    unsafe {
        match kind {
            BlockType::Q8_0 => q8_0(w, x),
            BlockType::Q4_0 => q4_0(w, x),
            BlockType::Q4K => q4_k(w, x),
            BlockType::Q6K => q6_k(w, x),
        }
    }
}

/// The codes of 64 weights with `x` from entry `at` on, `offset · Σ x` taken off: 16 sums of four.
#[allow(unsafe_code)]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn sums<const OFFSET_LOG2: u32>(codes: __m512i, x: &Row, at: usize) -> __m512 {
    debug_assert!(at + 64 <= x.codes.len());
    // SAFETY: 64 codes and 16 sums of four stand from `at` on.
    let (q, negated) = unsafe {
        (
            _mm512_loadu_si512(x.codes.as_ptr().add(at).cast()),
            _mm512_loadu_si512(x.negated.as_ptr().add(at / 4).cast()),
        )
    };
    let first = match OFFSET_LOG2 {
        0 => _mm512_setzero_si512(),
        log2 => _mm512_sllv_epi32(negated, _mm512_set1_epi32(log2 as i32)),
    };
    _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(first, codes, q))
}

/// Two f32 to the two halves of a vector.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn halves(low: f32, high: f32) -> __m512 {
    _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(low), _mm512_set1_ps(high))
}

/// Broadcast: put into the lowest lane alone, the compiler keeps the others of some register, the sum's as it happens, and every
/// block waits for the one before.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn half(bytes: &[u8]) -> f32 {
    let bits = u16::from_le_bytes([bytes[0], bytes[1]]) as i16;
    _mm_cvtss_f32(_mm_cvtph_ps(_mm_set1_epi16(bits)))
}

/// The scales of two blocks, whose f16 are `d0` and `d1`, times those of two groups of `x` from group `at` on, in the two halves of a
/// vector.
#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx2,f16c")]
fn scales(d0: &[u8], d1: &[u8], x: &Row, at: usize) -> __m512 {
    let bits = u32::from_le_bytes([d0[0], d0[1], d1[0], d1[1]]) as i32;
    let d = _mm_cvtph_ps(_mm_set1_epi32(bits));
    let own = _mm_setr_ps(x.scales[at], x.scales[at + 1], 0., 0.);
    let both = _mm512_castps128_ps512(_mm_mul_ps(d, own));
    let place = _mm512_mask_blend_epi32(0xff00, _mm512_setzero_si512(), _mm512_set1_epi32(1));
    _mm512_permutexvar_ps(place, both)
}

#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn q8_0<const N: usize>(w: &[u8], x: [Row; N]) -> [f32; N] {
    let mut sum = [_mm512_setzero_ps(); N];
    let sign = _mm512_set1_epi8(-128);
    let pairs = w.chunks_exact(68);
    let (pairs_len, last) = (pairs.len(), pairs.remainder());
    for (i, pair) in pairs.enumerate() {
        // SAFETY: a block's codes are bytes 2 to 34; 64 entries of x stand from 64 i on.
        unsafe {
            let low = _mm256_loadu_si256(pair.as_ptr().add(2).cast());
            let high = _mm256_loadu_si256(pair.as_ptr().add(36).cast());
            let codes = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high);
            let codes = _mm512_xor_si512(codes, sign);
            for (sum, x) in sum.iter_mut().zip(&x) {
                let scale = scales(pair, &pair[34..], x, 2 * i);
                *sum = _mm512_fmadd_ps(sums::<7>(codes, x, 64 * i), scale, *sum);
            }
        }
    }
    if !last.is_empty() {
        // SAFETY: as above; the rows of x are filled up to 64 with zeros.
        unsafe {
            let codes = _mm512_castsi256_si512(_mm256_loadu_si256(last.as_ptr().add(2).cast()));
            let codes = _mm512_xor_si512(codes, sign);
            for (sum, x) in sum.iter_mut().zip(&x) {
                let scale = halves(half(last) * x.scales[2 * pairs_len], 0.);
                *sum = _mm512_fmadd_ps(sums::<7>(codes, x, 64 * pairs_len), scale, *sum);
            }
        }
    }
    sum.map(|sum| _mm512_reduce_add_ps(sum))
}

/// The 32 codes of a Q4_0 block, in order.
#[allow(unsafe_code)]
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn nibbles(block: &[u8]) -> __m256i {
    debug_assert!(block.len() >= 18);
    // SAFETY: the codes are bytes 2 to 18.
    let packed = unsafe { _mm_loadu_si128(block.as_ptr().add(2).cast()) };
    let both = _mm256_set_m128i(_mm_srli_epi16::<4>(packed), packed);
    _mm256_and_si256(both, _mm256_set1_epi8(15))
}

#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn q4_0<const N: usize>(w: &[u8], x: [Row; N]) -> [f32; N] {
    let mut sum = [_mm512_setzero_ps(); N];
    let pairs = w.chunks_exact(36);
    let (pairs_len, last) = (pairs.len(), pairs.remainder());
    for (i, pair) in pairs.enumerate() {
        // SAFETY: both are whole blocks; 64 entries of x stand from 64 i on.
        unsafe {
            let (low, high) = (nibbles(pair), nibbles(&pair[18..]));
            let codes = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high);
            for (sum, x) in sum.iter_mut().zip(&x) {
                let scale = scales(pair, &pair[18..], x, 2 * i);
                *sum = _mm512_fmadd_ps(sums::<3>(codes, x, 64 * i), scale, *sum);
            }
        }
    }
    if !last.is_empty() {
        // SAFETY: as above; the rows of x are filled up to 64 with zeros.
        unsafe {
            let codes = _mm512_castsi256_si512(nibbles(last));
            for (sum, x) in sum.iter_mut().zip(&x) {
                let scale = halves(half(last) * x.scales[2 * pairs_len], 0.);
                *sum = _mm512_fmadd_ps(sums::<3>(codes, x, 64 * pairs_len), scale, *sum);
            }
        }
    }
    sum.map(|sum| _mm512_reduce_add_ps(sum))
}

#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn q4_k<const N: usize>(w: &[u8], x: [Row; N]) -> [f32; N] {
    let mut sum = [_mm512_setzero_ps(); N];
    let mut mins = [_mm256_setzero_ps(); N];
    let low_bits = _mm256_set1_epi8(15);
    for (i, block) in w.chunks_exact(144).enumerate() {
        let both = u32::from_le_bytes([block[0], block[1], block[2], block[3]]) as i32;
        let d = _mm_cvtph_ps(_mm_cvtsi32_si128(both));
        let min = _mm_movehdup_ps(d);
        // The twelve bytes hold two rows of eight 6-bit numbers.
        let word = |at: usize| {
            u32::from_le_bytes([block[4 + at], block[5 + at], block[6 + at], block[7 + at]])
        };
        let (a, b, c) = (word(0), word(4), word(8));
        let (six, four, two) = (0x3f3f_3f3f, 0x0f0f_0f0f, 0x0303_0303);
        let pack = |low: u32, high: u32| {
            _mm_cvtsi64_si128((u64::from(low) | u64::from(high) << 32) as i64)
        };
        let s = pack(a & six, c & four | (a >> 6 & two) << 4);
        let m = pack(b & six, c >> 4 & four | (b >> 6 & two) << 4);
        let s = _mm256_mul_ps(
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(s)),
            _mm256_broadcastss_ps(d),
        );
        let m = _mm256_mul_ps(
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(m)),
            _mm256_broadcastss_ps(min),
        );
        let mut scales = [_mm512_setzero_ps(); N];
        for n in 0..N {
            // SAFETY: eight groups stand from 8 i on.
            unsafe {
                let own = _mm256_loadu_ps(x[n].scales[8 * i..][..8].as_ptr());
                let sums = _mm256_loadu_ps(x[n].sums[8 * i..][..8].as_ptr());
                scales[n] = _mm512_castps256_ps512(_mm256_mul_ps(s, own));
                mins[n] = _mm256_fmadd_ps(m, sums, mins[n]);
            }
        }
        for chunk in 0..4 {
            // SAFETY: 128 bytes of codes stand from byte 16 on; 256 entries of x from 256 i on.
            unsafe {
                let packed = _mm256_loadu_si256(block.as_ptr().add(16 + 32 * chunk).cast());
                let low = _mm256_and_si256(packed, low_bits);
                let high = _mm256_and_si256(_mm256_srli_epi16::<4>(packed), low_bits);
                let codes = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high);
                let at = 2 * chunk as i32;
                let place = _mm512_mask_blend_epi32(
                    0xff00,
                    _mm512_set1_epi32(at),
                    _mm512_set1_epi32(at + 1),
                );
                for n in 0..N {
                    let scale = _mm512_permutexvar_ps(place, scales[n]);
                    let found = sums::<0>(codes, &x[n], 256 * i + 64 * chunk);
                    sum[n] = _mm512_fmadd_ps(found, scale, sum[n]);
                }
            }
        }
    }
    let mut found = [0.; N];
    for n in 0..N {
        let mins = _mm512_zextps256_ps512(mins[n]);
        found[n] = _mm512_reduce_add_ps(_mm512_sub_ps(sum[n], mins));
    }
    found
}

#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn q6_k<const N: usize>(w: &[u8], x: [Row; N]) -> [f32; N] {
    let mut sum = [_mm512_setzero_ps(); N];
    let (low_bits, high_bits) = (_mm512_set1_epi8(15), _mm512_set1_epi8(0x30));
    // Every group of x spans two scales of w, every scale of w four lanes.
    let groups = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    let lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    for (i, block) in w.chunks_exact(210).enumerate() {
        let mut scales = [_mm512_setzero_ps(); N];
        // SAFETY: 16 scales stand from byte 192 on, eight groups of x from 8 i on.
        unsafe {
            let s = _mm512_cvtepi8_epi32(_mm_loadu_si128(block.as_ptr().add(192).cast()));
            let s = _mm512_mul_ps(_mm512_cvtepi32_ps(s), _mm512_set1_ps(half(&block[208..])));
            for n in 0..N {
                let own = _mm256_loadu_ps(x[n].scales[8 * i..][..8].as_ptr());
                let own = _mm512_permutexvar_ps(groups, _mm512_castps256_ps512(own));
                scales[n] = _mm512_mul_ps(s, own);
            }
        }
        for part in 0..2 {
            // SAFETY: 64 bytes of low bits and 32 of high ones a half; 256 entries of x from 256 i on.
            unsafe {
                let low = _mm512_loadu_si512(block.as_ptr().add(64 * part).cast());
                let high = _mm256_loadu_si256(block.as_ptr().add(128 + 32 * part).cast());
                // Bits of the first and second 32 codes, then of the third and fourth, moved to bits 4 and 5.
                let both = _mm512_inserti64x4::<1>(
                    _mm512_castsi256_si512(_mm256_slli_epi16::<4>(high)),
                    _mm256_slli_epi16::<2>(high),
                );
                let next = _mm512_inserti64x4::<1>(
                    _mm512_castsi256_si512(high),
                    _mm256_srli_epi16::<2>(high),
                );
                let first = _mm512_or_si512(
                    _mm512_and_si512(low, low_bits),
                    _mm512_and_si512(both, high_bits),
                );
                let second = _mm512_or_si512(
                    _mm512_and_si512(_mm512_srli_epi16::<4>(low), low_bits),
                    _mm512_and_si512(next, high_bits),
                );
                for (chunk, codes) in [(2 * part, first), (2 * part + 1, second)] {
                    let place = _mm512_add_epi32(lanes, _mm512_set1_epi32(4 * chunk as i32));
                    for n in 0..N {
                        let scale = _mm512_permutexvar_ps(place, scales[n]);
                        let found = sums::<5>(codes, &x[n], 256 * i + 64 * chunk);
                        sum[n] = _mm512_fmadd_ps(found, scale, sum[n]);
                    }
                }
            }
        }
    }
    sum.map(|sum| _mm512_reduce_add_ps(sum))
}
