//! Knowledge distillation: the student's next-token distribution towards the teacher's, a mean per token
//! in nats, with an optional share of cross-entropy. As published (arXiv 2505.17272): forward KL over all
//! positions, everything trained at once. MambaInLLaMA's stepwise schedule (arXiv 2408.15237) converts
//! layer after layer and trains mixers only.

use std::ops::Range;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::student::{Student, Summand};
use super::{Laps, Shares, Terms, ids, masked_sum, next_token_losses};
use crate::data::Batch;
use crate::model::{ModelConfig, Parts};
use crate::op::loss::{Divergence, cross_entropy, divergence};
use crate::train::teacher::{About, Target, Teacher};
use crate::weights::Place;
use crate::{Error, Result};

/// What the cross-entropy's targets are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Labels {
    /// The text's next token.
    #[default]
    Text,
    /// The teacher's likeliest: pseudo-labels.
    Teacher,
}

/// When the student's layers take the places of the teacher's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// All from the first step.
    #[default]
    EndToEnd,
    /// One after the other, first to last, in equal shares of the steps, each with a learning-rate schedule of its
    /// own; until then a place keeps the teacher's layer.
    Stepwise,
}

/// What is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Trained {
    #[default]
    Everything,
    /// The mixers that replaced attention; all else stays as it is.
    Mixers,
}

/// The same on the command line and in a recipe's `[[kd]]`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct KdConfig {
    /// How far the student's distribution is from the teacher's.
    #[arg(long, value_enum, default_value_t = Self::default().divergence)]
    pub divergence: Divergence,
    /// Compare the distributions among the teacher's K likeliest tokens only.
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Softens both distributions; the divergence is multiplied by its square (Hinton et al. 2015).
    #[arg(long, default_value_t = Self::default().temperature)]
    pub temperature: f64,
    /// Weight of the divergence.
    #[arg(long, default_value_t = Self::default().kl_weight)]
    pub kl_weight: f64,
    /// Weight of the cross-entropy.
    #[arg(long, default_value_t = Self::default().ce_weight)]
    pub ce_weight: f64,
    /// What the cross-entropy's targets are.
    #[arg(long, value_enum, default_value_t = Self::default().labels)]
    pub labels: Labels,
    /// Leave out positions whose next token belongs to a prompt or to another document.
    #[arg(long)]
    pub mask_prompts: bool,
    /// When the student's layers take the places of the teacher's.
    #[arg(long, value_enum, default_value_t = Self::default().schedule)]
    pub schedule: Schedule,
    /// What is trained.
    #[arg(long, value_enum, default_value_t = Self::default().trained)]
    pub trained: Trained,
}

impl Default for KdConfig {
    fn default() -> Self {
        Self {
            divergence: Divergence::ForwardKl,
            top_k: None,
            temperature: 1.0,
            kl_weight: 1.0,
            ce_weight: 0.0,
            labels: Labels::Text,
            mask_prompts: false,
            schedule: Schedule::EndToEnd,
            trained: Trained::Everything,
        }
    }
}

impl KdConfig {
    /// # Errors
    /// Names the field that cannot work with a vocabulary of this size.
    pub fn validate(&self, vocab_size: usize) -> Result<()> {
        let wrong = |message: String| Err(Error::invalid(message));
        let tau = self.temperature;
        if !(tau > 0.0 && tau.is_finite()) {
            return wrong(format!("temperature {tau} must be above 0"));
        }
        for (name, weight) in [("kl_weight", self.kl_weight), ("ce_weight", self.ce_weight)] {
            if !(weight >= 0.0 && weight.is_finite()) {
                return wrong(format!("{name} {weight} must not be below 0"));
            }
        }
        if self.kl_weight + self.ce_weight == 0.0 {
            return wrong("kl_weight and ce_weight are both 0: nothing to learn".into());
        }
        match self.top_k {
            Some(k) if k < 2 || k > vocab_size => wrong(format!(
                "top_k {k} must lie between 2 and the vocabulary's {vocab_size}"
            )),
            _ => Ok(()),
        }
    }

