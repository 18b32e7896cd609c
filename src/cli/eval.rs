//! `zebroid eval kl` and `zebroid eval recall`.

use super::arg::data;
use super::arg::device::DeviceArg;
use super::arg::hub::Model;
use super::positive;
use super::show::{Progress, print, print_json, table, thousands};
use crate::checkpoint::Checkpoint;
use crate::data::stories::StoryGenerator;
use crate::data::{Batches, Packing, Tokenizer};
use crate::eval::kl;
use crate::eval::recall::recall;
use crate::pipeline::Text;

#[derive(Debug, clap::Subcommand)]
pub enum Eval {
    /// Benchmark tasks, as lm-evaluation-harness runs them.
    Harness(super::harness::Args),
    /// Recall over length and depth: needle, MQAR, phonebook, copying, variables.
    Probe(super::probe::Args),
    /// Perplexity and bits per byte of a text.
    Ppl(super::ppl::Args),
    /// What a student keeps of its base, task by task.
    Retention(super::retention::Args),
    /// A student against its teacher: KL, cross-entropies, top-1 agreement.
    Kl(KlArgs),
    /// Whether a model of the generated stories remembers what they told.
    Recall(RecallArgs),
}

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  zebroid eval kl --teacher ./teacher --student ./hybrid --data validation.jsonl --json"
)]
pub struct KlArgs {
    /// Checkpoint folder, .gguf file or Hugging Face id of the teacher.
    #[arg(long)]
    teacher: Model,
    /// Those of the student.
    #[arg(long)]
    student: Model,
    /// Texts (train kd --help says in what forms).
    #[arg(long, value_name = "TEXT", required = true)]
    data: Vec<Text>,
    /// Tokens a window.
    #[arg(long, value_parser = positive, default_value_t = 256)]
    seq_len: usize,
    /// Windows per forward pass.
    #[arg(long, value_parser = positive, default_value_t = 16)]
    batch_size: usize,
    /// documents: nothing crosses document borders; stream: one long text.
    #[arg(long, value_enum, default_value = "documents")]
    packing: Packing,
    #[command(flatten)]
    device: DeviceArg,
    /// One JSON object instead of the table.
    #[arg(long)]
    json: bool,
}

pub fn run(command: Eval) -> anyhow::Result<()> {
    match command {
        Eval::Harness(args) => super::harness::run(args),
        Eval::Probe(args) => super::probe::run(args),
        Eval::Ppl(args) => super::ppl::run(args),
        Eval::Retention(args) => super::retention::run(args),
        Eval::Kl(args) => run_kl(args),
        Eval::Recall(args) => run_recall(args),
    }
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  zebroid eval recall ./runs/demo/distilled --count 400")]
pub struct RecallArgs {
    /// Checkpoint folder (or Hugging Face id) with the stories' tokenizer.
    checkpoint: Model,
    /// Stories read.
    #[arg(long, value_parser = positive, default_value_t = 400)]
    count: usize,
    /// Of the stories; 1 and 2 are what the embedded teacher and the demo learn from.
    #[arg(long, default_value_t = 3)]
    seed: u64,
    #[command(flatten)]
    device: DeviceArg,
    /// One JSON object instead of the table.
    #[arg(long)]
    json: bool,
}

fn run_recall(args: RecallArgs) -> anyhow::Result<()> {
    let folder = args.checkpoint.fetch()?;
    let checkpoint = Checkpoint::open(&folder)?;
    let tokenizer = Tokenizer::open(&folder)?;
    tokenizer.check(checkpoint.config.vocab_size)?;
    let lm = checkpoint.model(&args.device.place()?)?;
    let stories: Vec<_> = StoryGenerator::new(args.seed).take(args.count).collect();
    let watch = Progress::default();
    let report = recall(&lm, &tokenizer, &stories, &watch)?;
    drop(watch);
    if args.json {
        print_json(&report)?;
        return Ok(());
    }
    let percent = |name: &str, share: f64| vec![name.into(), format!("{:.2} %", 100.0 * share)];
    let figures = report.rows().into_iter().chain(report.shortcuts.rows());
    let mut rows: Vec<_> = figures.map(|(name, share)| percent(name, share)).collect();
    rows.push(vec!["answers".into(), thousands(report.answers)]);
    print(table(&["measure", "value"], &rows))?;
    Ok(())
}

fn run_kl(args: KlArgs) -> anyhow::Result<()> {
    let place = args.device.place()?;
    let folder = args.teacher.fetch()?;
    let (teacher, student) = (
        Checkpoint::open(&folder)?,
        Checkpoint::open(&args.student.fetch()?)?,
    );
    let tokenizer = Tokenizer::open(&folder)?;
    tokenizer.check(teacher.config.vocab_size)?;
    let watch = Progress::default();
    let corpus = data::corpus(&args.data, &tokenizer, args.packing, &watch)?;
    corpus.check(1, args.seq_len)?;
    let report = kl::evaluate(
        &teacher.model(&place)?,
        &student.model(&place)?,
        &corpus,
        args.batch_size,
        args.seq_len,
        &watch,
    )?;
    drop(watch);
    if args.json {
        print_json(&report)?;
        return Ok(());
    }
    let rows = [
        ("kl (nats/token)", format!("{:.4}", report.kl)),
        (
            "ce_teacher (nats/token)",
            format!("{:.4}", report.ce_teacher),
        ),
        (
            "ce_student (nats/token)",
            format!("{:.4}", report.ce_student),
        ),
        (
            "agreement (top-1)",
            format!("{:.2} %", 100.0 * report.agreement),
        ),
        (
            "perplexity retention",
            format!("{:.2} %", 100.0 * report.perplexity_retention()),
        ),
        ("tokens", thousands(report.tokens)),
    ];
    let rows = rows.map(|(name, value)| vec![name.into(), value]);
    print(table(&["measure", "value"], &rows))?;
    Ok(())
}
