//! 256 weights at a time, in eight groups of 32 whose products with activations are whole numbers: `vpmaddubsw` multiplies unsigned
//! with signed bytes, so signed codes give their signs to the activations. A group is a lane, which takes `scale · product − minimum`;
//! the lanes are added up every [`SPAN`] weights.
//!
//! No vectors through closures and `map`: what the compiler does not inline has no vector registers.

use std::arch::x86_64::*;

use super::super::BlockType;
use super::super::activations::Row;
use super::SPAN;

pub(super) const Q8_0: u8 = BlockType::Q8_0 as u8;
pub(super) const Q6_K: u8 = BlockType::Q6K as u8;
pub(super) const Q4_K: u8 = BlockType::Q4K as u8;
pub(super) const Q4_0: u8 = BlockType::Q4_0 as u8;

/// Bytes of eight groups.
pub(super) const fn eight_bytes(kind: u8) -> usize {
    match kind {
        Q8_0 => 8 * BlockType::Q8_0.bytes(),
        Q6_K => BlockType::Q6K.bytes(),
        Q4_K => BlockType::Q4K.bytes(),
        _ => 8 * BlockType::Q4_0.bytes(),
    }
}

/// Whether codes have no sign; then there are minima.
pub(super) const fn unsigned(kind: u8) -> bool {
    matches!(kind, Q4_K | Q4_0)
}

/// # Safety
/// The processor has what [`super::Isa`] says of it, `w` is whole blocks, and the rows of `x` are as wide as `w`.
#[allow(unsafe_code)]
#[target_feature(enable = "avx2,fma,f16c")]
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
#[target_feature(enable = "avx2,fma,f16c")]
fn rows<const KIND: u8, const R: usize, const N: usize>(
    w: [&[u8]; R],
    x: [Row; N],
) -> [[f32; N]; R] {
    let bytes = const { eight_bytes(KIND) };
    let width = w[0].len();
    let eights = width.div_ceil(bytes);
    let long = |x: &Row| x.codes.len() >= 256 * eights && x.scales.len() >= 8 * eights;
    assert!(x.iter().all(|x| long(x) && x.sums.len() == x.scales.len()));
    assert!(w.iter().all(|w| w.len() == width));
    let mut totals = [[0.; N]; R];
    let mut room = [0; 272];
    for first in (0..eights).step_by(SPAN / 256) {
        let mut lanes = [[_mm256_setzero_ps(); N]; R];
        for at in first..eights.min(first + SPAN / 256) {
            for r in 0..R {
                let w = &w[r][bytes * at..];
                let w = match w.len() < bytes {
                    true => filled(w, &mut room).as_ptr(),
                    false => w.as_ptr(),
                };
                // SAFETY: as many bytes stand there, and activations as asserted.
                unsafe { add_eight::<KIND, N>(w, &x, at, &mut lanes[r]) };
            }
        }
        for r in 0..R {
            for n in 0..N {
                totals[r][n] += total(lanes[r][n]);
            }
        }
    }
    totals
}

/// Adds the products of eight groups with those of the activations from group `8 · at` on.
///
/// # Safety
/// Eight groups stand at `w`, and as many in each row of `x` from there on.
#[allow(unsafe_code)]
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn add_eight<const KIND: u8, const N: usize>(
    w: *const u8,
    x: &[Row; N],
    at: usize,
    lanes: &mut [__m256; N],
) {
    // A length that the compiler knows: it would ask at every reading.
    // SAFETY: the caller's promise.
    let w = unsafe { std::slice::from_raw_parts(w, const { eight_bytes(KIND) }) };
    let (scales, mins) = scales::<KIND>(w);
    for n in 0..N {
        // SAFETY: the caller's promise.
        let (q, x_scales, x_sums) = unsafe {
            (
                x[n].codes.get_unchecked(256 * at..256 * (at + 1)),
                _mm256_loadu_ps(x[n].scales.as_ptr().add(8 * at)),
                _mm256_loadu_ps(x[n].sums.as_ptr().add(8 * at)),
            )
        };
        let found = sums::<KIND>(w, bytemuck::cast_slice(q));
        let scale = _mm256_mul_ps(scales, x_scales);
        lanes[n] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(found), scale, lanes[n]);
        if unsigned(KIND) {
            lanes[n] = _mm256_fnmadd_ps(mins, x_sums, lanes[n]);
        }
    }
}

