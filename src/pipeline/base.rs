//! An opened teacher, and what can be made from it: shared by the commands and by recipes.

use std::path::Path;

use candle_core::{DType, Device};

use super::bank::bank_plans;
use crate::Result;
use crate::checkpoint::{self, Checkpoint};
use crate::convert::{
    Calibration, CalibrationConfig, Composed, Init, PlanOptions, calibrate, compose, plan,
    settle_ranks,
};
use crate::data::{Corpus, Tokenizer};
use crate::mixer::LayerKind;
use crate::model::{Lm, ModelConfig};
use crate::train::Stage;
use crate::train::stage::ild::{Ild, IldConfig};
use crate::train::stage::kd::{Kd, KdConfig};
use crate::watch::Watch;
use crate::weights::Weights;

/// A Llama checkpoint, opened once.
pub struct Base {
    pub checkpoint: Checkpoint,
    /// f32, on the CPU.
    pub weights: Weights,
    pub tokenizer: Tokenizer,
    pub device: Device,
}

impl Base {
    pub fn open(folder: &Path, device: Device) -> Result<Self> {
        let checkpoint = Checkpoint::open(folder)?;
        let tokenizer = Tokenizer::open(folder)?;
        tokenizer.check(checkpoint.config.vocab_size)?;
        Ok(Self {
            weights: checkpoint.weights(DType::F32, &Device::Cpu)?,
            tokenizer,
            checkpoint,
            device,
        })
    }

    pub fn config(&self) -> &ModelConfig {
        &self.checkpoint.config
    }

    pub fn folder(&self) -> &Path {
        &self.checkpoint.folder
    }

    /// The model on its device.
    pub fn lm(&self) -> Result<Lm> {
        let weights = self.weights.to_device(&self.device, DType::F32)?;
        Lm::new(self.config(), &weights)
    }

    /// A fingerprint of sizes and weights.
    pub fn hash(&self) -> Result<String> {
        checkpoint::fingerprint(self.config(), &self.weights)
    }

    /// [`calibrate`], kept in `folder`.
    pub fn calibrate(
        &self,
        corpus: &Corpus,
        config: &CalibrationConfig,
        folder: &Path,
        watch: &dyn Watch,
    ) -> Result<Calibration> {
        calibrate(&self.lm()?, &self.weights, corpus, config, folder, watch)
    }

    /// The student's config; ranks that depend on weights are settled.
    pub fn plan(
        &self,
        options: &PlanOptions,
        calibration: Option<&Calibration>,
    ) -> Result<ModelConfig> {
        let settled = settle_ranks(self.config(), &self.weights, options, calibration)?;
        plan(self.config(), &settled)
    }

    pub fn compose(
        &self,
        student: &ModelConfig,
        init: &Init,
        watch: &dyn Watch,
    ) -> Result<Composed> {
        compose(self.config(), &self.weights, student, init, watch)
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
            Init::Reference { .. } => None,
            Init::Refined { calibration, .. } => Some(*calibration),
        };
        let plans = bank_plans(options, kinds, self.config().layers.len())?;
        let candidates = plans.into_iter().map(|(kind, options)| {
            let student = self.plan(&options, calibration)?;
            let composed = self.compose(&student, init, watch)?;
            let weights = Weights::new(composed.tensors).to_device(&self.device, DType::F32)?;
            Ok((kind, composed.config, weights))
        });
        let candidates = candidates.collect::<Result<_>>()?;
        let ild = Ild::bank(self.lm()?, self.hash()?, candidates, config)?;
        Ok(Stage::Ild(ild))
    }

    /// ILD of one hybrid.
    pub fn ild(&self, student: &Checkpoint, config: IldConfig) -> Result<Stage> {
        let weights = student.weights(DType::F32, &self.device)?;
        let student = (student.config.clone(), weights);
        let ild = Ild::student(self.lm()?, self.hash()?, student, config)?;
        Ok(Stage::Ild(ild))
    }

    /// KD of `student`, whose layers `settled` an earlier stage has trained.
    pub fn kd(&self, student: &Checkpoint, settled: &[usize], config: KdConfig) -> Result<Stage> {
        let weights = student.weights(DType::F32, &self.device)?;
        let (lm, hash) = (self.lm()?, self.hash()?);
        let kd = Kd::new(lm, hash, &student.config, &weights, settled, config)?;
        Ok(Stage::Kd(Box::new(kd)))
    }
}
