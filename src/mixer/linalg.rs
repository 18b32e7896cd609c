//! Dense linear algebra for initialisation, in f64, by `faer`.

use candle_core::{DType, Device, Tensor};
use faer::Mat;

use crate::{Error, Result};

/// A 2-d tensor as a matrix.
pub fn matrix(t: &Tensor) -> Result<Mat<f64>> {
    let (rows, cols) = t.dims2()?;
    let data: Vec<f64> = t
        .to_device(&Device::Cpu)?
        .to_dtype(DType::F64)?
        .flatten_all()?
        .to_vec1()?;
    Ok(Mat::from_fn(rows, cols, |i, j| data[i * cols + j]))
}

/// A matrix as an f32 tensor on the CPU.
pub fn tensor(m: &Mat<f64>) -> Result<Tensor> {
    let (rows, cols) = (m.nrows(), m.ncols());
    let data: Vec<f32> = (0..rows * cols)
        .map(|at| m[(at / cols, at % cols)] as f32)
        .collect();
    Ok(Tensor::from_vec(data, (rows, cols), &Device::Cpu)?)
}

/// `M = U diag(S) Vᵀ` with the `min(rows, cols)` leading vectors, singular values falling.
pub struct Svd {
    pub u: Mat<f64>,
    pub s: Vec<f64>,
    pub v: Mat<f64>,
}

/// # Errors
/// When the matrix has entries that are not numbers.
pub fn svd(m: &Mat<f64>) -> Result<Svd> {
    let svd = m
        .thin_svd()
        .map_err(|e| Error::invalid(format!("singular value decomposition failed: {e:?}")))?;
    Ok(Svd {
        s: svd.S().column_vector().iter().copied().collect(),
        u: svd.U().to_owned(),
        v: svd.V().to_owned(),
    })
}
