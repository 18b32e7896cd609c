//! What one layer is worth: the KL to the teacher before and after a single layer of a model is replaced.
//! SMART's scores (spec 1.5) restore one MLA layer in the all-Mamba2 model; the budget selector breaks one
//! layer of the teacher.

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use crate::data::Corpus;
use crate::model::{Layer, Lm};
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
        let rows =
            |logits: Tensor| -> Result<Tensor> { Ok(logits.squeeze(0)?.to_dtype(DType::F32)?) };
        let target = rows(teacher.forward(&ids, documents)?)?;
        // From `hidden` on, through `layers`, to the KL.
        let kl = |mut hidden: Tensor, layers: &[Layer]| -> Result<f64> {
            for layer in layers {
                hidden = layer.forward(&hidden, documents)?.0;
            }
            let logits = rows(model.head(&model.normed(&hidden)?)?)?;
            let kl = forward_kl(&target, &logits, 1.0)?.mean_all()?;
            Ok(kl.to_dtype(DType::F64)?.to_scalar()?)
        };
        // The layers before the replaced one are the same for all: walk them once.
        let mut hidden = model.embed(&ids)?;
        let mut replaced = Vec::new();
        for (i, layer) in model.layers.iter().enumerate() {
            let with_other = other.layers[i].forward(&hidden, documents)?.0;
            replaced.push(kl(with_other, &model.layers[i + 1..])?);
            hidden = layer.forward(&hidden, documents)?.0;
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
