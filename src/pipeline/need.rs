//! What a stage takes, from sizes alone: what it is told, and what it says.

use std::path::Path;

use candle_core::DType;

use crate::Result;
use crate::checkpoint::Checkpoint;
use crate::mixer::Windows;
use crate::model::{LOGITS, ModelConfig};
use crate::train::cost::Memory;
use crate::train::{Length, TrainConfig, TrainSettings};

const F32: usize = size_of::<f32>();

/// A checkpoint by its sizes.
#[derive(Debug, Clone)]
pub struct Source {
    pub config: ModelConfig,
    /// Of its files.
    pub bytes: usize,
}

impl Source {
    /// Of a folder, where a config suffices: what its files have, or will have as bf16.
    ///
    /// # Errors
    /// A config that cannot be read.
    pub fn open(folder: &Path) -> Result<Self> {
        let (config, _) = Checkpoint::config_only(folder)?;
        let files = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let weights =
            files.filter(|file| file.path().extension().is_some_and(|e| e == "safetensors"));
        let sizes =
            weights.filter_map(|file| Some(std::fs::metadata(file.path()).ok()?.len() as usize));
        let bytes = match sizes.sum() {
            0 => 2 * config.parameters(),
            bytes => bytes,
        };
        Ok(Self { config, bytes })
    }

    /// Bytes a weight.
    pub fn width(&self) -> f64 {
        self.bytes as f64 / self.config.parameters() as f64
    }
}

/// What stages are forecast with.
pub struct Supply<'a> {
    pub base: &'a Source,
    /// Of the hybrid as the stage gets it; 0 before there is one.
    pub student: usize,
    /// Tokens of the training text and of the preferences, about, where the files are there.
    pub text: Option<u64>,
    pub pairs: Option<u64>,
    /// Bytes that a stage may take.
    pub free: usize,
    /// Weights that are not trained are used where files have them (on the CPU); else they are on the device.
    pub mapped: bool,
}

/// What a stage takes.
#[derive(Debug, Clone)]
pub struct Need {
    /// One after the other, beside the base model, the texts and the calibration.
    pub phases: Vec<Memory>,
    /// Of the hybrid that it leaves, if it does.
    pub student: Option<usize>,
    /// Of what else it leaves on disk.
    pub kept: usize,
    /// On disk while it runs: a save, and the next one beside it.
    pub scratch: usize,
    /// Of the calibration, which stays in memory.
    pub statistics: usize,
    /// Not known where it depends on a text that is not there.
    pub tokens: Option<u64>,
    /// Operations a token; not counted where linear algebra is what takes long.
    pub operations: Option<f64>,
    /// Bytes that updates move.
    pub moved: f64,
    /// Results that are measured on the held-out text.
    pub measured: bool,
    /// What products are computed in.
    pub compute: DType,
    /// What could be set otherwise.
    pub settings: Option<Settings>,
}

impl Default for Need {
    fn default() -> Self {
        Self {
            phases: Vec::new(),
            student: None,
            kept: 0,
            scratch: 0,
            statistics: 0,
            tokens: None,
            operations: None,
            moved: 0.0,
            measured: false,
            compute: DType::F32,
            settings: None,
        }
    }
}

/// Layers that ILD is advised to train at a time where memory is short.
pub const FEW: usize = 4;

/// What a stage that trains can be changed in.
#[derive(Debug, Clone)]
pub struct Settings {
    pub train: TrainSettings,
    /// Whether everything is trained, where mixers alone could be.
    pub all: bool,
    /// Whether more than [`FEW`] layers are trained at once, which need not be.
    pub layers: bool,
}

impl Supply<'_> {
    /// A model in files that are used where they stand, or on the device, in what it computes in.
    pub fn weights(
        &self,
        memory: Memory,
        name: &'static str,
        source: (usize, &ModelConfig),
        compute: DType,
    ) -> Memory {
        let (bytes, config) = source;
        match self.mapped {
            true => memory.with_file(name, bytes),
            false => memory.with(name, compute.size_in_bytes() * config.parameters()),
        }
    }

    /// Tokens of a run on a text of `text` tokens, in steps of `per_step`.
    pub fn length(&self, train: &TrainConfig, text: Option<u64>, per_step: usize) -> Option<u64> {
        let per_step = per_step as u64;
        match train.length {
            Length::Steps(steps) => Some(steps.saturating_mul(per_step)),
            Length::Tokens(tokens) => Some(tokens / per_step * per_step),
            Length::Epochs(epochs) => Some((epochs * text? as f64) as u64 / per_step * per_step),
        }
    }
}

/// Fingerprints widen the largest tensors, one a thread: entries of `config`'s as f32, `copies` of each.
pub fn fingerprint(config: &ModelConfig, copies: usize) -> Memory {
    let params = config.params();
    let mut sizes: Vec<usize> = params
        .iter()
        .map(|(_, shape)| shape.iter().product())
        .collect();
    sizes.sort_unstable_by(|a, b| b.cmp(a));
    let at_once = sizes.iter().take(rayon::current_num_threads());
    Memory::default().with("fingerprint", copies * F32 * at_once.sum::<usize>())
}

/// A pass without a way back of a model: its widest layer, and the logits of a piece (`models` of them, with their losses).
pub fn reading(config: &ModelConfig, windows: Windows, models: usize) -> Memory {
    let layers = (0..config.layers.len()).map(|i| config.layer_pass(i, windows).kept);
    let stream = windows.tokens() * config.hidden_size;
    let piece = (LOGITS / config.vocab_size).clamp(1, windows.tokens().max(1)) * config.vocab_size;
    Memory::default()
        .with(
            "activations",
            F32 * (layers.max().unwrap_or(0) + models * stream),
        )
        .with("logits", F32 * models * piece)
}
