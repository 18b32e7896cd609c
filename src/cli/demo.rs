//! `zebroid demo`: the whole pipeline on the embedded teacher, offline, in minutes.

use std::path::PathBuf;
use std::time::Instant;

use super::arg::device::DeviceArg;
use super::arg::{cache, data};
use super::run::{SAVE_EVERY, page, rows};
use super::show::{Progress, print, table, thousands};
use crate::checkpoint::{self, Checkpoint};
use crate::convert::Init;
use crate::data::stories::{Story, StoryGenerator};
use crate::data::{Packing, Tokenizer};
use crate::eval::kl::{self, KlReport};
use crate::eval::recall::{RecallReport, recall};
use crate::generate::{Engine, Generation, SamplingParams};
use crate::model::Lm;
use crate::pipeline::{self, Base, Outcome, Recipe, StageResult, Surroundings, Text, embedded};
use crate::{Error, Result};

/// Calibration, ILD bank, hybrid, KD, evaluation, side-by-side text, HTML report: recipes/demo.toml.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  zebroid demo\n  zebroid demo --out /tmp/demo --force\n\n\
    An interrupted demo goes on when it is started again."
)]
pub struct Args {
    /// Folder for everything the demo makes.
    #[arg(long, default_value = "runs/demo")]
    out: PathBuf,
    /// Tokens of the ILD bank [default: the recipe's].
    #[arg(long)]
    ild_tokens: Option<u64>,
    /// Tokens of the distillation [default: the recipe's].
    #[arg(long)]
    kd_tokens: Option<u64>,
    /// Layers that become MLA [default: the recipe's].
    #[arg(long, value_delimiter = ',')]
    mla: Option<Vec<usize>>,
    /// Seed of all that is drawn.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Optimizer steps between saves, which a killed demo goes on from.
    #[arg(long, default_value_t = SAVE_EVERY)]
    save_every: u64,
    #[command(flatten)]
    device: DeviceArg,
    /// Start over if OUT holds a finished demo.
    #[arg(long)]
    force: bool,
}

const REPORT: &str = "report.html";
/// The stories that the recipe holds out.
const HELD_OUT: (u64, usize) = (3, 400);

pub fn run(args: Args) -> anyhow::Result<()> {
    let started = Instant::now();
    let out = args.out.as_path();
    let report = out.join(REPORT);
    let _lock = checkpoint::lock(out)?;
    if report.exists() {
        if !args.force {
            let finished = "holds a finished demo; start over with --force, or choose --out";
            return Err(Error::file(out, finished).into());
        }
        pipeline::clear(out)?;
        std::fs::remove_file(&report).map_err(Error::io("cannot remove", &report))?;
    }
    let recipe = recipe(&args)?;
    let watch = Progress::default();
    let with = Surroundings {
        out,
        place: args.device.place()?,
        save_every: args.save_every,
        cache: &cache::folder(),
        watch: &watch,
    };
    let outcome = pipeline::run(&recipe, &with)?;
    let results = compare(&recipe, outcome, &with, started).map_err(pipeline::kept(out))?;
    drop(watch);
    let mut page = page(&recipe, &results.outcome)?;
    page.heading("Teacher and hybrid")
        .table(&["", "teacher", "hybrid"], &results.rows())
        .heading("The same beginning, continued by both")
        .side_by_side(&[
            ("teacher", &results.texts[0].text),
            ("hybrid", &results.texts[1].text),
        ]);
    page.write(&report)?;
    print(results.to_text())?;
    print(format_args!("\nreport: {}\n", report.display()))?;
    Ok(())
}

/// What the hybrid is like beside its teacher.
fn compare(
    recipe: &Recipe,
    outcome: Outcome,
    with: &Surroundings,
    started: Instant,
) -> Result<Results> {
    let base = Base::open(&outcome.base, with.place.clone())?;
    let distilled = || Checkpoint::open(&outcome.student)?.model(&with.place);
    let stories: Vec<Story> = StoryGenerator::new(HELD_OUT.0).take(HELD_OUT.1).collect();
    let recalls = [
        recall(&base.lm()?, &base.tokenizer, &stories, with.watch)?,
        recall(&distilled()?, &base.tokenizer, &stories, with.watch)?,
    ];
    let texts = [
        tell(base.lm()?, &base.tokenizer, &stories[0])?,
        tell(distilled()?, &base.tokenizer, &stories[0])?,
    ];
    Ok(Results {
        published: published(&base, recipe, with)?,
        outcome,
        recalls,
        texts,
        seconds: started.elapsed().as_secs_f64(),
    })
}

