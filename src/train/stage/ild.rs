//! Intermediate Layer Distillation (spec 1.4): every layer of the student reads the teacher's input of
//! that layer and learns its output and its mixer's output. A *bank* trains both candidates of every
//! layer (all MLA, all Mamba2) in one pass over the teacher, so that later stages choose.

use std::path::Path;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::student::Student;
use super::{Terms, ids, rows, scalar};
use crate::data::Batch;
use crate::model::{Lm, ModelConfig};
use crate::op::loss::{mean_l2, relative_mse};
use crate::train::params::ParamGroup;
use crate::weights::Weights;
use crate::{Error, Result};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum IldLoss {
    /// `Σ(x − t)² / Σ t²` of outputs and mixer outputs.
    RelativeMse,
    /// The reference's: the mean un-squared L2 norm.
    L2Norm,
}

impl IldLoss {
    /// Of `x` to `target`, both `[B, T, D]`.
    pub fn of(self, x: &Tensor, target: &Tensor) -> Result<Tensor> {
        let (x, target) = (rows(x)?, rows(target)?);
        Ok(match self {
            IldLoss::RelativeMse => relative_mse(&x, &target)?,
            IldLoss::L2Norm => mean_l2(&x, &target)?,
        })
    }
}

pub struct Ild {
    teacher: Lm,
    teacher_hash: String,
    candidates: Vec<Candidate>,
    loss: IldLoss,
}

struct Candidate {
    /// The folder it is written to: its mixer's name.
    name: String,
    student: Student,
}

impl Ild {
    /// `candidates`: full-depth models by name (`mla`, `mamba2`), initialised from the teacher. Layers are
    /// trained; embedding, final norm and head stay the teacher's.
    ///
    /// # Errors
    /// A candidate of another depth or width than the teacher.
    pub fn new(
        teacher: Lm,
        teacher_hash: String,
        candidates: Vec<(String, ModelConfig, Weights)>,
        loss: IldLoss,
    ) -> Result<Self> {
        let sizes = |c: &ModelConfig| (c.layers.len(), c.hidden_size);
        let (layers, hidden) = sizes(&teacher.config);
        let candidates = candidates
            .into_iter()
            .map(|(name, config, weights)| {
                if sizes(&config) != (layers, hidden) {
                    return Err(Error::invalid(format!(
                        "the {name} candidate has {} layers of {}, the teacher {layers} of {hidden}",
                        config.layers.len(),
                        config.hidden_size
                    )));
                }
                let student = Student::new(&config, &weights, |n| n.starts_with("model.layers."))?;
                Ok(Candidate { name, student })
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            teacher,
            teacher_hash,
            candidates,
            loss,
        })
    }

    #[cfg(test)]
    pub(in crate::train) fn set_loss(&mut self, loss: IldLoss) {
        self.loss = loss;
    }

    pub(super) fn identity(&self) -> Result<serde_json::Value> {
        let mut candidates = serde_json::Map::new();
        for c in &self.candidates {
            candidates.insert(c.name.clone(), c.student.hash()?.into());
        }
        Ok(serde_json::json!({
            "stage": "ild",
            "teacher": self.teacher_hash,
            "candidates": candidates,
            "loss": self.loss,
        }))
    }

    /// Layers do not touch each other, so each is walked back at once and its graph let go.
    pub(super) fn backward(&mut self, batch: &Batch, scale: f64) -> Result<Terms> {
        let ids = ids(batch, self.teacher.device())?;
        let trace = self.teacher.trace(&ids, Some(&batch.documents))?;
        let mut terms = Terms::default();
        for candidate in &mut self.candidates {
            let mut sum = 0.0;
            for (i, layer) in candidate.student.lm.layers.iter().enumerate() {
                let (out, mixed) = layer.forward(&trace.hidden[i], Some(&batch.documents))?;
                let (hidden, mixer) =
                    layer_terms(&self.teacher, self.loss, &trace, i, &out, &mixed)?;
                let loss = (hidden + mixer)?;
                let grads = (&loss * scale)?.backward()?;
                candidate.student.params.add(&grads)?;
                let loss = scalar(&loss)?;
                terms.named.push((format!("{}.{i}", candidate.name), loss));
                sum += loss;
            }
            terms.named.push((candidate.name.clone(), sum));
            terms.loss += sum;
        }
        Ok(terms)
    }

    pub(super) fn groups_mut(&mut self) -> Vec<&mut ParamGroup> {
        self.candidates
            .iter_mut()
            .map(|c| &mut c.student.params)
            .collect()
    }

    /// One checkpoint folder a candidate.
    pub(super) fn write(&self, out: &Path, tokenizer: &Path) -> Result<()> {
        std::fs::create_dir_all(out).map_err(Error::io("cannot create", out))?;
        for candidate in &self.candidates {
            candidate
                .student
                .write(&out.join(&candidate.name), tokenizer)?;
        }
        Ok(())
    }
}

/// The two terms of layer `index`: its output (the last layer's after the final norm, on both sides) and
/// its mixer's output, against what the teacher's layer gave.
pub fn layer_terms(
    teacher: &Lm,
    loss: IldLoss,
    trace: &crate::model::Trace,
    index: usize,
    out: &Tensor,
    mixed: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let last = index + 1 == trace.mixer_out.len();
    let hidden = match last {
        true => loss.of(&teacher.normed(out)?, &trace.hidden[index + 1])?,
        false => loss.of(out, &trace.hidden[index + 1])?,
    };
    Ok((hidden, loss.of(mixed, &trace.mixer_out[index])?))
}
