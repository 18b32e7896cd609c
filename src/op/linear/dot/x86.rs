//! The tile on x86-64, one text for both widths of vectors.

use std::arch::asm;
use std::arch::x86_64::*;

use super::{PADDED, Rows, SPAN, Storage};

/// How weights are stored.
const F32: u8 = 0;
const F16: u8 = 1;
const BF16: u8 = 2;

/// Rows of a panel that share a reading of activations: as many as have their sums, which stand side by side, in one vector.
const ROWS: usize = 4;

/// Of a weight.
const fn bytes(kind: u8) -> usize {
    if kind == F32 { 4 } else { 2 }
}

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
                    Storage::F32 => sum::<F32, R, N>(w, x, count),
                    Storage::F16 => sum::<F16, R, N>(w, x, count),
                    _ => sum::<BF16, R, N>(w, x, count),
                }
            }
        }

        /// [`super::column`].
        ///
        /// # Safety
        /// As [`tile`] for `y.len()` rows of `x.len()` weights, one behind the other.
        #[allow(unsafe_code)]
        #[target_feature(enable = $features)]
        pub unsafe fn column(storage: Storage, w: *const u8, x: &[f32], y: &mut [f32]) {
            // SAFETY: the caller's promise is the function's.
            unsafe {
                match storage {
                    Storage::F32 => rows::<F32>(w, x, y),
                    Storage::F16 => rows::<F16>(w, x, y),
                    _ => rows::<BF16>(w, x, y),
                }
            }
        }

        /// # Safety
        /// As [`column`].
        #[allow(unsafe_code)]
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn rows<const KIND: u8>(w: *const u8, x: &[f32], y: &mut [f32]) {
            let mut row = 0;
            // SAFETY: the caller's promise, for each of the rows.
            unsafe {
                while y.len() - row >= BESIDE {
                    let w = w.add(row * bytes(KIND) * x.len());
                    y[row..][..BESIDE].copy_from_slice(&together::<KIND, BESIDE>(w, x));
                    row += BESIDE;
                }
                while row < y.len() {
                    let w = w.add(row * bytes(KIND) * x.len());
                    y[row] = together::<KIND, 1>(w, x)[0];
                    row += 1;
                }
            }
        }

        /// # Safety
        /// As [`rows`], for `R` rows.
        #[allow(unsafe_code)]
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn together<const KIND: u8, const R: usize>(w: *const u8, x: &[f32]) -> [f32; R] {
            let mut sums = [0f32; R];
            for from in (0..x.len()).step_by(SPAN) {
                let mut places = [w; R];
                // SAFETY: the caller's promise.
                let found = unsafe {
                    for r in 0..R {
                        places[r] = w.add((r * x.len() + from) * bytes(KIND));
                    }
                    let (x, count) = (x.as_ptr().add(from), SPAN.min(x.len() - from));
                    sum::<KIND, R, 1>(places, [x], count)
                };
                for r in 0..R {
                    sums[r] += found[r][0];
                }
            }
            sums
        }

        /// # Safety
        /// As [`tile`].
        #[allow(unsafe_code)]
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn sum<const KIND: u8, const R: usize, const N: usize>(
            w: [*const u8; R],
            x: [*const f32; N],
            count: usize,
        ) -> [[f32; N]; R] {
            // SAFETY: the caller's promise is the function's.
            let sums = unsafe { vectors::<KIND, R, N>(w, x, count) };
            let mut found = [[0.; N]; R];
            if N == 1 {
                // Rows together: as many steps for some as for one.
                let totals = totals(column_of(sums));
                for r in 0..R {
                    found[r][0] = totals[r];
                }
            } else {
                for r in 0..R {
                    found[r] = totals(sums[r]);
                }
            }
            found
        }

        /// What is behind the last multiple of [`PADDED`] is filled up with zeros. A product has one vector of sums or, with two [`TURNS`], two that
        /// take turns: for few products at once, so that an addition need not wait for the one before; for many one after the other, with half
        /// the registers.
        ///
        /// # Safety
        /// As [`tile`].
        #[allow(unsafe_code)]
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn vectors<const KIND: u8, const R: usize, const N: usize>(
            w: [*const u8; R],
            x: [*const f32; N],
            count: usize,
        ) -> [[Vector; N]; R] {
            let left = count % PADDED;
            let count = count - left;
            // SAFETY: the caller's promise; there is an even number of vectors up to `count`, and `left` entries behind it.
            let add_some = |at, sums: &mut _| unsafe {
                add_products::<KIND, R, N>(w, x, at, LANES, sums);
            };
            let add_left = |from: usize, sums: &mut _| unsafe {
                for at in (from..left).step_by(TURNS * LANES) {
                    let n = LANES.min(left - at);
                    add_products::<KIND, R, N>(w, x, count + at, n, sums);
                }
            };
            let (mut even, mut odd) = ([[zero(); N]; R], [[zero(); N]; R]);
            if TURNS == 1 {
                let mut sums = odd;
                for first in (0..count).step_by(PADDED) {
                    // So many that the compiler writes them out: counting steps takes as long as a load.
                    for at in (first..first + PADDED).step_by(LANES) {
                        add_some(at, &mut sums);
                    }
                }
                add_left(0, &mut sums);
                return sums;
            }
            if R * N <= TWICE {
                for at in (0..count).step_by(2 * LANES) {
                    add_some(at, &mut even);
                    add_some(at + LANES, &mut odd);
                }
                add_left(0, &mut even);
                add_left(LANES, &mut odd);
                for r in 0..R {
                    for n in 0..N {
                        odd[r][n] = add(even[r][n], odd[r][n]);
                    }
                }
            } else {
                let mut sums = [[zero(); N]; R];
                for at in (0..count).step_by(2 * LANES) {
                    add_some(at, &mut sums);
                }
                add_left(0, &mut sums);
                // Volatile, so that they do not stay in registers, of which the other sums need all.
                for r in 0..R {
                    for n in 0..N {
                        // SAFETY: a reference's place.
                        unsafe { std::ptr::write_volatile(&mut even[r][n], sums[r][n]) };
                    }
                }
                for at in (LANES..count).step_by(2 * LANES) {
                    add_some(at, &mut odd);
                }
                add_left(LANES, &mut odd);
                for r in 0..R {
                    for n in 0..N {
                        // SAFETY: a reference's place.
                        let even = unsafe { std::ptr::read_volatile(&even[r][n]) };
                        odd[r][n] = add(even, odd[r][n]);
                    }
                }
            }
            odd
        }

        #[inline]
        #[target_feature(enable = $features)]
        fn column_of<const R: usize, const N: usize>(sums: [[Vector; N]; R]) -> [Vector; R] {
            let mut column = [zero(); R];
            for r in 0..R {
                column[r] = sums[r][0];
            }
            column
        }

        /// # Safety
        /// As [`sum`]; `n` weights and entries of each row stand from `at` on, at most `LANES`.
        #[allow(unsafe_code)]
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn add_products<const KIND: u8, const R: usize, const N: usize>(
            w: [*const u8; R],
            x: [*const f32; N],
            at: usize,
            n: usize,
            sums: &mut [[Vector; N]; R],
        ) {
            // SAFETY: the caller's promise.
            unsafe {
                // Registers keep the fewer of both.
                if N < R {
                    let mut entries = [zero(); N];
                    for i in 0..N {
                        entries[i] = load(x[i].add(at), n);
                    }
                    for r in 0..R {
                        let wide = weights::<KIND>(w[r].add(at * bytes(KIND)), n);
                        for i in 0..N {
                            sums[r][i] = fmadd(wide, entries[i], sums[r][i]);
                        }
                    }
                    return;
                }
                let mut wide = [zero(); R];
                for r in 0..R {
                    wide[r] = weights::<KIND>(w[r].add(at * bytes(KIND)), n);
                }
                for i in 0..N {
                    let x = load(x[i].add(at), n);
                    for r in 0..R {
                        sums[r][i] = fmadd(wide[r], x, sums[r][i]);
                    }
                }
            }
        }

        /// # Safety
        /// `n` weights stand at `at`, at most `LANES`.
        #[allow(unsafe_code)]
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn weights<const KIND: u8>(at: *const u8, n: usize) -> Vector {
            // SAFETY: the caller's promise.
            unsafe {
                match KIND {
                    F32 => load(at.cast(), n),
                    F16 => load_f16(at, n),
                    _ => load_bf16(at, n),
                }
            }
        }

        /// [`super::scores`].
        #[target_feature(enable = $features)]
        pub fn scores(queries: &[f32], dim: usize, keys: &[f32], stride: usize, out: &mut [f32]) {
            let positions = out.len() / (queries.len() / dim);
            let fours = queries.chunks(4 * dim).zip(out.chunks_mut(4 * positions));
            for (queries, out) in fours {
                if queries.len() == dim {
                    let whole = positions / BESIDE * BESIDE;
                    for p in (0..whole).step_by(BESIDE) {
                        let (keys, out) = (&keys[p * stride..], &mut out[p..]);
                        score::<BESIDE, 1>(queries, dim, keys, stride, out, positions);
                    }
                    for p in whole..positions {
                        let (keys, out) = (&keys[p * stride..], &mut out[p..]);
                        score::<1, 1>(queries, dim, keys, stride, out, positions);
                    }
                    continue;
                }
                for p in (0..positions).step_by(3) {
                    let (keys, out) = (&keys[p * stride..], &mut out[p..]);
                    match (queries.len() / dim, positions - p) {
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
                    key[r] = unsafe { load(keys.as_ptr().add(r * stride + at), LANES) };
                }
                for n in 0..N {
                    // SAFETY: as above.
                    let query = unsafe { load(queries.as_ptr().add(n * dim + at), LANES) };
                    for r in 0..R {
                        sums[r][n] = fmadd(key[r], query, sums[r][n]);
                    }
                }
            }
            if N == 1 {
                out[..R].copy_from_slice(&totals(column_of(sums)));
                return;
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
                        load_f16(bytes.as_ptr().add(2 * at), LANES),
                    )
                };
            }
            whole
        }

        /// [`super::pass`].
        #[target_feature(enable = $features)]
        pub fn pass(panel: Rows, x: Rows, span: usize, sums: &mut [f32]) {
            let rows = panel.count();
            for r in (0..rows).step_by(ROWS) {
                let (panel, sums) = (panel.from(r), &mut sums[r..]);
                match (rows - r).min(ROWS) {
                    1 => strip::<1>(panel, x, span, sums, rows),
                    2 => strip::<2>(panel, x, span, sums, rows),
                    3 => strip::<3>(panel, x, span, sums, rows),
                    _ => strip::<ROWS>(panel, x, span, sums, rows),
                }
            }
        }

        /// `R` rows of a panel with all of `x`.
        #[inline]
        #[target_feature(enable = $features)]
        fn strip<const R: usize>(panel: Rows, x: Rows, span: usize, sums: &mut [f32], rows: usize) {
            let count = x.count();
            for (i, sums) in sums.chunks_mut(BLOCK * rows).enumerate() {
                let (x, left) = (x.from(BLOCK * i), count - BLOCK * i);
                match left.min(BLOCK) {
                    1 => block::<R, 1>(panel, x, span, sums, rows),
                    2 => block::<R, 2>(panel, x, span, sums, rows),
                    3 => block::<R, 3>(panel, x, span, sums, rows),
                    _ => block::<R, BLOCK>(panel, x, span, sums, rows),
                }
            }
        }

        #[allow(unsafe_code)]
        #[inline]
        #[target_feature(enable = $features)]
        fn block<const R: usize, const N: usize>(
            panel: Rows,
            x: Rows,
            span: usize,
            sums: &mut [f32],
            rows: usize,
        ) {
            let w: [*const u8; R] = std::array::from_fn(|r| panel.row(r)[..span].as_ptr().cast());
            let x: [*const f32; N] = std::array::from_fn(|n| x.row(n)[..span].as_ptr());
            // SAFETY: `span` entries stand in every row, as just cut.
            let found = unsafe { vectors::<F32, R, N>(w, x, span) };
            add_totals(found, sums, rows);
        }
    };
}