    /// # Errors
    /// Settings out of range, vocabularies of different sizes, a stepwise schedule between models whose layers cannot
    /// be exchanged, or a student without the layers that are to be trained.
    pub fn fits(&self, teacher: &ModelConfig, student: &ModelConfig) -> Result<()> {
        let (t, s) = (teacher.vocab_size, student.vocab_size);
        if t != s {
            return Err(Error::invalid(format!(
                "the teacher has {t} tokens, the student {s}: distillation needs one vocabulary"
            )));
        }
        self.validate(s)?;
        let stepwise = self.schedule == Schedule::Stepwise;
        let sizes = |c: &ModelConfig| (c.layers.len(), c.hidden_size);
        if stepwise && sizes(teacher) != sizes(student) {
            return Err(Error::invalid(
                "a stepwise schedule needs a teacher of the student's depth and width: its own base model",
            ));
        }
        self.learns(student)
    }

    /// The same of what was written down of a teacher.
    ///
    /// # Errors
    /// Settings out of range, or that need more than the likeliest tokens.
    pub fn fits_stored(&self, teacher: &About, student: &ModelConfig) -> Result<()> {
        self.validate(student.vocab_size)?;
        let (tau, known) = (self.temperature, teacher.top_k);
        let wrong = |message: String| Err(Error::invalid(message));
        if self.schedule == Schedule::Stepwise {
            return wrong(
                "a stepwise schedule puts the teacher's own layers to work, and stored logits have none: give the teacher itself".into(),
            );
        }
        match self.top_k {
            None if tau != 1.0 => wrong(format!(
                "temperature {tau}: of the tokens that are not stored only the probability is known, and that at temperature 1; leave it, or compare the likeliest tokens alone (top_k, at most {known})"
            )),
            Some(k) if k > known => wrong(format!(
                "top_k {k}: the stored logits are those of the {known} likeliest tokens; lower it, or teach anew"
            )),
            _ => self.learns(student),
        }
    }

    /// # Errors
    /// A student without the layers that are to be trained.
    fn learns(&self, student: &ModelConfig) -> Result<()> {
        let mixers = self.schedule == Schedule::Stepwise || self.trained == Trained::Mixers;
        match mixers && student.converted().is_empty() {
            true => Err(Error::invalid(
                "the student has no converted layer to train",
            )),
            false => Ok(()),
        }
    }

    /// Which of a student's weights learn, by name.
    pub fn trains(&self, student: &ModelConfig) -> impl Fn(&str) -> bool + use<> {
        let converted = student.converted().into_iter();
        let prefixes = converted.map(|i| student.mixer_prefix(i));
        let (trained, prefixes) = (self.trained, prefixes.collect::<Vec<_>>());
        move |name| match trained {
            Trained::Everything => true,
            Trained::Mixers => prefixes.iter().any(|p| name.starts_with(p)),
        }
    }

    /// The part of rows `range` in a batch's divergence, of a student's logits `[rows, V]`, a scalar without its weight.
    fn divergence(
        &self,
        teacher: &Target,
        student: &Tensor,
        batch: &Batch,
        range: Range<usize>,
    ) -> Result<Tensor> {
        let (teacher, student) = teacher.beside(student, self.top_k)?;
        let rows = divergence(self.divergence, &teacher, &student, self.temperature)?;
        match self.mask_prompts {
            true => masked_sum(&rows, batch, range),
            false => Ok((rows.sum_all()? / batch.targets.len() as f64)?),
        }
    }

    /// The same of its cross-entropy.
    fn cross_entropy(
        &self,
        teacher: &Target,
        student: &Tensor,
        batch: &Batch,
        range: Range<usize>,
    ) -> Result<Tensor> {
        let losses = match self.labels {
            Labels::Text => next_token_losses(batch, range.clone(), student)?,
            Labels::Teacher => cross_entropy(student, &teacher.likeliest()?)?,
        };
        masked_sum(&losses, batch, range)
    }
}

pub struct Kd {
    teacher: Teacher,
    pub student: Student,
    config: KdConfig,
    /// Layers that are not in their places from the first step, first to last.
    late: Vec<usize>,
    /// How many of them are in their places.
    placed: usize,
}

