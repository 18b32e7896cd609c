//! From a Llama to a hybrid: the layer plan (sizes only), then the weights (initialised, or whole layers
//! of an ILD bank).

use std::collections::BTreeMap;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::checkpoint::Bank;
use crate::data::Batch;
use crate::mixer::calibration::{Sample, fit_output};
use crate::mixer::{Birth, Born, Mixer, MixerConfig};
use crate::model::{Lm, ModelConfig, Parts};
use crate::op::Documents;
use crate::op::linear::Matrix;
use crate::watch::Watch;
use crate::weights::{Place, Weights};
use crate::{Error, Result};

pub mod calibrate;
mod plan;
pub mod quantize;
mod ranks;
mod select;
pub use calibrate::{CHUNK, Calibration, CalibrationConfig, calibrate, calibration_key};
pub use plan::{LayerPlan, PlanOptions, plan};
pub use ranks::{check_ranks, settle_ranks};
pub use select::{Choice, Selector, fit_budget, select, smart_feasible};

/// How mixers are born from attention weights, as flags and recipes say it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum InitName {
    /// Fitted to the teacher's mixers on text.
    #[default]
    Refined,
    /// As published.
    #[value(alias = "reference")]
    #[serde(alias = "reference")]
    Published,
}

/// How mixers are born from attention weights.
pub enum Init<'a> {
    /// As published; what it draws follows from the seed.
    Published { seed: u64 },
    /// Fitted to the teacher's mixers on text. `own_inputs`: output projections are fitted to what reaches
    /// them in the hybrid, and make up for what the layers before them missed; a bank, whose layers are to
    /// be combined anew, is fitted to the teacher's inputs.
    Refined {
        calibration: &'a Calibration,
        own_inputs: bool,
    },
}

/// `student` from the teacher: MLPs, norms, embedding, head and attention that stays as the teacher has them, mixers converted
/// in f32 on the CPU, layer by layer. Where a mixer turned by frequencies of its own, its config says so.
///
/// # Errors
/// When a layer of the plan cannot be born from the teacher's layer, or [`Error::Interrupted`].
pub fn compose(
    teacher: &Parts,
    student: &ModelConfig,
    init: &Init,
    watch: &dyn Watch,
) -> Result<Parts> {
    let layers = student.layers.len();
    watch.start("compose", layers);
    let mut composed = student.clone();
    let mut weights = BTreeMap::new();
    for (name, _) in student.params() {
        if teacher.weights.contains(&name) {
            weights.insert(name.clone(), teacher.weights.matrix(&name)?);
        }
    }
    let (mut teaching, own_inputs) = match init {
        Init::Published { .. } => (None, false),
        Init::Refined {
            calibration,
            own_inputs,
        } => (Some(Teaching::new(teacher, &calibration.fit)?), *own_inputs),
    };
    for (i, config) in student.layers.iter().enumerate() {
        let sample = teaching.as_mut().map(|t| t.layer(i)).transpose()?;
        let attention = teacher.attention(i)?;
        if !student.is_converted(i) {
            if let Some(teaching) = teaching.as_mut().filter(|_| own_inputs) {
                teaching.keep(i)?;
            }
            watch.reached(i + 1, layers, "layers")?;
            continue;
        }
        let birth = match (init, &sample) {
            // Each layer draws from a stream of its own.
            (Init::Published { seed }, _) => Birth::Published {
                seed: seed
                    .wrapping_mul(0x9E37_79B9_7F4A_7C15)
                    .wrapping_add(i as u64),
            },
            (Init::Refined { calibration, .. }, Some(sample)) => Birth::Refined {
                statistics: &calibration.layers[i],
                sample,
            },
            (Init::Refined { .. }, None) => {
                unreachable!("a refined initialisation has a sample of each layer")
            }
        };
        let Born { config, tensors } = config.born(&attention, &birth)?;
        let tensors = match teaching.as_mut().filter(|_| own_inputs) {
            Some(teaching) => {
                // Half of the layer's time is still to come.
                watch.reached(i, layers, "layers")?;
                teaching.follow(i, &config, tensors)?
            }
            None => tensors,
        };
        for (name, tensor) in tensors {
            let name = format!("model.layers.{i}.{}.{name}", config.prefix());
            weights.insert(name, tensor.into());
        }
        composed.layers[i] = config;
        watch.reached(i + 1, layers, "layers")?;
    }
    Ok(Parts::new(composed, weights))
}

/// The teacher, and the hybrid behind it, on their way through the text, a layer at a time.
struct Teaching {
    lm: Lm,
    /// The teacher's residual stream before the current layer, and after its mixer.
    before: Tensor,
    between: Tensor,
    /// The hybrid's before the current layer.
    own: Tensor,
    documents: Documents,
}

impl Teaching {
    fn new(teacher: &Parts, text: &Batch) -> Result<Self> {
        let lm = teacher.lm(&Place::cpu())?;
        let ids = Tensor::from_slice(&text.input_ids, (text.rows, text.len), lm.device())?;
        let hidden = lm.embed(&ids)?;
        Ok(Self {
            before: hidden.clone(),
            between: hidden.clone(),
            own: hidden,
            documents: text.documents.clone(),
            lm,
        })
    }

    /// The next layer's mixer, read and written; to be called for each layer in turn.
    fn layer(&mut self, index: usize) -> Result<Sample> {
        let layer = &self.lm.layers[index];
        let input = layer.mixer_input(&self.before)?;
        let output = layer.mixer.forward(&input, Some(&self.documents))?;
        self.between = layer.joined(&self.before, &output)?;
        self.before = layer.finish(&self.before, &output)?;
        Ok(Sample {
            input,
            output,
            documents: self.documents.clone(),
        })
    }