fn recipe(args: &Args) -> Result<Recipe> {
    let mut recipe = Recipe::parse(embedded::DEMO)?;
    recipe.seed = args.seed;
    if let (Some(tokens), Some(ild)) = (args.ild_tokens, &mut recipe.ild) {
        ild.train.tokens = Some(tokens);
    }
    if let (Some(tokens), Some(kd)) = (args.kd_tokens, recipe.kd.first_mut()) {
        kd.train.tokens = Some(tokens);
    }
    if let Some(mla) = &args.mla {
        recipe.plan.mla = mla.clone();
    }
    Ok(recipe)
}

/// The same hybrid as the published initialisation makes it, untrained.
fn published(base: &Base, recipe: &Recipe, with: &Surroundings) -> Result<KlReport> {
    let init = Init::Published { seed: recipe.seed };
    let student = base.plan(&recipe.plan, &init)?;
    let lm = base.compose(&student, &init, with.watch)?.lm(&base.place)?;
    let (seed, count) = HELD_OUT;
    let text = with.out.join(format!("stories-{seed}-{count}.jsonl"));
    let corpus = data::corpus(
        &[Text::of(&text)],
        &base.tokenizer,
        Packing::Documents,
        with.watch,
    )?;
    let eval = &recipe.eval;
    kl::evaluate(
        &base.lm()?,
        &lm,
        &corpus,
        eval.batch_size,
        eval.seq_len,
        with.watch,
    )
}

/// A story from the beginning that all models are given.
fn tell(lm: Lm, tokenizer: &Tokenizer, story: &Story) -> Result<Generation> {
    let sentences: Vec<&str> = story.text.split_inclusive(". ").take(3).collect();
    let params = SamplingParams {
        max_tokens: Some(80),
        ..SamplingParams::default()
    };
    let prompt = sentences.concat();
    let engine = Engine::new(&lm, tokenizer.clone())?;
    let found = engine.generate(&[prompt.trim_end()], 1, &params, &mut |_, _| true)?;
    let first = found.into_iter().flatten().next();
    let mut generation = first.expect("one for one prompt");
    generation.text = format!("{}{}", prompt.trim_end(), generation.text);
    Ok(generation)
}

struct Results {
    /// The published initialisation, untrained.
    published: KlReport,
    outcome: Outcome,
    /// Teacher, hybrid.
    recalls: [RecallReport; 2],
    /// Teacher, hybrid.
    texts: [Generation; 2],
    seconds: f64,
}

impl Results {
    fn rows(&self) -> Vec<Vec<String>> {
        let [teacher, hybrid] = &self.recalls;
        let percent = |x: f64| format!("{:.2} %", 100.0 * x);
        let row =
            |name: &str, teacher: String, hybrid: String| vec![name.to_owned(), teacher, hybrid];
        let speed = |name: &str| {
            let stage = self.outcome.stages.iter().find(|s| s.name == name);
            let last = stage.and_then(|s| s.metrics.last());
            last.map_or("-".into(), |m| thousands(m.tokens_per_s as usize))
        };
        let mut rows = vec![row(
            "KV ratio",
            percent(1.0),
            percent(self.outcome.kv_ratio),
        )];
        if let Some(last) = self.outcome.stages.last().and_then(|s: &StageResult| s.kl) {
            rows.extend([
                row(
                    "KL to the teacher (nats/token)",
                    "0".into(),
                    format!("{:.4}", last.kl),
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
            ]);
        }
        let recalled = teacher.rows().into_iter().zip(hybrid.rows());
        rows.extend(recalled.map(|((name, a), (_, b))| row(name, percent(a), percent(b))));
        // Of the same stories, whoever answers.
        let shortcuts = teacher.shortcuts.rows();
        rows.extend(shortcuts.map(|(name, share)| row(name, percent(share), percent(share))));
        rows.extend([
            row("ILD tokens/s", String::new(), speed("ild")),
            row("KD tokens/s", String::new(), speed("kd 1")),
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
        ]);
        rows
    }

    fn to_text(&self) -> String {
        let [teacher, hybrid] = &self.texts;
        format!(
            "\n{}\nuntrained, as published: KL {:.4}\n\nteacher: {}\n\nhybrid:  {}\n\n{}",
            table(&super::run::HEADERS, &rows(&self.outcome)),
            self.published.kl,
            teacher.text,
            hybrid.text,
            table(&["", "teacher", "hybrid"], &self.rows())
        )
    }
}
