//! `zebroid run`: a recipe, from a teacher to a trained hybrid.

use std::path::{Path, PathBuf};

use super::arg::device::DeviceArg;
use super::plan::{as_json, as_table};
use super::show::{Progress, print, print_json, table};
use crate::checkpoint::{self, Checkpoint};
use crate::mixer::LayerKind;
use crate::pipeline::{self, Outcome, Recipe, Surroundings, Teacher, Text};
use crate::report::{Report, Series};
use crate::{Error, Result};

/// Carry out a recipe: calibrate, ILD, select, compose, KD, DPO, evaluation. What is done is not done
/// again: kill it anywhere and run it once more, or change a setting, and only what depends on it is made.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    zebroid run recipes/demo.toml\n  \
    zebroid run recipes/zebra-llama/1b-4mla-12m2.toml --plan\n  \
    zebroid run recipes/zebra-llama/1b-4mla-12m2.toml --teacher ./Llama-3.2-1B-Instruct --kd-teacher ./Llama-3.1-8B-Instruct \\\n    \
      --train sft.jsonl --validation held-out.jsonl --preferences preferences.jsonl --out runs/1b")]
pub struct Args {
    /// A TOML file; the shipped ones are in recipes/.
    recipe: PathBuf,
    /// Folder for everything that the run makes [default: runs/ and the recipe's name].
    #[arg(long)]
    out: Option<PathBuf>,
    /// The teacher's folder, instead of the recipe's.
    #[arg(long)]
    teacher: Option<PathBuf>,
    /// The teacher of KD stages that name one of their own.
    #[arg(long)]
    kd_teacher: Option<PathBuf>,
    /// Training text, instead of the recipe's.
    #[arg(long)]
    train: Option<Text>,
    /// Held-out text, instead of the recipe's.
    #[arg(long)]
    validation: Option<Text>,
    /// Preference pairs, instead of the recipe's.
    #[arg(long)]
    preferences: Option<Text>,
    /// Show stages and sizes, and check the recipe, its teachers and texts as a run does; nothing is made.
    #[arg(long)]
    plan: bool,
    /// Optimizer steps between saves, which a killed run goes on from.
    #[arg(long, default_value_t = SAVE_EVERY)]
    save_every: u64,
    #[command(flatten)]
    device: DeviceArg,
    /// One JSON object instead of the tables.
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let recipe = recipe(&args)?;
    let name = args.recipe.file_stem().unwrap_or_default();
    let out = args
        .out
        .clone()
        .unwrap_or_else(|| Path::new("runs").join(name));
    if args.plan {
        show_plan(&recipe, args.json)?;
        return Ok(pipeline::check(&recipe, &out)?);
    }
    let _lock = checkpoint::lock(&out)?;
    let watch = Progress::default();
    let surroundings = Surroundings {
        out: &out,
        place: args.device.place()?,
        save_every: args.save_every,
        watch: &watch,
    };
    let outcome = pipeline::run(&recipe, &surroundings)?;
    drop(watch);
    let report = out.join("report.html");
    page(&recipe, &outcome)?.write(&report)?;
    if args.json {
        print_json(&outcome)?;
        return Ok(());
    }
    print(format_args!(
        "{}\nKV ratio {:.2} % at the teacher's whole context\nhybrid: {}\nreport: {}\n",
        table(&HEADERS, &rows(&outcome)),
        100.0 * outcome.kv_ratio,
        outcome.student.display(),
        report.display()
    ))?;
    Ok(())
}

/// The file with what the flags replace.
fn recipe(args: &Args) -> Result<Recipe> {
    let mut recipe = Recipe::load(&args.recipe)?;
    if let Some(teacher) = &args.teacher {
        recipe.teacher = Teacher::Folder(teacher.clone());
    }
    if let Some(teacher) = &args.kd_teacher {
        for kd in recipe.kd.iter_mut().filter(|kd| kd.teacher.is_some()) {
            kd.teacher = Some(teacher.clone());
        }
    }
    if let Some(text) = &args.train {
        recipe.data.train = text.clone();
    }
    if let Some(text) = &args.validation {
        recipe.data.validation = text.clone();
    }
    if let Some(text) = &args.preferences {
        recipe.data.preferences = Some(text.clone());
    }
    Ok(recipe)
}

/// Unless said otherwise.
pub const SAVE_EVERY: u64 = 100;

