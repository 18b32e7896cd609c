//! 256 weights at a time, in eight groups of 32 whose products with activations are whole numbers: `vpmaddubsw` multiplies unsigned
//! with signed bytes, so Q8_0's codes give their signs to the activations, and what is taken off of Q6_K's is taken off of products. A
//! group is a lane, which takes `scale · product − minimum`; the lanes are added up every [`SPAN`] weights.
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
    let mut room = [[0; 272]; R];
    for first in (0..eights).step_by(SPAN / 256) {
        let mut lanes = [[_mm256_setzero_ps(); N]; R];
        for at in first..eights.min(first + SPAN / 256) {
            let mut eight: [&[u8]; R] = [&[]; R];
            for (r, room) in room.iter_mut().enumerate() {
                let w = &w[r][bytes * at..];
                eight[r] = match w.len() < bytes {
                    true => &filled(w, room)[..bytes],
                    false => &w[..bytes],
                };
            }
            // SAFETY: as many activations stand there, as asserted.
            unsafe {
                if N == 1 {
                    add_eight::<KIND, R, N>(eight, &x, at, &mut lanes);
                } else {
                    // Registers for several rows' sums are those for several activations'.
                    for r in 0..R {
                        let lanes = std::array::from_mut(&mut lanes[r]);
                        add_eight::<KIND, 1, N>([eight[r]], &x, at, lanes);
                    }
                }
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

/// Adds the products of eight groups of every row, `w`, with those of the activations from group `8 · at` on: the same step of all rows before
/// the next, so that there is something to do while a row's sum is waited for.
///
/// # Safety
/// Eight groups stand in each row of `x` from there on.
#[allow(unsafe_code)]
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn add_eight<const KIND: u8, const R: usize, const N: usize>(
    w: [&[u8]; R],
    x: &[Row; N],
    at: usize,
    lanes: &mut [[__m256; N]; R],
) {
    let mut q: [&[u8]; N] = [&[]; N];
    for n in 0..N {
        // SAFETY: the caller's promise.
        let codes = unsafe { x[n].codes.get_unchecked(256 * at..256 * (at + 1)) };
        q[n] = bytemuck::cast_slice(codes);
    }
    let zeros = [[_mm256_setzero_si256(); N]; R];
    let mut fours = [zeros; 2];
    for (i, fours) in fours.iter_mut().enumerate() {
        let mut twos = [zeros; 2];
        for (k, twos) in twos.iter_mut().enumerate() {
            let j = 4 * i + 2 * k;
            for r in 0..R {
                for n in 0..N {
                    let a = product::<KIND>(w[r], q[n], j);
                    let b = product::<KIND>(w[r], q[n], j + 1);
                    twos[r][n] = two_groups::<KIND>(a, b);
                }
            }
        }
        for r in 0..R {
            for n in 0..N {
                fours[r][n] = four_groups::<KIND>(twos[0][r][n], twos[1][r][n]);
            }
        }
    }
    for r in 0..R {
        let (scales, mins) = scales::<KIND>(w[r]);
        for n in 0..N {
            // SAFETY: the caller's promise.
            let (x_scales, x_sums) = unsafe {
                (
                    _mm256_loadu_ps(x[n].scales.as_ptr().add(8 * at)),
                    _mm256_loadu_ps(x[n].sums.as_ptr().add(8 * at)),
                )
            };
            let (a, b) = (fours[0][r][n], fours[1][r][n]);
            let low = _mm256_permute2x128_si256::<0x20>(a, b);
            let found = _mm256_add_epi32(low, _mm256_permute2x128_si256::<0x31>(a, b));
            let (scale, lanes) = (_mm256_mul_ps(scales, x_scales), &mut lanes[r][n]);
            *lanes = _mm256_fmadd_ps(_mm256_cvtepi32_ps(found), scale, *lanes);
            if unsigned(KIND) {
                *lanes = _mm256_fnmadd_ps(mins, x_sums, *lanes);
            }
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
        _ => _mm256_sub_epi8(six_bits(w, j), _mm256_set1_epi8(32)),
    }
}

/// The codes of group `j` of a Q6_K block, before 32 is taken off.
#[inline]
#[target_feature(enable = "avx2")]
fn six_bits(w: &[u8], j: usize) -> __m256i {
    let (part, quarter) = (j / 4, j % 4);
    let (low, high) = (
        load(&w[64 * part + 32 * (quarter % 2)..]),
        load(&w[128 + 32 * part..]),
    );
    // Shifts by a variable, for a loop over `j` that is not unrolled would have a branch for each.
    let low = _mm256_srl_epi16(low, _mm_cvtsi32_si128(4 * (quarter / 2) as i32));
    let high = _mm256_srl_epi16(high, _mm_cvtsi32_si128(2 * quarter as i32));
    let high = _mm256_and_si256(high, _mm256_set1_epi8(3));
    let low = _mm256_and_si256(low, _mm256_set1_epi8(15));
    _mm256_or_si256(low, _mm256_slli_epi16::<4>(high))
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
        Q4_K => scales_mins(w),
        // Its scales of 16 weights are whole numbers too, and in the products.
        _ => (wide_half(&w[208..]), _mm256_setzero_ps()),
    }
}

/// A group's products: pairs in 16 bits where codes have no sign (15 · 127 · 2 at the most, four of which have room there), else four in 32.
#[inline]
#[target_feature(enable = "avx2")]
fn product<const KIND: u8>(w: &[u8], q: &[u8], j: usize) -> __m256i {
    let q = load(&q[32 * j..]);
    match KIND {
        Q4_0 | Q4_K => _mm256_maddubs_epi16(codes::<KIND>(w, j), q),
        Q8_0 => {
            let codes = codes::<KIND>(w, j);
            ones(_mm256_maddubs_epi16(
                _mm256_abs_epi8(codes),
                _mm256_sign_epi8(q, codes),
            ))
        }
        _ => {
            // What is taken off of codes is taken off of products: the same for all rows that are multiplied together.
            let off = _mm256_maddubs_epi16(_mm256_set1_epi8(32), q);
            let pairs = _mm256_sub_epi16(_mm256_maddubs_epi16(six_bits(w, j), q), off);
            _mm256_madd_epi16(pairs, q6_k_scales(w, j))
        }
    }
}

/// Sums of two of a group's products, of each half of `a` and of `b`.
#[inline]
#[target_feature(enable = "avx2")]
fn two_groups<const KIND: u8>(a: __m256i, b: __m256i) -> __m256i {
    match unsigned(KIND) {
        true => _mm256_add_epi16(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b)),
        false => _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b)),
    }
}