pub mod avx2 {
    use super::*;

    const LANES: usize = 8;
    /// Sixteen registers do not hold two vectors of sums for as many rows as share their loads. The four cycles of an addition are covered by
    /// eight rows, or twelve products of three with four; fewer wait for memory, or are a few that are left over.
    const TURNS: usize = 1;
    /// Products of rows for which there were registers for both.
    const TWICE: usize = 4;
    /// Rows, or keys, that are multiplied with one together.
    const BESIDE: usize = 8;
    /// Rows of activations that are multiplied with [`ROWS`] together: what there are registers for.
    const BLOCK: usize = 3;
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
            let mut four = [zero(); 4];
            four[..count].copy_from_slice(&sums[first..first + count]);
            let mut totals = [0f32; 4];
            // SAFETY: four numbers.
            unsafe { _mm_storeu_ps(totals.as_mut_ptr(), four_totals(four)) };
            found[first..first + count].copy_from_slice(&totals[..count]);
        }
        found
    }

    /// Those of four vectors, side by side.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn four_totals(sums: [Vector; 4]) -> __m128 {
        let mut four = [_mm_setzero_ps(); 4];
        for n in 0..4 {
            let high = _mm256_extractf128_ps::<1>(sums[n]);
            four[n] = _mm_add_ps(_mm256_castps256_ps128(sums[n]), high);
        }
        let [a, b, c, d] = four;
        let ab = _mm_add_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a));
        let cd = _mm_add_ps(_mm_movelh_ps(c, d), _mm_movehl_ps(d, c));
        let even = _mm_shuffle_ps::<0x88>(ab, cd);
        _mm_add_ps(even, _mm_shuffle_ps::<0xdd>(ab, cd))
    }

    /// `sums [N, rows] +=` the totals of `found`, at most four rows.
    #[allow(unsafe_code)]
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn add_totals<const R: usize, const N: usize>(
        found: [[Vector; N]; R],
        sums: &mut [f32],
        rows: usize,
    ) {
        for n in 0..N {
            let mut four = [zero(); 4];
            for r in 0..R {
                four[r] = found[r][n];
            }
            let (totals, sums) = (four_totals(four), &mut sums[n * rows..][..R]);
            if R == 4 {
                let sums = sums.as_mut_ptr();
                // SAFETY: four numbers, as the slice was cut.
                unsafe { _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), totals)) };
                continue;
            }
            let mut each = [0f32; 4];
            // SAFETY: four numbers.
            unsafe { _mm_storeu_ps(each.as_mut_ptr(), totals) };
            for (sum, total) in sums.iter_mut().zip(each) {
                *sum += total;
            }
        }
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

    /// The first `n` lanes from `at` on, zeros in the others.
    ///
    /// # Safety
    /// `n` entries stand there, at most eight.
    #[allow(unsafe_code)]
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load(at: *const f32, n: usize) -> Vector {
        let mut filled = [0f32; LANES];
        // SAFETY: the caller's promise.
        unsafe {
            if n == LANES {
                return _mm256_loadu_ps(at);
            }
            // Bytes: weights stand anywhere.
            std::ptr::copy_nonoverlapping(at.cast::<u8>(), filled.as_mut_ptr().cast(), 4 * n);
            _mm256_loadu_ps(filled.as_ptr())
        }
    }

    /// # Safety
    /// As [`load`], in 16 bits.
    #[allow(unsafe_code)]
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_bits(at: *const u8, n: usize) -> __m128i {
        let mut filled = [0u16; LANES];
        // SAFETY: the caller's promise.
        unsafe {
            if n == LANES {
                return _mm_loadu_si128(at.cast());
            }
            std::ptr::copy_nonoverlapping(at, filled.as_mut_ptr().cast(), 2 * n);
            _mm_loadu_si128(filled.as_ptr().cast())
        }
    }

    /// # Safety
    /// As [`load`].
    #[allow(unsafe_code)]
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_f16(at: *const u8, n: usize) -> Vector {
        // SAFETY: the caller's promise.
        _mm256_cvtph_ps(unsafe { load_bits(at, n) })
    }

    /// # Safety
    /// As [`load`].
    #[allow(unsafe_code)]
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_bf16(at: *const u8, n: usize) -> Vector {
        // SAFETY: the caller's promise.
        let bits = _mm256_cvtepu16_epi32(unsafe { load_bits(at, n) });
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
    }
}