/// Blocks that are fewer than a whole number of eight groups, with zeros behind them.
#[cold]
pub(super) fn filled<'a, const LEN: usize>(w: &[u8], room: &'a mut [u8; LEN]) -> &'a [u8] {
    room.fill(0);
    room[..w.len()].copy_from_slice(w);
    room
}

/// The codes of group `j`.
#[allow(unsafe_code)]
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn codes<const KIND: u8>(w: &[u8], j: usize) -> __m256i {
    let low_bits = _mm256_set1_epi8(15);
    match KIND {
        Q8_0 => load(&w[34 * j + 2..]),
        Q4_0 => {
            // SAFETY: sixteen bytes, as the slice is cut.
            let packed = unsafe { _mm_loadu_si128(w[18 * j + 2..][..16].as_ptr().cast()) };
            let both = _mm256_set_m128i(_mm_srli_epi16::<4>(packed), packed);
            _mm256_and_si256(both, low_bits)
        }
        Q4_K => {
            let packed = load(&w[16 + 32 * (j / 2)..]);
            let moved = match j % 2 {
                0 => packed,
                _ => _mm256_srli_epi16::<4>(packed),
            };
            _mm256_and_si256(moved, low_bits)
        }
        _ => {
            let (part, quarter) = (j / 4, j % 4);
            let (low, high) = (
                load(&w[64 * part + 32 * (quarter % 2)..]),
                load(&w[128 + 32 * part..]),
            );
            // Shifts by a variable, for a loop over `j` that is not unrolled would have a branch for each.
            let low = _mm256_srl_epi16(low, _mm_cvtsi32_si128(4 * (quarter / 2) as i32));
            let high = _mm256_srl_epi16(high, _mm_cvtsi32_si128(2 * quarter as i32));
            let high = _mm256_and_si256(high, _mm256_set1_epi8(3));
            let low = _mm256_and_si256(low, low_bits);
            let both = _mm256_or_si256(low, _mm256_slli_epi16::<4>(high));
            _mm256_sub_epi8(both, _mm256_set1_epi8(32))
        }
    }
}

/// What the groups' whole numbers are multiplied by, and what their activations are multiplied by and taken off.
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) fn scales<const KIND: u8>(w: &[u8]) -> (__m256, __m256) {
    match KIND {
        Q8_0 => (eight_blocks::<34>(w), _mm256_setzero_ps()),
        Q4_0 => {
            let scales = eight_blocks::<18>(w);
            (scales, _mm256_mul_ps(scales, _mm256_set1_ps(8.)))
        }
        Q4_K => {
            let (scales, mins) = scales_mins(&w[4..16]);
            (
                _mm256_mul_ps(wide_half(w), bytes(scales)),
                _mm256_mul_ps(wide_half(&w[2..]), bytes(mins)),
            )
        }
        // Its scales of 16 weights are whole numbers too, and in the products.
        _ => (wide_half(&w[208..]), _mm256_setzero_ps()),
    }
}

/// The whole numbers of eight groups.
#[inline]
#[target_feature(enable = "avx2")]
fn sums<const KIND: u8>(w: &[u8], q: &[u8]) -> __m256i {
    let mut fours = [_mm256_setzero_si256(); 2];
    for (i, four) in fours.iter_mut().enumerate() {
        let j = 4 * i;
        let (a, b) = (product::<KIND>(w, q, j), product::<KIND>(w, q, j + 1));
        let ab = two_sums(unsigned(KIND), a, b);
        let (c, d) = (product::<KIND>(w, q, j + 2), product::<KIND>(w, q, j + 3));
        let cd = two_sums(unsigned(KIND), c, d);
        *four = match unsigned(KIND) {
            true => ones(_mm256_packs_epi32(ab, cd)),
            false => _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd)),
        };
    }
    let [a, b] = fours;
    let low = _mm256_permute2x128_si256::<0x20>(a, b);
    _mm256_add_epi32(low, _mm256_permute2x128_si256::<0x31>(a, b))
}

