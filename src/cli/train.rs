//! `zebroid train`: ILD bank or end-to-end KD.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};

use super::device::DeviceArg;
use super::init::{InitArgs, init};
use super::interrupt;
use super::output::{progress, show_step};
use super::plan::PlanArgs;
use crate::checkpoint::{self, Checkpoint};
use crate::convert::{LayerKind, compose};
use crate::data::{Corpus, Packing, Tokenizer};
use crate::train::stage::ild::{Ild, IldLoss};
use crate::train::stage::kd::{Kd, KdConfig};
use crate::train::{RunOptions, Stage, StepMetrics, TrainConfig, train};
use crate::{Error, Result};

/// Train towards a teacher. Interrupted runs go on when the same command is given again.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    zebroid train --stage ild --teacher ./teacher --data train.jsonl ./bank --kv-rank 16 --tokens 400000 --lr 2e-3\n  \
    zebroid compose ./teacher ./hybrid --mla 2 --kv-rank 16 --bank ./bank\n  \
    zebroid train --stage kd --teacher ./teacher --student ./hybrid --data train.jsonl ./distilled --tokens 1600000")]
pub struct Args {
    #[arg(long, value_enum)]
    stage: StageName,
    /// Llama checkpoint folder.
    #[arg(long)]
    teacher: PathBuf,
    /// Hybrid checkpoint folder to start from (kd).
    #[arg(long, required_if_eq("stage", "kd"))]
    student: Option<PathBuf>,
    /// JSON lines with a text field.
    #[arg(long)]
    data: PathBuf,
    /// Folder of the result (kd: a checkpoint; ild: a bank with mla/ and mamba2/); must not exist.
    out: PathBuf,
    /// Sizes of the bank's candidates (ild).
    #[command(flatten)]
    plan: PlanArgs,
    #[command(flatten)]
    init: InitArgs,
    /// What a layer is measured by (ild).
    #[arg(long, value_enum, default_value = "relative-mse")]
    loss: IldLoss,
    /// Softens both distributions (kd).
    #[arg(long, default_value_t = 1.0)]
    temperature: f64,
    /// Share of cross-entropy in the loss (kd).
    #[arg(long, default_value_t = 0.0)]
    ce_weight: f64,
    #[command(flatten)]
    train: TrainArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum StageName {
    Ild,
    Kd,
}

/// How long, how fast, in which portions.
#[derive(Debug, Clone, clap::Args)]
pub struct TrainArgs {
    /// Tokens to train on (rounded down to whole steps).
    #[arg(long, default_value_t = 2_000_000)]
    pub tokens: u64,
    /// Windows a micro-batch.
    #[arg(long, default_value_t = 16)]
    pub batch_size: usize,
    /// Micro-batches a step.
    #[arg(long, default_value_t = 1)]
    pub accumulation: usize,
    /// Tokens a window.
    #[arg(long, default_value_t = 256)]
    pub seq_len: usize,
    /// Peak learning rate.
    #[arg(long, default_value_t = 1e-3)]
    pub lr: f64,
    /// Share of the steps that warm up.
    #[arg(long, default_value_t = 0.01)]
    pub warmup: f64,
    /// Learning rate at the end, as a share of the peak.
    #[arg(long, default_value_t = 0.0)]
    pub min_lr: f64,
    #[arg(long, default_value_t = 0.0)]
    pub weight_decay: f64,
    #[arg(long, default_value_t = 0.9)]
    pub beta1: f64,
    #[arg(long, default_value_t = 0.95)]
    pub beta2: f64,
    /// Gradient norm is clipped to this; 0 never clips.
    #[arg(long, default_value_t = 1.0)]
    pub clip: f64,
    /// Of the data order and of what initialisation draws.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// documents: attention, convolution and state stop at document borders; stream: they do not.
    #[arg(long, value_enum, default_value = "documents")]
    pub packing: Packing,
    /// Steps between saves.
    #[arg(long, default_value_t = 200)]
    pub save_every: u64,
    #[command(flatten)]
    pub device: DeviceArg,
    /// Replace OUT, and drop an unfinished run with other settings.
    #[arg(long)]
    pub force: bool,
    /// Print every step's metrics as a JSON line on standard output.
    #[arg(long)]
    pub json: bool,
}

impl TrainArgs {
    pub fn config(&self) -> Result<TrainConfig> {
        let mut config = TrainConfig {
            steps: 1,
            batch_size: self.batch_size,
            accumulation: self.accumulation,
            seq_len: self.seq_len,
            lr: self.lr,
            warmup: self.warmup,
            min_lr: self.min_lr,
            weight_decay: self.weight_decay,
            beta1: self.beta1,
            beta2: self.beta2,
            clip: self.clip,
            seed: self.seed,
            ..TrainConfig::default()
        };
        config.validate()?;
        config.steps = self.tokens / config.tokens_per_step() as u64;
        match config.steps {
            0 => Err(Error::invalid(format!(
                "--tokens {} is less than one step ({} tokens)",
                self.tokens,
                config.tokens_per_step()
            ))),
            _ => Ok(config),
        }
    }

