//! `[select]`: what each layer becomes, by what a bank's layers or untrained ones are worth.

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::candidates::Pair;
use super::{Context, Made, Sizes, Stage};
use crate::checkpoint::{Bank, Key};
use crate::convert::{PlanOptions, Selector, select};
use crate::data::{Batches, Corpus};
use crate::mixer::{LayerKind, Windows};
use crate::model::ModelConfig;
use crate::numerics;
use crate::pipeline::base::Base;
use crate::pipeline::need::{Need, Supply, reading};
use crate::pipeline::texts::Texts;
use crate::train::cost::forward;
use crate::watch::Watch;
use crate::{Error, Result};

mod budget;
mod places;

pub use budget::{BUDGET_CANDIDATES, Budget, Candidates, Damage, Damages, damages, fitting};
pub use places::Places;

/// How mixers are chosen. The same on the command line and in a recipe's `[select]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Zebra-Llama's: ends kept, near-uniform gaps, the largest total score.
    #[default]
    Smart,
    /// Evenly spaced, whatever the scores.
    Uniform,
    /// The largest scores, wherever they stand.
    Greedy,
    /// Candidate of every layer: least KL within the bytes given. Each layer alone is replaced in the
    /// teacher, and damages are taken to add up.
    Budget,
}

impl Method {
    /// How places are chosen from a bank's scores; a budget needs no bank.
    pub fn selector(self) -> Option<Selector> {
        match self {
            Method::Smart => Some(Selector::Smart),
            Method::Uniform => Some(Selector::Uniform),
            Method::Greedy => Some(Selector::Greedy),
            Method::Budget => None,
        }
    }
}

/// The same on the command line and in a recipe's `[select]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct SelectStage {
    /// How to choose.
    #[arg(long, value_enum, default_value_t = Self::default().method)]
    pub method: Method,
    /// Layers whose place is chosen (all methods but budget).
    #[arg(long)]
    pub count: Option<usize>,
    #[command(flatten)]
    #[serde(flatten)]
    pub pair: Pair,
    /// Most bytes of KV cache a token, bf16 (budget).
    #[arg(long)]
    pub kv_bytes: Option<usize>,
    /// Most bytes of recurrent state a sequence, f32 (budget).
    #[arg(long)]
    pub state_bytes: Option<usize>,
    /// Kinds of layer to choose from, where there is no bank [default: mamba2,mla:8,mla:16,mla:32] (budget).
    #[arg(long, value_delimiter = ',', value_name = "KIND,KIND,..")]
    pub candidates: Option<Vec<LayerKind>>,
    /// Tokens of a sequence that the bytes are for [default: the teacher's context] (budget).
    #[arg(long)]
    pub length: Option<usize>,
    /// Tokens to score on.
    #[arg(long, default_value_t = Self::default().tokens)]
    pub tokens: usize,
}

impl Default for SelectStage {
    fn default() -> Self {
        Self {
            method: Method::Smart,
            count: None,
            pair: Pair::default(),
            kv_bytes: None,
            state_bytes: None,
            candidates: None,
            length: None,
            tokens: 16_384,
        }
    }
}

impl SelectStage {
    pub fn budget(&self) -> Budget {
        Budget {
            kv_bytes: self.kv_bytes,
            state_bytes: self.state_bytes,
        }
    }

    /// What a budget chooses from where there is no bank.
    pub fn born(&self) -> &[LayerKind] {
        self.candidates.as_deref().unwrap_or(&BUDGET_CANDIDATES)
    }

    /// Tokens of a sequence that costs are for.
    pub fn length(&self, teacher: &ModelConfig) -> usize {
        self.length.unwrap_or(teacher.max_position_embeddings)
    }

    /// # Errors
    /// When it is missing.
    pub fn count(&self) -> Result<usize> {
        let missing =
            || Error::invalid("count is missing: how many layers have their place chosen");
        self.count.ok_or_else(missing)
    }

    /// # Errors
    /// Settings of another method, which would not be read, or ones that are missing; `bank`: the candidates there are.
    pub fn validate(&self, bank: Option<&[LayerKind]>) -> Result<()> {
        for (name, value) in [
            ("count", self.count),
            ("length", self.length),
            ("tokens", Some(self.tokens)),
        ] {
            if value == Some(0) {
                return Err(Error::invalid(format!("{name} must not be 0")));
            }
        }
        if self.method == Method::Budget {
            if self.count.is_some() || self.pair != Pair::default() {
                return Err(Error::invalid(
                    "a budget decides every layer: leave out count, place and elsewhere",
                ));
            }
            if bank.is_some() && self.candidates.is_some() {
                return Err(Error::invalid(
                    "a budget chooses among the bank's candidates where there is one: leave out candidates",
                ));
            }
            return Ok(());
        }
        if self.budget() != Budget::default() || self.candidates.is_some() || self.length.is_some()
        {
            return Err(Error::invalid(
                "kv_bytes, state_bytes, candidates and length are for the method budget",
            ));
        }
        let Some(kinds) = bank else {
            return Err(Error::invalid(
                "places are chosen from an ILD bank: train one first ([ild] target must be bank)",
            ));
        };
        self.pair.of(kinds)?;
        self.count().map(drop)
    }

