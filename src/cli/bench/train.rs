//! `zebroid bench train`: tokens a second, peak memory, time per phase.

use std::time::Instant;

use anyhow::ensure;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::{median, use_threads};
use crate::checkpoint::Checkpoint;
use crate::cli::arg::device::DeviceArg;
use crate::cli::arg::hub::Model;
use crate::cli::positive;
use crate::cli::show::{Progress, bytes, print, print_json, table, thousands};
use crate::convert::{Init, PlanOptions, compose, plan};
use crate::data::{Corpus, Packing};
use crate::mixer::Windows;
use crate::op::runtime::{OWN, free_memory, peak_memory};
use crate::pipeline::need::Source;
use crate::train::cost::{IldSizes, Learner, Memory, StepSizes};
use crate::train::optimizer::GaloreConfig;
use crate::train::stage::ild::{Ild, IldConfig};
use crate::train::stage::kd::{Kd, KdConfig, Trained};
use crate::train::teacher::Teacher;
use crate::train::{ClipBy, OptimizerName, Stage, TrainSettings, check_batch, take_step};
use crate::watch::Watch;
use crate::weights::Precision;

/// Steps of KD, or of ILD, on random tokens.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  \
    zebroid bench train ./teacher --mla 2 --kv-rank 16 --rope-dim 8 --batch-size 16 --seq-len 256 --threads 2")]
