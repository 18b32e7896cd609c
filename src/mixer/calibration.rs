//! What a mixer can be fitted to: the teacher's mixer, read and written on real text.

use candle_core::{DType, Device, Tensor};
use faer::Mat;
use faer::linalg::solvers::Solve;

use super::linalg::{matrix, svd, tensor};
use super::{Mixer, MixerConfig};
use crate::op::Documents;
use crate::weights::Weights;
use crate::{Error, Result};

/// One layer of the teacher on a sample of text.
#[derive(Debug, Clone)]
pub struct Sample {
    /// What the mixer reads (after the norm), `[B, T, D]`.
    pub input: Tensor,
    /// What it writes (before the residual addition), `[B, T, D]`.
    pub output: Tensor,
    pub documents: Documents,
}

impl Sample {
    /// `E[x xᵀ]` of the input, `[D, D]`.
    pub fn second_moment(&self) -> Result<Mat<f64>> {
        let (b, t, d) = self.input.dims3()?;
        let x = self.input.reshape((b * t, d))?;
        let moment = (x.t()?.contiguous()?.matmul(&x)? / (b * t) as f64)?;
        matrix(&moment)
    }
}

/// Weight of the prior, relative to the features' mean square.
const RIDGE: f64 = 1e-3;

/// A mixer whose output projection is fitted to the sample in closed form.
#[derive(Debug)]
pub struct Fitted {
    pub tensors: Vec<(String, Tensor)>,
    /// `Σ(ŷ − y)² / Σ y²` of the mixer's output on the sample.
    pub error: f64,
}

/// Replaces `out_proj.weight` of a mixer by the ridge regression of the teacher's output on the mixer's
/// features (what the projection reads), with the given projection as the prior mean:
/// `min ‖F Wᵀ − Y‖² + λ‖W − W₀‖²`.
pub fn fit_output(
    config: &MixerConfig,
    mut tensors: Vec<(String, Tensor)>,
    sample: &Sample,
) -> Result<Fitted> {
    const OUT: &str = "out_proj.weight";
    let Some(slot) = tensors.iter().position(|(name, _)| name == OUT) else {
        return Err(Error::invalid(format!(
            "{} has no {OUT} to fit",
            config.name()
        )));
    };
    let prior = tensors[slot].1.clone();
    let (_, width) = prior.dims2()?;
    // With an identity in its place, the mixer's output is what the projection reads.
    tensors[slot].1 = Tensor::eye(width, DType::F32, &Device::Cpu)?;
    let probe = Mixer::new(config, &Weights::new(tensors.iter().cloned().collect()))?;
    let features = probe.forward(&sample.input, Some(&sample.documents))?;
    let (b, t, d) = sample.output.dims3()?;
    let features = features.reshape((b * t, width))?;
    let target = sample.output.reshape((b * t, d))?;
    let turned = features.t()?.contiguous()?;
    let gram = matrix(&turned.matmul(&features)?)?;
    let cross = matrix(&turned.matmul(&target)?)?;
    let lambda = RIDGE * (0..width).map(|i| gram[(i, i)]).sum::<f64>() / width as f64;
    let prior = matrix(&prior)?;
    let left = Mat::from_fn(width, width, |i, j| {
        gram[(i, j)] + if i == j { lambda } else { 0.0 }
    });
    let right = Mat::from_fn(width, d, |i, j| cross[(i, j)] + lambda * prior[(j, i)]);
    let solved = left
        .llt(faer::Side::Lower)
        .map_err(|e| {
            Error::invalid(format!(
                "{}: the features cannot be fitted: {e:?}",
                config.name()
            ))
        })?
        .solve(&right);
    let fitted = tensor(&solved.transpose().to_owned())?;
    let gap = (features.matmul(&fitted.t()?)? - &target)?;
    let square =
        |t: &Tensor| -> Result<f64> { Ok(t.sqr()?.to_dtype(DType::F64)?.sum_all()?.to_scalar()?) };
    let error = square(&gap)? / square(&target)?;
    tensors[slot].1 = fitted;
    Ok(Fitted { tensors, error })
}

/// The symmetric root of a positive semi-definite matrix and the root's inverse. Directions that hardly
/// occur are lifted to a thousandth of the mean, so that the inverse stays bounded.
pub fn root(m: &Mat<f64>) -> Result<(Mat<f64>, Mat<f64>)> {
    let n = m.nrows();
    let decomposed = svd(m)?;
    let floor = 1e-3 * decomposed.s.iter().sum::<f64>() / n as f64 + f64::MIN_POSITIVE;
    let power = |p: f64| {
        let scaled = Mat::from_fn(n, n, |i, j| {
            decomposed.u[(i, j)] * (decomposed.s[j] + floor).powf(p)
        });
        scaled * decomposed.u.transpose()
    };
    Ok((power(0.5), power(-0.5)))
}