    /// Runs a stage with a progress bar and Ctrl-C.
    pub fn run(
        &self,
        name: &str,
        stage: &mut Stage,
        corpus: &Corpus,
        out: &Path,
        tokenizer: &Path,
    ) -> Result<Vec<StepMetrics>> {
        let config = self.config()?;
        interrupt::install();
        let bar = progress(name, config.steps);
        let mut observe = |metrics: &StepMetrics| {
            show_step(&bar, metrics);
            if self.json {
                println!(
                    "{}",
                    serde_json::to_string(metrics).expect("numbers and names serialise")
                );
            }
        };
        let metrics = train(
            stage,
            corpus,
            &config,
            RunOptions {
                out: out.to_owned(),
                tokenizer: tokenizer.to_owned(),
                force: self.force,
                save_every: self.save_every,
                stop: &interrupt::asked,
                observe: &mut observe,
            },
        );
        bar.finish();
        metrics
    }
}

pub fn run(args: Args) -> anyhow::Result<()> {
    args.train.config()?;
    checkpoint::check_output(&args.out, args.train.force)?;
    let device = args.train.device.get()?;
    let teacher = Checkpoint::open(&args.teacher)?;
    let tokenizer = Tokenizer::open(&args.teacher)?;
    let corpus = Corpus::load(&args.data, &tokenizer, args.train.packing)?;
    // Before the initialisation, which takes its text from the same data.
    corpus.check(args.train.batch_size, args.train.seq_len)?;
    let (name, mut stage) = match args.stage {
        StageName::Ild => ("ild", ild(&args, &teacher, &device)?),
        StageName::Kd => ("kd", kd(&args, &teacher, &device)?),
    };
    let metrics = args
        .train
        .run(name, &mut stage, &corpus, &args.out, &args.teacher)?;
    if let Some(last) = metrics.last() {
        eprintln!(
            "{} steps, {} tokens, last loss {:.4}",
            last.step, last.tokens, last.loss
        );
    }
    eprintln!("written to {}", args.out.display());
    Ok(())
}

/// Both candidates for every layer, born from the teacher.
fn ild(args: &Args, teacher: &Checkpoint, device: &Device) -> Result<Stage> {
    let layers = teacher.config.layers.len();
    let mut candidates = Vec::new();
    let weights = teacher.weights(DType::F32, &Device::Cpu)?;
    let text = args.init.text(&args.teacher, Some(&args.data))?;
    for (name, kind) in [("mla", LayerKind::Mla), ("mamba2", LayerKind::Mamba2)] {
        let mut plan = args.plan.clone();
        plan.layers = Some(vec![kind; layers]);
        let config = plan.student(&teacher.config)?;
        let composed = compose(
            &teacher.config,
            &weights,
            &config,
            &init(&text, false, args.train.seed),
        )?;
        let weights =
            crate::weights::Weights::new(composed.tensors).to_device(device, DType::F32)?;
        candidates.push((name.to_owned(), composed.config, weights));
    }
    let lm = teacher.model(device, DType::F32)?;
    let hash = checkpoint::fingerprint(&teacher.config, &weights)?;
    Ok(Stage::Ild(Ild::new(lm, hash, candidates, args.loss)?))
}

fn kd(args: &Args, teacher: &Checkpoint, device: &Device) -> Result<Stage> {
    let Some(folder) = &args.student else {
        return Err(Error::invalid("--stage kd needs --student"));
    };
    let student = Checkpoint::open(folder)?;
    let config = KdConfig {
        temperature: args.temperature,
        ce_weight: args.ce_weight,
    };
    let hash =
        checkpoint::fingerprint(&teacher.config, &teacher.weights(DType::F32, &Device::Cpu)?)?;
    Ok(Stage::Kd(Box::new(Kd::new(
        teacher.model(device, DType::F32)?,
        hash,
        &student.config,
        &student.weights(DType::F32, device)?,
        config,
    )?)))
}
