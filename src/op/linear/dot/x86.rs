//! The tile on x86-64, one text for both widths of vectors.

use std::arch::x86_64::*;

use super::{PADDED, Storage};

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
                    Storage::F32 => whole::<4, R, N>(w, x, count, |at| load(at.cast())),
                    Storage::F16 => whole::<2, R, N>(w, x, count, |at| load_f16(at)),
                    _ => whole::<2, R, N>(w, x, count, |at| load_bf16(at)),
                }
            }
        }

        /// The sum of what is a multiple of [`PADDED`], and of what is left, filled up with zeros.
        ///
        /// # Safety
        /// As [`tile`]; `widen` reads `LANES` weights of `BYTES` bytes.
        #[allow(unsafe_code)]
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn whole<const BYTES: usize, const R: usize, const N: usize>(
            w: [*const u8; R],
            x: [*const f32; N],
            count: usize,
            widen: impl Fn(*const u8) -> Vector,
        ) -> [[f32; N]; R] {
            let left = count % PADDED;
            let count = count - left;
            // SAFETY: the caller's promise; what is filled up has PADDED entries a row.
            unsafe {
                if left == 0 {
                    return sum::<BYTES, R, N>([(w, x, count)], widen);
                }
                let (mut w_left, mut x_left) = ([[0u8; 4 * PADDED]; R], [[0f32; PADDED]; N]);
                for r in 0..R {
                    let w = std::slice::from_raw_parts(w[r].add(BYTES * count), BYTES * left);
                    w_left[r][..BYTES * left].copy_from_slice(w);
                }
                for n in 0..N {
                    let x = std::slice::from_raw_parts(x[n].add(count), left);
                    x_left[n][..left].copy_from_slice(x);
                }
                let w_left = w_left.each_ref().map(|w| w.as_ptr());
                let x_left = x_left.each_ref().map(|x| x.as_ptr());
                sum::<BYTES, R, N>([(w, x, count), (w_left, x_left, PADDED)], widen)
            }
        }

        /// Of parts of rows, one behind the other. Two vectors of sums take turns: for few rows at once, so that an addition need not
        /// wait for the one before; for many one after the other, with half the registers.
        ///
        /// # Safety
        /// As [`tile`] for every part, whose count is a multiple of [`PADDED`]; `widen` reads `LANES` weights of `BYTES` bytes.
        #[allow(unsafe_code)]
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn sum<const BYTES: usize, const R: usize, const N: usize>(
            parts: impl Copy + IntoIterator<Item = ([*const u8; R], [*const f32; N], usize)>,
            widen: impl Fn(*const u8) -> Vector,
        ) -> [[f32; N]; R] {
            let (mut first, mut second) = ([[zero(); N]; R], [[zero(); N]; R]);
            // SAFETY: the caller's promise; there is an even number of vectors.
            unsafe {
                if R * N <= 4 {
                    for (w, x, count) in parts {
                        for at in (0..count).step_by(2 * LANES) {
                            add_products::<BYTES, R, N>(w, x, at, &widen, &mut first);
                            add_products::<BYTES, R, N>(w, x, at + LANES, &widen, &mut second);
                        }
                    }
                    for r in 0..R {
                        for n in 0..N {
                            second[r][n] = add(first[r][n], second[r][n]);
                        }
                    }
                } else {
                    for (w, x, count) in parts {
                        for at in (0..count).step_by(2 * LANES) {
                            add_products::<BYTES, R, N>(w, x, at, &widen, &mut second);
                        }
                    }
                    // Volatile, so that they do not stay in registers, of which the other sums need all.
                    for r in 0..R {
                        for n in 0..N {
                            std::ptr::write_volatile(&mut first[r][n], second[r][n]);
                        }
                    }
                    second = [[zero(); N]; R];
                    for (w, x, count) in parts {
                        for at in (LANES..count).step_by(2 * LANES) {
                            add_products::<BYTES, R, N>(w, x, at, &widen, &mut second);
                        }
                    }
                    for r in 0..R {
                        for n in 0..N {
                            let first = std::ptr::read_volatile(&first[r][n]);
                            second[r][n] = add(first, second[r][n]);
                        }
                    }
                }
            }
            let mut found = [[0.; N]; R];
            if N == 1 {
                // Rows together: as many steps for four as for one.
                let mut sums = [zero(); R];
                for r in 0..R {
                    sums[r] = second[r][0];
                }
                let totals = totals(sums);
                for r in 0..R {
                    found[r][0] = totals[r];
                }
            } else {
                for r in 0..R {
                    found[r] = totals(second[r]);
                }
            }
            found
        }

        /// # Safety
        /// As [`sum`]; LANES weights and entries of each row stand from `at` on.
        #[allow(unsafe_code)]
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn add_products<const BYTES: usize, const R: usize, const N: usize>(
            w: [*const u8; R],
            x: [*const f32; N],
            at: usize,
            widen: &impl Fn(*const u8) -> Vector,
            sums: &mut [[Vector; N]; R],
        ) {
            // SAFETY: the caller's promise.
            unsafe {
                let mut wide = [zero(); R];
                for r in 0..R {
                    wide[r] = widen(w[r].add(at * BYTES));
                }
                for n in 0..N {
                    let x = load(x[n].add(at));
                    for r in 0..R {
                        sums[r][n] = fmadd(wide[r], x, sums[r][n]);
                    }
                }
            }
        }

        /// [`super::scores`].
        #[target_feature(enable = $features)]
        pub fn scores(queries: &[f32], dim: usize, keys: &[f32], stride: usize, out: &mut [f32]) {
            let positions = out.len() / (queries.len() / dim);
            let fours = queries.chunks(4 * dim).zip(out.chunks_mut(4 * positions));
            for (queries, out) in fours {
                for p in (0..positions).step_by(3) {
                    let (keys, out) = (&keys[p * stride..], &mut out[p..]);
                    match (queries.len() / dim, positions - p) {
                        (1, 1) => score::<1, 1>(queries, dim, keys, stride, out, positions),
                        (1, 2) => score::<2, 1>(queries, dim, keys, stride, out, positions),
                        (1, _) => score::<3, 1>(queries, dim, keys, stride, out, positions),
                        (2, 1) => score::<1, 2>(queries, dim, keys, stride, out, positions),
                        (2, 2) => score::<2, 2>(queries, dim, keys, stride, out, positions),
                        (2, _) => score::<3, 2>(queries, dim, keys, stride, out, positions),
                        (3, 1) => score::<1, 3>(queries, dim, keys, stride, out, positions),
                        (3, 2) => score::<2, 3>(queries, dim, keys, stride, out, positions),
                        (3, _) => score::<3, 3>(queries, dim, keys, stride, out, positions),
                        (_, 1) => score::<1, 4>(queries, dim, keys, stride, out, positions),
                        (_, 2) => score::<2, 4>(queries, dim, keys, stride, out, positions),
                        (_, _) => score::<3, 4>(queries, dim, keys, stride, out, positions),
                    }
                }
            }
        }

        /// `R` keys with `N` queries.
        #[allow(unsafe_code)]
        #[inline]
        #[target_feature(enable = $features)]
        fn score<const R: usize, const N: usize>(
            queries: &[f32],
            dim: usize,
            keys: &[f32],
            stride: usize,
            out: &mut [f32],
            positions: usize,
        ) {
            let (queries, keys) = (&queries[..N * dim], &keys[..(R - 1) * stride + dim]);
            let mut sums = [[zero(); N]; R];
            for at in (0..dim).step_by(LANES) {
                let mut key = [zero(); R];
                for r in 0..R {
                    // SAFETY: whole vectors, as the slice was cut.
                    key[r] = unsafe { load(keys.as_ptr().add(r * stride + at)) };
                }
                for n in 0..N {
                    // SAFETY: as above.
                    let query = unsafe { load(queries.as_ptr().add(n * dim + at)) };
                    for r in 0..R {
                        sums[r][n] = fmadd(key[r], query, sums[r][n]);
                    }
                }
            }
            for r in 0..R {
                let found = totals(sums[r]);
                for n in 0..N {
                    out[n * positions + r] = found[n];
                }
            }
        }

        /// The first entries of `bytes` in f16, whole vectors of them; how many.
        #[allow(unsafe_code)]
        #[target_feature(enable = $features)]
        pub fn widen_f16(bytes: &[u8], out: &mut [f32]) -> usize {
            let whole = out.len().min(bytes.len() / 2) / LANES * LANES;
            for at in (0..whole).step_by(LANES) {
                // SAFETY: LANES entries stand from `at` on in both.
                unsafe {
                    store(
                        out.as_mut_ptr().add(at),
                        load_f16(bytes.as_ptr().add(2 * at)),
                    )
                };
            }
            whole
        }

        /// [`super::pass`].
        #[target_feature(enable = $features)]
        pub fn pass(panel: &[f32], x: &[f32], span: usize, sums: &mut [f32], rows: usize) {
            for r in (0..rows).step_by(3) {
                let (panel, sums) = (&panel[r * span..], &mut sums[r..]);
                match rows - r {
                    1 => strip::<1>(panel, x, span, sums, rows),
                    2 => strip::<2>(panel, x, span, sums, rows),
                    _ => strip::<3>(panel, x, span, sums, rows),
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
            for (x, sums) in x.chunks(4 * span).zip(sums.chunks_mut(4 * rows)) {
                match x.len() / span {
                    1 => block::<R, 1>(panel, x, span, sums, rows),
                    2 => block::<R, 2>(panel, x, span, sums, rows),
                    3 => block::<R, 3>(panel, x, span, sums, rows),
                    _ => block::<R, 4>(panel, x, span, sums, rows),
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
            let found = unsafe { sum::<4, R, N>([(w, x, span)], |at| load(at.cast())) };
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

    /// The sums of the lanes, by halves; of four vectors together.
    #[allow(unsafe_code)]
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn totals<const N: usize>(sums: [Vector; N]) -> [f32; N] {
        let mut found = [0.; N];
        for first in (0..N).step_by(4) {
            let count = 4.min(N - first);
            let mut four = [_mm_setzero_ps(); 4];
            for n in 0..count {
                let sum = sums[first + n];
                let high = _mm256_extractf128_ps::<1>(sum);
                four[n] = _mm_add_ps(_mm256_castps256_ps128(sum), high);
            }
            let [a, b, c, d] = four;
            let ab = _mm_add_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a));
            let cd = _mm_add_ps(_mm_movelh_ps(c, d), _mm_movehl_ps(d, c));
            let (even, odd) = (
                _mm_shuffle_ps::<0x88>(ab, cd),
                _mm_shuffle_ps::<0xdd>(ab, cd),
            );
            let mut totals = [0f32; 4];
            // SAFETY: four numbers.
            unsafe { _mm_storeu_ps(totals.as_mut_ptr(), _mm_add_ps(even, odd)) };
            found[first..first + count].copy_from_slice(&totals[..count]);
        }
        found
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
    unsafe fn store(at: *mut f32, a: Vector) {
        // SAFETY: the caller's promise.
        unsafe { _mm256_storeu_ps(at, a) }
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
    fn totals<const N: usize>(sums: [Vector; N]) -> [f32; N] {
        let mut found = [0.; N];
        for n in 0..N {
            found[n] = _mm512_reduce_add_ps(sums[n]);
        }
        found
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
    unsafe fn store(at: *mut f32, a: Vector) {
        // SAFETY: the caller's promise.
        unsafe { _mm512_storeu_ps(at, a) }
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
