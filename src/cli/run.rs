//! `zebroid run`: a recipe, from a teacher to a trained hybrid.

use std::path::{Path, PathBuf};

use super::arg::cache;
use super::arg::device::DeviceArg;
use super::arg::hub::Model;
use super::plan::{as_json, as_table};
use super::show::{Progress, print, print_json, table};
use crate::checkpoint::{self, Checkpoint};
use crate::hub::Part;
use crate::mixer::LayerKind;
use crate::pipeline::{self, Mixture, Outcome, Recipe, Surroundings, Text, Variant};
use crate::report::{Report, Series};
use crate::train::StepMetrics;
use crate::watch::Watch;
use crate::{Error, Result};

/// Carry out a recipe: calibrate, ILD, select, compose, KD, DPO, evaluation; of a recipe with a sweep, every variant.
/// What is done is not done again: kill it anywhere and run it once more, or change a setting, and only what depends on it
/// is made.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    zebroid run recipes/demo.toml\n  \
    zebroid run recipes/zebra-llama/1b-4mla-12m2.toml --plan\n  \
    zebroid run recipes/demo.toml --set seed=1 --set kd.train.lr=1e-3 --out runs/other\n  \
    zebroid run recipes/zebra-llama/1b-4mla-12m2.toml --teacher ./Llama-3.2-1B-Instruct --kd-teacher ./Llama-3.1-8B-Instruct \\\n    \
      --train sft.jsonl --validation held-out.jsonl --preferences preferences.jsonl --out runs/1b")]
pub struct Args {
    /// A TOML file; the shipped ones are in recipes/.
    recipe: PathBuf,
    /// Folder for everything that the run makes [default: runs/ and the recipe's name].
    #[arg(long)]
    out: Option<PathBuf>,
    /// The teacher's folder or Hugging Face id, instead of the recipe's.
    #[arg(long)]
    teacher: Option<Model>,
    /// The teacher of KD stages that name one of their own.
    #[arg(long)]
    kd_teacher: Option<Model>,
    /// Training text, instead of the recipe's; may be given again (train kd --help says how texts are mixed).
    #[arg(long, value_name = "TEXT")]
    train: Vec<Text>,
    /// Held-out text, instead of the recipe's.
    #[arg(long, value_name = "TEXT")]
    validation: Vec<Text>,
    /// Preference pairs, instead of the recipe's.
    #[arg(long)]
    preferences: Option<Text>,
    /// Replace what the recipe says: a key as in its file, and a value; may be given again.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
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
    let variants = variants(&args)?;
    let name = args.recipe.file_stem().unwrap_or_default();
    let out = args
        .out
        .clone()
        .unwrap_or_else(|| Path::new("runs").join(name));
    let (cache, watch) = (cache::folder(), Progress::default());
    if args.plan {
        show_plans(&variants, args.json, &watch)?;
        return Ok(check(&variants, &out, &cache, &watch)?);
    }
    let _lock = checkpoint::lock(&out)?;
    // A mistake in the last variant is found before the first is made.
    if variants.len() > 1 {
        check(&variants, &out, &cache, &watch)?;
    }
    let surroundings = Surroundings {
        out: &out,
        place: args.device.place()?,
        save_every: args.save_every,
        cache: &cache,
        watch: &watch,
    };
    let mut outcomes = Vec::new();
    for variant in &variants {
        if !variant.label.is_empty() {
            watch.note(&variant.label);
        }
        let outcome = pipeline::run(&variant.recipe, &surroundings);
        outcomes.push(outcome.map_err(|e| labelled(variant, e))?);
    }
    drop(watch);
    let report = out.join("report.html");
    if let ([variant], [outcome]) = (&variants[..], &outcomes[..]) {
        page(&variant.recipe, outcome)?.write(&report)?;
        if args.json {
            print_json(outcome)?;
            return Ok(());
        }
        print(format_args!(
            "{}\nKV ratio {:.2} % at the teacher's whole context\nhybrid: {}\nreport: {}\n",
            table(&HEADERS, &rows(outcome)),
            100.0 * outcome.kv_ratio,
            outcome.student.display(),
            report.display()
        ))?;
        return Ok(());
    }
    let all: Vec<(&Variant, &Outcome)> = variants.iter().zip(&outcomes).collect();
    sweep_page(&all).write(&report)?;
    if args.json {
        let each = |(variant, outcome): &(&Variant, &Outcome)| serde_json::json!({ "variant": variant.label, "outcome": outcome });
        print_json(&all.iter().map(each).collect::<Vec<_>>())?;
        return Ok(());
    }
    let (headers, rows) = sweep_table(&all);
    let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
    print(format_args!(
        "{}\nreport: {}\n",
        table(&headers, &rows),
        report.display()
    ))?;
    Ok(())
}

