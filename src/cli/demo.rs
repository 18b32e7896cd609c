//! `zebroid demo`: the whole pipeline on the embedded teacher, offline, in minutes.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::{DType, Device};

use super::compose::open_bank;
use super::device::DeviceArg;
use super::init::calibration_batch;
use super::output::{progress, show_step, table, thousands};
use super::plan::as_table;
use super::{embedded, interrupt};
use crate::checkpoint::{self, Checkpoint, Format};
use crate::convert::{Composed, Init, LayerKind, PlanOptions, compose, compose_from_bank, plan};
use crate::data::stories::{self, Story, StoryGenerator};
use crate::data::{Batch, Corpus, Packing, Tokenizer};
use crate::eval::kl::{self, KlReport};
use crate::eval::recall::{RecallReport, recall};
use crate::eval::report::{Report, Series};
use crate::generate::{Engine, Generation, SamplingParams};
use crate::model::ModelConfig;
use crate::train::stage::ild::{Ild, IldLoss};
use crate::train::stage::kd::{Kd, KdConfig};
use crate::train::{RunOptions, Stage, StepMetrics, TrainConfig, train};
use crate::weights::Weights;
use crate::{Error, Result};

/// Plan, compose, ILD bank, hybrid, KD, evaluation, side-by-side text, HTML report.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  zebroid demo\n  zebroid demo --out /tmp/demo --force\n\n\
    An interrupted demo goes on when it is started again."
)]
pub struct Args {
    /// Folder for everything the demo makes.
    #[arg(long, default_value = "runs/demo")]
    out: PathBuf,
    /// Tokens of the ILD bank.
    #[arg(long, default_value_t = 300_000)]
    ild_tokens: u64,
    /// Tokens of the distillation.
    #[arg(long, default_value_t = 1_600_000)]
    kd_tokens: u64,
    /// Layers that become MLA.
    #[arg(long, value_delimiter = ',', default_value = "1,2")]
    mla: Vec<usize>,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    device: DeviceArg,
    /// Start over if OUT holds a finished demo.
    #[arg(long)]
    force: bool,
}

const SEQ_LEN: usize = 256;
const BATCH: usize = 16;
const CALIBRATION_TOKENS: usize = 16_384;
/// The teacher learned from seed 1.
const TRAIN_SEED: u64 = 2;
const HELD_OUT_SEED: u64 = 3;
const TRAIN_STORIES: usize = 20_000;
const HELD_OUT_STORIES: usize = 400;
const REPORT: &str = "report.html";

pub fn run(args: Args) -> anyhow::Result<()> {
    interrupt::install();
    let started = Instant::now();
    let demo = Demo::open(&args)?;
    print!("{}", as_table(&demo.teacher.config, &demo.student));

    let weights = demo.teacher.weights(DType::F32, &Device::Cpu)?;
    let reference = demo.compose(
        &weights,
        &demo.student,
        &Init::Reference { seed: args.seed },
    )?;
    let reference = demo.evaluate(&demo.lm(reference)?)?;
    let refined = demo.compose(&weights, &demo.student, &demo.refined(true))?;
    let untrained = demo.evaluate(&demo.lm(refined)?)?;
    let ild = demo.ild(&args, &weights)?;
    let hybrid = compose_from_bank(&weights, &demo.student, &open_bank(&demo.path("bank"))?)?;
    let (out, source) = (demo.path("hybrid"), Some(demo.teacher.folder.as_path()));
    if !out.exists() {
        checkpoint::save(
            &out,
            Format::Zebroid,
            &hybrid.config,
            &hybrid.tensors,
            source,
            false,
        )?;
    }
    let after_ild = demo.evaluate(&demo.lm(hybrid)?)?;
    let kd = demo.kd(&args, &weights)?;
    let distilled = Checkpoint::open(&demo.path("distilled"))?.model(&demo.device, DType::F32)?;
    let after_kd = demo.evaluate(&distilled)?;
    let teacher = demo.teacher.model(&demo.device, DType::F32)?;
    let recalls = [
        recall(&teacher, &demo.tokenizer, &demo.held_out)?,
        recall(&distilled, &demo.tokenizer, &demo.held_out)?,
    ];
    let texts = [demo.tell(teacher)?, demo.tell(distilled)?];
    let results = Results {
        kv_ratio: demo.student.kv_ratio(&demo.teacher.config),
        stages: [
            ("untrained, as published", reference),
            ("untrained, refined", untrained),
            ("after ILD", after_ild),
            ("after KD", after_kd),
        ],
        recalls,
        texts,
        ild,
        kd,
        seconds: started.elapsed().as_secs_f64(),
    };
    print!("{}", results.to_text());
    results.report(&demo).write(&demo.path(REPORT))?;
    println!("\nreport: {}", demo.path(REPORT).display());
    Ok(())
}

