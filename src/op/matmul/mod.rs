//! Matrix products over slices, by the `gemm` crate or by tiles of a processor that has them: strides instead of transposed copies.

#[cfg(target_arch = "x86_64")]
mod tiles;

use std::cell::Cell;

use gemm::Parallelism;

#[cfg(target_arch = "x86_64")]
use super::isa::{Isa, Level};

/// A matrix inside a slice: entry `(i, j)` stands at `i · strides[0] + j · strides[1]`.
#[derive(Clone, Copy)]
pub struct View<'a> {
    pub data: &'a [f32],
    pub dims: [usize; 2],
    pub strides: [usize; 2],
}

impl<'a> View<'a> {
    /// `rows × cols`, row after row.
    pub fn rows(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self {
            data,
            dims: [rows, cols],
            strides: [cols, 1],
        }
    }

    pub fn transposed(self) -> Self {
        let ([rows, cols], [down, right]) = (self.dims, self.strides);
        Self {
            data: self.data,
            dims: [cols, rows],
            strides: [right, down],
        }
    }

    fn fits(&self) -> bool {
        let [rows, cols] = self.dims;
        let [down, right] = self.strides;
        rows == 0 || cols == 0 || (rows - 1) * down + (cols - 1) * right < self.data.len()
    }
}

/// Products below this many multiplications are not worth a second thread.
const WORTH_THREADS: usize = 1 << 19;

thread_local! {
    static ROUGH: Cell<bool> = const { Cell::new(false) };
}

/// Whether products that this thread asks for may be rough ([`roughly`]).
pub fn is_rough() -> bool {
    ROUGH.get()
}

/// `work` of this thread, a training step, in whose products factors have 17 bits instead of 24 where the processor has tiles. What is computed
/// outside of it is in f32 everywhere, so that a checkpoint means the same on every processor.
pub fn roughly<R>(work: impl FnOnce() -> R) -> R {
    as_rough(true, work)
}

/// `work` of this thread as another thread would do it that [`is_rough`] or not.
pub fn as_rough<R>(rough: bool, work: impl FnOnce() -> R) -> R {
    struct Back(bool);
    impl Drop for Back {
        fn drop(&mut self) {
            ROUGH.set(self.0);
        }
    }
    let _back = Back(ROUGH.replace(rough));
    work()
}

/// `out = a · b` (or `out += a · b`), `out` row after row, by this thread and in f32: for one of many tasks.
pub fn matmul(out: &mut [f32], a: View, b: View, accumulate: bool) {
    into(out, a, b, accumulate, false);
}

/// `out += a · b`, `out` row after row, by all threads.
pub fn add_product(out: &mut [f32], a: View, b: View) {
    into(out, a, b, true, true);
}

fn into(out: &mut [f32], a: View, b: View, accumulate: bool, shared: bool) {
    assert!(
        out.len() == a.dims[0] * b.dims[1],
        "matmul: {:?} times {:?} into {}",
        a.dims,
        b.dims,
        out.len()
    );
    // SAFETY: `out` holds as many entries as the product, as just asserted; it is borrowed mutably and so overlaps neither.
    #[allow(unsafe_code)]
    unsafe {
        multiply(out.as_mut_ptr(), a, b, accumulate, shared);
    }
}

/// `a · b`, row after row: of all threads, and without zeros that would be written first.
pub fn product(a: View, b: View) -> Vec<f32> {
    let len = a.dims[0] * b.dims[1];
    let mut out = Vec::with_capacity(len);
    // SAFETY: there is room for the product, all of whose entries are written and none read before.
    #[allow(unsafe_code)]
    unsafe {
        multiply(out.as_mut_ptr(), a, b, false, true);
        out.set_len(len);
    }
    out
}