fn show_plan(recipe: &Recipe, json: bool) -> anyhow::Result<()> {
    let scratch = tempfile::tempdir()?;
    let folder = pipeline::teacher_folder(&recipe.teacher, scratch.path())?;
    let (teacher, _) = Checkpoint::config_only(&folder)?;
    let students = recipe.check(&teacher)?;
    let last = students
        .last()
        .ok_or_else(|| Error::invalid("no student"))?;
    let length = teacher.max_position_embeddings;
    if json {
        let plan = serde_json::json!({ "recipe": recipe, "plan": as_json(&teacher, last, length) });
        print_json(&plan)?;
        return Ok(());
    }
    if !recipe.about.is_empty() {
        print(format_args!("{}\n\n", recipe.about))?;
    }
    let (stages, table) = (stages(recipe).join(", "), as_table(&teacher, last, length));
    print(format_args!("stages: {stages}\n\n{table}"))?;
    match &recipe.select {
        Some(select) if select.method.selector().is_some() => {
            print("(places are chosen after ILD; a uniform placement is shown)\n")?;
        }
        Some(_) => {
            print("(mixers are chosen by what they cost; one choice that fits is shown)\n")?;
        }
        None => {}
    }
    Ok(())
}

/// What a recipe goes through, in order.
fn stages(recipe: &Recipe) -> Vec<String> {
    let mut stages = Vec::new();
    let length = |train: &crate::train::TrainConfig| match (train.steps, train.tokens) {
        (Some(steps), _) => format!("{steps} steps"),
        (None, Some(tokens)) => format!("{:.3} M tokens", tokens as f64 / 1e6),
        (None, None) => format!("{} epochs", train.epochs.unwrap_or(1.0)),
    };
    if let Some(ild) = &recipe.ild {
        stages.push(format!("ild ({})", length(&ild.train)));
    }
    if let Some(select) = &recipe.select {
        let name = format!("{:?}", select.method).to_lowercase();
        let count = select.count.map(|count| format!("{count} layers, "));
        stages.push(format!("select ({}{name})", count.unwrap_or_default()));
    }
    stages.push("compose".into());
    for kd in &recipe.kd {
        stages.push(format!("kd ({})", length(&kd.train)));
    }
    if let Some(dpo) = &recipe.dpo {
        stages.push(format!("dpo ({})", length(&dpo.train)));
    }
    stages
}

pub const HEADERS: [&str; 6] = [
    "stage",
    "KL (nats/token)",
    "cross-entropy",
    "top-1 agreement",
    "perplexity retention",
    "tokens",
];

pub fn rows(outcome: &Outcome) -> Vec<Vec<String>> {
    let row = |stage: &pipeline::StageResult| {
        let kl = stage.kl.as_ref();
        let show = |of: &dyn Fn(&crate::eval::kl::KlReport) -> String| {
            kl.map_or_else(|| "-".to_owned(), of)
        };
        let tokens = stage.metrics.last().map_or(0, |m| m.tokens as usize);
        vec![
            stage.name.clone(),
            show(&|k| format!("{:.4}", k.kl)),
            show(&|k| format!("{:.4}", k.ce_student)),
            show(&|k| format!("{:.2} %", 100.0 * k.agreement)),
            show(&|k| format!("{:.2} %", 100.0 * k.perplexity_retention())),
            super::show::thousands(tokens),
        ]
    };
    outcome.stages.iter().map(row).collect()
}

/// The run as a page: results, curves, plan.
pub fn page(recipe: &Recipe, outcome: &Outcome) -> Result<Report> {
    let mut report = Report::new("zebroid run");
    report
        .paragraph(&recipe.about)
        .table(&HEADERS, &rows(outcome));
    for stage in outcome.stages.iter().filter(|s| !s.metrics.is_empty()) {
        let names: Vec<String> = match (stage.name.as_str(), recipe.bank()) {
            // A bank's curves, one a candidate.
            ("ild", Some(kinds)) => kinds.iter().map(LayerKind::to_string).collect(),
            _ => vec!["loss".into()],
        };
        let series: Vec<Series> = names.iter().map(|name| curve(name, stage)).collect();
        report.line_plot(&stage.name, "tokens", "loss", &series, true);
    }
    if let Some(scores) = &outcome.scores {
        let points = scores.scores.layers.iter().enumerate();
        let series = Series {
            name: scores.place.to_string(),
            points: points.map(|(i, s)| (i as f64, s.score)).collect(),
        };
        let title = format!("What {} gains over {}", scores.place, scores.elsewhere);
        report.line_plot(&title, "layer", "nats/token", &[series], false);
    }
    let (base, _) = Checkpoint::config_only(&outcome.base)?;
    let (student, _) = Checkpoint::config_only(&outcome.student)?;
    report.heading("Plan").code(
        "layers",
        &as_table(&base, &student, base.max_position_embeddings),
    );
    Ok(report)
}

fn curve(name: &str, stage: &pipeline::StageResult) -> Series {
    let value = |m: &crate::train::StepMetrics| match name {
        "loss" => m.loss,
        name => m
            .terms
            .get(name)
            .and_then(|v| v.as_f64())
            .unwrap_or(f64::NAN),
    };
    Series {
        name: name.into(),
        points: stage
            .metrics
            .iter()
            .map(|m| (m.tokens as f64, value(m)))
            .collect(),
    }
}