    /// What a bank's layers are worth.
    ///
    /// # Errors
    /// As [`Places::score`].
    pub fn scores(
        &self,
        base: &Base,
        bank: &Bank,
        (text, seq_len): (&Corpus, usize),
        watch: &dyn Watch,
    ) -> Result<Places> {
        Places::score(base, bank, &self.pair, (text, self.tokens, seq_len), watch)
    }

    /// What each kind of layer costs the teacher.
    ///
    /// # Errors
    /// As [`damages`].
    pub fn damages(
        &self,
        base: &Base,
        candidates: &Candidates,
        (text, seq_len): (&Corpus, usize),
        watch: &dyn Watch,
    ) -> Result<Damages> {
        let length = self.length(base.config());
        damages(
            base,
            candidates,
            length,
            (text, self.tokens, seq_len),
            watch,
        )
    }
}

impl Stage for SelectStage {
    /// Every layer alone in a pass of its own, for each candidate that it may become.
    fn need(&self, sizes: &Sizes, _: &Supply) -> Result<Need> {
        let eval = &sizes.common.eval;
        let windows = Windows {
            rows: eval.batch_size,
            len: eval.seq_len,
        };
        let kinds = match self.method {
            Method::Budget => sizes.bank.as_deref().unwrap_or(self.born()).len(),
            _ => 1,
        };
        let passes = 1 + kinds * sizes.teacher.layers.len();
        Ok(Need {
            phases: vec![reading(sizes.teacher, windows, 2)],
            tokens: Some(self.tokens as u64),
            operations: Some(passes as f64 * forward(sizes.teacher, windows)),
            ..Need::default()
        })
    }

    fn about(&self) -> String {
        let name = format!("{:?}", self.method).to_lowercase();
        let count = self.count.map(|count| format!("{count} layers, "));
        format!("{}{name}", count.unwrap_or_default())
    }

    /// A plan as it could be chosen; what is measured decides among such.
    fn check(&self, sizes: &mut Sizes) -> Result<()> {
        let (options, bank) = (&sizes.common.plan, sizes.bank.as_deref());
        if !(options.mla.is_empty() && options.layers.is_none()) {
            return Err(Error::invalid(
                "[plan] names the MLA layers already: leave mla and layers out of it, or [select]",
            ));
        }
        if let Some(layer) = options.attention.first() {
            return Err(Error::invalid(format!(
                "layer {layer} keeps its attention in [plan], and all layers are chosen: leave attention out of it"
            )));
        }
        self.validate(bank)?;
        let layers = sizes.teacher.layers.len();
        let kinds = match bank {
            _ if self.method == Method::Budget => {
                let kinds = bank.unwrap_or(self.born());
                let length = self.length(sizes.teacher);
                fitting(sizes.teacher, options, kinds, length, self.budget())?
            }
            kinds => {
                let kinds = kinds.unwrap_or_default();
                let [place, elsewhere] = self.pair.of(kinds)?;
                let chosen = select(Selector::Uniform, &vec![0.0; layers], self.count()?)?;
                let kind = |i: usize| match chosen.contains(&i) {
                    true => kinds[place],
                    false => kinds[elsewhere],
                };
                (0..layers).map(kind).collect()
            }
        };
        sizes.plan = options.with_layers(kinds);
        Ok(())
    }

    fn fill(&self, texts: &Texts) -> Result<()> {
        texts.selection().check(1, 1)
    }

    fn key(&self, with: &Context, made: &Made) -> Result<Key> {
        let seq_len = with.common.eval.seq_len;
        let bank = made.bank.as_ref().map(|bank| &bank.key);
        let sample = json!([self.tokens, seq_len, with.texts.selection().hash()]);
        let settings = match self.method.selector() {
            Some(_) => json!({ "bank": bank, "pair": self.pair, "sample": sample }),
            None => json!({
                "plan": with.common.plan,
                "bank": bank,
                "candidates": self.born(),
                "length": self.length(with.base.config()),
                "birth": with.birth(),
                "sample": sample,
            }),
        };
        with.key(numerics::Stage::Scores, settings)
    }

    fn carry_out(&self, _: &str, with: &Context, made: &mut Made) -> Result<()> {
        let key = self.key(with, made)?;
        let bank = || match &made.bank {
            Some(bank) => Bank::open(&bank.folder).map(Some),
            None => Ok(None),
        };
        let text = (with.texts.selection(), with.common.eval.seq_len);
        let (base, watch) = (with.base, with.surroundings.watch);
        let options: &PlanOptions = &with.common.plan;
        let kinds = match self.method.selector() {
            Some(selector) => {
                let found = with.store.get("scores", &key, || {
                    let missing = || Error::invalid("places are chosen from an ILD bank");
                    let bank = bank()?.ok_or_else(missing)?;
                    self.scores(base, &bank, text, watch)
                })?;
                let kinds = found.choose(selector, self.count()?)?.1;
                made.scores = Some(found);
                kinds
            }
            None => {
                let found = with.store.get("damages", &key, || {
                    let (bank, init) = (bank()?, made.init(with.common, false));
                    let candidates = match &bank {
                        Some(bank) => Candidates::Bank(bank),
                        None => Candidates::Born {
                            options,
                            kinds: self.born(),
                            init: &init,
                        },
                    };
                    self.damages(base, &candidates, text, watch)
                })?;
                let chosen = found.choose(self.budget())?;
                let kinds = chosen.iter().map(|choice| choice.kind).collect();
                made.damages = Some(found);
                kinds
            }
        };
        made.plan = Some(options.with_layers(kinds));
        Ok(())
    }
}
