//! A student against its teacher on held-out text.

use candle_core::{DType, Tensor};
use serde::Serialize;

use crate::data::Corpus;
use crate::model::Lm;
use crate::op::loss::{cross_entropy, forward_kl};
use crate::{Error, Result};

/// Means over tokens; `kl` over all positions, the cross-entropies over those with a next token.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct KlReport {
    /// Forward KL(teacher ‖ student), nats a token.
    pub kl: f64,
    /// Cross-entropy of the teacher on the text, nats a token.
    pub ce_teacher: f64,
    pub ce_student: f64,
    /// Share of positions where both hold the same token likeliest.
    pub agreement: f64,
    /// Positions evaluated.
    pub tokens: usize,
}

impl KlReport {
    /// The teacher's perplexity over the student's.
    pub fn perplexity_retention(&self) -> f64 {
        (self.ce_teacher - self.ce_student).exp()
    }
}

/// Every window of `corpus` once, `batch_size` at a time; `observe` is told (done, all) windows.
///
/// # Errors
/// Models with different vocabularies, or a corpus without a window.
pub fn evaluate(
    teacher: &Lm,
    student: &Lm,
    corpus: &Corpus,
    batch_size: usize,
    seq_len: usize,
    observe: &mut dyn FnMut(usize, usize),
) -> Result<KlReport> {
    let (t, s) = (teacher.config.vocab_size, student.config.vocab_size);
    if t != s {
        return Err(Error::invalid(format!(
            "the teacher has {t} tokens, the student {s}: nothing to compare"
        )));
    }
    let windows = corpus.windows(seq_len);
    let (mut kl, mut ce_teacher, mut ce_student, mut agreed) = (0.0, 0.0, 0.0, 0.0);
    let (mut tokens, mut scored) = (0, 0.0);
    let mut done = 0;
    while done < windows {
        let batch = corpus.ordered(done, batch_size, seq_len)?;
        let ids = Tensor::from_slice(&batch.input_ids, (batch.rows, batch.len), student.device())?;
        let rows = batch.rows * batch.len;
        let logits = |lm: &Lm| -> Result<Tensor> {
            let logits = lm.forward(&ids, Some(&batch.documents))?;
            Ok(logits
                .reshape((rows, lm.config.vocab_size))?
                .to_dtype(DType::F32)?)
        };
        let (teacher, student) = (logits(teacher)?, logits(student)?);
        let targets = Tensor::from_slice(&batch.targets, rows, student.device())?;
        let mask = Tensor::from_slice(&batch.mask, rows, student.device())?;
        let masked = |x: Tensor| sum(&(x * &mask)?);
        kl += sum(&forward_kl(&teacher, &student, 1.0)?)?;
        ce_teacher += masked(cross_entropy(&teacher, &targets)?)?;
        ce_student += masked(cross_entropy(&student, &targets)?)?;
        let same = teacher.argmax(1)?.eq(&student.argmax(1)?)?;
        agreed += sum(&same.to_dtype(DType::F32)?)?;
        tokens += rows;
        scored += batch.mask.iter().sum::<f32>() as f64;
        done += batch.rows;
        observe(done, windows);
    }
    if scored == 0.0 {
        return Err(Error::invalid(
            "the data has no token with a next one: nothing to evaluate",
        ));
    }
    Ok(KlReport {
        kl: kl / tokens as f64,
        ce_teacher: ce_teacher / scored,
        ce_student: ce_student / scored,
        agreement: agreed / tokens as f64,
        tokens,
    })
}

fn sum(x: &Tensor) -> Result<f64> {
    Ok(x.to_dtype(DType::F64)?.sum_all()?.to_scalar()?)
}
