//! `zebroid train`: ILD, end-to-end or stepwise KD, preference optimisation.

use std::cell::RefCell;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use super::arg::data::{DataArgs, pairs};
use super::arg::device::DeviceArg;
use super::arg::hub::{DataFile, Model};
use super::arg::init::InitArgs;
use super::show::dashboard::Dashboard;
use super::show::{Progress, command_line, note, print_line};
use crate::checkpoint::{self, Checkpoint, Input};
use crate::convert::PlanOptions;
use crate::data::{Batches, Corpus, Tokenizer};
use crate::eval::kl;
use crate::mixer::LayerKind;
use crate::model::Lm;
use crate::pipeline::stage::compose::{Source, recorded};
use crate::pipeline::stage::dpo::DpoStage;
use crate::pipeline::stage::ild::{IldStage, IldTarget};
use crate::pipeline::stage::kd::{KdStage, stored_input};
use crate::pipeline::stage::training::{start_training, tell_step};
use crate::pipeline::{Base, CANDIDATES, Text};
use crate::train::stage::dpo::DpoConfig;
use crate::train::stage::ild::IldConfig;
use crate::train::stage::kd::KdConfig;
use crate::train::{
    FROZEN, Figures, RunOptions, Sources, StepMetrics, TrainConfig, TrainSettings, Training,
    Validation, partial_folder,
};
use crate::watch::{Quiet, Watch};
use crate::{Error, Result};

/// Train a hybrid. Interrupted runs go on when the same command is given again.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    stage: StageArgs,
}

#[derive(Debug, clap::Subcommand)]
enum StageArgs {
    /// Intermediate layer distillation: every layer towards the teacher's.
    Ild(Box<IldArgs>),
    /// Knowledge distillation: the next-token distribution towards the teacher's.
    Kd(KdArgs),
    /// Preference optimisation: chosen answers over rejected ones.
    Dpo(DpoArgs),
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    zebroid train ild --teacher ./teacher --data train.jsonl ./bank --kv-rank 16 --tokens 400000 --lr 2e-3\n  \
    zebroid train ild --teacher ./teacher --data train.jsonl ./bank --candidates mla:8,mla:16,mamba2 --tokens 400000\n  \
    zebroid train ild --teacher ./teacher --student ./hybrid --inputs joint --data train.jsonl ./aligned --tokens 400000")]
struct IldArgs {
    /// Llama checkpoint folder or Hugging Face id.
    #[arg(long)]
    teacher: Model,
    /// Align this hybrid, instead of training a bank.
    #[arg(long)]
    student: Option<Model>,
    /// Texts: JSON lines, a JSON list, parquet or .arrow with text, prompt and completion, messages or conversations (written by the checkpoint's
    /// chat template), or .txt (one text); .gz and .zst are unpacked. May be given again: texts are mixed by #weight=W behind their names, or
    /// all of them are read; #tokens=N is a text's beginning, #K/N every N-th line from the K-th. stories:SEED:COUNT is written by the
    /// program, hf://datasets/org/name[@revision]/FILE is a file of the Hugging Face hub and hf://datasets/org/name[/CONFIG/SPLIT] a split
    /// [train], manifest:FILE is what an earlier run learned from (its data.json).
    #[arg(long, value_name = "TEXT", required = true)]
    data: Vec<Text>,
    /// Folder of the result, a bank (a folder a candidate) or with --student a checkpoint; must not exist.
    out: PathBuf,
    #[command(flatten, next_help_heading = "ILD")]
    ild: IldConfig,
    #[command(flatten, next_help_heading = "Training")]
    train: TrainArgs,
    /// Kinds of layer to train side by side, as --layers spells them.
    #[arg(long, value_delimiter = ',', value_name = "KIND,KIND,..", default_values_t = CANDIDATES, help_heading = "Bank")]
    candidates: Vec<LayerKind>,
    /// Layers to train at a time, with the memory that they take: the result is that of all at once.
    #[arg(long, value_name = "COUNT", conflicts_with_all = ["only_layers", "pieces", "validation"], help_heading = "Memory")]
    layers_at_once: Option<NonZeroUsize>,
    /// Train these layers only; OUT is a piece, for --pieces (other processes or machines train the others).
    #[arg(long, value_delimiter = ',', value_name = "I,J,..", conflicts_with_all = ["pieces", "validation"], help_heading = "Memory")]
    only_layers: Option<Vec<usize>>,
    /// Train nothing: OUT is made of pieces that the same command has made with --only-layers.
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "PIECE,..",
        conflicts_with = "validation",
        help_heading = "Memory"
    )]
    pieces: Vec<PathBuf>,
    /// Sizes of the bank's candidates.
    #[command(flatten, next_help_heading = "Bank")]
    plan: PlanOptions,
    #[command(flatten)]
    init: InitArgs,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    zebroid train kd --teacher ./teacher --student ./hybrid --data train.jsonl ./distilled --tokens 1600000\n  \
    zebroid train kd --teacher-logits ./logits --student ./hybrid --data manifest:./logits/data.json ./distilled\n  \
    zebroid train kd --schedule stepwise --trained mixers --kl-weight 0.1 --ce-weight 1 --labels teacher \\\n    \
      --teacher ./teacher --student ./hybrid --data train.jsonl ./stepwise --epochs 1")]