impl Kd {
    /// `settled`: layers that an earlier stage converted and trained, in their places from the first step.
    ///
    /// # Errors
    /// As [`KdConfig::fits`] and [`KdConfig::fits_stored`].
    pub fn new(
        teacher: Teacher,
        parts: &Parts,
        settled: &[usize],
        config: KdConfig,
        place: &Place,
    ) -> Result<Self> {
        let student = &parts.config;
        match &teacher {
            Teacher::Model { lm, .. } => config.fits(&lm.config, student)?,
            Teacher::Stored(stored) => config.fits_stored(&stored.about, student)?,
        }
        let (converted, stepwise) = (student.converted(), config.schedule == Schedule::Stepwise);
        let is_late = |i: &usize| stepwise && !settled.contains(i);
        let late = converted.iter().copied().filter(is_late).collect();
        let trained = config.trains(student);
        Ok(Self {
            teacher,
            student: Student::new(parts, trained, place)?,
            placed: 0,
            late,
            config,
        })
    }

    pub(super) fn teacher(&self) -> &Teacher {
        &self.teacher
    }

    #[cfg(test)]
    pub fn exchange_teacher(&mut self, teacher: crate::model::Lm) {
        self.teacher = Teacher::Model {
            lm: Box::new(teacher),
            hash: self.teacher.hash(),
        };
    }

    /// What it is told to do, as recipes spell it.
    pub(super) fn settings(&self) -> serde_json::Value {
        serde_json::json!({ "objective": self.config })
    }

    pub(super) fn identity(&self) -> Result<serde_json::Value> {
        Ok(serde_json::json!({
            "stage": "kd",
            "teacher": self.teacher.hash(),
            "student": self.student.hash()?,
            "late": self.late,
            "kd": self.config,
        }))
    }

    /// Puts the layers in their places whose turn has come; the steps that the last of them has for its own.
    pub(super) fn start_step(&mut self, step: u64, steps: u64) -> Range<u64> {
        let count = self.late.len() as u64;
        let start = |turn: u64| steps * turn / count.max(1);
        let turn = (0..count).find(|turn| step < start(turn + 1));
        self.placed = turn.map_or(self.late.len(), |turn| turn as usize + 1);
        turn.map_or(0..steps, |turn| start(turn)..start(turn + 1))
    }

