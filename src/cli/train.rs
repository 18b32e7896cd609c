//! `zebroid train`: ILD, end-to-end or stepwise KD, preference optimisation.

use std::cell::RefCell;
use std::path::{Path, PathBuf};

use candle_core::DType;

use super::device::DeviceArg;
use super::init::InitArgs;
use super::output::{Progress, note, print_line};
use crate::checkpoint::{self, Checkpoint};
use crate::convert::PlanOptions;
use crate::data::{Batches, Corpus, Packing, Preferences, Tokenizer};
use crate::eval::kl;
use crate::mixer::LayerKind;
use crate::model::Lm;
use crate::pipeline::{Base, CANDIDATES, start_training, tell_step};
use crate::train::stage::dpo::{Dpo, DpoConfig};
use crate::train::stage::ild::IldConfig;
use crate::train::stage::kd::KdConfig;
use crate::train::{
    Figures, RunOptions, Stage, StepMetrics, TrainConfig, Validation, partial_folder, train,
};
use crate::watch::{Quiet, Watch};
use crate::{Error, Result};

/// Train a hybrid. Interrupted runs go on when the same command is given again.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    zebroid train --stage ild --teacher ./teacher --data train.jsonl ./bank --kv-rank 16 --tokens 400000 --lr 2e-3\n  \
    zebroid train --stage ild --teacher ./teacher --student ./hybrid --inputs joint --data train.jsonl ./aligned --tokens 400000\n  \
    zebroid train --stage kd --teacher ./teacher --student ./hybrid --data train.jsonl ./distilled --tokens 1600000\n  \
    zebroid train --stage kd --schedule stepwise --trained mixers --kl-weight 0.1 --ce-weight 1 --labels teacher \\\n    \
      --teacher ./teacher --student ./hybrid --data train.jsonl ./stepwise --epochs 1\n  \
    zebroid train --stage dpo --student ./distilled --data preferences.jsonl ./aligned --lr 5e-7 --beta 0.01")]
