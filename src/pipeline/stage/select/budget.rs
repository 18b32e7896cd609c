//! Mixer and rank of every layer under a budget of bytes: what each kind of layer costs the teacher in each place alone, and
//! the choice of least damage that fits.

use serde::{Deserialize, Serialize};

use crate::checkpoint::Bank;
use crate::convert::{Choice, Init, PlanOptions, fit_budget, plan};
use crate::data::Corpus;
use crate::eval::sensitivity::{Score, sensitivity};
use crate::mixer::mla::{plan::MlaKind, rank::RankRule};
use crate::mixer::{Cost, LayerKind};
use crate::model::ModelConfig;
use crate::pipeline::base::Base;
use crate::pipeline::stage::candidates;
use crate::watch::Watch;
use crate::{Error, Result};

/// Where none are named: Mamba2, and MLA of these ranks.
pub const BUDGET_CANDIDATES: [LayerKind; 4] = [LayerKind::Mamba2, mla(8), mla(16), mla(32)];

const fn mla(rank: usize) -> LayerKind {
    LayerKind::Mla(MlaKind {
        kv_lora_rank: Some(rank),
        q_lora_rank: None,
    })
}

/// The most that all layers together may keep.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Budget {
    /// Bytes of KV cache a token, bf16, as an average over the length that the damages are for.
    pub kv_bytes: Option<usize>,
    /// Bytes of recurrent state a sequence, f32.
    pub state_bytes: Option<usize>,
}

/// Damages of all kinds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Damages {
    /// Tokens that they are measured on.
    pub tokens: usize,
    /// Tokens of a sequence that costs are for.
    pub length: usize,
    pub options: Vec<Damage>,
}

/// One kind of layer, in each place alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Damage {
    pub kind: LayerKind,
    pub costs: Vec<Cost>,
    /// KL that the teacher loses.
    pub layers: Vec<Score>,
}

impl Damages {
    /// One choice a layer.
    ///
    /// # Errors
    /// When nothing fits: the least that the choices need.
    pub fn choose(&self, budget: Budget) -> Result<Vec<Choice>> {
        let layers = self.options.first().map_or(0, |o| o.layers.len());
        let choices = |i: usize| -> Vec<Choice> {
            let choice = |option: &Damage| Choice {
                kind: option.kind,
                cost: option.costs[i],
                damage: option.layers[i].score,
            };
            self.options.iter().map(choice).collect()
        };
        let choices: Vec<_> = (0..layers).map(choices).collect();
        let cached = budget
            .kv_bytes
            .map(|bytes| (bytes / 2).saturating_mul(self.length));
        let state = budget.state_bytes.map(|bytes| bytes / 4);
        fit_budget(&choices, cached, state).ok_or_else(|| {
            let least = |of: fn(&Cost) -> usize| -> usize {
                let layer = |choices: &Vec<Choice>| choices.iter().map(|c| of(&c.cost)).min();
                choices.iter().filter_map(layer).sum()
            };
            let given = |bytes: Option<usize>| bytes.map_or("any".into(), |n| n.to_string());
            Error::invalid(format!(
                "no choice of mixers fits {} bytes a token (bf16, at {} tokens) and {} bytes of state (f32): alone, the least \
                 are {} and {}",
                given(budget.kv_bytes),
                self.length,
                given(budget.state_bytes),
                (2 * least(|c| c.cached)).div_ceil(self.length.max(1)),
                4 * least(|c| c.state)
            ))
        })
    }
}

/// What layers are chosen from.
pub enum Candidates<'a> {
    /// As the initialisation makes them.
    Born {
        options: &'a PlanOptions,
        kinds: &'a [LayerKind],
        init: &'a Init<'a>,
    },
    /// As they have been trained.
    Bank(&'a Bank),
}

/// Every kind with the model that has it in all layers.
///
/// # Errors
/// No kind, one that is named twice or that the teacher cannot give, or a rule where a number is needed.
fn planned(
    teacher: &ModelConfig,
    options: &PlanOptions,
    kinds: &[LayerKind],
) -> Result<Vec<(LayerKind, ModelConfig)>> {
    if let Some(rule) = options.sizes.kv_lora_rank.filter(RankRule::is_open) {
        return Err(Error::invalid(format!(
            "the KV rank {rule}: the budget method chooses among the candidates it is given"
        )));
    }
    candidates::check(kinds)?;
    let layers = teacher.layers.len();
    let sized = |kind: &LayerKind| {
        let options = options.with_layers(vec![*kind; layers]);
        Ok((*kind, plan(teacher, &options)?))
    };
    kinds.iter().map(sized).collect()
}

fn costs(model: &ModelConfig, length: usize) -> Vec<Cost> {
    let layers = model.layers.iter();
    layers
        .map(|layer| layer.cost(model.hidden_size, length))
        .collect()
}

/// A choice that fits, whatever its damage: what can be said before anything is measured.
///
/// # Errors
/// A candidate that the teacher cannot give, or when nothing fits.
pub fn fitting(
    teacher: &ModelConfig,
    options: &PlanOptions,
    kinds: &[LayerKind],
    length: usize,
    budget: Budget,
) -> Result<Vec<LayerKind>> {
    let none = Score {
        score: 0.0,
        standard_error: 0.0,
    };
    let damage = |(kind, student): (LayerKind, ModelConfig)| Damage {
        kind,
        costs: costs(&student, length),
        layers: vec![none; teacher.layers.len()],
    };
    let all = Damages {
        tokens: 0,
        length,
        options: (planned(teacher, options, kinds)?.into_iter())
            .map(damage)
            .collect(),
    };
    Ok(all.choose(budget)?.iter().map(|c| c.kind).collect())
}

/// Every candidate in every place of the teacher alone, its costs at `length` tokens.
///
/// # Errors
/// A candidate that the teacher cannot give, a text that fills no window, or [`Error::Interrupted`].
pub fn damages(
    base: &Base,
    candidates: &Candidates,
    length: usize,
    (corpus, tokens, seq_len): (&Corpus, usize, usize),
    watch: &dyn Watch,
) -> Result<Damages> {
    let models = match candidates {
        Candidates::Born { options, kinds, .. } => planned(base.config(), options, kinds)?,
        Candidates::Bank(bank) => {
            let all = bank.candidates.iter();
            all.map(|(kind, candidate)| (*kind, candidate.config.clone()))
                .collect()
        }
    };
    let windows = (tokens / seq_len.max(1)).max(1);
    let teacher = base.lm()?;
    let mut damages = Damages {
        tokens: 0,
        length,
        options: Vec::new(),
    };
    for (i, (kind, student)) in models.into_iter().enumerate() {
        let lm = match candidates {
            Candidates::Born { init, .. } => base.compose(&student, init, watch)?.lm(&base.place)?,
            Candidates::Bank(bank) => bank.candidates[i].1.model(&base.place)?,
        };
        let found = sensitivity(&teacher, &teacher, &lm, corpus, windows, seq_len, watch)?;
        damages.tokens = found.tokens;
        let loss = |s: &Score| Score {
            score: -s.score,
            standard_error: s.standard_error,
        };
        damages.options.push(Damage {
            kind,
            costs: costs(&student, length),
            layers: found.layers.iter().map(loss).collect(),
        });
    }
    Ok(damages)
}