struct Demo {
    out: PathBuf,
    device: Device,
    teacher: Checkpoint,
    student: ModelConfig,
    tokenizer: Tokenizer,
    train: Corpus,
    validation: Corpus,
    held_out: Vec<Story>,
    /// What the initialisation is fitted to.
    calibration: Batch,
}

impl Demo {
    fn open(args: &Args) -> Result<Self> {
        let out = args.out.clone();
        if out.join(REPORT).exists() {
            if !args.force {
                return Err(Error::file(
                    &out,
                    "holds a finished demo; start over with --force, or choose --out",
                ));
            }
            fs::remove_dir_all(&out).map_err(Error::io("cannot remove", &out))?;
        }
        fs::create_dir_all(&out).map_err(Error::io("cannot create", &out))?;
        let folder = out.join("teacher");
        if !folder.exists() {
            embedded::write_teacher(&folder)?;
        }
        let teacher = Checkpoint::open(&folder)?;
        let tokenizer = Tokenizer::open(&folder)?;
        let kinds = PlanOptions::place(teacher.config.layers.len(), &args.mla, &[])?;
        let student = plan(&teacher.config, &embedded::plan_options(kinds))?;
        stories::write_jsonl(&out.join("train.jsonl"), TRAIN_SEED, TRAIN_STORIES)?;
        stories::write_jsonl(
            &out.join("validation.jsonl"),
            HELD_OUT_SEED,
            HELD_OUT_STORIES,
        )?;
        let train = Corpus::load(&out.join("train.jsonl"), &tokenizer, Packing::Documents)?;
        Ok(Self {
            device: args.device.get()?,
            validation: Corpus::load(
                &out.join("validation.jsonl"),
                &tokenizer,
                Packing::Documents,
            )?,
            held_out: StoryGenerator::new(HELD_OUT_SEED)
                .take(HELD_OUT_STORIES)
                .collect(),
            calibration: calibration_batch(&train, CALIBRATION_TOKENS)?,
            train,
            teacher,
            student,
            tokenizer,
            out,
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.out.join(name)
    }

    fn refined(&self, own_inputs: bool) -> Init<'_> {
        Init::Refined {
            text: &self.calibration,
            own_inputs,
        }
    }

    fn compose(&self, weights: &Weights, student: &ModelConfig, init: &Init) -> Result<Composed> {
        compose(&self.teacher.config, weights, student, init)
    }

    fn lm(&self, composed: Composed) -> Result<crate::model::Lm> {
        let weights = Weights::new(composed.tensors).to_device(&self.device, DType::F32)?;
        crate::model::Lm::new(&composed.config, &weights)
    }

    fn evaluate(&self, student: &crate::model::Lm) -> Result<KlReport> {
        let teacher = self.teacher.model(&self.device, DType::F32)?;
        kl::evaluate(
            &teacher,
            student,
            &self.validation,
            BATCH,
            SEQ_LEN,
            &mut |_, _| {},
        )
    }

    fn config(&self, tokens: u64, lr: f64, seed: u64) -> TrainConfig {
        TrainConfig {
            steps: (tokens / (BATCH * SEQ_LEN) as u64).max(1),
            batch_size: BATCH,
            seq_len: SEQ_LEN,
            lr,
            warmup: 0.05,
            seed,
            ..TrainConfig::default()
        }
    }

    /// Trains a stage, or reads the metrics of one that an earlier start finished.
    fn stage(
        &self,
        name: &str,
        config: &TrainConfig,
        stage: impl FnOnce() -> Result<Stage>,
    ) -> Result<Vec<StepMetrics>> {
        let out = self.path(name);
        if out.exists() {
            return read_metrics(&out.join("metrics.jsonl"));
        }
        let bar = progress(name, config.steps);
        let metrics = train(
            &mut stage()?,
            &self.train,
            config,
            RunOptions {
                out,
                tokenizer: self.teacher.folder.clone(),
                force: false,
                save_every: 100,
                stop: &interrupt::asked,
                observe: &mut |metrics| show_step(&bar, metrics),
            },
        );
        bar.finish();
        metrics
    }

    fn ild(&self, args: &Args, weights: &Weights) -> Result<Vec<StepMetrics>> {
        let config = self.config(args.ild_tokens, 6e-3, args.seed);
        self.stage("bank", &config, || {
            let layers = self.student.layers.len();
            let mut candidates = Vec::new();
            for (name, kind) in [("mla", LayerKind::Mla), ("mamba2", LayerKind::Mamba2)] {
                let config = plan(
                    &self.teacher.config,
                    &embedded::plan_options(vec![kind; layers]),
                )?;
                let born = self.compose(weights, &config, &self.refined(false))?;
                let weights = Weights::new(born.tensors).to_device(&self.device, DType::F32)?;
                candidates.push((name.to_owned(), born.config, weights));
            }
            let hash = checkpoint::fingerprint(&self.teacher.config, weights)?;
            let teacher = self.teacher.model(&self.device, DType::F32)?;
            Ok(Stage::Ild(Ild::new(
                teacher,
                hash,
                candidates,
                IldLoss::RelativeMse,
            )?))
        })
    }

    fn kd(&self, args: &Args, weights: &Weights) -> Result<Vec<StepMetrics>> {
        let config = self.config(args.kd_tokens, 3e-3, args.seed + 1);
        self.stage("distilled", &config, || {
            let student = Checkpoint::open(&self.path("hybrid"))?;
            let hash = checkpoint::fingerprint(&self.teacher.config, weights)?;
            Ok(Stage::Kd(Box::new(Kd::new(
                self.teacher.model(&self.device, DType::F32)?,
                hash,
                &student.config,
                &student.weights(DType::F32, &self.device)?,
                KdConfig::default(),
            )?)))
        })
    }

    /// A story from the beginning that all models are given.
    fn tell(&self, lm: crate::model::Lm) -> Result<Generation> {
        let story = &self.held_out[0].text;
        let sentences: Vec<&str> = story.split_inclusive(". ").take(3).collect();
        let params = SamplingParams {
            max_tokens: 80,
            ..SamplingParams::default()
        };
        let prompt = sentences.concat();
        let engine = Engine::new(lm, self.tokenizer.clone())?;
        let mut generation = engine.generate(prompt.trim_end(), &params, &mut |_| true)?;
        generation.text = format!("{}{}", prompt.trim_end(), generation.text);
        Ok(generation)
    }
}

fn read_metrics(path: &Path) -> Result<Vec<StepMetrics>> {
    let text = fs::read_to_string(path).map_err(Error::io("cannot read", path))?;
    text.lines()
        .map(|line| serde_json::from_str(line).map_err(|e| Error::file(path, e)))
        .collect()
}

struct Results {
    kv_ratio: f64,
    stages: [(&'static str, KlReport); 4],
    /// Teacher, hybrid.
    recalls: [RecallReport; 2],
    /// Teacher, hybrid.
    texts: [Generation; 2],
    ild: Vec<StepMetrics>,
    kd: Vec<StepMetrics>,
    seconds: f64,
}

impl Results {
    fn rows(&self) -> Vec<Vec<String>> {
        let [(_, reference), (_, untrained), _, (_, last)] = &self.stages;
        let [teacher, hybrid] = &self.recalls;
        let speed = |m: &[StepMetrics]| {
            m.last()
                .map_or("-".into(), |m| thousands(m.tokens_per_s as usize))
        };
        let percent = |x: f64| format!("{:.2} %", 100.0 * x);
        let row =
            |name: &str, teacher: String, hybrid: String| vec![name.to_owned(), teacher, hybrid];
        vec![
            row("KV ratio", percent(1.0), percent(self.kv_ratio)),
            row(
                "KL to the teacher (nats/token)",
                "0".into(),
                format!("{:.4}", last.kl),
            ),
            row(
                "  untrained: as published, refined",
                String::new(),
                format!("{:.3}, {:.3}", reference.kl, untrained.kl),
            ),
            row("top-1 agreement", percent(1.0), percent(last.agreement)),
            row(
                "perplexity (held-out)",
                format!("{:.3}", last.ce_teacher.exp()),
                format!("{:.3}", last.ce_student.exp()),
            ),
            row(
                "perplexity retention",
                percent(1.0),
                percent(last.perplexity_retention()),
            ),
            row(
                "recall accuracy",
                percent(teacher.accuracy),
                percent(hybrid.accuracy),
            ),
            row("ILD tokens/s", String::new(), speed(&self.ild)),
            row("KD tokens/s", String::new(), speed(&self.kd)),
            row(
                "decoding tokens/s",
                thousands(self.texts[0].decode_tokens_per_s as usize),
                thousands(self.texts[1].decode_tokens_per_s as usize),
            ),
            row(
                "seconds in all",
                String::new(),
                format!("{:.0}", self.seconds),
            ),
        ]
    }

    fn to_text(&self) -> String {
        let [teacher, hybrid] = &self.texts;
        format!(
            "\nteacher: {}\n\nhybrid:  {}\n\n{}",
            teacher.text,
            hybrid.text,
            table(&["", "teacher", "hybrid"], &self.rows())
        )
    }

    fn report(&self, demo: &Demo) -> Report {
        let mut report = Report::new("zebroid demo");
        report
            .paragraph("A small Llama, embedded in the program, turned into a hybrid of MLA and Mamba2 layers.")
            .table(&["", "teacher", "hybrid"], &self.rows())
            .heading("Plan")
            .code("layers", &as_table(&demo.teacher.config, &demo.student))
            .heading("Training")
            .line_plot("Distillation", "tokens", "KL (nats/token)", &[curve("KD", &self.kd, |m| m.loss)], true);
        let bank: Vec<Series> = ["mla", "mamba2"]
            .map(|name| {
                curve(name, &self.ild, |m| {
                    m.terms[name].as_f64().unwrap_or(f64::NAN)
                })
            })
            .into();
        report.line_plot("ILD bank", "tokens", "sum of relative errors", &bank, true);
        let layers = demo.student.layers.len();
        let last = self.ild.last();
        let errors = ["mla", "mamba2"].map(|name| {
            let of = |i: usize| {
                last.and_then(|m| m.terms[&format!("{name}.{i}")].as_f64())
                    .unwrap_or(f64::NAN)
            };
            let points = (0..layers).map(|i| (i as f64, of(i))).collect();
            Series {
                name: name.into(),
                points,
            }
        });
        report.line_plot(
            "Error of each layer after ILD",
            "layer",
            "relative error",
            &errors,
            false,
        );
        let stages = self.stages.iter().map(|(name, r)| {
            vec![
                (*name).to_owned(),
                format!("{:.4}", r.kl),
                format!("{:.4}", r.ce_student),
                format!("{:.2} %", 100.0 * r.agreement),
                format!("{:.2} %", 100.0 * r.perplexity_retention()),
            ]
        });
        report
            .table(
                &[
                    "stage",
                    "KL",
                    "cross-entropy",
                    "agreement",
                    "perplexity retention",
                ],
                &stages.collect::<Vec<_>>(),
            )
            .heading("The same beginning, continued by both")
            .side_by_side(&[
                ("teacher", &self.texts[0].text),
                ("hybrid", &self.texts[1].text),
            ]);
        report
    }
}

fn curve(name: &str, metrics: &[StepMetrics], of: impl Fn(&StepMetrics) -> f64) -> Series {
    Series {
        name: name.into(),
        points: metrics.iter().map(|m| (m.tokens as f64, of(m))).collect(),
    }
}
