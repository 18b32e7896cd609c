//! What a mixer can be fitted to: the teacher's mixer, read and written on real text.

use candle_core::{DType, Device, Tensor};
use faer::Mat;
use faer::linalg::solvers::Solve;

use super::linalg::{matrix, tensor};
use super::{AttentionWeights, Mixer, MixerConfig};
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

/// One layer of the teacher over a calibration text of any length.
#[derive(Debug, Clone)]
pub struct Statistics {
    /// `E[x]` of what the mixer reads, `[D]`.
    pub input_mean: Vec<f64>,
    /// `E[x xᵀ]`, `[D, D]`.
    pub input_moment: Mat<f64>,
    /// `E[y]` of what the mixer writes, `[D]`.
    pub output_mean: Vec<f64>,
    /// `E[y²]`, `[D]`.
    pub output_square: Vec<f64>,
    /// `E[|q|²]` of every query head and rotary pair, `[H, hd/2]`.
    pub query_energy: Mat<f64>,
    /// The same of the key heads, `[G, hd/2]`.
    pub key_energy: Mat<f64>,
}

impl Statistics {
    /// From sums over `tokens`: of the input `[D]`, its products `[D, D]`, the output and its squares `[D]`.
    pub fn new(
        attention: &AttentionWeights,
        tokens: usize,
        [input, products, output, squares]: [&Tensor; 4],
    ) -> Result<Self> {
        let mean = |t: &Tensor| -> Result<Vec<f64>> {
            Ok((t.to_dtype(DType::F64)? / tokens as f64)?.to_vec1()?)
        };
        let mut statistics = Self {
            input_mean: mean(input)?,
            input_moment: matrix(&(products / tokens as f64)?)?,
            output_mean: mean(output)?,
            output_square: mean(squares)?,
            query_energy: Mat::new(),
            key_energy: Mat::new(),
        };
        let moment = statistics.moment(attention);
        let [q, k, _] = attention.linear(Some(&moment))?.matrices()?;
        let hd = attention.config.head_dim;
        let energy = |w: Mat<f64>| -> Mat<f64> {
            let spread = &w * &moment;
            let square = |row: usize| -> f64 {
                (0..w.ncols()).map(|n| spread[(row, n)] * w[(row, n)]).sum()
            };
            Mat::from_fn(w.nrows() / hd, hd / 2, |head, pair| {
                let row = head * hd + pair;
                square(row) + square(row + hd / 2)
            })
        };
        statistics.query_energy = energy(q);
        statistics.key_energy = energy(k);
        Ok(statistics)
    }

    /// `E[x' x'ᵀ]` of what the projections of `attention` read: `x' = x`, or, where they have biases, `x` with a 1 behind it.
    pub(super) fn moment(&self, attention: &AttentionWeights) -> Mat<f64> {
        let (moment, mean) = (&self.input_moment, &self.input_mean);
        let d = mean.len();
        let wide = d + usize::from(attention.biases.is_some());
        Mat::from_fn(wide, wide, |i, j| match (i < d, j < d) {
            (true, true) => moment[(i, j)],
            (true, false) => mean[i],
            (false, true) => mean[j],
            (false, false) => 1.0,
        })
    }

    /// Of a sample alone.
    pub fn of(attention: &AttentionWeights, sample: &Sample) -> Result<Self> {
        let sums = sums(&sample.input, &sample.output)?;
        let (b, t, _) = sample.input.dims3()?;
        Self::new(attention, b * t, sums.each_ref())
    }
}

/// What [`Statistics::new`] takes, of one batch (both `[B, T, D]`), in f64 on the CPU.
pub fn sums(input: &Tensor, output: &Tensor) -> Result<[Tensor; 4]> {
    let (b, t, d) = input.dims3()?;
    let (x, y) = (input.reshape((b * t, d))?, output.reshape((b * t, d))?);
    let long = |t: Tensor| t.to_device(&Device::Cpu)?.to_dtype(DType::F64);
    Ok([
        long(x.clone())?.sum(0)?,
        long(x.t()?.contiguous()?.matmul(&x)?)?,
        long(y.clone())?.sum(0)?,
        long(y.sqr()?)?.sum(0)?,
    ])
}

