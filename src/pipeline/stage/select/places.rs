//! Where one of a bank's candidates is worth most.

use serde::{Deserialize, Serialize};

use crate::Result;
use crate::checkpoint::Bank;
use crate::convert::{Selector, select};
use crate::data::Corpus;
use crate::eval::sensitivity::{Sensitivity, sensitivity};
use crate::mixer::LayerKind;
use crate::pipeline::base::Base;
use crate::pipeline::stage::candidates::Pair;
use crate::watch::Watch;

/// What a bank's layers are worth.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Places {
    #[serde(default = "mla")]
    pub place: LayerKind,
    #[serde(default = "mamba2")]
    pub elsewhere: LayerKind,
    #[serde(flatten)]
    pub scores: Sensitivity,
}

// Scores of zebroid 0.1 do not say whose they are.
fn mla() -> LayerKind {
    LayerKind::MLA
}

fn mamba2() -> LayerKind {
    LayerKind::Mamba2
}

impl Places {
    /// Scores one candidate of a bank in each place of another, on `tokens` of `corpus` in windows of `seq_len`.
    ///
    /// # Errors
    /// As [`Pair::of`] and [`sensitivity`].
    pub fn score(
        base: &Base,
        bank: &Bank,
        pair: &Pair,
        (corpus, tokens, seq_len): (&Corpus, usize, usize),
        watch: &dyn Watch,
    ) -> Result<Self> {
        let [place, elsewhere] = pair.of(&bank.kinds())?;
        let model = |at: usize| bank.candidates[at].1.model(&base.place);
        let windows = (tokens / seq_len.max(1)).max(1);
        let (teacher, other, everywhere) = (base.lm()?, model(place)?, model(elsewhere)?);
        Ok(Self {
            place: bank.candidates[place].0,
            elsewhere: bank.candidates[elsewhere].0,
            scores: sensitivity(
                &teacher,
                &everywhere,
                &other,
                corpus,
                windows,
                seq_len,
                watch,
            )?,
        })
    }

    /// The places of `count` layers, and the kind of every layer.
    ///
    /// # Errors
    /// As [`select`].
    pub fn choose(&self, selector: Selector, count: usize) -> Result<(Vec<usize>, Vec<LayerKind>)> {
        let scores: Vec<f64> = self.scores.layers.iter().map(|s| s.score).collect();
        let chosen = select(selector, &scores, count)?;
        let kinds = (0..scores.len()).map(|i| match chosen.contains(&i) {
            true => self.place,
            false => self.elsewhere,
        });
        let kinds = kinds.collect();
        Ok((chosen, kinds))
    }
}
