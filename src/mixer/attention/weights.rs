//! The weights of an attention layer: what other mixers are born from.

use candle_core::Tensor;
use faer::Mat;

use super::AttentionConfig;
use crate::Result;
use crate::mixer::linalg::matrix;
use crate::weights::Weights;

#[derive(Debug, Clone)]
pub struct AttentionWeights {
    pub config: AttentionConfig,
    /// `[H·hd, D]`
    pub q: Tensor,
    /// `[G·hd, D]`
    pub k: Tensor,
    /// `[G·hd, D]`
    pub v: Tensor,
    /// `[D, H·hd]`
    pub o: Tensor,
    /// Of q, k and v, `[rows]` each.
    pub biases: Option<[Tensor; 3]>,
    /// Of each head's queries and keys, `[hd]` each.
    pub norms: Option<[Tensor; 2]>,
}

impl AttentionConfig {
    /// `weights` seen from the mixer's prefix.
    pub(super) fn biases(&self, weights: &Weights) -> Result<Option<[Tensor; 3]>> {
        if !self.attention_bias {
            return Ok(None);
        }
        let [q, k, v] = ["q", "k", "v"].map(|name| weights.get(&format!("{name}_proj.bias")));
        Ok(Some([q?, k?, v?]))
    }

    pub(super) fn norms(&self, weights: &Weights) -> Result<Option<[Tensor; 2]>> {
        if self.qk_norm_eps.is_none() {
            return Ok(None);
        }
        let [q, k] = ["q", "k"].map(|name| weights.get(&format!("{name}_norm.weight")));
        Ok(Some([q?, k?]))
    }
}

impl AttentionWeights {
    /// `weights` seen from the mixer's prefix.
    pub fn new(config: &AttentionConfig, weights: &Weights) -> Result<Self> {
        Ok(Self {
            q: weights.get("q_proj.weight")?,
            k: weights.get("k_proj.weight")?,
            v: weights.get("v_proj.weight")?,
            o: weights.get("o_proj.weight")?,
            biases: config.biases(weights)?,
            norms: config.norms(weights)?,
            config: config.clone(),
        })
    }

    /// Under their names after the prefix.
    pub(in crate::mixer) fn tensors(&self) -> Vec<(String, Tensor)> {
        let projections = [&self.q, &self.k, &self.v, &self.o];
        let weights = ["q", "k", "v", "o"].into_iter().zip(projections);
        let weights = weights.map(|(name, tensor)| (format!("{name}_proj.weight"), tensor));
        let biases = ["q", "k", "v"]
            .into_iter()
            .zip(self.biases.iter().flatten());
        let biases = biases.map(|(name, tensor)| (format!("{name}_proj.bias"), tensor));
        let norms = ["q", "k"].into_iter().zip(self.norms.iter().flatten());
        let norms = norms.map(|(name, tensor)| (format!("{name}_norm.weight"), tensor));
        let all = weights.chain(biases).chain(norms);
        all.map(|(name, tensor)| (name, tensor.clone())).collect()
    }

    /// The attention without norms on its heads that is nearest to this one, as most mixers can only be born from that: a head's norm is
    /// the product with its weight, over the root mean square that the head has over inputs of moment `E[x' x'ᵀ]`, `x'` an input with a 1
    /// behind it where there are biases; without a moment: over independent inputs of mean square 1.
    pub(in crate::mixer) fn linear(&self, moment: Option<&Mat<f64>>) -> Result<Self> {
        let Some([of_q, of_k]) = &self.norms else {
            return Ok(self.clone());
        };
        let hd = self.config.head_dim;
        let eps = self.config.qk_norm_eps.unwrap_or_default();
        let biases = self.biases.as_ref();
        // What each row is multiplied by.
        let factors = |w: &Tensor, bias: Option<&Tensor>, norm: &Tensor| -> Result<Tensor> {
            let w = with_bias(w, bias)?;
            let spread = moment.map(|moment| &w * moment);
            let spread = spread.as_ref().unwrap_or(&w);
            let square = |i: usize| {
                (0..w.ncols())
                    .map(|n| spread[(i, n)] * w[(i, n)])
                    .sum::<f64>()
            };
            let norm: Vec<f32> = norm.to_vec1()?;
            let mut factors = Vec::with_capacity(w.nrows());
            for head in 0..w.nrows() / hd {
                let rows = head * hd..(head + 1) * hd;
                let size = (rows.map(square).sum::<f64>() / hd as f64 + eps).sqrt();
                factors.extend(norm.iter().map(|norm| norm / size as f32));
            }
            Ok(Tensor::new(factors, self.q.device())?)
        };
        let q = factors(&self.q, biases.map(|[q, _, _]| q), of_q)?;
        let k = factors(&self.k, biases.map(|[_, k, _]| k), of_k)?;
        let times = |w: &Tensor, factors: &Tensor| w.broadcast_mul(&factors.unsqueeze(1)?);
        let biases = match biases {
            Some([of_q, of_k, of_v]) => Some([(of_q * &q)?, (of_k * &k)?, of_v.clone()]),
            None => None,
        };
        Ok(Self {
            config: AttentionConfig {
                qk_norm_eps: None,
                ..self.config.clone()
            },
            q: times(&self.q, &q)?,
            k: times(&self.k, &k)?,
            biases,
            norms: None,
            ..self.clone()
        })
    }

    /// Queries, keys and values as matrices, each with its bias as one more column where there are biases.
    pub(in crate::mixer) fn matrices(&self) -> Result<[Mat<f64>; 3]> {
        let biases = self
            .biases
            .as_ref()
            .map(|[q, k, v]| [Some(q), Some(k), Some(v)]);
        let [q, k, v] = biases.unwrap_or_default();
        Ok([
            with_bias(&self.q, q)?,
            with_bias(&self.k, k)?,
            with_bias(&self.v, v)?,
        ])
    }
}

fn with_bias(w: &Tensor, bias: Option<&Tensor>) -> Result<Mat<f64>> {
    match bias {
        Some(bias) => matrix(&Tensor::cat(&[w, &bias.unsqueeze(1)?], 1)?),
        None => matrix(w),
    }
}
