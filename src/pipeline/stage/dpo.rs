//! `[dpo]`: the model makes chosen answers likelier than rejected ones.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::training::{self, summary, trained_need};
use super::{Context, Made, Sizes, Stage, eval};
use crate::checkpoint::{Checkpoint, Key};
use crate::data::{Batches, Preferences};
use crate::mixer::Windows;
use crate::numerics;
use crate::pipeline::need::{Need, Settings, Supply, reading};
use crate::pipeline::texts::Texts;
use crate::train::cost::Learner;
use crate::train::stage::dpo::{CHUNK, Dpo, DpoConfig};
use crate::train::{self, Sources, TrainSettings};
use crate::watch::Watch;
use crate::weights::Place;
use crate::{Error, Result};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct DpoStage {
    pub objective: DpoConfig,
    pub train: TrainSettings,
}

impl DpoStage {
    /// `stored`: where the log-probabilities of the model as it is are kept.
    ///
    /// # Errors
    /// As [`Dpo::new`].
    pub fn align<'a>(
        &self,
        student: &Checkpoint,
        pairs: &'a Preferences,
        stored: &Path,
        place: &Place,
        watch: &dyn Watch,
    ) -> Result<train::Stage<'a>> {
        let parts = student.parts()?;
        let place = place.training(self.train.weights);
        let dpo = Dpo::new(&parts, pairs, self.objective, stored, &place, watch)?;
        Ok(train::Stage::Dpo(dpo, pairs))
    }
}

fn pairs(texts: &Texts) -> Result<&Preferences> {
    let missing = || Error::invalid("preferences are missing from [data]");
    texts.preferences.as_ref().ok_or_else(missing)
}

impl Stage for DpoStage {
    fn about(&self) -> String {
        summary(&self.train)
    }

    fn check(&self, sizes: &mut Sizes) -> Result<()> {
        self.train.settle()?;
        self.objective.validate()?;
        match sizes.preferences {
            true => Ok(()),
            false => Err(Error::invalid("preferences are missing from [data]")),
        }
    }

    /// As if every pair were as long as it may be.
    fn need(&self, sizes: &Sizes, with: &Supply) -> Result<Need> {
        let config = self.train.settle()?;
        let student = sizes.student()?;
        let pairs = |count: usize| Windows {
            rows: 2 * count,
            len: self.objective.max_length,
        };
        let learner = Learner {
            config: student,
            trained: &|_| true,
        };
        let windows = pairs(config.batch_size);
        let mut need = trained_need(&config, learner, None, windows, with.pairs, with);
        let weights = learner.bytes(config.weights);
        let before = reading(student, pairs(CHUNK), 1).with("trained weights", weights);
        need.phases.push(before);
        need.settings = Some(Settings {
            train: self.train.clone(),
            all: false,
            layers: false,
        });
        Ok(need)
    }

    fn fill(&self, texts: &Texts) -> Result<()> {
        training::fill(pairs(texts)?, &self.train)
    }

    fn key(&self, with: &Context, made: &Made) -> Result<Key> {
        let pairs = pairs(with.texts)?.hash();
        let settings = json!({ "dpo": self, "student": made.student()?.key, "pairs": pairs });
        with.key(numerics::Stage::Dpo, settings)
    }

    fn carry_out(&self, name: &str, with: &Context, made: &mut Made) -> Result<()> {
        let (key, before) = (self.key(with, made)?, made.student()?);
        let stored = with.store.path("frozen", &key);
        let stored = stored.with_extension("safetensors");
        let begin = || {
            let student = Checkpoint::open(&before.folder)?;
            let (place, watch) = (&with.base.place, with.surroundings.watch);
            let sources = Sources {
                record: student.provenance()?,
                inputs: with.texts.preferences_input().into_iter().collect(),
            };
            let stage = self.align(&student, pairs(with.texts)?, &stored, place, watch)?;
            Ok((stage.into(), sources))
        };
        let (student, metrics) = training::trained(name, &key, &self.train, with, begin)?;
        eval::result(name, student, metrics, with, made)
    }
}
