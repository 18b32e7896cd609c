//! An opened teacher, and what can be made from it: shared by the commands and by recipes.

use std::path::Path;
use std::sync::OnceLock;

use super::bank::bank_plans;
use crate::Result;
use crate::checkpoint::Checkpoint;
use crate::convert::{
    Calibration, CalibrationConfig, Init, PlanOptions, calibrate, compose, plan, settle_ranks,
};
use crate::data::{Corpus, Tokenizer};
use crate::mixer::LayerKind;
use crate::model::{Lm, ModelConfig, Parts};
use crate::train::Stage;
use crate::train::stage::ild::{Ild, IldConfig};
use crate::train::stage::kd::{Kd, KdConfig};
use crate::watch::Watch;
use crate::weights::Place;

/// A Llama checkpoint, opened once.
pub struct Base {
    pub checkpoint: Checkpoint,
    pub parts: Parts,
    pub tokenizer: Tokenizer,
    pub place: Place,
    /// Once it was asked for.
    hash: OnceLock<String>,
}

impl Base {
    pub fn open(folder: &Path, place: Place) -> Result<Self> {
        let checkpoint = Checkpoint::open(folder)?;
        let tokenizer = Tokenizer::open(folder)?;
        tokenizer.check(checkpoint.config.vocab_size)?;
        Ok(Self {
            parts: checkpoint.parts()?,
            tokenizer,
            checkpoint,
            place,
            hash: OnceLock::new(),
        })
    }

    pub fn config(&self) -> &ModelConfig {
        &self.checkpoint.config
    }

    pub fn folder(&self) -> &Path {
        &self.checkpoint.folder
    }

    /// The model in its place.
    pub fn lm(&self) -> Result<Lm> {
        self.parts.lm(&self.place)
    }

    /// A fingerprint of sizes and weights.
    pub fn hash(&self) -> Result<String> {
        if let Some(known) = self.hash.get() {
            return Ok(known.clone());
        }
        let found = self.parts.hash()?;
        Ok(self.hash.get_or_init(|| found).clone())
    }

    /// [`calibrate`], kept in `folder`.
    pub fn calibrate(
        &self,
        corpus: &Corpus,
        config: &CalibrationConfig,
        folder: &Path,
        watch: &dyn Watch,
    ) -> Result<Calibration> {
        calibrate(&self.parts, &self.place, corpus, config, folder, watch)
    }

    /// The student's config; ranks that depend on weights are settled.
    pub fn plan(
        &self,
        options: &PlanOptions,
        calibration: Option<&Calibration>,
    ) -> Result<ModelConfig> {
        let settled = settle_ranks(&self.parts, options, calibration)?;
        plan(self.config(), &settled)
    }

    pub fn compose(&self, student: &ModelConfig, init: &Init, watch: &dyn Watch) -> Result<Parts> {
        compose(&self.parts, student, init, watch)
    }

    /// ILD of candidates for every layer.
    ///
    /// # Errors
    /// As [`bank_plans`].
    pub fn bank(
        &self,
        options: &PlanOptions,
        kinds: &[LayerKind],
        init: &Init,
        config: IldConfig,
        watch: &dyn Watch,
    ) -> Result<Stage> {
        let calibration = match init {
            Init::Published { .. } => None,
            Init::Refined { calibration, .. } => Some(*calibration),
        };
        let plans = bank_plans(options, kinds, self.config().layers.len())?;
        let candidates = plans.into_iter().map(|(kind, options)| {
            let student = self.plan(&options, calibration)?;
            Ok((kind, self.compose(&student, init, watch)?))
        });
        let candidates = candidates.collect::<Result<_>>()?;
        let ild = Ild::bank(self.lm()?, self.hash()?, candidates, config, &self.place)?;
        Ok(Stage::Ild(ild))
    }

    /// ILD of one hybrid.
    pub fn ild(&self, student: &Checkpoint, config: IldConfig) -> Result<Stage> {
        let student = student.parts()?;
        let ild = Ild::student(self.lm()?, self.hash()?, student, config, &self.place)?;
        Ok(Stage::Ild(ild))
    }

    /// KD of `student`, whose layers `settled` an earlier stage has trained.
    pub fn kd(&self, student: &Checkpoint, settled: &[usize], config: KdConfig) -> Result<Stage> {
        let (lm, hash) = (self.lm()?, self.hash()?);
        let kd = Kd::new(lm, hash, &student.parts()?, settled, config, &self.place)?;
        Ok(Stage::Kd(Box::new(kd)))
    }
}
