//! Mamba2 fitted to the teacher's attention on real text. Against [`super::published`]: the convolution
//! is the identity, scaled to where SiLU is useful (nearly linear for x, positive for B and C); the gate
//! is as constant as a projection of the input can make it; each head's decay, and how sharply it
//! compares, are those whose features explain the teacher's head best; the output projection is fitted
//! in closed form.

use candle_core::{DType, Device, Tensor};
use faer::Mat;
use faer::linalg::solvers::Solve;

use super::init::channel_biases;
use super::{Mamba2, Mamba2Config};
use crate::Result;
use crate::mixer::calibration::{Fitted, Regression, Sample, Statistics, fit_output};
use crate::mixer::linalg::tensor;
use crate::mixer::{AttentionWeights, Mixer, MixerConfig};
use crate::op::Documents;
use crate::weights::Weights;

/// Positions after which a head has forgotten half.
const HALF_LIVES: [f64; 8] = [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 48.0, 256.0];
/// Root mean squares of B and C before SiLU: the larger, the sharper the comparison.
const SHARPNESS: [f64; 3] = [0.5, 1.5, 4.0];
/// Root mean square of x before SiLU: small enough to be nearly linear; the norm undoes the size.
const X_SIZE: f64 = 0.5;
/// The step: large against the norm's epsilon, small enough to move both ways.
const STEP: f64 = 0.5;
/// What the gate aims at before SiLU.
const GATE: f64 = 2.0;

/// What a head is made with.
#[derive(Debug, Clone, Copy)]
struct Head {
    half_life: f64,
    sharpness: f64,
}

/// # Errors
/// When the attention's heads are not this mixer's.
pub fn refined(
    c: &Mamba2Config,
    attention: &AttentionWeights,
    statistics: &Statistics,
    samples: &[Sample],
) -> Result<Fitted> {
    c.fits(&attention.config)?;
    let teacher = Teacher::new(c, attention, statistics, samples)?;
    let heads = attention.config.num_attention_heads;
    let mut best = vec![
        (
            f64::INFINITY,
            Head {
                half_life: 1.0,
                sharpness: 1.0
            }
        );
        heads
    ];
    for half_life in HALF_LIVES {
        for sharpness in SHARPNESS {
            let all = Head {
                half_life,
                sharpness,
            };
            let tensors = teacher.tensors(c, &vec![all; heads])?;
            let errors = teacher.unexplained(&Mamba2::of(c, tensors)?)?;
            for (best, error) in best.iter_mut().zip(errors) {
                if error < best.0 {
                    *best = (error, all);
                }
            }
        }
    }
    let heads: Vec<Head> = best.into_iter().map(|(_, head)| head).collect();
    fit_output(
        &MixerConfig::Mamba2(c.clone()),
        teacher.tensors(c, &heads)?,
        samples.iter().cloned().map(Ok),
    )
}

impl Mamba2 {
    fn of(c: &Mamba2Config, tensors: Vec<(String, Tensor)>) -> Result<Self> {
        Self::new(c, &Weights::new(tensors.into_iter().collect()))
    }
}

struct Teacher<'a> {
    /// Without norms on its heads.
    attention: AttentionWeights,
    /// All candidates' projections.
    in_proj: Tensor,
    samples: Vec<Seen<'a>>,
    /// Root mean squares of queries, keys and values, one a head.
    sizes: [Vec<f64>; 3],
}

/// A sample, and what is the same for all candidates.
struct Seen<'a> {
    documents: &'a Documents,
    /// What the teacher's heads read from the past, `[B·T, H·hd]`.
    heads: Tensor,
    /// What the projections give: the gate, x with B and C, the steps.
    projected: [Tensor; 3],
}