/// A sum in 32 bits of each half of four groups, `ab` and `cd`.
#[inline]
#[target_feature(enable = "avx2")]
fn four_groups<const KIND: u8>(ab: __m256i, cd: __m256i) -> __m256i {
    if !unsigned(KIND) {
        return _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
    }
    let (ab, cd) = (_mm256_castsi256_ps(ab), _mm256_castsi256_ps(cd));
    ones(_mm256_add_epi16(
        _mm256_castps_si256(_mm256_shuffle_ps::<0x88>(ab, cd)),
        _mm256_castps_si256(_mm256_shuffle_ps::<0xdd>(ab, cd)),
    ))
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

/// The first eight bytes as floats.
#[inline]
#[target_feature(enable = "avx2")]
fn wide_bytes(bytes: __m128i) -> __m256 {
    _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes))
}

/// The eight scales and the eight minima of a Q4_K block. It begins with what both are multiplied by, in halves, and three words: the first
/// four scales in 6 bits a byte, the first four minima, and of the others four bits and four, whose upper two are left in the words before.
#[allow(unsafe_code)]
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn scales_mins(block: &[u8]) -> (__m256, __m256) {
    // SAFETY: sixteen bytes, as the slice is cut.
    let words = unsafe { _mm_loadu_si128(block[..16].as_ptr().cast()) };
    // As the four words of the result: scales, scales, minima, minima.
    let (six, four) = (0x3f3f_3f3f, 0x0f0f_0f0f);
    let low = _mm_srlv_epi32(
        _mm_shuffle_epi32::<0b11_10_11_01>(words),
        _mm_setr_epi32(0, 0, 0, 4),
    );
    let low = _mm_and_si128(low, _mm_setr_epi32(six, four, six, four));
    let high = _mm_srli_epi32::<2>(_mm_shuffle_epi32::<0b10_10_01_01>(words));
    let high = _mm_and_si128(high, _mm_setr_epi32(0, 0x3030_3030, 0, 0x3030_3030));
    let both = _mm_or_si128(low, high);
    let halves = _mm_cvtph_ps(words);
    let (scale, min) = (
        _mm256_broadcastss_ps(halves),
        _mm256_broadcastss_ps(_mm_movehdup_ps(halves)),
    );
    (
        _mm256_mul_ps(scale, wide_bytes(both)),
        _mm256_mul_ps(min, wide_bytes(_mm_unpackhi_epi64(both, both))),
    )
}