/// What all of these do, `shared` by all threads; without `accumulate` nothing at `out` is read and all of it written.
///
/// # Safety
/// There is room for the product's entries at `out`, apart from both views, and with `accumulate` they have been written.
#[allow(unsafe_code)]
unsafe fn multiply(out: *mut f32, a: View, b: View, accumulate: bool, shared: bool) {
    let ([m, k], [inner, n]) = (a.dims, b.dims);
    assert!(
        inner == k && a.fits() && b.fits(),
        "matmul: {:?} times {:?}",
        a.dims,
        b.dims
    );
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        if !accumulate {
            // SAFETY: the caller's promise; bytes of nothing are zeros.
            unsafe { out.write_bytes(0, m * n) };
        }
        return;
    }
    let worth_threads = m * n * k >= WORTH_THREADS;
    #[cfg(target_arch = "x86_64")]
    if shared && is_rough() && Isa::here().level() == Level::Amx && tiles::take(a, b) {
        // SAFETY: an `Isa` is of this processor; the rest was just asserted, or is the caller's promise.
        unsafe { tiles::multiply(out, a, b, accumulate, !worth_threads) };
        return;
    }
    let threads = match shared && worth_threads {
        true => Parallelism::Rayon(rayon::current_num_threads()),
        false => Parallelism::None,
    };
    // SAFETY: both views lie inside their slices, as just asserted; of `out` the caller's promise.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out,
            1,
            n as isize,
            accumulate,
            a.data.as_ptr(),
            a.strides[1] as isize,
            a.strides[0] as isize,
            b.data.as_ptr(),
            b.strides[1] as isize,
            b.strides[0] as isize,
            1.,
            1.,
            false,
            false,
            false,
            threads,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By tiles where there are any: edges in all directions, several spans, blocks of columns and of entries; a row is the same whatever is
    /// multiplied beside it.
    #[test]
    fn large_products_equal_the_definition() {
        for (m, n, k) in [(1, 100, 40), (70, 45, 67), (130, 530, 33), (45, 70, 2100)] {
            let entries = |count: usize, by: f32| -> Vec<f32> {
                let entry = |i: usize| (i as f32 * by).sin() * (1. + (i % 7) as f32);
                (0..count).map(entry).collect()
            };
            let (a, b) = (entries(m * k, 0.37), entries(k * n, 0.73));
            let turned = |x: &[f32], [rows, cols]: [usize; 2]| -> Vec<f32> {
                (0..x.len())
                    .map(|i| x[i % rows * cols + i / rows])
                    .collect()
            };
            let (a_turned, b_turned) = (turned(&a, [m, k]), turned(&b, [k, n]));
            let lefts = [
                View::rows(&a, m, k),
                View::rows(&a_turned, k, m).transposed(),
            ];
            let rights = [
                View::rows(&b, k, n),
                View::rows(&b_turned, n, k).transposed(),
            ];
            let first = roughly(|| product(lefts[0], rights[0]));
            for (left, right) in lefts.iter().flat_map(|a| rights.map(|b| (*a, b))) {
                let found = roughly(|| product(left, right));
                let mut twice = found.clone();
                roughly(|| add_product(&mut twice, left, right));
                for (at, (found, twice)) in found.iter().zip(twice).enumerate() {
                    let (i, j) = (at / n, at % n);
                    let factors =
                        (0..k).map(|l| (f64::from(a[i * k + l]), f64::from(b[l * n + j])));
                    let want: f64 = factors.clone().map(|(a, b)| a * b).sum();
                    let size = factors.map(|(a, b)| (a * b).powi(2)).sum::<f64>().sqrt();
                    let off = [f64::from(*found) - want, f64::from(twice) - 2. * want];
                    assert!(
                        off.iter().all(|off| off.abs() < 4e-5 * size),
                        "{m}x{n}x{k} at {i},{j}: {off:?} of {want} ({size})"
                    );
                }
                #[cfg(target_arch = "x86_64")]
                if Isa::here().level() == Level::Amx {
                    assert_eq!(found, first, "however they stand");
                }
            }
            let last = View {
                data: &a[(m - 1) * k..],
                dims: [1, k],
                strides: [k, 1],
            };
            #[cfg(target_arch = "x86_64")]
            if Isa::here().level() == Level::Amx {
                assert_eq!(roughly(|| product(last, rights[0])), first[(m - 1) * n..]);
            }
        }
    }

    #[test]
    fn equals_the_definition_for_all_strides() {
        for (m, n, k) in [
            (1, 1, 1),
            (2, 3, 0),
            (40, 17, 1),
            (17, 40, 2),
            (300, 1, 40),
            (3, 5, 2),
            (7, 16, 33),
            (64, 1, 9),
            (1, 40, 17),
        ] {
            let a: Vec<f32> = (0..m * k).map(|i| (i as f32 * 0.37).sin()).collect();
            let b: Vec<f32> = (0..k * n).map(|i| (i as f32 * 0.73).cos()).collect();
            let b_turned: Vec<f32> = (0..n * k).map(|i| b[i % k * n + i / k]).collect();
            let a = View::rows(&a, m, k);
            for b in [
                View::rows(&b, k, n),
                View::rows(&b_turned, n, k).transposed(),
            ] {
                let mut out = vec![1.; m * n];
                matmul(&mut out, a, b, true);
                // What stands there is not read.
                let mut alone = vec![f32::NAN; m * n];
                matmul(&mut alone, a, b, false);
                for (at, (got, alone)) in out.iter().zip(&alone).enumerate() {
                    let (i, j) = (at / n, at % n);
                    let entry =
                        |l: usize| a.data[i * k + l] * b.data[l * b.strides[0] + j * b.strides[1]];
                    let want = 1. + (0..k).map(entry).sum::<f32>();
                    assert!(
                        (got - want).abs() < 1e-4 && (alone + 1. - want).abs() < 1e-4,
                        "{m}x{n}x{k} at {i},{j}: {got} for {want}"
                    );
                }
            }
        }
    }
}