struct KdArgs {
    /// Checkpoint folder or Hugging Face id of the teacher; beside --teacher-logits only --validation compares with it.
    #[arg(long, required_unless_present = "teacher_logits")]
    teacher: Option<Model>,
    /// Learn from what zebroid teach has written of a teacher on the same --data: the teacher itself is not needed.
    #[arg(long, value_name = "FOLDER")]
    teacher_logits: Option<PathBuf>,
    /// Hybrid to start from: checkpoint folder or Hugging Face id.
    #[arg(long)]
    student: Model,
    /// Texts: JSON lines, a JSON list, parquet or .arrow with text, prompt and completion, messages or conversations (written by the checkpoint's
    /// chat template), or .txt (one text); .gz and .zst are unpacked. May be given again: texts are mixed by #weight=W behind their names, or
    /// all of them are read; #tokens=N is a text's beginning, #K/N every N-th line from the K-th. stories:SEED:COUNT is written by the
    /// program, hf://datasets/org/name[@revision]/FILE is a file of the Hugging Face hub and hf://datasets/org/name[/CONFIG/SPLIT] a split
    /// [train], manifest:FILE is what an earlier run learned from (its data.json).
    #[arg(long, value_name = "TEXT", required = true)]
    data: Vec<Text>,
    /// Folder of the result, a checkpoint; must not exist.
    out: PathBuf,
    #[command(flatten, next_help_heading = "KD")]
    kd: KdConfig,
    #[command(flatten, next_help_heading = "Training")]
    train: TrainArgs,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  \
    zebroid train dpo --student ./distilled --data preferences.jsonl ./aligned --lr 5e-7 --beta 0.01")]
struct DpoArgs {
    /// Checkpoint folder or Hugging Face id to start from.
    #[arg(long)]
    student: Model,
    /// Pairs: JSON lines, a JSON list, parquet or .arrow of prompt, chosen and rejected, strings or messages; .gz and .zst are unpacked.
    /// hf://datasets/org/name[@revision]/FILE is a file of the Hugging Face hub.
    #[arg(long)]
    data: DataFile,
    /// Folder of the result, a checkpoint; must not exist.
    out: PathBuf,
    #[command(flatten, next_help_heading = "DPO")]
    dpo: DpoConfig,
    #[command(flatten, next_help_heading = "Training")]
    train: TrainArgs,
}

/// How long, how fast, in which portions, and how the run is kept.
#[derive(Debug, Clone, clap::Args)]
pub struct TrainArgs {
    #[command(flatten)]
    pub settings: TrainSettings,
    #[command(flatten)]
    pub data: DataArgs,
    /// Held-out text to measure the student on while it learns (KL to the teacher, and agreement).
    #[arg(long, value_name = "TEXT")]
    pub validation: Vec<Text>,
    /// Steps between these measurements.
    #[arg(long, default_value_t = 50)]
    pub eval_every: u64,
    /// Steps between saves.
    #[arg(long, default_value_t = 200)]
    pub save_every: u64,
    /// Saves to keep; one that is damaged is passed over for the one before.
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    pub keep_last: usize,
    /// The result is the student with the lowest KL on --validation, not the last one.
    #[arg(long, requires = "validation")]
    pub keep_best: bool,
    #[command(flatten)]
    pub device: DeviceArg,
    /// Replace OUT, and drop an unfinished run with other settings.
    #[arg(long)]
    pub force: bool,
    /// Print every step's metrics as a JSON line on standard output.
    #[arg(long)]
    pub json: bool,
    /// Show curves of the loss and of --validation on the whole terminal, where there is one.
    #[arg(long, conflicts_with = "json")]
    pub dashboard: bool,
}

/// A training command's run.
pub struct TrainRun<'a> {
    pub name: &'a str,
    pub config: &'a TrainConfig,
    pub out: &'a Path,
    /// Folder whose tokenizer files the result gets.
    pub tokenizer: &'a Path,
    /// What the student is compared with while it learns.
    pub teacher: Option<&'a Base>,
    pub sources: Sources,
}

