//! A student against its teacher on held-out text.

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use crate::data::{Batch, Corpus};
use crate::model::{LOGITS, Lm, pieces};
use crate::op::loss::{cross_entropy, forward_kl};
use crate::watch::Watch;
use crate::{Error, Result};

/// Means over tokens; `kl` over all positions, the cross-entropies over those with a next token.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
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

    /// The student's figures, as records and `metrics.jsonl` name them.
    pub fn figures(&self) -> Vec<(String, f64)> {
        let figures = [
            ("eval_kl", self.kl),
            ("eval_ce", self.ce_student),
            ("eval_agreement", self.agreement),
        ];
        figures.map(|(name, value)| (name.to_owned(), value)).into()
    }
}

/// Every window of `corpus` once, `batch_size` at a time.
///
/// # Errors
/// Models with different vocabularies, a corpus without a window, or [`Error::Interrupted`].
pub fn evaluate(
    teacher: &Lm,
    student: &Lm,
    corpus: &Corpus,
    batch_size: usize,
    seq_len: usize,
    watch: &dyn Watch,
) -> Result<KlReport> {
    let windows = corpus.windows(seq_len);
    let mut sums = Sums::new(teacher, student)?;
    let mut done = 0;
    watch.start("eval", windows);
    while done < windows {
        let batch = corpus.ordered(done, batch_size, seq_len)?;
        sums.add(&batch)?;
        done += batch.rows;
        watch.reached(done, windows, "windows")?;
    }
    sums.report()
}

/// The rows of one batch, `at_once` at a time.
///
/// # Errors
/// As [`evaluate`].
pub fn evaluate_batch(
    teacher: &Lm,
    student: &Lm,
    batch: &Batch,
    at_once: usize,
    watch: &dyn Watch,
) -> Result<KlReport> {
    let at_once = at_once.max(1);
    let mut sums = Sums::new(teacher, student)?;
    watch.start("eval", batch.rows);
    for from in (0..batch.rows).step_by(at_once) {
        sums.add(&batch.part(from, at_once))?;
        watch.reached((from + at_once).min(batch.rows), batch.rows, "windows")?;
    }
    sums.report()
}

struct Sums<'a> {
    teacher: &'a Lm,
    student: &'a Lm,
    kl: f64,
    ce_teacher: f64,
    ce_student: f64,
    agreed: f64,
    tokens: usize,
    scored: f64,
}

impl<'a> Sums<'a> {
    fn new(teacher: &'a Lm, student: &'a Lm) -> Result<Self> {
        let (t, s) = (teacher.config.vocab_size, student.config.vocab_size);
        if t != s {
            return Err(Error::invalid(format!(
                "the teacher has {t} tokens, the student {s}: nothing to compare"
            )));
        }
        Ok(Self {
            teacher,
            student,
            kl: 0.0,
            ce_teacher: 0.0,
            ce_student: 0.0,
            agreed: 0.0,
            tokens: 0,
            scored: 0.0,
        })
    }

    fn add(&mut self, batch: &Batch) -> Result<()> {
        let device = self.student.device();
        let ids = Tensor::from_slice(&batch.input_ids, (batch.rows, batch.len), device)?;
        let rows = batch.rows * batch.len;
        let hidden = |lm: &Lm| lm.hidden(&ids, Some(&batch.documents));
        let (taught, learned) = (hidden(self.teacher)?, hidden(self.student)?);
        for range in pieces(rows, self.student.config.vocab_size, LOGITS) {
            let teacher = self.teacher.logits(&taught, &range)?;
            let student = self.student.logits(&learned, &range)?;
            let targets = Tensor::new(&batch.targets[range.clone()], device)?;
            let mask = Tensor::new(&batch.mask[range], device)?;
            let masked = |x: Tensor| sum(&(x * &mask)?);
            self.kl += sum(&forward_kl(&teacher, &student, 1.0)?)?;
            self.ce_teacher += masked(cross_entropy(&teacher, &targets)?)?;
            self.ce_student += masked(cross_entropy(&student, &targets)?)?;
            let same = teacher.argmax(1)?.eq(&student.argmax(1)?)?;
            self.agreed += sum(&same.to_dtype(DType::F32)?)?;
        }
        self.tokens += rows;
        self.scored += batch.mask.iter().sum::<f32>() as f64;
        Ok(())
    }

    fn report(&self) -> Result<KlReport> {
        if self.scored == 0.0 {
            return Err(Error::invalid(
                "the data has no token with a next one: nothing to evaluate",
            ));
        }
        Ok(KlReport {
            kl: self.kl / self.tokens as f64,
            ce_teacher: self.ce_teacher / self.scored,
            ce_student: self.ce_student / self.scored,
            agreement: self.agreed / self.tokens as f64,
            tokens: self.tokens,
        })
    }
}

fn sum(x: &Tensor) -> Result<f64> {
    Ok(x.to_dtype(DType::F64)?.sum_all()?.to_scalar()?)
}
