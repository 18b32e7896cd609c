//! What one layer is worth: the KL to the teacher before and after a single layer of a model is replaced.
//! SMART's scores (arXiv 2505.17272) restore one MLA layer in the all-Mamba2 model; the budget selector breaks one
//! layer of the teacher.

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use crate::data::Corpus;
use crate::model::{LOGITS, Layer, Lm, pieces, through};
use crate::op::loss::forward_kl;
use crate::watch::Watch;
use crate::{Error, Result};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sensitivity {
    /// KL(teacher ‖ model) with no layer replaced (SMART: all Mamba2), nats a token.
    pub kl: f64,
    pub layers: Vec<Score>,
    /// Tokens sampled.
    pub tokens: usize,
}

/// `KL(teacher ‖ model) − KL(teacher ‖ model with this layer replaced)`: what the replacement gains.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Score {
    pub score: f64,
    /// Of the mean over windows.
    pub standard_error: f64,
}

/// Scores of replacing each layer of `model` by that of `other`, on the first `windows` windows of `corpus`.
///
/// # Errors
/// Models of different depths or vocabularies, no window, or [`Error::Interrupted`].
pub fn sensitivity(
    teacher: &Lm,
    model: &Lm,
    other: &Lm,
    corpus: &Corpus,
    windows: usize,
    seq_len: usize,
    watch: &dyn Watch,
) -> Result<Sensitivity> {
    let sizes = |lm: &Lm| (lm.layers.len(), lm.config.vocab_size);
    if sizes(model) != sizes(teacher) || sizes(other) != sizes(teacher) {
        return Err(Error::invalid(
            "the models and the teacher differ in depth or vocabulary",
        ));
    }
    let windows = windows.min(corpus.windows(seq_len));
    let mut base = Vec::new();
    let mut gains: Vec<Vec<f64>> = vec![Vec::new(); model.layers.len()];
    watch.start("select", windows);
    for window in 0..windows {
        let batch = corpus.ordered(window, 1, seq_len)?;
        let documents = Some(&batch.documents);
        let ids = Tensor::from_slice(&batch.input_ids, (1, batch.len), teacher.device())?;
        let taught = teacher.hidden(&ids, documents)?;
        // From `hidden` on, through `layers`, to the KL.
        let kl = |hidden: Tensor, layers: &[Layer]| -> Result<f64> {
            let hidden = through(layers, hidden, documents)?;
            let own = model.normed(&hidden)?.squeeze(0)?;
            let mut sum = 0.0;
            for range in pieces(batch.len, model.config.vocab_size, LOGITS) {
                let target = teacher.logits(&taught, &range)?;
                let kl = forward_kl(&target, &model.logits(&own, &range)?, 1.0)?;
                sum += kl.sum_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
            }
            Ok(sum / batch.len as f64)
        };
        // The layers before the replaced one are the same for all: walk them once.
        let mut hidden = model.embed(&ids)?;
        let mut replaced = Vec::new();
        for (i, layer) in model.layers.iter().enumerate() {
            let with_other = other.layers[i].forward(&hidden, documents)?.hidden;
            replaced.push(kl(with_other, &model.layers[i + 1..])?);
            hidden = layer.forward(&hidden, documents)?.hidden;
        }
        let all = kl(hidden, &[])?;
        base.push(all);
        for (gains, replaced) in gains.iter_mut().zip(replaced) {
            gains.push(all - replaced);
        }
        watch.reached(window + 1, windows, "windows")?;
    }
    if base.is_empty() {
        return Err(Error::invalid("the data fills no window: nothing to score"));
    }
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let score = |gains: &Vec<f64>| {
        let (n, score) = (gains.len() as f64, mean(gains));
        let squares: f64 = gains.iter().map(|g| (g - score).powi(2)).sum();
        Score {
            score,
            standard_error: (squares / (n - 1.0).max(1.0) / n).sqrt(),
        }
    };
    Ok(Sensitivity {
        kl: mean(&base),
        layers: gains.iter().map(score).collect(),
        tokens: windows * seq_len,
    })
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::data::Packing;
    use crate::mixer::{AttentionConfig, MixerConfig};
    use crate::model::ModelConfig;
    use crate::weights::Weights;

    /// Two tokens, embedded as (1, 1) and (1, -1); two layers, whose values multiply the first and second dim by these
    /// factors and whose MLPs give 0; the logits are the normed hidden state itself.
    fn model(layers: [[f32; 2]; 2]) -> Lm {
        let attention = AttentionConfig::new(1, 1, 2, None);
        let config = ModelConfig {
            model_type: ModelConfig::MODEL_TYPE.into(),
            format_version: crate::model::FORMAT_VERSION,
            hidden_size: 2,
            intermediate_size: 1,
            vocab_size: 2,
            max_position_embeddings: 8,
            rms_norm_eps: 1e-12,
            tie_word_embeddings: false,
            embedding_multiplier: 1.0,
            residual_multiplier: 1.0,
            logits_scaling: 1.0,
            bos_token_id: None,
            eos_token_id: Vec::new(),
            layers: vec![MixerConfig::Attention(attention); 2],
            converted: None,
        };
        let tensors = config.params().into_iter().map(|(name, shape)| {
            let count = shape.iter().product();
            let layer = |i: usize| name.starts_with(&format!("model.layers.{i}."));
            let values: Vec<f32> = match name.rsplit('.').nth(1).unwrap() {
                "embed_tokens" => vec![1.0, 1.0, 1.0, -1.0],
                "o_proj" | "lm_head" => vec![1.0, 0.0, 0.0, 1.0],
                "v_proj" => {
                    let [a, b] = layers[usize::from(layer(1))];
                    vec![a, 0.0, 0.0, b]
                }
                norm if norm.contains("norm") => vec![1.0; count],
                _ => vec![0.0; count],
            };
            let tensor = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
            (name, tensor)
        });
        Lm::new(&config, &Weights::new(tensors.collect())).unwrap()
    }

    /// Windows of one token: attention gives the value itself. The norm makes (x, y) into (x, y) / sqrt((x² + y²) / 2),
    /// and 49 + 1 = 2 · 5². Differences of the two logits:
    ///
    /// | token | model | layer 0 adds 6 to x | layer 1 adds 6 to y (-6 for the second token) |
    /// |---|---|---|---|
    /// | (1, 1) | (1, 1): 0 | (7, 1)/5: 1.2 | (1, 7)/5: -1.2 |
    /// | (1, -1) | (1, -1): 2 | (7, -1)/5: 1.6 | (1, -7)/5: 1.6 |
    ///
    /// The teacher is the model with layer 0 replaced. KL of logit differences a to b, with p = 1/(1 + e^-a):
    /// p ln(p/q) + (1 - p) ln((1 - p)/(1 - q)). First token: KL(1.2, 0) = 0.1520945, KL(1.2, 1.2) = 0,
    /// KL(1.2, -1.2) = 0.6444595; second: KL(1.6, 2) = 0.0102199, and twice KL(1.6, 1.6) = 0.
    #[test]
    fn scores_are_what_a_hand_computes() {
        let (none, x, y) = ([0.0, 0.0], [6.0, 0.0], [0.0, 6.0]);
        let (teacher, all, other) = (model([x, none]), model([none, none]), model([x, y]));
        let corpus = Corpus::new(&[vec![0, 1]], Packing::Documents);
        let found = sensitivity(
            &teacher,
            &all,
            &other,
            &corpus,
            2,
            1,
            &crate::watch::Quiet::default(),
        )
        .unwrap();
        let close = |a: f64, b: f64| assert!((a - b).abs() < 2e-6, "{a} for {b}: {found:?}");
        // Means of 0.1520945 and 0.0102199; of two values the standard error is half their distance.
        close(found.kl, 0.0811572);
        close(found.layers[0].score, 0.0811572);
        close(found.layers[0].standard_error, 0.0709373);
        // Of 0.1520945 - 0.6444595 = -0.4923650 and 0.0102199.
        close(found.layers[1].score, -0.2410726);
        close(found.layers[1].standard_error, 0.2512925);
        assert_eq!((found.layers.len(), found.tokens), (2, 2));
    }
}
