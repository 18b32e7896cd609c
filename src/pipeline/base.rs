//! An opened teacher, and what can be made from it: shared by the commands and by recipes.

use std::path::Path;
use std::sync::OnceLock;

use crate::Result;
use crate::checkpoint::{Checkpoint, Input, Provenance};
use crate::convert::{Init, PlanOptions, compose, settle_ranks};
use crate::data::Tokenizer;
use crate::model::{Lm, ModelConfig, Parts};
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

    /// As [`Checkpoint::provenance`]; its weights are read for it once.
    ///
    /// # Errors
    /// A record or weights that cannot be read.
    pub fn provenance(&self) -> Result<Provenance> {
        Provenance::of(&self.checkpoint, || self.hash())
    }

    /// What the record of a step says that learns from it.
    ///
    /// # Errors
    /// Weights that cannot be read.
    pub fn input(&self) -> Result<Input> {
        let hash = Some(self.hash()?);
        Ok(Input::file("teacher", self.folder(), hash))
    }

    /// The student's config. Ranks that depend on weights are read off spectra: those of the text that a refined
    /// initialisation is fitted to, or the weights' own, as published (X-EcoMLA, arXiv 2503.11132).
    ///
    /// # Errors
    /// Sizes that the teacher cannot give.
    pub fn plan(&self, options: &PlanOptions, init: &Init) -> Result<ModelConfig> {
        let calibration = match init {
            Init::Published { .. } => None,
            Init::Refined { calibration, .. } => Some(*calibration),
        };
        settle_ranks(&self.parts, options, calibration)?.student(self.config())
    }

    /// The hybrid's weights, from the teacher's alone.
    ///
    /// # Errors
    /// As [`compose`].
    pub fn compose(&self, student: &ModelConfig, init: &Init, watch: &dyn Watch) -> Result<Parts> {
        compose(&self.parts, student, init, watch)
    }
}
