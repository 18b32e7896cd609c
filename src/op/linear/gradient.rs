//! Gradients of a product that is taken piece by piece, outside of candle's graph: so that neither its output nor its weight's
//! gradient need be there more than once.

use candle_core::{Device, Result, Tensor};

use super::matrix::Matrix;
use super::{KERNELS, plain};
use crate::op::cpu::{host, slice};
use crate::op::matmul::{View, matmul};
use crate::op::route::Route;

/// What `y = x Wᵀ` hands back to `x`: `dy [M, N]` → `dy W [M, K]`.
pub fn back(dy: &Tensor, w: &Matrix) -> Result<Tensor> {
    let (m, n) = dy.dims2()?;
    let (_, k) = w.dims()?;
    let dy = dy.contiguous()?;
    match w {
        Matrix::Dense(w) if KERNELS.route(&[&dy, w]) == Route::Cpu => {
            let w = w.contiguous()?;
            let ((dy, dy_at), (w, w_at)) = (dy.storage_and_layout(), w.storage_and_layout());
            let (dy, w) = (slice(host(&dy)?, dy_at)?, slice(host(&w)?, w_at)?);
            let mut dx = vec![0.; m * k];
            matmul(
                &mut dx,
                View::rows(dy, m, n),
                View::rows(w, n, k),
                false,
                true,
            );
            Tensor::from_vec(dx, (m, k), &Device::Cpu)
        }
        Matrix::Dense(w) => plain::back(&dy, w),
        Matrix::Stored(w) => {
            let (dy, at) = dy.storage_and_layout();
            Tensor::from_vec(w.back(slice(host(&dy)?, at)?), (m, k), &Device::Cpu)
        }
    }
}

/// The gradient of a matrix `[N, K]`, summed up.
pub struct WeightGradient(Sum);

enum Sum {
    Host {
        entries: Vec<f32>,
        width: usize,
    },
    /// In f32, whatever the matrix is.
    #[cfg(feature = "cuda")]
    Cuda(Tensor),
    Plain(Tensor),
}

impl WeightGradient {
    /// Zero, for a matrix like this.
    pub fn new(w: &Tensor) -> Result<Self> {
        let (n, k) = w.dims2()?;
        Ok(Self(match KERNELS.route(&[w]) {
            Route::Cpu => Sum::Host {
                entries: vec![0.; n * k],
                width: k,
            },
            #[cfg(feature = "cuda")]
            Route::Cuda => Sum::Cuda(Tensor::zeros((n, k), candle_core::DType::F32, w.device())?),
            _ => Sum::Plain(w.zeros_like()?),
        }))
    }

    /// `+= dyᵀ x`: of `y = x Wᵀ`, `dy [M, N]`, `x [M, K]`.
    pub fn add_product(&mut self, dy: &Tensor, x: &Tensor) -> Result<()> {
        match &mut self.0 {
            Sum::Host { entries, width } => {
                let (dy, x) = (dy.contiguous()?, x.contiguous()?);
                let (m, n) = dy.dims2()?;
                let ((dy, dy_at), (x, x_at)) = (dy.storage_and_layout(), x.storage_and_layout());
                let (dy, x) = (slice(host(&dy)?, dy_at)?, slice(host(&x)?, x_at)?);
                let dy = View::rows(dy, m, n).transposed();
                matmul(entries, dy, View::rows(x, m, *width), true, true);
            }
            #[cfg(feature = "cuda")]
            Sum::Cuda(sum) => {
                let (dy, x) = (dy.contiguous()?, x.contiguous()?);
                let (m, _) = dy.dims2()?;
                let gpu = crate::op::cuda::Cuda::of(sum)?;
                let [sum, dy, x] = [gpu.tensor(sum)?, gpu.tensor(&dy)?, gpu.tensor(&x)?];
                gpu.add_product(&sum, &dy, &x, m)?;
            }
            Sum::Plain(sum) => *sum = (&*sum + dy.t()?.matmul(x)?)?,
        }
        Ok(())
    }

    /// Row `ids[i] += dx[i]`: of rows that were gathered, `dx [M, K]`.
    pub fn add_rows(&mut self, ids: &Tensor, dx: &Tensor) -> Result<()> {
        match &mut self.0 {
            Sum::Host { entries, width } => {
                let dx = dx.contiguous()?;
                let (dx, at) = dx.storage_and_layout();
                let rows = slice(host(&dx)?, at)?.chunks_exact(*width);
                for (id, dx) in ids.to_vec1::<u32>()?.iter().zip(rows) {
                    let row = &mut entries[*id as usize * *width..][..*width];
                    row.iter_mut().zip(dx).for_each(|(sum, dx)| *sum += dx);
                }
            }
            #[cfg(feature = "cuda")]
            Sum::Cuda(sum) => *sum = sum.index_add(ids, &dx.to_dtype(sum.dtype())?, 0)?,
            Sum::Plain(sum) => *sum = sum.index_add(ids, dx, 0)?,
        }
        Ok(())
    }

    /// `[N, K]`
    pub fn finish(self) -> Result<Tensor> {
        match self.0 {
            Sum::Host { entries, width } => {
                let rows = entries.len() / width;
                Tensor::from_vec(entries, (rows, width), &Device::Cpu)
            }
            #[cfg(feature = "cuda")]
            Sum::Cuda(sum) => Ok(sum),
            Sum::Plain(sum) => Ok(sum),
        }
    }
}
