//! Matrix products over slices, by the `gemm` crate: strides instead of transposed copies.

use gemm::Parallelism;

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

/// `out = a · b` (or `out += a · b`), `out` row after row. `parallel`: the caller is not itself one of
/// many parallel tasks.
pub fn matmul(out: &mut [f32], a: View, b: View, accumulate: bool, parallel: bool) {
    let ([m, k], [inner, n]) = (a.dims, b.dims);
    assert!(
        inner == k && out.len() == m * n && a.fits() && b.fits(),
        "matmul: {:?} times {:?} into {}",
        a.dims,
        b.dims,
        out.len()
    );
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        if !accumulate {
            out.fill(0.);
        }
        return;
    }
    let threads = match parallel && m * n * k >= WORTH_THREADS {
        true => Parallelism::Rayon(rayon::current_num_threads()),
        false => Parallelism::None,
    };
    // SAFETY: both views lie inside their slices and `out` holds m·n entries, as just asserted; `out` is
    // borrowed mutably and so overlaps neither.
    #[allow(unsafe_code)]
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
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

    #[test]
    fn equals_the_definition_for_all_strides() {
        for (m, n, k) in [(1, 1, 1), (3, 5, 2), (7, 16, 33), (64, 1, 9), (1, 40, 17)] {
            let a: Vec<f32> = (0..m * k).map(|i| (i as f32 * 0.37).sin()).collect();
            let b: Vec<f32> = (0..k * n).map(|i| (i as f32 * 0.73).cos()).collect();
            let b_turned: Vec<f32> = (0..n * k).map(|i| b[i % k * n + i / k]).collect();
            let a = View::rows(&a, m, k);
            for b in [
                View::rows(&b, k, n),
                View::rows(&b_turned, n, k).transposed(),
            ] {
                let mut out = vec![1.; m * n];
                matmul(&mut out, a, b, true, false);
                for (at, got) in out.iter().enumerate() {
                    let (i, j) = (at / n, at % n);
                    let entry =
                        |l: usize| a.data[i * k + l] * b.data[l * b.strides[0] + j * b.strides[1]];
                    let want = 1. + (0..k).map(entry).sum::<f32>();
                    assert!(
                        (got - want).abs() < 1e-4,
                        "{m}x{n}x{k} at {i},{j}: {got} for {want}"
                    );
                }
            }
        }
    }
}