impl TrainArgs {
    /// Settings are checked, and the output is this process's, before anything is read.
    pub fn claim(&self, out: &Path, inputs: &[&Path]) -> Result<(TrainConfig, checkpoint::Lock)> {
        let config = self.settings.settle()?;
        Ok((config, checkpoint::claim(out, self.force, inputs)?))
    }

    /// Runs a stage and says how it ended.
    pub fn finish(&self, run: TrainRun, training: Training, watch: Progress) -> Result<()> {
        let TrainRun {
            config,
            out,
            mut sources,
            ..
        } = run;
        let held_out = match (&self.validation[..], run.teacher) {
            ([], _) => None,
            (texts, Some(base)) => {
                let corpus = self.data.held_out(texts, &base.tokenizer, &watch)?;
                corpus.check(1, config.seq_len)?;
                let text = Text::input("validation", texts, &corpus);
                sources.inputs.push(text);
                Some((base.lm()?, corpus))
            }
            (_, None) => {
                return Err(Error::invalid(
                    "--validation compares with a teacher, which this stage has not (beside --teacher-logits: name it with --teacher)",
                ));
            }
        };
        let measure = held_out.as_ref().map(|(teacher, corpus)| {
            move |student: &Lm| -> Result<Figures> {
                let (rows, len) = (config.batch_size, config.seq_len);
                // A step that is not saved yet is not given up for its measurement.
                let quiet = Quiet::default();
                let found = kl::evaluate(teacher, student, corpus, rows, len, &quiet)?;
                Ok(found.figures())
            }
        });
        let dashboard = self.dashboard.then(Dashboard::open).flatten();
        let shown: &dyn Watch = match &dashboard {
            Some(dashboard) => dashboard,
            None => &watch,
        };
        start_training(shown, run.name, config, &training, out)?;
        // Whoever reads the steps may leave, and the disk that they go to may fill: the run is saved then.
        let printed = RefCell::new(Ok(()));
        let mut observe = |metrics: &StepMetrics, _: u64| {
            tell_step(shown, metrics);
            dashboard.iter().for_each(|shown| shown.step(metrics));
            if self.json && printed.borrow().is_ok() {
                *printed.borrow_mut() = print_line(metrics);
            }
        };
        let metrics = training.carry_out(
            config,
            RunOptions {
                out: out.to_path_buf(),
                tokenizer: run.tokenizer.to_owned(),
                sources,
                force: self.force,
                save_every: self.save_every,
                keep_last: self.keep_last,
                validation: measure.as_ref().map(|measure| Validation {
                    every: self.eval_every,
                    keep_best: self.keep_best,
                    measure,
                }),
                stop: &|| shown.stop() || printed.borrow().is_err(),
                observe: &mut observe,
            },
        );
        let metrics = match (metrics, printed.into_inner()) {
            (Err(saved @ Error::Interrupted(_)), Err(unprinted)) => {
                note(saved);
                Err(unprinted)
            }
            // Asked to stop, it has: all is saved.
            (Err(saved @ Error::Interrupted(_)), Ok(())) => {
                drop((dashboard, watch));
                note(saved);
                note(format_args!("  {}", command_line()));
                return Ok(());
            }
            (metrics, printed) => metrics.and_then(|metrics| printed.map(|()| metrics)),
        };
        // The bar or the dashboard ends before the last words.
        drop((dashboard, watch));
        if let Some(last) = metrics?.last() {
            note(format_args!(
                "{} steps, {} tokens, last loss {:.4}",
                last.step, last.tokens, last.loss
            ));
        }
        note(format_args!("written to {}", out.display()));
        Ok(())
    }
}

