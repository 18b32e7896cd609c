//! From a Llama to a hybrid: the layer plan (sizes only), then the weights (initialised, or whole layers
//! of an ILD bank).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::checkpoint::Bank;
use crate::mixer::{Birth, Born, MixerConfig};
use crate::model::{ModelConfig, Parts};
use crate::op::linear::Matrix;
use crate::watch::Watch;
use crate::weights::Weights;
use crate::{Error, Result};

pub mod calibrate;
mod plan;
pub mod quantize;
mod ranks;
mod select;
mod teaching;
pub use calibrate::{CHUNK, Calibration, CalibrationConfig, calibrate, calibration_key};
pub use plan::{LayerPlan, PlanOptions, plan};
pub use ranks::{check_ranks, settle_ranks};
pub use select::{Choice, Selector, fit_budget, select, smart_feasible};
use teaching::Teaching;
pub use teaching::{CHOICE, PIECE};

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
    let mut teaching = match init {
        Init::Published { .. } => None,
        Init::Refined {
            calibration,
            own_inputs,
        } => Some(Teaching::new(teacher, &calibration.fit, *own_inputs)?),
    };
    for (i, config) in student.layers.iter().enumerate() {
        let attention = teacher.attention(i)?;
        if !student.is_converted(i) {
            if let Some(teaching) = &mut teaching {
                teaching.pass(i, None)?;
            }
            watch.reached(i + 1, layers, "layers")?;
            continue;
        }
        let samples = teaching.as_mut().map(|t| t.choice(i)).transpose()?;
        let birth = match (init, &samples) {
            // Each layer draws from a stream of its own.
            (Init::Published { seed }, _) => Birth::Published {
                seed: seed
                    .wrapping_mul(0x9E37_79B9_7F4A_7C15)
                    .wrapping_add(i as u64),
            },
            (Init::Refined { calibration, .. }, Some(samples)) => Birth::Refined {
                statistics: &calibration.layers[i],
                samples,
            },
            (Init::Refined { .. }, None) => {
                unreachable!("a refined initialisation has samples of each layer")
            }
        };
        let Born { config, tensors } = config.born(&attention, &birth)?;
        drop(samples);
        let tensors = match &mut teaching {
            Some(teaching) => {
                // Half of the layer's time is still to come.
                watch.reached(i, layers, "layers")?;
                let tensors = teaching.fit(i, &config, tensors)?;
                teaching.pass(i, Some((&config, &tensors)))?;
                tensors
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