    pub(in crate::train) fn backward(&mut self, batch: &Batch, shares: &Shares) -> Result<Terms> {
        let Self {
            teacher,
            student,
            config,
            late,
            placed,
            ..
        } = self;
        let ids = ids(batch, student.lm.device())?;
        let mut laps = Laps::new();
        let taught = teacher.read(batch, &ids)?;
        let teacher_forward = ("teacher forward", laps.lap());
        // The teacher's layers stand where the student's have not come yet.
        let waiting = &late[*placed..];
        let layers = teacher.lm().map_or(&[][..], |lm| &lm.layers);
        let stand_in = |i: usize| layers.get(i).filter(|_| waiting.contains(&i));
        let loss = |range: Range<usize>, logits: &Tensor| {
            let target = taught.target(&range)?;
            let mut summands = Vec::new();
            if config.kl_weight > 0.0 {
                let share = match config.mask_prompts {
                    true => shares.learned,
                    false => shares.positions,
                };
                let kl = config.divergence(&target, logits, batch, range.clone())?;
                summands.push(Summand {
                    name: "kl",
                    value: (kl * share)?,
                    weight: config.kl_weight * config.temperature.powi(2),
                });
            }
            if config.ce_weight > 0.0 {
                let ce = config.cross_entropy(&target, logits, batch, range)?;
                summands.push(Summand {
                    name: "ce",
                    value: (ce * shares.learned)?,
                    weight: config.ce_weight,
                });
            }
            Ok(summands)
        };
        let learned = student.learn(&ids, &batch.documents, stand_in, loss)?;
        let mut phases = vec![teacher_forward];
        phases.extend(learned.phases);
        Ok(Terms {
            loss: learned.loss,
            named: learned.named,
            phases,
        })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;
    use crate::op::Documents;
    use crate::op::laws::random;
    use crate::op::loss::{likeliest, with_rest};

    /// Every variant's loss, through its own code path, against finite differences in f64.
    #[test]
    fn every_variant_has_the_gradient_of_its_loss() {
        let (m, v) = (4, 9);
        let batch = Batch {
            input_ids: vec![0; m],
            targets: vec![3, 0, 8, 1],
            mask: vec![1.0, 0.0, 1.0, 1.0],
            documents: Documents::new(vec![0; m], m),
            examples: vec![0],
            rows: 1,
            len: m,
        };
        let inputs = random(&[&[m, v], &[m, v]], 7);
        let teacher = (&inputs[0] * 3.0).unwrap();
        let plain = KdConfig::default();
        let kinds = [
            Divergence::ForwardKl,
            Divergence::ReverseKl,
            Divergence::Jsd,
            Divergence::Tvd,
        ];
        let mut variants = Vec::new();
        for divergence in kinds {
            for top_k in [None, Some(4)] {
                for mask_prompts in [false, true] {
                    variants.push(KdConfig {
                        divergence,
                        top_k,
                        mask_prompts,
                        temperature: 1.7,
                        ..plain
                    });
                }
            }
        }
        for labels in [Labels::Text, Labels::Teacher] {
            variants.push(KdConfig {
                labels,
                kl_weight: 0.1,
                ce_weight: 1.0,
                ..plain
            });
        }
        let stored = |teacher: &Tensor| {
            let rows = teacher.to_dtype(DType::F32).unwrap();
            let rows = rows.to_vec2::<f32>().unwrap();
            let tokens: Vec<u32> = rows.iter().flat_map(|row| likeliest(row, 5)).collect();
            let logits = with_rest(teacher, &tokens).unwrap();
            Target::Likeliest { tokens, logits }
        };
        let both = |config| [(config, false), (config, true)];
        for (config, is_stored) in variants.into_iter().flat_map(both) {
            let loss = |x: &Tensor| -> Tensor {
                // In two pieces, as logits come.
                let piece = |range: Range<usize>| {
                    let of = |x: &Tensor| x.narrow(0, range.start, range.len()).unwrap();
                    let (teacher, x) = match is_stored {
                        true => (stored(&of(&teacher)), of(x)),
                        false => (Target::Whole(of(&teacher)), of(x)),
                    };
                    let kl = config
                        .divergence(&teacher, &x, &batch, range.clone())
                        .unwrap();
                    let ce = config.cross_entropy(&teacher, &x, &batch, range).unwrap();
                    ((kl * config.kl_weight).unwrap() + (ce * config.ce_weight).unwrap()).unwrap()
                };
                (piece(0..1) + piece(1..m)).unwrap()
            };
            let x = Var::from_tensor(&inputs[1]).unwrap();
            let grads = loss(x.as_tensor()).backward().unwrap();
            let grad = grads.get(&x).unwrap().flatten_all().unwrap();
            let grad = grad.to_vec1::<f64>().unwrap();
            let at = |i: usize, step: f64| {
                let mut nudge = vec![0.0; m * v];
                nudge[i] = step;
                let nudge = Tensor::from_vec(nudge, (m, v), &Device::Cpu).unwrap();
                let moved = (&inputs[1] + nudge).unwrap();
                loss(&moved)
                    .to_dtype(DType::F64)
                    .unwrap()
                    .to_scalar::<f64>()
                    .unwrap()
            };
            for (i, grad) in grad.iter().enumerate() {
                let slope = (at(i, 1e-5) - at(i, -1e-5)) / 2e-5;
                assert!(
                    (slope - grad).abs() < 1e-7,
                    "{config:?} {is_stored} [{i}]: {grad} for {slope}"
                );
            }
        }
    }

    #[test]
    fn settings_out_of_range_are_named() {
        let say = |change: fn(&mut KdConfig)| {
            let mut config = KdConfig::default();
            change(&mut config);
            config.validate(100).unwrap_err().to_string()
        };
        assert!(say(|c| c.temperature = 0.0).contains("temperature 0"));
        assert!(say(|c| c.ce_weight = -1.0).contains("ce_weight -1"));
        assert!(say(|c| c.kl_weight = 0.0).contains("nothing to learn"));
        assert!(say(|c| c.top_k = Some(101)).contains("top_k 101"));
    }
}