impl<'a> Teacher<'a> {
    fn new(
        c: &Mamba2Config,
        attention: &'a AttentionWeights,
        statistics: &Statistics,
        samples: &'a [Sample],
    ) -> Result<Self> {
        let a = &attention.config;
        let width = a.num_attention_heads * a.head_dim;
        let open = AttentionWeights {
            o: Tensor::eye(width, DType::F32, &Device::Cpu)?,
            ..attention.clone()
        };
        let weights = Weights::new(open.tensors().into_iter().collect());
        let mixer = Mixer::new(&MixerConfig::Attention(a.clone()), &weights)?;
        let heads = samples.iter().map(|sample| {
            let heads = mixer.forward(&sample.input, Some(&sample.documents))?;
            Ok(heads.flatten(0, 1)?)
        });
        let heads = heads.collect::<Result<Vec<_>>>()?;
        let d = statistics.input_mean.len();
        let moment = &statistics.moment(attention);
        let attention = attention.linear(Some(moment))?;
        let size = |w: Mat<f64>| -> Vec<f64> {
            let spread = &w * moment;
            let square = |row: usize| {
                (0..w.ncols())
                    .map(|n| spread[(row, n)] * w[(row, n)])
                    .sum::<f64>()
            };
            let hd = a.head_dim;
            let of = |head: usize| {
                ((head * hd..(head + 1) * hd).map(square).sum::<f64>() / hd as f64).sqrt()
            };
            (0..w.nrows() / hd).map(|head| of(head).max(1e-6)).collect()
        };
        let sizes = attention.matrices()?.map(size);
        let moment = &statistics.input_moment;
        // The projection of the input that is nearest to a constant: E[x xᵀ]⁻¹ E[x].
        let mean = Mat::from_fn(d, 1, |i, _| statistics.input_mean[i]);
        let floor = 1e-3 * (0..d).map(|i| moment[(i, i)]).sum::<f64>() / d as f64;
        let left = Mat::from_fn(d, d, |i, j| {
            moment[(i, j)] + if i == j { floor } else { 0.0 }
        });
        let gate = match left.llt(faer::Side::Lower) {
            Ok(llt) => llt.solve(&mean),
            Err(_) => Mat::zeros(d, 1),
        };
        let gate = Mat::from_fn(c.d_inner(), d, |_, n| GATE * gate[(n, 0)]);
        let steps = Tensor::zeros((a.num_attention_heads, d), DType::F32, &Device::Cpu)?;
        let (v, k, q) = (&attention.v, &attention.k, &attention.q);
        let mut teacher = Self {
            in_proj: Tensor::cat(&[&tensor(&gate)?, v, k, q, &steps], 0)?,
            attention,
            samples: Vec::new(),
            sizes,
        };
        let any = Head {
            half_life: 1.0,
            sharpness: 1.0,
        };
        let any = vec![any; a.num_attention_heads];
        let mixer = Mamba2::of(c, teacher.tensors(c, &any)?)?;
        for (sample, heads) in samples.iter().zip(heads) {
            let u = &sample.input;
            teacher.samples.push(Seen {
                documents: &sample.documents,
                heads,
                projected: [mixer.gate(u)?, mixer.project(u)?, mixer.steps(u)?],
            });
        }
        Ok(teacher)
    }

