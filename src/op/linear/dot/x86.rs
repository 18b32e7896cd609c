//! The tile on x86-64, one text for both widths of vectors.

use std::arch::x86_64::*;

use super::Storage;

macro_rules! tiles {
    ($features:literal) => {
        /// # Safety
        /// The processor has the instructions; every row of `w` holds `count` weights, every row of `x` as many entries.
        #[allow(unsafe_code)]
        #[target_feature(enable = $features)]
        pub unsafe fn tile<const R: usize, const N: usize>(
            storage: Storage,
            w: [*const u8; R],
            x: [*const f32; N],
            count: usize,
        ) -> [[f32; N]; R] {
            // SAFETY: the caller's promise is the function's.
            unsafe {
                match storage {
                    Storage::F32 => sum::<4, R, N>(storage, w, x, count, |at| load(at.cast())),
                    Storage::F16 => sum::<2, R, N>(storage, w, x, count, |at| load_f16(at)),
                    _ => sum::<2, R, N>(storage, w, x, count, |at| load_bf16(at)),
                }
            }
        }

        /// # Safety
        /// As [`tile`]; `widen` reads `LANES` weights of `BYTES` bytes.
        #[allow(unsafe_code)]
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn sum<const BYTES: usize, const R: usize, const N: usize>(
            storage: Storage,
            w: [*const u8; R],
            x: [*const f32; N],
            count: usize,
            widen: impl Fn(*const u8) -> Vector,
        ) -> [[f32; N]; R] {
            // Two vectors of lanes, so that an addition need not wait for the one before.
            let whole = count / (2 * LANES) * (2 * LANES);
            let mut sums = [[[zero(); 2]; N]; R];
            for at in (0..whole).step_by(2 * LANES) {
                for half in 0..2 {
                    let from = at + half * LANES;
                    // SAFETY: LANES weights and entries of each row stand from `from` on.
                    unsafe {
                        let x: [Vector; N] = std::array::from_fn(|n| load(x[n].add(from)));
                        for r in 0..R {
                            let w = widen(w[r].add(from * BYTES));
                            for n in 0..N {
                                sums[r][n][half] = fmadd(w, x[n], sums[r][n][half]);
                            }
                        }
                    }
                }
            }
            if whole < count {
                // What is left, filled up with zeros.
                let left = count - whole;
                let mut w_left = [[0f32; 2 * LANES]; R];
                for r in 0..R {
                    // SAFETY: `left` weights stand from `whole` on.
                    let bytes = unsafe {
                        std::slice::from_raw_parts(w[r].add(whole * BYTES), left * BYTES)
                    };
                    storage.widen(bytes, &mut w_left[r][..left]);
                }
                for n in 0..N {
                    let mut x_left = [0f32; 2 * LANES];
                    // SAFETY: `left` entries stand from `whole` on.
                    let entries = unsafe { std::slice::from_raw_parts(x[n].add(whole), left) };
                    x_left[..left].copy_from_slice(entries);
                    for r in 0..R {
                        for half in 0..2 {
                            let at = half * LANES;
                            // SAFETY: the arrays hold two vectors.
                            let (w, x) = unsafe {
                                (
                                    load(w_left[r].as_ptr().add(at)),
                                    load(x_left.as_ptr().add(at)),
                                )
                            };
                            sums[r][n][half] = fmadd(w, x, sums[r][n][half]);
                        }
                    }
                }
            }
            sums.map(|sums| sums.map(|[a, b]| total(add(a, b))))
        }

        /// [`super::pass`].
        #[target_feature(enable = $features)]
        pub fn pass(panel: &[f32], x: &[f32], span: usize, sums: &mut [f32], rows: usize) {
            for r in (0..rows).step_by(2) {
                let (panel, sums) = (&panel[r * span..], &mut sums[r..]);
                match rows - r {
                    1 => strip::<1>(panel, x, span, sums, rows),
                    _ => strip::<2>(panel, x, span, sums, rows),
                }
            }
        }

        /// `R` rows of a panel with all of `x`.
        #[inline]
        #[target_feature(enable = $features)]
        fn strip<const R: usize>(
            panel: &[f32],
            x: &[f32],
            span: usize,
            sums: &mut [f32],
            rows: usize,
        ) {
            for (x, sums) in x.chunks(3 * span).zip(sums.chunks_mut(3 * rows)) {
                match x.len() / span {
                    1 => block::<R, 1>(panel, x, span, sums, rows),
                    2 => block::<R, 2>(panel, x, span, sums, rows),
                    _ => block::<R, 3>(panel, x, span, sums, rows),
                }
            }
        }

        #[allow(unsafe_code)]
        #[inline]
        #[target_feature(enable = $features)]
        fn block<const R: usize, const N: usize>(
            panel: &[f32],
            x: &[f32],
            span: usize,
            sums: &mut [f32],
            rows: usize,
        ) {
            let w: [*const u8; R] =
                std::array::from_fn(|r| panel[r * span..][..span].as_ptr().cast());
            let x: [*const f32; N] = std::array::from_fn(|n| x[n * span..][..span].as_ptr());
            // SAFETY: `span` entries stand in every row, as just cut.
            let found = unsafe { sum::<4, R, N>(Storage::F32, w, x, span, |at| load(at.cast())) };
            for n in 0..N {
                for r in 0..R {
                    sums[n * rows + r] += found[r][n];
                }
            }
        }
    };
}