pub mod avx512 {
    use super::*;

    const LANES: usize = 16;
    const TURNS: usize = 2;
    /// Products of rows for which there are registers for both.
    const TWICE: usize = 8;
    /// Rows, or keys, that are multiplied with one together.
    const BESIDE: usize = 8;
    /// Rows of activations that are multiplied with [`ROWS`] together.
    const BLOCK: usize = 4;
    type Vector = __m512;
    /// Where in a vector of 16 bits an entry of 32 has its upper half from.
    // SAFETY: any bits are a vector.
    #[allow(unsafe_code)]
    const HALVES: __m512i = {
        let mut halves = [0u16; 2 * LANES];
        let mut i = 0;
        while i < halves.len() {
            halves[i] = i as u16 / 2;
            i += 1;
        }
        unsafe { std::mem::transmute(halves) }
    };

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

    /// The sums of the lanes, by halves; of eight vectors together.
    #[allow(unsafe_code)]
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq,avx2")]
    fn totals<const N: usize>(sums: [Vector; N]) -> [f32; N] {
        let mut found = [0.; N];
        for first in (0..N).step_by(8) {
            let count = 8.min(N - first);
            let mut eight = [zero(); 8];
            eight[..count].copy_from_slice(&sums[first..first + count]);
            let [a, b, c, d, e, f, g, h] = eight;
            let eighths = eighths(quarters([a, b, c, d]), quarters([e, f, g, h]));
            let all = add(eighths, _mm512_permute_ps::<0xb1>(eighths));
            let order = _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 0, 0, 0, 0, 0, 0, 0, 0);
            let all = _mm512_castps512_ps256(_mm512_permutexvar_ps(order, all));
            let mut totals = [0f32; 8];
            // SAFETY: eight numbers.
            unsafe { _mm256_storeu_ps(totals.as_mut_ptr(), all) };
            found[first..first + count].copy_from_slice(&totals[..count]);
        }
        found
    }

    /// `sums [N, rows] +=` the totals of `found`, by halves: sixteen vectors together, at most four of each row.
    #[allow(unsafe_code)]
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq,avx2")]
    fn add_totals<const R: usize, const N: usize>(
        found: [[Vector; N]; R],
        sums: &mut [f32],
        rows: usize,
    ) {
        let mut pairs = [zero(); 4];
        for r in 0..R {
            let mut four = [zero(); 4];
            four[..N].copy_from_slice(&found[r]);
            pairs[r] = quarters(four);
        }
        let [a, b, c, d] = pairs;
        let (low, high) = (eighths(a, b), eighths(c, d));
        let all = add(
            _mm512_shuffle_ps::<0x88>(low, high),
            _mm512_shuffle_ps::<0xdd>(low, high),
        );
        let mut totals = [0f32; LANES];
        // SAFETY: sixteen numbers.
        unsafe { store(totals.as_mut_ptr(), all) };
        for (n, totals) in totals.as_chunks::<4>().0.iter().take(N).enumerate() {
            for (sum, total) in sums[n * rows..][..R].iter_mut().zip(totals) {
                *sum += total;
            }
        }
    }

    /// Of four vectors, the sums of their quarters: by halves, those of a vector side by side.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn quarters([a, b, c, d]: [Vector; 4]) -> Vector {
        let ab = folded::<0x44, 0xee>(a, b);
        folded::<0x88, 0xdd>(ab, folded::<0x44, 0xee>(c, d))
    }

    /// The quarters of two vectors that `LOW` takes, and those of `HIGH` added to them.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn folded<const LOW: i32, const HIGH: i32>(a: Vector, b: Vector) -> Vector {
        add(
            _mm512_shuffle_f32x4::<LOW>(a, b),
            _mm512_shuffle_f32x4::<HIGH>(a, b),
        )
    }

    /// Of two of [`quarters`], the sums of those's halves.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn eighths(a: Vector, b: Vector) -> Vector {
        let (a, b) = (_mm512_castps_pd(a), _mm512_castps_pd(b));
        add(
            _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
            _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)),
        )
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

    /// The first `n` lanes from `at` on, zeros in the others.
    ///
    /// # Safety
    /// `n` entries stand there, at most sixteen.
    #[allow(unsafe_code)]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load(at: *const f32, n: usize) -> Vector {
        // SAFETY: the caller's promise; what a mask leaves out is not read.
        unsafe {
            match n {
                LANES => _mm512_loadu_ps(at),
                _ => _mm512_maskz_loadu_ps((1 << n) - 1, at),
            }
        }
    }

    /// # Safety
    /// As [`load`], in 16 bits.
    #[allow(unsafe_code)]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load_bits(at: *const u8, n: usize) -> __m256i {
        // SAFETY: the caller's promise; what a mask leaves out is not read.
        unsafe {
            match n {
                LANES => _mm256_loadu_si256(at.cast()),
                _ => _mm256_maskz_loadu_epi16((1 << n) - 1, at.cast()),
            }
        }
    }

    /// # Safety
    /// As [`load`].
    #[allow(unsafe_code)]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load_f16(at: *const u8, n: usize) -> Vector {
        // SAFETY: the caller's promise.
        _mm512_cvtph_ps(unsafe { load_bits(at, n) })
    }

    /// In one step what shifting widened integers does in two, which take longer than weights from a cache. Written out, because the compiler
    /// makes a permutation of two vectors of the intrinsic, which takes two.
    ///
    /// # Safety
    /// As [`load`].
    #[allow(unsafe_code)]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load_bf16(at: *const u8, n: usize) -> Vector {
        let upper: __mmask32 = 0xaaaa_aaaa;
        // SAFETY: the caller's promise; an instruction on registers.
        unsafe {
            let bits = _mm512_castsi256_si512(load_bits(at, n));
            let wide: __m512i;
            asm!(
                "vpermw {wide}{{{upper}}}{{z}}, {halves}, {bits}",
                wide = lateout(zmm_reg) wide,
                upper = in(kreg) upper,
                halves = in(zmm_reg) HALVES,
                bits = in(zmm_reg) bits,
                options(pure, nomem, nostack, preserves_flags)
            );
            _mm512_castsi512_ps(wide)
        }
    }
}
