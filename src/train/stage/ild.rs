//! Intermediate Layer Distillation (Zebra-Llama, arXiv 2505.17272): every layer of the student reads the teacher's input of
//! that layer and learns its output and its mixer's output. A *bank* trains several candidates of every
//! layer (all MLA, all Mamba2, ..) in one pass over the teacher, so that later stages choose.

use std::path::Path;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::student::Student;
use super::{Shares, Terms, ids, rows, scalar, share};
use crate::checkpoint::Bank;
use crate::data::Batch;
use crate::mixer::LayerKind;
use crate::model::{LayerOutput, Lm, ModelConfig, Parts, Trace};
use crate::op::adamw::sum_of_squares;
use crate::op::loss::{mean_l2, relative_mse};
use crate::train::cost::in_layers;
use crate::train::params::ParamGroup;
use crate::weights::Place;
use crate::{Error, Result};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum IldLoss {
    /// `Σ(x − t)² / Σ t²` of outputs and mixer outputs.
    RelativeMse,
    /// AMD's: the mean un-squared L2 norm.
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

/// What a student's layer reads while it learns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum IldInputs {
    /// The teacher's input of that layer.
    #[default]
    Teacher,
    /// That, and what the student's own layers before it give, each half of the loss (Lillama, arXiv
    /// 2412.16719): a layer learns to make up for those before it.
    Joint,
}

/// The same on the command line and in a recipe's `[ild]`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct IldConfig {
    /// What a layer is measured by.
    #[arg(long, value_enum, default_value_t = Self::default().loss)]
    pub loss: IldLoss,
    /// What a layer reads while it learns.
    #[arg(long, value_enum, default_value_t = Self::default().inputs)]
    pub inputs: IldInputs,
}

impl Default for IldConfig {
    fn default() -> Self {
        Self {
            loss: IldLoss::RelativeMse,
            inputs: IldInputs::Teacher,
        }
    }
}

pub struct Ild {
    teacher: Lm,
    teacher_hash: String,
    candidates: Vec<Candidate>,
    config: IldConfig,
}

struct Candidate {
    /// What its layers are, and so the folder inside the result that it is written to; none: it is the result.
    kind: Option<LayerKind>,
    /// In metrics.
    name: String,
    student: Student,
}

impl Ild {
    /// A bank of `candidates`: full-depth models, each with one kind of layer, initialised from the teacher.
    /// Layers are trained; embedding, final norm and head stay as they are.
    ///
    /// # Errors
    /// A candidate of another depth or width than the teacher.
    pub fn bank(
        teacher: Lm,
        teacher_hash: String,
        candidates: Vec<(LayerKind, Parts)>,
        config: IldConfig,
        place: &Place,
    ) -> Result<Self> {
        let candidates = candidates.into_iter().map(|(kind, c)| (Some(kind), c));
        Self::new(teacher, teacher_hash, candidates.collect(), config, place)
    }

    /// One hybrid whose places are settled.
    ///
    /// # Errors
    /// As [`Ild::bank`].
    pub fn student(
        teacher: Lm,
        teacher_hash: String,
        student: Parts,
        config: IldConfig,
        place: &Place,
    ) -> Result<Self> {
        Self::new(teacher, teacher_hash, vec![(None, student)], config, place)
    }