pub fn run(args: Args) -> anyhow::Result<()> {
    match args.stage {
        StageArgs::Ild(args) => ild(&args),
        StageArgs::Kd(args) => kd(&args),
        StageArgs::Dpo(args) => dpo(&args),
    }?;
    Ok(())
}

/// Teacher and text; what cannot work is refused before the initialisation, which takes its text from the same data.
fn open(
    args: &TrainArgs,
    config: &TrainConfig,
    teacher: &Path,
    texts: &[Text],
    watch: &dyn Watch,
) -> Result<(Base, Corpus)> {
    let base = Base::open(teacher, args.device.place()?)?;
    let corpus = corpus(args, config, &base.tokenizer, texts, watch)?;
    Ok((base, corpus))
}

/// The text, if it fills the run's batches.
fn corpus(
    args: &TrainArgs,
    config: &TrainConfig,
    tokenizer: &Tokenizer,
    texts: &[Text],
    watch: &dyn Watch,
) -> Result<Corpus> {
    let corpus = args.data.corpus(texts, tokenizer, watch)?;
    corpus.check(config.batch_size, config.seq_len)?;
    config.steps(corpus.windows(config.seq_len))?;
    Ok(corpus)
}

fn ild(args: &IldArgs) -> Result<()> {
    let student = args.student.iter().map(Model::named);
    let models = student.chain([args.teacher.named()]);
    let inputs: Vec<&Path> = models
        .chain(args.data.iter().filter_map(Text::source))
        .collect();
    let (config, _lock) = args.train.claim(&args.out, &inputs)?;
    let watch = Progress::default();
    let teacher = args.teacher.fetch()?;
    let student = args.student.as_ref().map(Model::fetch).transpose()?;
    let (base, text) = open(&args.train, &config, &teacher, &args.data, &watch)?;
    let stage = IldStage {
        target: match student {
            Some(_) => IldTarget::Hybrid,
            None => IldTarget::Bank,
        },
        candidates: args.candidates.clone(),
        objective: args.ild,
        train: args.train.settings.clone(),
        layers_at_once: args.layers_at_once,
    };
    let (students, record) = match &student {
        Some(student) => {
            let student = Checkpoint::open(student)?;
            (vec![(None, student.parts()?)], student.provenance()?)
        }
        None => {
            let calibration = args.init.calibration(&base, &args.data, &watch)?;
            let init = args.init.init(&calibration, false, config.seed);
            let born = args.init.birth(&init, &args.data);
            let record = recorded(&base, &args.plan, &Source::Teacher, born)?;
            (stage.bank(&base, &args.plan, &init, &watch)?, record)
        }
    };
    let training = match (&args.only_layers, args.pieces.as_slice()) {
        (Some(layers), _) => stage.align(&base, &students, Some(layers), &text)?.into(),
        (None, []) => stage.training(&base, students, &text)?,
        (None, pieces) => Training::Joined {
            stage: Box::new(stage.align(&base, &students, Some(&[]), &text)?),
            pieces: pieces.to_vec(),
        },
    };
    let run = TrainRun {
        name: "ild",
        config: &config,
        out: &args.out,
        tokenizer: &teacher,
        teacher: Some(&base),
        sources: Sources {
            record,
            inputs: vec![base.input()?, Text::input("data", &args.data, &text)],
        },
    };
    args.train.finish(run, training, watch)
}