/// Weight of the prior, relative to the features' mean square.
const RIDGE: f64 = 1e-3;

/// A mixer whose output projection is fitted to samples in closed form.
#[derive(Debug)]
pub struct Fitted {
    pub tensors: Vec<(String, Tensor)>,
    /// `Σ(ŷ − y)² / Σ y²` of the mixer's output on the samples.
    pub error: f64,
}

/// Sums that a linear regression is solved from, over any number of samples.
pub(super) struct Regression {
    /// `Σ f fᵀ [W, W]` and `Σ f yᵀ [W, D]`, in f64.
    gram: Tensor,
    cross: Tensor,
    /// `Σ |y|²`
    pub square: f64,
}

impl Regression {
    /// Of no samples, from `features` numbers to `targets`.
    pub fn new(features: usize, targets: usize) -> Result<Self> {
        let zeros = |width| Tensor::zeros((features, width), DType::F64, &Device::Cpu);
        Ok(Self {
            gram: zeros(features)?,
            cross: zeros(targets)?,
            square: 0.0,
        })
    }

    /// `features [N, W]`, `targets [N, D]`.
    pub fn add(&mut self, features: &Tensor, targets: &Tensor) -> Result<()> {
        let turned = features.t()?.contiguous()?;
        let long = |t: Tensor| t.to_dtype(DType::F64);
        self.gram = (&self.gram + long(turned.matmul(features)?)?)?;
        self.cross = (&self.cross + long(turned.matmul(targets)?)?)?;
        let square = long(targets.sqr()?)?.sum_all()?;
        self.square += square.to_scalar::<f64>()?;
        Ok(())
    }

    /// `[W, W]` and `[W, D]`.
    pub fn matrices(&self) -> Result<[Mat<f64>; 2]> {
        Ok([matrix(&self.gram)?, matrix(&self.cross)?])
    }
}

/// Replaces the output projection of a mixer by the ridge regression of the teacher's output on the mixer's
/// features (what the projection reads), with the given projection as the prior mean:
/// `min ‖F Wᵀ − Y‖² + λ‖W − W₀‖²`. One sample at a time is held.
pub fn fit_output(
    config: &MixerConfig,
    mut tensors: Vec<(String, Tensor)>,
    samples: impl Iterator<Item = Result<Sample>>,
) -> Result<Fitted> {
    let output = config.output();
    let Some(slot) = tensors.iter().position(|(name, _)| name == output) else {
        return Err(Error::invalid(format!(
            "{} has no {output} to fit",
            config.name()
        )));
    };
    let prior = tensors[slot].1.clone();
    let (d, width) = prior.dims2()?;
    // With an identity in its place, the mixer's output is what the projection reads.
    tensors[slot].1 = Tensor::eye(width, DType::F32, &Device::Cpu)?;
    let probe = Mixer::new(config, &Weights::new(tensors.iter().cloned().collect()))?;
    let mut sums = Regression::new(width, d)?;
    for sample in samples {
        let sample = sample?;
        let features = probe.forward(&sample.input, Some(&sample.documents))?;
        sums.add(&features.flatten(0, 1)?, &sample.output.flatten(0, 1)?)?;
    }
    let [gram, cross] = sums.matrices()?;
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
    // ‖F Wᵀ − Y‖² = Σ W ∘ (W G − 2 Cᵀ) + ‖Y‖²
    let spread = &gram * &solved;
    let entry = |i: usize, j: usize| solved[(i, j)] * (spread[(i, j)] - 2.0 * cross[(i, j)]);
    let gap: f64 = (0..d)
        .map(|j| (0..width).map(|i| entry(i, j)).sum::<f64>())
        .sum();
    tensors[slot].1 = tensor(&solved.transpose().to_owned())?;
    Ok(Fitted {
        tensors,
        error: (gap + sums.square).max(0.0) / sums.square,
    })
}