pub struct Args {
    /// Llama checkpoint folder or Hugging Face id.
    teacher: Model,
    #[command(flatten)]
    plan: PlanOptions,
    /// Windows per step.
    #[arg(long, value_parser = positive, default_value_t = 16)]
    batch_size: usize,
    /// Tokens per window.
    #[arg(long, value_parser = positive, default_value_t = 256)]
    seq_len: usize,
    /// Counted steps.
    #[arg(long, value_parser = positive, default_value_t = 8)]
    steps: usize,
    /// Steps before the counted ones.
    #[arg(long, default_value_t = 2)]
    warmup: usize,
    /// What a step is of: ild is that of one hybrid, all layers at once.
    #[arg(long, value_enum, default_value_t)]
    stage: Steps,
    /// What KD trains.
    #[arg(long, value_enum, default_value_t)]
    trained: Trained,
    /// How trained matrices are kept.
    #[arg(long, value_enum, default_value_t)]
    weights: Precision,
    /// What a step follows.
    #[arg(long, value_enum, default_value_t)]
    optimizer: OptimizerName,
    #[command(flatten)]
    galore: GaloreConfig,
    /// What is clipped together.
    #[arg(long, value_enum, default_value_t)]
    clip_by: ClipBy,
    /// Compute a layer's activations anew on the way back (true or false) [default: where they would not fit].
    #[arg(long)]
    gradient_checkpointing: Option<bool>,
    /// CPU threads [default: all cores].
    #[arg(long, value_parser = positive)]
    threads: Option<usize>,
    #[command(flatten)]
    device: DeviceArg,
    /// One JSON object instead of the table.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
enum Steps {
    #[default]
    Kd,
    Ild,
}

#[derive(Serialize)]
struct Report {
    /// Median over the counted steps.
    tokens_per_s: f64,
    step_s: f64,
    /// Median seconds by phase.
    phases: Vec<(&'static str, f64)>,
    /// Of the whole process; absent where the system does not tell.
    peak_rss_bytes: Option<usize>,
    /// What `plan --train` would say of the steps from the second on.
    predicted_bytes: usize,
    parameters: usize,
    threads: usize,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let (rows, len) = (args.batch_size, args.seq_len);
    check_batch(rows, 1, len)?;
    let of_kd = args.trained != Trained::default() || args.gradient_checkpointing.is_some();
    ensure!(
        args.stage == Steps::Kd || !of_kd,
        "--trained and --gradient-checkpointing are for --stage kd"
    );
    let settings = TrainSettings {
        lr: 1e-4,
        warmup: 0.0,
        weights: args.weights,
        optimizer: args.optimizer,
        galore: args.galore,
        clip_by: args.clip_by,
        ..TrainSettings::default()
    };
    let training = settings.settle()?;
    use_threads(args.threads)?;
    let place = args.device.place()?.training(args.weights);
    let folder = args.teacher.fetch()?;
    let teacher = Checkpoint::open(&folder)?;
    let student = plan(&teacher.config, &args.plan)?;
    let taught = teacher.config.clone();
    let files = Source::open(&folder)?.bytes;
    let teacher = teacher.parts()?;
    let watch = Progress::default();
    let init = Init::Published { seed: 0 };
    let composed = compose(&teacher, &student, &init, &watch)?;
    let (lm, hash) = (teacher.lm(&place)?, String::new());
    let all = args.warmup + args.steps;
    let text = random_text(all * rows * len, student.vocab_size);
    let windows = Windows { rows, len };
    let (mut stage, sizes) = match args.stage {
        Steps::Kd => {
            let config = KdConfig {
                trained: args.trained,
                ..KdConfig::default()
            };
            let teacher = Teacher::Model {
                lm: Box::new(lm),
                hash,
            };
            let mut kd = Kd::new(teacher, &composed, &[], config, &place)?;
            kd.student.checkpointing = args.gradient_checkpointing;
            let learner = Learner {
                config: &student,
                trained: &config.trains(&student),
            };
            let short = || free_memory().is_some_and(|free| learner.is_short(windows, free));
            let sizes = StepSizes {
                learner,
                teacher: Some(&taught),
                windows,
                accumulation: 1,
                weights: training.weights,
                compute: place.compute,
                optimizer: training.optimizer,
                anew: args.gradient_checkpointing.unwrap_or_else(short),
                at_once: training.applies_at_once(),
            };
            (Stage::Kd(Box::new(kd), &text), sizes.memory())
        }
        Steps::Ild => {
            let candidates = vec![(None, composed.clone())];
            let ild = Ild::new(lm, hash, candidates, IldConfig::default(), None, &place)?;
            let sizes = IldSizes {
                teacher: &taught,
                candidates: std::slice::from_ref(&student),
                windows,
                accumulation: 1,
                weights: training.weights,
                compute: place.compute,
                optimizer: training.optimizer,
                joint: false,
                at_once: student.layers.len(),
                applied: training.applies_at_once(),
            };
            (Stage::Ild(ild, &text), sizes.memory())
        }
    };
    drop((teacher, composed));
    let predicted = Memory::default()
        .with("program", OWN.own)
        .with_file("program's file", OWN.file)
        .with_file("teacher", files)
        .and(&sizes);
    watch.start("bench", all);
    let mut seconds = Vec::new();
    let mut phases: Vec<(&'static str, Vec<f64>)> = Vec::new();
    for step in 0..all {
        let batch = text.ordered(step * rows, rows, len)?;
        let update = training.update(step as u64, all as u64);
        let started = Instant::now();
        let taken = take_step(&mut stage, &[batch], &update, f64::INFINITY)?;
        watch.reached(step + 1, all, "steps")?;
        if step < args.warmup {
            continue;
        }
        seconds.push(started.elapsed().as_secs_f64());
        for (i, (name, time)) in taken.phases.into_iter().enumerate() {
            match phases.get_mut(i) {
                Some((_, times)) => times.push(time),
                None => phases.push((name, vec![time])),
            }
        }
    }
    drop(watch);
    let step_s = median(seconds);
    let report = Report {
        tokens_per_s: (rows * len) as f64 / step_s,
        step_s,
        phases: phases
            .into_iter()
            .map(|(name, times)| (name, median(times)))
            .collect(),
        peak_rss_bytes: peak_memory(),
        predicted_bytes: predicted.total(),
        parameters: student.parameters(),
        threads: rayon::current_num_threads(),
    };
    if args.json {
        print_json(&report)?;
        return Ok(());
    }
    let mut rows = vec![
        vec!["tokens/s".into(), thousands(report.tokens_per_s as usize)],
        vec!["step".into(), format!("{:.1} ms", 1e3 * report.step_s)],
    ];
    for (name, time) in &report.phases {
        rows.push(vec![format!("  {name}"), format!("{:.1} ms", 1e3 * time)]);
    }
    rows.push(vec![
        "peak memory".into(),
        report.peak_rss_bytes.map_or("unknown".into(), bytes),
    ]);
    rows.push(vec!["predicted".into(), bytes(report.predicted_bytes)]);
    rows.push(vec!["parameters".into(), thousands(report.parameters)]);
    rows.push(vec!["threads".into(), report.threads.to_string()]);
    let title = match args.stage {
        Steps::Kd => "KD step",
        Steps::Ild => "ILD step",
    };
    print(table(&[title, "median"], &rows))?;
    Ok(())
}

fn random_text(tokens: usize, vocab: usize) -> Corpus {
    let mut random = ChaCha8Rng::seed_from_u64(0);
    let ids = (0..tokens).map(|_| random.random_range(0..vocab as u32));
    Corpus::new(&[ids.collect()], Packing::Stream)
}