/// Of each half, two sums of `a` and two of `b`; in an order of their own where they are not `small` (of 16 bits).
#[inline]
#[target_feature(enable = "avx2")]
fn two_sums(small: bool, a: __m256i, b: __m256i) -> __m256i {
    match small {
        true => ones(_mm256_packs_epi32(a, b)),
        false => _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b)),
    }
}

/// A group's products, four to a lane.
#[inline]
#[target_feature(enable = "avx2")]
fn product<const KIND: u8>(w: &[u8], q: &[u8], j: usize) -> __m256i {
    let (codes, q) = (codes::<KIND>(w, j), load(&q[32 * j..]));
    let pairs = match unsigned(KIND) {
        true => _mm256_maddubs_epi16(codes, q),
        false => _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(q, codes)),
    };
    match KIND {
        Q6_K => _mm256_madd_epi16(pairs, q6_k_scales(w, j)),
        _ => ones(pairs),
    }
}

/// The two scales of group `j` of a Q6_K block, one for each half of its pairs.
#[allow(unsafe_code)]
#[inline]
#[target_feature(enable = "avx2")]
fn q6_k_scales(block: &[u8], j: usize) -> __m256i {
    // SAFETY: sixteen bytes, as the slice is cut.
    let scales = unsafe { _mm_loadu_si128(block[192..208].as_ptr().cast()) };
    let (a, b) = (2 * j as i64, 2 * j as i64 + 1);
    let place = _mm_set_epi64x(b * 0x0101_0101_0101_0101, a * 0x0101_0101_0101_0101);
    _mm256_cvtepi8_epi16(_mm_shuffle_epi8(scales, place))
}

/// The halves at byte `at` of eight blocks.
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) fn eight_halves(w: [&[u8]; 8], at: usize) -> __m256 {
    let mut four = [0; 2];
    for j in 0..8 {
        let half = u16::from_le_bytes([w[j][at], w[j][at + 1]]);
        four[j / 4] |= u64::from(half) << (16 * (j % 4));
    }
    _mm256_cvtph_ps(_mm_set_epi64x(four[1] as i64, four[0] as i64))
}

/// The halves at the beginnings of eight blocks of `BYTES` in a row.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn eight_blocks<const BYTES: usize>(w: &[u8]) -> __m256 {
    let w = &w[..8 * BYTES];
    let mut four = [0; 2];
    for j in 0..8 {
        let half = u16::from_le_bytes([w[BYTES * j], w[BYTES * j + 1]]);
        four[j / 4] |= u64::from(half) << (16 * (j % 4));
    }
    _mm256_cvtph_ps(_mm_set_epi64x(four[1] as i64, four[0] as i64))
}

/// Asks memory for bytes that are read later: what computes much between its loads has too few of them on their way.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn ask_for(bytes: &[u8]) {
    for line in bytes.chunks(64) {
        _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast());
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
pub(super) fn total(a: __m256) -> f32 {
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

/// Sums of two to sums of four.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn ones(pairs: __m256i) -> __m256i {
    _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))
}

/// Eight whole numbers in the bytes of a word.
#[inline]
#[target_feature(enable = "avx2")]
fn bytes(word: u64) -> __m256 {
    _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_set1_epi64x(word as i64)))
}

/// The eight scales and the eight minima of 6 bits, a byte each.
#[inline]
fn scales_mins(packed: &[u8]) -> (u64, u64) {
    const SIX: u32 = 0x3f3f_3f3f;
    const FOUR: u32 = 0x0f0f_0f0f;
    const TWO: u32 = 0x0303_0303;
    let word = |at: usize| {
        u32::from_le_bytes([packed[at], packed[at + 1], packed[at + 2], packed[at + 3]])
    };
    let (a, b, c) = (word(0), word(4), word(8));
    let join = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    let scales = join(a & SIX, (c & FOUR) | (a >> 6 & TWO) << 4);
    let mins = join(b & SIX, (c >> 4 & FOUR) | (b >> 6 & TWO) << 4);
    (scales, mins)
}
