//! Dense linear algebra for initialisation, in f64, by `faer`.

use candle_core::{DType, Device, Tensor};
use faer::{Mat, Side};

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

/// `M = Q diag(values) Qᵀ` of a symmetric positive semi-definite matrix, values falling and not below 0.
pub struct Eigen {
    pub vectors: Mat<f64>,
    pub values: Vec<f64>,
}

/// # Errors
/// When the matrix has entries that are not numbers.
pub fn eigen(m: &Mat<f64>) -> Result<Eigen> {
    let found = m
        .self_adjoint_eigen(Side::Lower)
        .map_err(|e| Error::invalid(format!("eigenvalue decomposition failed: {e:?}")))?;
    let values = found.S().column_vector().iter();
    Ok(Eigen {
        vectors: found.U().reverse_cols().to_owned(),
        values: values.rev().map(|value| value.max(0.0)).collect(),
    })
}

/// What is added to the diagonal of a positive semi-definite matrix, so that directions that hardly occur
/// can be divided by: a thousandth of the mean eigenvalue.
pub fn floor(m: &Mat<f64>) -> f64 {
    let trace: f64 = (0..m.nrows()).map(|i| m[(i, i)]).sum();
    1e-3 * trace / m.nrows().max(1) as f64 + f64::MIN_POSITIVE
}

/// The symmetric root of a positive semi-definite matrix lifted by its [`floor`], and the root's inverse.
pub fn root(m: &Mat<f64>) -> Result<(Mat<f64>, Mat<f64>)> {
    let floor = floor(m);
    let Eigen { vectors, values } = eigen(m)?;
    let power = |p: f64| {
        let scaled = Mat::from_fn(m.nrows(), m.nrows(), |i, j| {
            vectors[(i, j)] * (values[j] + floor).powf(p)
        });
        scaled * vectors.transpose()
    };
    Ok((power(0.5), power(-0.5)))
}
