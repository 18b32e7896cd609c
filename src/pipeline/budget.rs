//! Mixer and rank of every layer under a budget of bytes: what each kind of layer costs the teacher in each place alone, and
//! the choice of least damage that fits.

use candle_core::DType;
use serde::{Deserialize, Serialize};

use super::base::Base;
use crate::convert::{Choice, Init, PlanOptions, fit_budget, plan};
use crate::data::Corpus;
use crate::eval::sensitivity::{Score, sensitivity};
use crate::mixer::mla::{plan::MlaKind, rank::RankRule};
use crate::mixer::{Cost, LayerKind};
use crate::model::{Lm, ModelConfig};
use crate::watch::Watch;
use crate::weights::Weights;
use crate::{Error, Result};

/// The most that all layers together may keep.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Budget {
    /// Bytes of KV cache a token, bf16.
    pub kv_bytes: Option<usize>,
    /// Bytes of recurrent state a sequence, f32.
    pub state_bytes: Option<usize>,
}

/// Damages of all kinds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Damages {
    /// Tokens that they are measured on.
    pub tokens: usize,
    pub options: Vec<Damage>,
}

/// One kind of layer, in each place alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Damage {
    pub kind: LayerKind,
    pub cost: Cost,
    /// KL that the teacher loses.
    pub layers: Vec<Score>,
}

impl Damages {
    /// One choice a layer.
    ///
    /// # Errors
    /// When nothing fits.
    pub fn choose(&self, budget: Budget) -> Result<Vec<Choice>> {
        let layers = self.options.first().map_or(0, |o| o.layers.len());
        let choices = |i: usize| -> Vec<Choice> {
            let choice = |option: &Damage| Choice {
                kind: option.kind,
                cost: option.cost,
                damage: option.layers[i].score,
            };
            self.options.iter().map(choice).collect()
        };
        let choices: Vec<_> = (0..layers).map(choices).collect();
        let (kv, state) = (budget.kv_bytes, budget.state_bytes);
        fit_budget(&choices, kv.map(|b| b / 2), state.map(|b| b / 4))
    }
}

/// Mamba2 and MLA of every rank, each with the model that has it in all layers.
///
/// # Errors
/// No rank, one that the teacher cannot give, or a rule where a number is needed.
pub fn candidates(
    teacher: &ModelConfig,
    options: &PlanOptions,
    ranks: &[usize],
) -> Result<Vec<(LayerKind, ModelConfig)>> {
    if let Some(rule) = options.sizes.kv_lora_rank.filter(RankRule::is_open) {
        return Err(Error::invalid(format!(
            "the KV rank {rule}: the budget method chooses among the ranks it is given"
        )));
    }
    if ranks.is_empty() {
        return Err(Error::invalid(
            "the budget method needs ranks to choose from",
        ));
    }
    let mla = |rank: &usize| {
        LayerKind::Mla(MlaKind {
            kv_lora_rank: Some(*rank),
            q_lora_rank: None,
        })
    };
    let kinds = std::iter::once(LayerKind::Mamba2).chain(ranks.iter().map(mla));
    let layers = teacher.layers.len();
    let sized = |kind| {
        Ok((
            kind,
            plan(teacher, &options.with_layers(vec![kind; layers]))?,
        ))
    };
    kinds.map(sized).collect()
}

/// A choice that fits, whatever its damage: what can be said before anything is measured.
///
/// # Errors
/// As [`candidates`], or when nothing fits.
pub fn fitting(
    teacher: &ModelConfig,
    options: &PlanOptions,
    ranks: &[usize],
    budget: Budget,
) -> Result<Vec<LayerKind>> {
    let none = Score {
        score: 0.0,
        standard_error: 0.0,
    };
    let damage = |(kind, student): (LayerKind, ModelConfig)| Damage {
        kind,
        cost: student.layers[0].cost(student.hidden_size),
        layers: vec![none; teacher.layers.len()],
    };
    let all = Damages {
        tokens: 0,
        options: (candidates(teacher, options, ranks)?.into_iter())
            .map(damage)
            .collect(),
    };
    Ok(all.choose(budget)?.iter().map(|c| c.kind).collect())
}

/// Every kind of layer, as the initialisation makes it, in every place of the teacher alone.
///
/// # Errors
/// As [`candidates`], a text that fills no window, or [`Error::Interrupted`].
pub fn damages(
    base: &Base,
    options: &PlanOptions,
    ranks: &[usize],
    init: &Init,
    (corpus, tokens, seq_len): (&Corpus, usize, usize),
    watch: &dyn Watch,
) -> Result<Damages> {
    let kinds = candidates(base.config(), options, ranks)?;
    let windows = (tokens / seq_len.max(1)).max(1);
    let teacher = base.lm()?;
    let mut damages = Damages {
        tokens: 0,
        options: Vec::new(),
    };
    for (kind, student) in kinds {
        let composed = base.compose(&student, init, watch)?;
        let weights = Weights::new(composed.tensors).to_device(&base.device, DType::F32)?;
        let lm = Lm::new(&composed.config, &weights)?;
        let found = sensitivity(&teacher, &teacher, &lm, corpus, windows, seq_len, watch)?;
        damages.tokens = found.tokens;
        let loss = |s: &Score| Score {
            score: -s.score,
            standard_error: s.standard_error,
        };
        damages.options.push(Damage {
            kind,
            cost: student.layers[0].cost(student.hidden_size),
            layers: found.layers.iter().map(loss).collect(),
        });
    }
    Ok(damages)
}