fn labelled(variant: &Variant, error: Error) -> Error {
    match (variant.label.as_str(), error) {
        (label, Error::Invalid(message)) if !label.is_empty() => {
            Error::Invalid(format!("{label}: {message}"))
        }
        (_, error) => error,
    }
}

/// The file with what the flags replace.
fn variants(args: &Args) -> Result<Vec<Variant>> {
    let mut variants = Recipe::load_all(&args.recipe, &args.set)?;
    for Variant { recipe, .. } in &mut variants {
        recipe.teach(
            args.teacher.as_ref().map(Model::named),
            args.kd_teacher.as_ref().map(Model::named),
        );
        let data = &mut recipe.data;
        for (texts, of) in [
            (&args.train, &mut data.train),
            (&args.validation, &mut data.validation),
        ] {
            if let Some(mixture) = Mixture::of(texts) {
                *of = mixture;
            }
        }
        if let Some(text) = &args.preferences {
            data.preferences = Some(text.clone());
        }
    }
    Ok(variants)
}

/// Unless said otherwise.
pub const SAVE_EVERY: u64 = 100;

/// What would be done.
fn show_plans(variants: &[Variant], json: bool, watch: &dyn Watch) -> anyhow::Result<()> {
    let mut plans = Vec::new();
    for variant in variants {
        let plan = show_plan(variant, json, watch).map_err(|e| labelled(variant, e))?;
        plans.extend(plan);
    }
    match &plans[..] {
        [] => {}
        [plan] => print_json(plan)?,
        plans => print_json(&plans)?,
    }
    Ok(())
}

/// Whether what is planned can be done.
fn check(variants: &[Variant], out: &Path, cache: &Path, watch: &dyn Watch) -> Result<()> {
    variants.iter().try_for_each(|variant| {
        pipeline::check(&variant.recipe, out, cache, watch).map_err(|e| labelled(variant, e))
    })
}

/// Prints a plan, or gives it as JSON.
fn show_plan(
    variant: &Variant,
    json: bool,
    watch: &dyn Watch,
) -> Result<Option<serde_json::Value>> {
    let recipe = &variant.recipe;
    let fetched = recipe.fetched(Part::Config, watch)?;
    let scratch = tempfile::tempdir().map_err(Error::io("cannot create", &std::env::temp_dir()))?;
    let folder = pipeline::teacher_folder(&fetched.teacher, scratch.path())?;
    let (teacher, _) = Checkpoint::config_only(&folder)?;
    let students = recipe.check(&teacher)?;
    let last = students
        .last()
        .ok_or_else(|| Error::invalid("no student"))?;
    let length = teacher.max_position_embeddings;
    let stages = recipe.stages();
    if json {
        let stages = stages
            .iter()
            .map(|entry| serde_json::json!({ "name": entry.name, "about": entry.stage.about() }));
        return Ok(Some(serde_json::json!({
            "variant": variant.label,
            "recipe": recipe,
            "stages": stages.collect::<Vec<_>>(),
            "plan": as_json(&teacher, last, length),
        })));
    }
    for text in [&variant.label, &recipe.about] {
        if !text.is_empty() {
            print(format_args!("{text}\n\n"))?;
        }
    }
    let stages = stages.iter().map(|entry| match entry.stage.about() {
        about if about.is_empty() => entry.name.clone(),
        about => format!("{} ({about})", entry.name),
    });
    let stages = stages.collect::<Vec<_>>().join(", ");
    print(format_args!(
        "stages: {stages}\n\n{}",
        as_table(&teacher, last, length)
    ))?;
    match &recipe.select {
        Some(select) if select.method.selector().is_some() => {
            print("(places are chosen after ILD; a uniform placement is shown)\n")?;
        }
        Some(_) => {
            print("(mixers are chosen by what they cost; one choice that fits is shown)\n")?;
        }
        None => {}
    }
    Ok(None)
}