pub struct Args {
    #[arg(long, value_enum)]
    stage: StageName,
    /// Llama checkpoint folder (ild, kd).
    #[arg(long, required_if_eq_any([("stage", "ild"), ("stage", "kd")]))]
    teacher: Option<PathBuf>,
    /// Hybrid checkpoint folder to start from (kd, dpo; ild: align this hybrid, instead of a bank).
    #[arg(long, required_if_eq_any([("stage", "kd"), ("stage", "dpo")]))]
    student: Option<PathBuf>,
    /// JSON lines: text, or prompt and completion (dpo: prompt, chosen and rejected).
    #[arg(long)]
    data: PathBuf,
    /// Folder of the result, a checkpoint (ild without --student: a bank, a folder a candidate); must not exist.
    out: PathBuf,
    #[command(flatten, next_help_heading = "ILD")]
    ild: IldConfig,
    #[command(flatten, next_help_heading = "KD")]
    kd: KdConfig,
    #[command(flatten, next_help_heading = "DPO")]
    dpo: DpoConfig,
    #[command(flatten, next_help_heading = "Training")]
    train: TrainArgs,
    /// Kinds of layer to train side by side, as --layers spells them (ild without --student).
    #[arg(long, value_delimiter = ',', value_name = "KIND,KIND,..", default_values_t = CANDIDATES, help_heading = "Bank")]
    candidates: Vec<LayerKind>,
    /// Sizes of the bank's candidates.
    #[command(flatten, next_help_heading = "Bank")]
    plan: PlanOptions,
    #[command(flatten)]
    init: InitArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum StageName {
    /// Intermediate layer distillation: every layer towards the teacher's.
    Ild,
    /// Knowledge distillation: the next-token distribution towards the teacher's.
    Kd,
    /// Preference optimisation: chosen answers over rejected ones.
    Dpo,
}

/// How long, how fast, in which portions, and how the run is kept.
#[derive(Debug, Clone, clap::Args)]
pub struct TrainArgs {
    #[command(flatten)]
    pub config: TrainConfig,
    /// documents: attention, convolution and state stop at document borders; stream: they do not.
    #[arg(long, value_enum, default_value = "documents")]
    pub packing: Packing,
    /// Held-out text to measure the student on while it learns (KL to the teacher, and agreement).
    #[arg(long)]
    pub validation: Option<PathBuf>,
    /// Steps between these measurements.
    #[arg(long, default_value_t = 50)]
    pub eval_every: u64,
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
    /// Runs a stage.
    pub fn run(
        &self,
        name: &str,
        stage: &mut Stage,
        data: &dyn Batches,
        out: &Path,
        tokenizer: &Path,
        teacher: Option<&Base>,
        watch: &dyn Watch,
    ) -> Result<Vec<StepMetrics>> {
        let held_out = match (&self.validation, teacher) {
            (None, _) => None,
            (Some(path), Some(base)) => {
                let corpus = Corpus::load(path, &base.tokenizer, Packing::Documents)?;
                corpus.check(1, self.config.seq_len)?;
                Some((base.lm()?, corpus))
            }
            (Some(_), None) => {
                return Err(Error::invalid(
                    "--validation compares with a teacher, which this stage has not",
                ));
            }
        };
        let measure = held_out.as_ref().map(|(teacher, corpus)| {
            move |student: &Lm| -> Result<Figures> {
                let (rows, len) = (self.config.batch_size, self.config.seq_len);
                // A step that is not saved yet is not given up for its measurement.
                let quiet = Quiet::default();
                let found = kl::evaluate(teacher, student, corpus, rows, len, &quiet)?;
                Ok(vec![
                    ("eval_kl".into(), found.kl),
                    ("eval_ce".into(), found.ce_student),
                    ("eval_agreement".into(), found.agreement),
                ])
            }
        });
        start_training(watch, name, &self.config, data, out)?;
        // Whoever reads the steps may leave, and the disk that they go to may fill: the run is saved then.
        let printed = RefCell::new(Ok(()));
        let mut observe = |metrics: &StepMetrics, _: u64| {
            tell_step(watch, metrics);
            if self.json && printed.borrow().is_ok() {
                *printed.borrow_mut() = print_line(metrics);
            }
        };
        let metrics = train(
            stage,
            data,
            &self.config,
            RunOptions {
                out: out.to_owned(),
                tokenizer: tokenizer.to_owned(),
                force: self.force,
                save_every: self.save_every,
                validation: measure.as_ref().map(|measure| Validation {
                    every: self.eval_every,
                    measure,
                }),
                stop: &|| watch.stop() || printed.borrow().is_err(),
                observe: &mut observe,
            },
        );
        match (metrics, printed.into_inner()) {
            (Err(saved @ Error::Interrupted(_)), Err(unprinted)) => {
                note(saved);
                Err(unprinted)
            }
            (metrics, printed) => metrics.and_then(|metrics| printed.map(|()| metrics)),
        }
    }
}

pub fn run(args: Args) -> anyhow::Result<()> {
    args.train.config.validate()?;
    let models = [&args.teacher, &args.student].into_iter().flatten();
    let inputs: Vec<&Path> = models.chain([&args.data]).map(|p| p.as_path()).collect();
    let _lock = checkpoint::claim(&args.out, args.train.force, &inputs)?;
    let watch = Progress::default();
    let needed = |path: &Option<PathBuf>, flag: &str| {
        let path = path.clone();
        path.ok_or_else(|| Error::invalid(format!("this stage needs {flag}")))
    };
    let (name, mut stage, data, tokenizer, base): (_, _, Box<dyn Batches>, _, _) = match args.stage
    {
        StageName::Dpo => {
            let student = needed(&args.student, "--student")?;
            let (stage, pairs) = dpo(&args, &student, &watch)?;
            ("dpo", stage, Box::new(pairs), student, None)
        }
        StageName::Ild | StageName::Kd => {
            let teacher = needed(&args.teacher, "--teacher")?;
            let base = Base::open(&teacher, args.train.device.get()?)?;
            let corpus = Corpus::load(&args.data, &base.tokenizer, args.train.packing)?;
            // Before the initialisation, which takes its text from the same data.
            corpus.check(args.train.config.batch_size, args.train.config.seq_len)?;
            args.train
                .config
                .steps(corpus.windows(args.train.config.seq_len))?;
            let student = args.student.as_deref().map(Checkpoint::open).transpose()?;
            let (name, stage) = match (args.stage, student) {
                (StageName::Ild, None) => ("ild", bank(&args, &base, &watch)?),
                (StageName::Ild, Some(student)) => ("ild", base.ild(&student, args.ild)?),
                (_, Some(student)) => ("kd", base.kd(&student, &[], args.kd)?),
                (_, None) => return Err(Error::invalid("this stage needs --student").into()),
            };
            (name, stage, Box::new(corpus), teacher, Some(base))
        }
    };
    let run = args.train.run(
        name,
        &mut stage,
        &*data,
        &args.out,
        &tokenizer,
        base.as_ref(),
        &watch,
    );
    drop(watch);
    if let Some(last) = run?.last() {
        note(format_args!(
            "{} steps, {} tokens, last loss {:.4}",
            last.step, last.tokens, last.loss
        ));
    }
    note(format_args!("written to {}", args.out.display()));
    Ok(())
}

/// All candidates for every layer, born from the teacher.
fn bank(args: &Args, base: &Base, watch: &dyn Watch) -> Result<Stage> {
    let calibration = (args.init).calibration(base, Some(&args.data), watch)?;
    let init = args.init.init(&calibration, false, args.train.config.seed);
    base.bank(&args.plan, &args.candidates, &init, args.ild, watch)
}

fn dpo(args: &Args, student: &Path, watch: &dyn Watch) -> Result<(Stage, Preferences)> {
    let checkpoint = Checkpoint::open(student)?;
    let tokenizer = Tokenizer::open(student)?;
    tokenizer.check(checkpoint.config.vocab_size)?;
    let pairs = Preferences::load(
        &args.data,
        &tokenizer,
        args.dpo.max_prompt,
        args.dpo.max_length,
    )?;
    let train = &args.train.config;
    pairs.check(train.batch_size, train.seq_len)?;
    let weights = checkpoint.weights(DType::F32, &args.train.device.get()?)?;
    let stored = partial_folder(&args.out).join("reference.safetensors");
    let dpo = Dpo::new(
        &checkpoint.config,
        &weights,
        &pairs,
        args.dpo,
        &stored,
        watch,
    )?;
    Ok((Stage::Dpo(dpo), pairs))
}