    fn tensors(&self, c: &Mamba2Config, heads: &[Head]) -> Result<Vec<(String, Tensor)>> {
        let a = &self.attention.config;
        let (h, g, hd) = (a.num_attention_heads, a.num_key_value_heads, a.head_dim);
        let frequencies = a.rope.as_ref().map(|r| r.frequencies(hd).0);
        let groups = c.groups();
        let [queries, keys, values] = &self.sizes;
        let group = |head: usize| head * g / groups;
        // Heads of one key head share its scale: that of the first.
        let sharp = |head: usize| heads[head * h / groups].sharpness;
        let mut scales = Vec::with_capacity(c.conv_channels());
        for head in 0..groups {
            scales.extend(std::iter::repeat_n(X_SIZE / values[group(head)], hd));
        }
        for head in 0..groups {
            scales.extend(std::iter::repeat_n(sharp(head) / keys[group(head)], hd));
        }
        for head in 0..h {
            for dim in 0..hd {
                // A pair that would have turned far within the head's memory compares nothing.
                let turned = frequencies
                    .as_ref()
                    .map_or(0.0, |f| f[dim % (hd / 2).max(1)] * heads[head].half_life);
                scales.push(heads[head].sharpness / queries[head] / (1.0 + turned * turned));
            }
        }
        let channels = scales.len();
        let taps = Mat::from_fn(channels, c.d_conv, |i, tap| {
            if tap + 1 == c.d_conv { scales[i] } else { 0.0 }
        });
        let bias = match channel_biases(c, &self.attention)? {
            Some(projected) => {
                let scales: Vec<f32> = scales.iter().map(|scale| *scale as f32).collect();
                (projected * Tensor::new(scales, &Device::Cpu)?)?
            }
            None => Tensor::zeros(channels, DType::F32, &Device::Cpu)?,
        };
        let each = |f: &dyn Fn(&Head) -> f64| {
            let data: Vec<f32> = heads.iter().map(|head| f(head) as f32).collect();
            Tensor::from_vec(data, h, &Device::Cpu)
        };
        // exp(A_log) · step · half_life = ln 2.
        let a_log = each(&|head| (std::f64::consts::LN_2 / head.half_life / STEP).ln())?;
        let dt_bias = each(&|_| STEP.exp_m1().ln())?;
        Ok(vec![
            ("in_proj.weight".to_owned(), self.in_proj.clone()),
            (
                "conv1d.weight".to_owned(),
                tensor(&taps)?.reshape((channels, 1, c.d_conv))?,
            ),
            ("conv1d.bias".to_owned(), bias),
            ("dt_bias".to_owned(), dt_bias),
            ("A_log".to_owned(), a_log),
            ("D".to_owned(), each(&|_| 0.0)?),
            (
                "norm.weight".to_owned(),
                Tensor::ones(c.d_inner(), DType::F32, &Device::Cpu)?,
            ),
            ("out_proj.weight".to_owned(), self.attention.o.clone()),
        ])
    }

    /// For each head, the share of the teacher's head that no linear map of the candidate's explains.
    fn unexplained(&self, candidate: &Mamba2) -> Result<Vec<f64>> {
        let c = &candidate.config;
        let p = c.head_dim;
        let sums = (0..c.num_heads).map(|_| Regression::new(p, p));
        let mut sums = sums.collect::<Result<Vec<_>>>()?;
        for sample in &self.samples {
            let [z, xbc, dt] = &sample.projected;
            let y = candidate.scan(xbc, dt, Some(sample.documents))?;
            let features = candidate.gated(&y, z)?.flatten(0, 1)?;
            for (head, sums) in sums.iter_mut().enumerate() {
                let of = |all: &Tensor| all.narrow(1, head * p, p)?.contiguous();
                sums.add(&of(&features)?, &of(&sample.heads)?)?;
            }
        }
        let share = |sums: Regression| -> Result<f64> {
            let [gram, cross] = sums.matrices()?;
            let floor =
                1e-3 * (0..p).map(|i| gram[(i, i)]).sum::<f64>() / p as f64 + f64::MIN_POSITIVE;
            let left = Mat::from_fn(p, p, |i, j| gram[(i, j)] + if i == j { floor } else { 0.0 });
            let Ok(llt) = left.llt(faer::Side::Lower) else {
                return Ok(f64::INFINITY);
            };
            let solved = llt.solve(&cross);
            let explained: f64 = (0..p)
                .map(|i| (0..p).map(|j| solved[(i, j)] * cross[(i, j)]).sum::<f64>())
                .sum();
            Ok(1.0 - explained / sums.square.max(f64::MIN_POSITIVE))
        };
        sums.into_iter().map(share).collect()
    }
}