/// A row a variant: KL after each stage, and what the last one is like.
fn sweep_table(all: &[(&Variant, &Outcome)]) -> (Vec<String>, Vec<Vec<String>>) {
    let mut names: Vec<&str> = Vec::new();
    for stage in all.iter().flat_map(|(_, outcome)| &outcome.stages) {
        if stage.kl.is_some() && !names.contains(&stage.name.as_str()) {
            names.push(&stage.name);
        }
    }
    let mut headers = vec!["variant".to_owned()];
    headers.extend(names.iter().map(|name| format!("KL after {name}")));
    headers.extend(["top-1 agreement".into(), "KV ratio".into()]);
    let row = |(variant, outcome): &(&Variant, &Outcome)| {
        let kl = |name: &&str| {
            let stage = outcome.stages.iter().find(|s| s.name == *name);
            let kl = stage.and_then(|s| s.kl);
            kl.map_or("-".into(), |kl| format!("{:.4}", kl.kl))
        };
        let last = outcome.stages.last().and_then(|s| s.kl);
        let mut row = vec![variant.label.clone()];
        row.extend(names.iter().map(kl));
        row.push(last.map_or("-".into(), |k| format!("{:.2} %", 100.0 * k.agreement)));
        row.push(format!("{:.2} %", 100.0 * outcome.kv_ratio));
        row
    };
    (headers, all.iter().map(row).collect())
}

/// All variants: what they end with, and their curves over each other.
fn sweep_page(all: &[(&Variant, &Outcome)]) -> Report {
    let mut report = Report::new("zebroid run");
    let (headers, rows) = sweep_table(all);
    let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
    if let Some((variant, _)) = all.first() {
        report.paragraph(&variant.recipe.about);
    }
    report.table(&headers, &rows);
    let mut names: Vec<&str> = Vec::new();
    for stage in all.iter().flat_map(|(_, outcome)| &outcome.stages) {
        if !stage.metrics.is_empty() && !names.contains(&stage.name.as_str()) {
            names.push(&stage.name);
        }
    }
    for name in names {
        let series = all.iter().filter_map(|(variant, outcome)| {
            let stage = outcome.stages.iter().find(|s| s.name == name)?;
            let mut series = curve("loss", stage);
            series.name = variant.label.clone();
            Some(series)
        });
        let series: Vec<Series> = series.collect();
        report.line_plot(name, "tokens", "loss", &series, true);
    }
    report
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
        let title = format!("{}: gradient norm by layer", stage.name);
        let norms = norms_by_layer(stage);
        // Runs of older versions have not recorded them.
        if !norms.is_empty() {
            report.line_plot(&title, "tokens", "norm", &norms, true);
        }
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

/// A curve a layer, of means over a hundredth of the steps; steps that were left out have none.
fn norms_by_layer(stage: &pipeline::StageResult) -> Vec<Series> {
    const POINTS: usize = 100;
    let metrics = &stage.metrics;
    let layers = metrics.iter().map(|m| m.layer_grad_norm.len()).max();
    let windows = metrics.chunks(metrics.len().div_ceil(POINTS).max(1));
    let of = |layer: usize| {
        let point = |window: &[StepMetrics]| {
            let norms = window.iter().filter_map(|m| m.layer_grad_norm.get(layer));
            let mean = norms.clone().sum::<f64>() / norms.count() as f64;
            (window.last().map_or(0.0, |m| m.tokens as f64), mean)
        };
        Series::new(layer.to_string(), windows.clone().map(point).collect())
    };
    (0..layers.unwrap_or(0)).map(of).collect()
}

fn curve(name: &str, stage: &pipeline::StageResult) -> Series {
    let value = |m: &StepMetrics| match name {
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
