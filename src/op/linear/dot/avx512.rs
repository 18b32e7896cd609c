//! 16 weights at a time, in two sums.

use std::arch::x86_64::*;

use super::super::storage::Storage;

const WIDTH: usize = 16;

/// # Safety
/// The processor has what [`super::Isa`] says of it; `w` holds as many weights as each of `x` has entries.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
pub unsafe fn dot<const N: usize>(storage: Storage, w: &[u8], x: [&[f32]; N]) -> [f32; N] {
    // SAFETY: the caller's promise is the function's.
    unsafe {
        match storage {
            Storage::F32 => sum::<N, 4>(storage, w, x, |at| _mm512_loadu_ps(at.cast())),
            Storage::F16 => sum::<N, 2>(storage, w, x, |at| {
                _mm512_cvtph_ps(_mm256_loadu_si256(at.cast()))
            }),
            _ => sum::<N, 2>(storage, w, x, |at| {
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(
                    _mm256_loadu_si256(at.cast()),
                )))
            }),
        }
    }
}

/// # Safety
/// As [`dot`]; `widen` reads `WIDTH` weights of `BYTES` bytes.
#[allow(unsafe_code)]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
unsafe fn sum<const N: usize, const BYTES: usize>(
    storage: Storage,
    w: &[u8],
    x: [&[f32]; N],
    widen: impl Fn(*const u8) -> __m512,
) -> [f32; N] {
    let width = w.len() / BYTES;
    let whole = width / (2 * WIDTH) * (2 * WIDTH);
    let mut sums = [[_mm512_setzero_ps(); 2]; N];
    for at in (0..whole).step_by(2 * WIDTH) {
        for (half, from) in [(0, at), (1, at + WIDTH)] {
            // SAFETY: WIDTH weights and entries of each row stand from `from` on.
            unsafe {
                let w = widen(w.as_ptr().add(from * BYTES));
                for (sums, x) in sums.iter_mut().zip(&x) {
                    sums[half] =
                        _mm512_fmadd_ps(w, _mm512_loadu_ps(x.as_ptr().add(from)), sums[half]);
                }
            }
        }
    }
    if whole < width {
        // What is left, filled up with zeros.
        let mut left = [0f32; 2 * WIDTH];
        storage.widen(&w[whole * BYTES..], &mut left[..width - whole]);
        for (sums, x) in sums.iter_mut().zip(&x) {
            let mut entries = [0f32; 2 * WIDTH];
            entries[..width - whole].copy_from_slice(&x[whole..width]);
            for (half, sum) in sums.iter_mut().enumerate() {
                // SAFETY: both arrays hold two vectors.
                unsafe {
                    let w = _mm512_loadu_ps(left.as_ptr().add(half * WIDTH));
                    let x = _mm512_loadu_ps(entries.as_ptr().add(half * WIDTH));
                    *sum = _mm512_fmadd_ps(w, x, *sum);
                }
            }
        }
    }
    sums.map(|[a, b]| _mm512_reduce_add_ps(_mm512_add_ps(a, b)))
}
