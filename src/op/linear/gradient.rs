//! The gradient of a weight, summed up in f32 outside of candle's graph, so that it need not be there more than once.

use candle_core::{DType, Device, Result, Tensor};

use super::{KERNELS, wide};
use crate::op::cpu::{host, slice};
use crate::op::matmul::{View, add_product};
/// The gradient of a matrix `[N, K]`, summed up.
#[derive(Debug)]
pub struct WeightGradient(Sum);

#[derive(Debug)]
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
    /// Zero, for a matrix that is computed with in `compute`.
    pub(super) fn zeros((n, k): (usize, usize), compute: DType, device: &Device) -> Result<Self> {
        Ok(Self(match device {
            Device::Cpu if KERNELS.cpu.contains(&compute) => Sum::Host {
                entries: vec![0.; n * k],
                width: k,
            },
            #[cfg(feature = "cuda")]
            Device::Cuda(_) if KERNELS.cuda.contains(&compute) => {
                Sum::Cuda(Tensor::zeros((n, k), DType::F32, device)?)
            }
            _ => Sum::Plain(Tensor::zeros((n, k), wide(compute), device)?),
        }))
    }

    /// Rows from `first` on `+= dyᵀ x`: of `y = x Wᵀ` by these rows, `dy [M, N]`, `x [M, K]`.
    pub fn add_product(&mut self, first: usize, dy: &Tensor, x: &Tensor) -> Result<()> {
        let (m, n) = dy.dims2()?;
        let (dy, x) = (dy.contiguous()?, x.contiguous()?);
        match &mut self.0 {
            Sum::Host { entries, width } => {
                let ((dy, dy_at), (x, x_at)) = (dy.storage_and_layout(), x.storage_and_layout());
                let (dy, x) = (slice(host(&dy)?, dy_at)?, slice(host(&x)?, x_at)?);
                let dy = View::rows(dy, m, n).transposed();
                let sum = &mut entries[first * *width..][..n * *width];
                add_product(sum, dy, View::rows(x, m, *width));
            }
            #[cfg(feature = "cuda")]
            Sum::Cuda(sum) => {
                let rows = sum.narrow(0, first, n)?;
                let gpu = crate::op::cuda::Cuda::of(sum)?;
                let [rows, dy, x] = [gpu.tensor(&rows)?, gpu.tensor(&dy)?, gpu.tensor(&x)?];
                gpu.add_product(&rows, &dy, &x, m)?;
            }
            Sum::Plain(sum) => {
                let product = dy.t()?.matmul(&x)?.to_dtype(sum.dtype())?;
                let rows = (sum.narrow(0, first, n)? + product)?;
                sum.slice_set(&rows, 0, first)?;
            }
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
            Sum::Plain(sum) => *sum = sum.index_add(ids, &dx.to_dtype(sum.dtype())?, 0)?,
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
