//! End-to-end knowledge distillation (spec 1.6): forward KL to the teacher's next-token distribution,
//! a mean per token in nats, with an optional share of cross-entropy to the text.

use serde::{Deserialize, Serialize};

use super::student::Student;
use super::{Laps, Terms, ids, masked_mean, rows, scalar};
use crate::data::Batch;
use crate::model::{Lm, ModelConfig};
use crate::op::loss::{cross_entropy, forward_kl};
use crate::weights::Weights;
use crate::{Error, Result};

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KdConfig {
    /// Both distributions are softened by it; the KL is multiplied by its square (Hinton et al. 2015).
    pub temperature: f64,
    /// Weight of the cross-entropy; the KL has the rest.
    pub ce_weight: f64,
}

impl Default for KdConfig {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            ce_weight: 0.0,
        }
    }
}

pub struct Kd {
    teacher: Lm,
    teacher_hash: String,
    pub student: Student,
    config: KdConfig,
}

impl Kd {
    /// # Errors
    /// Vocabularies of different sizes, or weights out of range.
    pub fn new(
        teacher: Lm,
        teacher_hash: String,
        student: &ModelConfig,
        weights: &Weights,
        config: KdConfig,
    ) -> Result<Self> {
        let (t, s) = (teacher.config.vocab_size, student.vocab_size);
        if t != s {
            return Err(Error::invalid(format!(
                "the teacher has {t} tokens, the student {s}: distillation needs one vocabulary"
            )));
        }
        if config.temperature.is_nan() || config.temperature <= 0.0 {
            let found = config.temperature;
            return Err(Error::invalid(format!(
                "temperature {found} must be above 0"
            )));
        }
        if !(0.0..=1.0).contains(&config.ce_weight) {
            let found = config.ce_weight;
            return Err(Error::invalid(format!(
                "ce_weight {found} must lie between 0 and 1"
            )));
        }
        Ok(Self {
            teacher,
            teacher_hash,
            student: Student::new(student, weights, |_| true)?,
            config,
        })
    }

    pub(super) fn identity(&self) -> Result<serde_json::Value> {
        Ok(serde_json::json!({
            "stage": "kd",
            "teacher": self.teacher_hash,
            "student": self.student.hash()?,
            "kd": self.config,
        }))
    }

    pub(super) fn backward(&mut self, batch: &Batch, scale: f64) -> Result<Terms> {
        let ids = ids(batch, self.student.lm.device())?;
        let documents = Some(&batch.documents);
        let mut laps = Laps::new();
        let mut phases = Vec::new();
        let target = rows(&self.teacher.forward(&ids, documents)?)?;
        phases.push(("teacher forward", laps.lap()));
        let logits = rows(&self.student.lm.forward(&ids, documents)?)?;
        let (tau, ce_weight) = (self.config.temperature, self.config.ce_weight);
        let kl = forward_kl(&target, &logits, tau)?.mean_all()?;
        let mut loss = (&kl * ((1.0 - ce_weight) * tau * tau))?;
        let mut named = vec![("kl".to_owned(), scalar(&kl)?)];
        if ce_weight > 0.0 {
            let targets = candle_core::Tensor::from_slice(
                &batch.targets,
                batch.targets.len(),
                logits.device(),
            )?;
            let ce = masked_mean(&cross_entropy(&logits, &targets)?, batch)?;
            named.push(("ce".to_owned(), scalar(&ce)?));
            loss = (loss + (ce * ce_weight)?)?;
        }
        phases.push(("student forward and loss", laps.lap()));
        let grads = (&loss * scale)?.backward()?;
        self.student.params.add(&grads)?;
        phases.push(("backward", laps.lap()));
        Ok(Terms {
            loss: scalar(&loss)?,
            named,
            phases,
        })
    }
}