fn kd(args: &KdArgs) -> Result<()> {
    let models = [Some(&args.student), args.teacher.as_ref()];
    let models = models.into_iter().flatten().map(Model::named);
    let others = args.teacher_logits.iter().map(PathBuf::as_path);
    let texts = args.data.iter().filter_map(Text::source);
    let inputs: Vec<&Path> = models.chain(others).chain(texts).collect();
    let (config, _lock) = args.train.claim(&args.out, &inputs)?;
    let watch = Progress::default();
    let student = Checkpoint::open(&args.student.fetch()?)?;
    let teacher = args.teacher.as_ref().map(Model::fetch).transpose()?;
    let place = args.train.device.place()?;
    let base = teacher
        .as_ref()
        .map(|folder| Base::open(folder, place.clone()));
    let base = base.transpose()?;
    // The result's tokenizer, which the text is read with.
    let folder = teacher.as_ref().unwrap_or(&student.folder);
    let tokenizer = match &base {
        Some(base) => base.tokenizer.clone(),
        None => Tokenizer::open(folder)?,
    };
    tokenizer.check(student.config.vocab_size)?;
    let text = corpus(&args.train, &config, &tokenizer, &args.data, &watch)?;
    let stage = KdStage {
        objective: args.kd,
        train: args.train.settings.clone(),
        ..KdStage::default()
    };
    let (stage, input) = match (&args.teacher_logits, &base) {
        (Some(logits), _) => {
            let stage = stage.distil_stored(logits, &tokenizer, &student, &[], &text, &place)?;
            (stage, stored_input(logits)?)
        }
        (None, Some(base)) => (stage.distil(base, &student, &[], &text)?, base.input()?),
        (None, None) => return Err(Error::invalid("no teacher is named")),
    };
    let run = TrainRun {
        name: "kd",
        config: &config,
        out: &args.out,
        tokenizer: folder,
        teacher: base.as_ref(),
        sources: Sources {
            record: student.provenance()?,
            inputs: vec![input, Text::input("data", &args.data, &text)],
        },
    };
    args.train.finish(run, stage.into(), watch)
}

fn dpo(args: &DpoArgs) -> Result<()> {
    args.train.data.check_unused()?;
    let inputs = [args.student.named(), args.data.named()];
    let (config, _lock) = args.train.claim(&args.out, &inputs)?;
    let (student, data) = (args.student.fetch()?, args.data.fetch()?);
    let watch = Progress::default();
    let checkpoint = Checkpoint::open(&student)?;
    let tokenizer = Tokenizer::open(&student)?;
    tokenizer.check(checkpoint.config.vocab_size)?;
    let pairs = pairs(&data, args.dpo.lengths(), &tokenizer, &watch)?;
    pairs.check(config.batch_size, config.seq_len)?;
    let stage = DpoStage {
        objective: args.dpo,
        train: args.train.settings.clone(),
    };
    let stored = partial_folder(&args.out).join(FROZEN);
    let place = args.train.device.place()?;
    let stage = stage.align(&checkpoint, &pairs, &stored, &place, &watch)?;
    let run = TrainRun {
        name: "dpo",
        config: &config,
        out: &args.out,
        tokenizer: &student,
        teacher: None,
        sources: Sources {
            record: checkpoint.provenance()?,
            inputs: vec![Input::file("data", &data, Some(pairs.hash()))],
        },
    };
    args.train.finish(run, stage.into(), watch)
}