    /// Passes a layer that the hybrid keeps.
    fn keep(&mut self, index: usize) -> Result<()> {
        let layer = &self.lm.layers[index];
        let input = layer.mixer_input(&self.own)?;
        let mixed = layer.mixer.forward(&input, Some(&self.documents))?;
        self.own = layer.finish(&self.own, &mixed)?;
        Ok(())
    }

    /// Fits the output projection of the layer that was just born once more: to what the hybrid's layers
    /// before it give, towards the teacher's residual stream. Then the hybrid passes the layer.
    fn follow(
        &mut self,
        index: usize,
        config: &MixerConfig,
        born: Vec<(String, Tensor)>,
    ) -> Result<Vec<(String, Tensor)>> {
        let layer = &self.lm.layers[index];
        let input = layer.mixer_input(&self.own)?;
        let sample = Sample {
            output: layer.missing(&self.between, &self.own)?,
            input,
            documents: self.documents.clone(),
        };
        let tensors = fit_output(config, born, &sample)?.tensors;
        let mixer = Mixer::new(config, &Weights::new(tensors.iter().cloned().collect()))?;
        let mixed = mixer.forward(&sample.input, Some(&self.documents))?;
        self.own = layer.finish(&self.own, &mixed)?;
        Ok(tensors)
    }
}

/// Every layer of `student` taken whole (mixer, MLP and norms) from the bank's model of that mixer;
/// embedding, final norm and head from the teacher (Zebra-Llama, arXiv 2505.17272).
///
/// # Errors
/// When the bank has no model with that mixer, or one of other sizes.
pub fn compose_from_bank(teacher: &Weights, student: &ModelConfig, bank: &Bank) -> Result<Parts> {
    let mut composed = student.clone();
    let mut all: BTreeMap<String, Matrix> = BTreeMap::new();
    let configs: Vec<&ModelConfig> = bank.candidates.iter().map(|(_, c)| &c.config).collect();
    let taken = bank_layers(student, &configs)?;
    for (at, (_, candidate)) in bank.candidates.iter().enumerate() {
        let layers = || (0..taken.len()).filter(|i| taken[*i] == at);
        if layers().next().is_none() {
            continue;
        }
        let weights = candidate.parts()?.weights;
        for i in layers() {
            composed.layers[i] = candidate.config.layers[i].clone();
            let prefix = format!("model.layers.{i}.");
            let layer = weights.iter().filter(|(name, _)| name.starts_with(&prefix));
            all.extend(layer.map(|(name, weight)| (name.to_owned(), weight.clone())));
        }
    }
    for (name, _) in student.params() {
        if !name.starts_with("model.layers.") {
            all.insert(name.clone(), teacher.matrix(&name)?);
        }
    }
    Ok(Parts::new(composed, all))
}

/// Which of a bank's candidates each layer of `student` is taken from: the first with that mixer in its sizes.
///
/// # Errors
/// A layer that no candidate has.
pub fn bank_layers(student: &ModelConfig, candidates: &[&ModelConfig]) -> Result<Vec<usize>> {
    let hidden = student.hidden_size;
    let layers = student.layers.iter().enumerate().map(|(i, wanted)| {
        // The bank's frequencies were chosen when it was born; the sizes must be the plan's.
        let fits = |found: &MixerConfig| {
            found.name() == wanted.name() && found.params(hidden) == wanted.params(hidden)
        };
        let found = candidates.iter().position(|c| c.layers.get(i).is_some_and(fits));
        found.ok_or_else(|| {
            Error::invalid(format!(
                "the bank has no {} layer {i} with the sizes of the plan: give its candidates and ranks to both",
                wanted.name()
            ))
        })
    });
    layers.collect()
}

/// Whether a student `before` can go on as `after`.
///
/// # Errors
/// Other sizes, or a layer that was converted already.
pub fn check_growth(after: &ModelConfig, before: &ModelConfig) -> Result<()> {
    let sizes = |c: &ModelConfig| {
        (
            c.layers.len(),
            c.hidden_size,
            c.intermediate_size,
            c.vocab_size,
        )
    };
    if sizes(after) != sizes(before) {
        return Err(Error::invalid(
            "the student to go on from has other sizes than the plan",
        ));
    }
    for i in before.converted() {
        let name = before.layers[i].name();
        if after.layers[i].name() != name {
            return Err(Error::invalid(format!(
                "layer {i} is {name} already: only what is the teacher's can be converted"
            )));
        }
    }
    Ok(())
}

/// Goes on from a trained student: layers that `before` has with the same mixer are taken whole, of the
/// others everything but the new mixer, and the embedding, final norm and head.
///
/// # Errors
/// As [`check_growth`].
pub fn grow(composed: Parts, before: &Parts) -> Result<Parts> {
    let Parts {
        mut config,
        weights,
    } = composed;
    check_growth(&config, &before.config)?;
    let mut all = weights.to_map();
    for (i, layer) in before.config.layers.iter().enumerate() {
        let own = format!("model.layers.{i}.{}.", config.layers[i].prefix());
        let kept = config.layers[i].name() == layer.name();
        if kept {
            config.layers[i] = layer.clone();
        }
        for (name, weight) in &mut all {
            if name.starts_with(&format!("model.layers.{i}.")) && (kept || !name.starts_with(&own))
            {
                *weight = before.weights.matrix(name)?;
            }
        }
    }
    for (name, weight) in &mut all {
        if !name.starts_with("model.layers.") {
            *weight = before.weights.matrix(name)?;
        }
    }
    Ok(Parts::new(config, all))
}
