//! `y = x Wᵀ`: of a [`Matrix`] that is trained, or of one as a file has it.

pub mod cuda;
pub mod dot;
mod float8;
mod gradient;
mod matrix;
mod observer;
mod plain;
mod product;
mod rows;
mod storage;
mod stored;
mod stored_linear;
#[cfg(test)]
mod tests;
mod trained;

use crate::op::cpu::{host, slice};
use crate::op::matmul::{View, product};
use crate::op::route::{Kernels, Route};
use candle_core::{CpuStorage, CustomOp2, DType, Device, Layout, Result, Shape, Tensor, bail};

pub use float8::{finite as finite_float8, quantize as quantize_float8};
pub use gradient::WeightGradient;
pub use matrix::Matrix;
pub use observer::Observer;
pub use product::{Part, Scratch, products, products_by};
pub use storage::Storage;
pub use stored::{Owner, Stored};
use stored_linear::StoredLinear;
pub use trained::Trained;

/// On CUDA devices candle's products, which the plain version consists of, are cuBLAS's.
const KERNELS: Kernels = Kernels::f32("linear").cuda(&[DType::F32, DType::BF16]);

/// `x [.., in]`, `w [out, in]` → `[.., out]`.
pub fn linear(x: &Tensor, w: &Matrix) -> Result<Tensor> {
    let (rows, width) = w.dims()?;
    if x.dims().last() != Some(&width) {
        bail!(
            "linear: x {:?} does not end with the {width} inputs of w [{rows}, {width}]",
            x.shape(),
        );
    }
    match w {
        Matrix::Dense(w) if KERNELS.route(&[x, w]) == Route::Cpu => {
            x.contiguous()?.apply_op2(&w.contiguous()?, Linear)
        }
        Matrix::Dense(w) => plain::linear(x, w),
        Matrix::Stored(w) if KERNELS.route(&[x]) == Route::Cpu => {
            x.contiguous()?.apply_op1(StoredLinear(w.clone()))
        }
        Matrix::Trained(w) => w.linear(x),
        Matrix::Stored(_) => bail!(
            "linear: a matrix as stored is multiplied in f32 on the CPU, not {:?} on {:?}",
            x.dtype(),
            x.device()
        ),
    }
}

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
            let dx = product(View::rows(dy, m, n), View::rows(w, n, k));
            Tensor::from_vec(dx, (m, k), &Device::Cpu)
        }
        Matrix::Dense(w) => plain::back(&dy, w),
        Matrix::Trained(w) => w.back(&dy),
        Matrix::Stored(w) => {
            let (dy, at) = dy.storage_and_layout();
            Tensor::from_vec(w.back(slice(host(&dy)?, at)?), (m, k), &Device::Cpu)
        }
    }
}

/// Of `x [.., in]` the shape of `x Wᵀ`.
pub(in crate::op) fn output(x: &[usize], outs: usize) -> Shape {
    let mut dims = x.to_vec();
    *dims.last_mut().expect("checked to end with the inputs") = outs;
    dims.into()
}

/// What sums are in where products are computed in `compute`.
pub fn wide(compute: DType) -> DType {
    match compute {
        DType::BF16 | DType::F16 => DType::F32,
        wide => wide,
    }
}

/// `y [.., N]` with `bias [N]` added to every row, in the type of y.
pub fn biased(y: &Tensor, bias: &Tensor) -> Result<Tensor> {
    y.broadcast_add(&bias.to_dtype(y.dtype())?)
}

/// Adds `bias` to every row of `y`.
pub fn add_bias(y: &mut [f32], bias: &[f32]) {
    for row in y.chunks_exact_mut(bias.len().max(1)) {
        row.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
    }
}

struct Linear;

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (outs, ins) = w_layout.shape().dims2()?;
        let (x, w) = (slice(x, x_layout)?, slice(w, w_layout)?);
        let m = x_layout.shape().elem_count() / ins;
        let w = View::rows(w, outs, ins).transposed();
        let y = product(View::rows(x, m, ins), w);
        Ok((CpuStorage::F32(y), output(x_layout.dims(), outs)))
    }

    /// `dx = dy W`, `dW = dyᵀ x`.
    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (outs, ins) = w.dims2()?;
        let m = x.elem_count() / ins;
        let dy = dy.contiguous()?;
        let (x_storage, x_layout) = x.storage_and_layout();
        let (w_storage, w_layout) = w.storage_and_layout();
        let (dy_storage, dy_layout) = dy.storage_and_layout();
        let dy = View::rows(slice(host(&dy_storage)?, dy_layout)?, m, outs);
        let dx = match x.track_op() {
            true => {
                let w = View::rows(slice(host(&w_storage)?, w_layout)?, outs, ins);
                let dx = product(dy, w);
                Some(Tensor::from_vec(dx, x.shape(), &Device::Cpu)?)
            }
            false => None,
        };
        let dw = match w.track_op() {
            true => {
                let x = View::rows(slice(host(&x_storage)?, x_layout)?, m, ins);
                let dw = product(dy.transposed(), x);
                Some(Tensor::from_vec(dw, w.shape(), &Device::Cpu)?)
            }
            false => None,
        };
        Ok((dx, dw))
    }
}