    fn new(
        teacher: Lm,
        teacher_hash: String,
        candidates: Vec<(Option<LayerKind>, Parts)>,
        ild: IldConfig,
        place: &Place,
    ) -> Result<Self> {
        let sizes = |c: &ModelConfig| (c.layers.len(), c.hidden_size);
        let (layers, hidden) = sizes(&teacher.config);
        let candidates = candidates
            .into_iter()
            .map(|(kind, parts)| {
                let config = &parts.config;
                let name = kind.map_or("student".to_owned(), |kind| kind.to_string());
                if sizes(config) != (layers, hidden) {
                    return Err(Error::invalid(format!(
                        "{name} has {} layers of {}, the teacher {layers} of {hidden}",
                        config.layers.len(),
                        config.hidden_size
                    )));
                }
                let student = Student::new(&parts, in_layers, place)?;
                Ok(Candidate {
                    kind,
                    name,
                    student,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            teacher,
            teacher_hash,
            candidates,
            config: ild,
        })
    }

    pub(super) fn teacher(&self) -> &Lm {
        &self.teacher
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
            "ild": self.config,
        }))
    }

    /// Layers do not touch each other, so each is walked back at once and its graph let go.
    pub(super) fn backward(&mut self, batch: &Batch, shares: &Shares) -> Result<Terms> {
        let ids = ids(batch, self.teacher.device())?;
        let documents = Some(&batch.documents);
        let trace = self.teacher.trace(&ids, documents)?;
        let joint = self.config.inputs == IldInputs::Joint;
        let mut energies = shares.energies.iter();
        let mut part = |loss: Tensor| -> Result<Tensor> {
            let share = energies.next().copied().unwrap_or(shares.positions);
            Ok((loss * share)?)
        };
        let mut terms = Terms::default();
        for candidate in &mut self.candidates {
            let mut sum = 0.0;
            let mut own = trace.hidden[0].clone();
            for (i, layer) in candidate.student.lm.layers.iter().enumerate() {
                let goal = Goal::new(&self.teacher, self.config.loss, &trace, i);
                let taught = layer.forward(&trace.hidden[i], documents)?;
                let (hidden, mixer) = goal.terms(&taught, &trace.mixer_out[i])?;
                let mut loss = (part(hidden)? + part(mixer)?)?;
                if joint {
                    let alone = layer.forward(&own, documents)?;
                    let (hidden, mixer) = goal.terms(&alone, &missing(&trace, i, &own)?)?;
                    loss = ((loss + part(hidden)?)? + part(mixer)?)?.affine(0.5, 0.0)?;
                    own = alone.hidden.detach();
                }
                let grads = loss.backward()?;
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

    /// The shares of relative errors: each is divided by its target's sum of squares, of which a micro-batch has a
    /// part.
    pub(super) fn share_energies(&self, batches: &[Batch], shares: &mut [Shares]) -> Result<()> {
        if self.config.loss != IldLoss::RelativeMse {
            return Ok(());
        }
        let parts = batches.iter().map(|batch| self.energies(batch));
        let parts = parts.collect::<Result<Vec<_>>>()?;
        for term in 0..parts[0].len() {
            let of_term = share(parts.iter().map(|energies| energies[term]));
            for (shares, share) in shares.iter_mut().zip(of_term) {
                shares.energies.push(share);
            }
        }
        Ok(())
    }

    /// Sums of squares of a batch's targets, in the order in which [`Ild::backward`] meets them.
    fn energies(&self, batch: &Batch) -> Result<Vec<f64>> {
        let ids = ids(batch, self.teacher.device())?;
        let documents = Some(&batch.documents);
        let trace = self.teacher.trace(&ids, documents)?;
        let mut energies = Vec::new();
        for candidate in &self.candidates {
            let mut own = trace.hidden[0].clone();
            for (i, layer) in candidate.student.lm.layers.iter().enumerate() {
                let hidden = sum_of_squares(&trace.hidden[i + 1])?;
                energies.extend([hidden, sum_of_squares(&trace.mixer_out[i])?]);
                if self.config.inputs == IldInputs::Joint {
                    energies.extend([hidden, sum_of_squares(&missing(&trace, i, &own)?)?]);
                    own = layer.forward(&own, documents)?.hidden.detach();
                }
            }
        }
        Ok(energies)
    }

    pub(super) fn only_student(&self) -> Option<&Student> {
        match self.candidates.as_slice() {
            [one] => Some(&one.student),
            _ => None,
        }
    }

    pub(super) fn groups_mut(&mut self) -> Vec<&mut ParamGroup> {
        self.candidates
            .iter_mut()
            .map(|c| &mut c.student.params)
            .collect()
    }

    /// The hybrid, or a bank: one checkpoint folder a candidate.
    pub(super) fn write(&self, out: &Path, tokenizer: &Path) -> Result<()> {
        let mut kinds = Vec::new();
        for candidate in &self.candidates {
            let Some(kind) = candidate.kind else {
                return candidate.student.write(out, tokenizer);
            };
            std::fs::create_dir_all(out).map_err(Error::io("cannot create", out))?;
            candidate
                .student
                .write(&out.join(kind.folder()), tokenizer)?;
            kinds.push(kind);
        }
        Bank::write_index(out, kinds)
    }
}

/// What a student's mixer that reads `own` is to give: whatever is missing from it to the teacher's residual stream.
fn missing(trace: &Trace, index: usize, own: &Tensor) -> Result<Tensor> {
    Ok(((&trace.hidden[index] - own)? + &trace.mixer_out[index])?)
}

/// What the teacher's layer gave.
pub struct Goal<'a> {
    teacher: &'a Lm,
    loss: IldLoss,
    /// The layer's output.
    hidden: &'a Tensor,
    last: bool,
}

impl<'a> Goal<'a> {
    pub fn new(teacher: &'a Lm, loss: IldLoss, trace: &'a Trace, index: usize) -> Self {
        Self {
            teacher,
            loss,
            hidden: &trace.hidden[index + 1],
            last: index + 1 == trace.mixer_out.len(),
        }
    }

    /// The two terms: of the layer's output (the last layer's after the final norm, on both sides), and
    /// of its mixer's output, which is to be `mixer`.
    pub fn terms(&self, given: &LayerOutput, mixer: &Tensor) -> Result<(Tensor, Tensor)> {
        let LayerOutput { hidden: out, mixed } = given;
        let hidden = match self.last {
            true => self.loss.of(&self.teacher.normed(out)?, self.hidden)?,
            false => self.loss.of(out, self.hidden)?,
        };
        Ok((hidden, self.loss.of(mixed, mixer)?))
    }
}