pub mod avx2 {
    use super::*;

    const LANES: usize = 8;
    type Vector = __m256;

    tiles!("avx2,fma,f16c");

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn zero() -> Vector {
        _mm256_setzero_ps()
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn fmadd(a: Vector, b: Vector, c: Vector) -> Vector {
        _mm256_fmadd_ps(a, b, c)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn add(a: Vector, b: Vector) -> Vector {
        _mm256_add_ps(a, b)
    }

    /// The sum of the lanes, by halves.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn total(a: Vector) -> f32 {
        let four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
    }

    /// # Safety
    /// Eight entries stand at `at`.
    #[allow(unsafe_code)]
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load(at: *const f32) -> Vector {
        // SAFETY: the caller's promise.
        unsafe { _mm256_loadu_ps(at) }
    }

    /// # Safety
    /// Eight entries stand at `at`.
    #[allow(unsafe_code)]
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_f16(at: *const u8) -> Vector {
        // SAFETY: the caller's promise.
        _mm256_cvtph_ps(unsafe { _mm_loadu_si128(at.cast()) })
    }

    /// # Safety
    /// Eight entries stand at `at`.
    #[allow(unsafe_code)]
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_bf16(at: *const u8) -> Vector {
        // SAFETY: the caller's promise.
        let bits = _mm256_cvtepu16_epi32(unsafe { _mm_loadu_si128(at.cast()) });
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
    }
}

pub mod avx512 {
    use super::*;

    const LANES: usize = 16;
    type Vector = __m512;

    tiles!("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c");

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn zero() -> Vector {
        _mm512_setzero_ps()
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn fmadd(a: Vector, b: Vector, c: Vector) -> Vector {
        _mm512_fmadd_ps(a, b, c)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn add(a: Vector, b: Vector) -> Vector {
        _mm512_add_ps(a, b)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn total(a: Vector) -> f32 {
        _mm512_reduce_add_ps(a)
    }

    /// # Safety
    /// Sixteen entries stand at `at`.
    #[allow(unsafe_code)]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load(at: *const f32) -> Vector {
        // SAFETY: the caller's promise.
        unsafe { _mm512_loadu_ps(at) }
    }

    /// # Safety
    /// Sixteen entries stand at `at`.
    #[allow(unsafe_code)]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_f16(at: *const u8) -> Vector {
        // SAFETY: the caller's promise.
        _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(at.cast()) })
    }

    /// # Safety
    /// Sixteen entries stand at `at`.
    #[allow(unsafe_code)]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_bf16(at: *const u8) -> Vector {
        // SAFETY: the caller's promise.
        let bits = _mm512_cvtepu16_epi32(unsafe { _mm256_loadu_si256(at.cast()) });
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
    }
}
