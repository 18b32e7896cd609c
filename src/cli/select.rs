//! `zebroid select`: what each layer should become.

use std::path::{Path, PathBuf};

use candle_core::DType;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::device::DeviceArg;
use super::init::InitArgs;
use super::output::{bytes, progress, table};
use crate::checkpoint::{Checkpoint, write_atomic};
use crate::convert::{Choice, Init, PlanOptions, Selector, fit_budget, plan, select};
use crate::data::{Corpus, Packing};
use crate::eval::sensitivity::{Score, Sensitivity, sensitivity};
use crate::mixer::mla::{plan::MlaKind, rank::RankRule};
use crate::mixer::{Cost, LayerKind};
use crate::model::Lm;
use crate::pipeline::Base;
use crate::weights::Weights;
use crate::{Error, Result};

/// Choose the places of MLA from an ILD bank (smart, greedy, uniform), or mixer and rank of every layer
/// under a budget (budget).
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    zebroid select --teacher ./teacher --bank ./bank --data validation.jsonl --count 2 --save-scores scores.json\n  \
    zebroid select --scores scores.json --count 3 --method greedy --json\n  \
    zebroid select --method budget --teacher ./teacher --data validation.jsonl --calibration train.jsonl \\\n    \
      --kv-bytes 48 --state-bytes 20000 --ranks 8,16,32 --rope-dim 4")]
pub struct Args {
    /// Llama checkpoint folder.
    #[arg(long, required_unless_present = "scores")]
    teacher: Option<PathBuf>,
    /// Result of train --stage ild (all methods but budget).
    #[arg(long)]
    bank: Option<PathBuf>,
    /// JSON lines to score on.
    #[arg(long, required_unless_present = "scores")]
    data: Option<PathBuf>,
    /// Scores that an earlier call saved, instead of scoring.
    #[arg(long, conflicts_with_all = ["teacher", "bank", "data"])]
    scores: Option<PathBuf>,
    /// Layers to become MLA (all methods but budget).
    #[arg(long)]
    count: Option<usize>,
    #[arg(long, value_enum, default_value = "smart")]
    method: Method,
    /// Most bytes of KV cache a token, bf16 (budget).
    #[arg(long)]
    kv_bytes: Option<usize>,
    /// Most bytes of recurrent state a sequence, f32 (budget).
    #[arg(long)]
    state_bytes: Option<usize>,
    /// Ranks of the latent to choose from (budget).
    #[arg(long, value_delimiter = ',', default_value = "8,16,32")]
    ranks: Vec<usize>,
    /// Tokens to score on.
    #[arg(long, default_value_t = 16_384)]
    tokens: usize,
    /// Tokens a window.
    #[arg(long, default_value_t = 256)]
    seq_len: usize,
    /// Where to keep the scores.
    #[arg(long)]
    save_scores: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArg,
    /// One JSON object instead of the table.
    #[arg(long)]
    json: bool,
    /// The other sizes of MLA layers.
    #[command(flatten, next_help_heading = "Sizes (budget)")]
    plan: PlanOptions,
    #[command(flatten, next_help_heading = "Calibration (budget)")]
    init: InitArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
enum Method {
    /// Zebra-Llama's: ends kept, near-uniform gaps, the largest total score.
    Smart,
    /// Evenly spaced, whatever the scores.
    Uniform,
    /// The largest scores, wherever they stand.
    Greedy,
    /// Mixer and rank of every layer: least KL within the bytes given. Each layer alone is replaced in the
    /// teacher, and damages are taken to add up.
    Budget,
}

/// What `--save-scores` keeps.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Saved {
    Damages(Damages),
    Sensitivity(Sensitivity),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Damages {
    tokens: usize,
    options: Vec<Damage>,
}

/// One kind of layer, in each place alone.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Damage {
    kind: LayerKind,
    cost: Cost,
    /// KL that the teacher loses.
    layers: Vec<Score>,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let selector = match args.method {
        Method::Smart => Some(Selector::Smart),
        Method::Uniform => Some(Selector::Uniform),
        Method::Greedy => Some(Selector::Greedy),
        Method::Budget => None,
    };
    let saved = match &args.scores {
        Some(path) => read(path)?,
        None if selector.is_none() => Saved::Damages(damages(&args)?),
        None => Saved::Sensitivity(score(&args)?),
    };
    if let Some(path) = &args.save_scores {
        write_atomic(path, serde_json::to_string_pretty(&saved)?.as_bytes())?;
    }
    match (selector, saved) {
        (Some(selector), Saved::Sensitivity(scores)) => show_places(&args, selector, &scores),
        (None, Saved::Damages(damages)) => show_budget(&args, &damages),
        _ => Err(Error::invalid(
            "these scores are of another method: budget needs damages, the others a bank's scores",
        )
        .into()),
    }
}

fn show_places(args: &Args, selector: Selector, scores: &Sensitivity) -> anyhow::Result<()> {
    let count = needed(args.count, "--count")?;
    let values: Vec<f64> = scores.layers.iter().map(|s| s.score).collect();
    let chosen = select(selector, &values, count)?;
    if args.json {
        let found = json!({ "method": selector, "mla": chosen, "sensitivity": scores });
        println!("{}", serde_json::to_string_pretty(&found)?);
        return Ok(());
    }
    let rows = scores.layers.iter().enumerate().map(|(i, s)| {
        let mark = if chosen.contains(&i) { "mla" } else { "mamba2" };
        vec![i.to_string(), show(s), mark.into()]
    });
    let headers = ["layer", "score (nats/token)", "choice"];
    print!("{}", table(&headers, &rows.collect::<Vec<_>>()));
    let list: Vec<String> = chosen.iter().map(usize::to_string).collect();
    println!(
        "\nKL of all Mamba2: {:.4} on {} tokens\n--mla {}",
        scores.kl,
        scores.tokens,
        list.join(",")
    );
    Ok(())
}

fn show_budget(args: &Args, damages: &Damages) -> anyhow::Result<()> {
    let layers = damages.options.first().map_or(0, |o| o.layers.len());
    let choices = |i: usize| -> Vec<Choice> {
        let choice = |option: &Damage| Choice {
            kind: option.kind,
            cost: option.cost,
            damage: option.layers[i].score,
        };
        damages.options.iter().map(choice).collect()
    };
    let choices: Vec<_> = (0..layers).map(choices).collect();
    let chosen = fit_budget(
        &choices,
        args.kv_bytes.map(|b| b / 2),
        args.state_bytes.map(|b| b / 4),
    )?;
    let cost = chosen.iter().fold(Cost::default(), |sum, c| sum + c.cost);
    let damage: f64 = chosen.iter().map(|c| c.damage).sum();
    let kinds: Vec<String> = chosen.iter().map(|c| c.kind.to_string()).collect();
    if args.json {
        let found = json!({
            "method": args.method,
            "layers": kinds,
            "kv_bytes_per_token": 2 * cost.kv_per_token,
            "state_bytes": 4 * cost.state,
            "damage": damage,
            "damages": damages,
        });
        println!("{}", serde_json::to_string_pretty(&found)?);
        return Ok(());
    }
    let names: Vec<String> = damages.options.iter().map(|o| o.kind.to_string()).collect();
    let mut headers = vec!["layer"];
    headers.extend(names.iter().map(String::as_str));
    headers.push("choice");
    let rows = (0..layers).map(|i| {
        let mut row = vec![i.to_string()];
        row.extend(damages.options.iter().map(|o| show(&o.layers[i])));
        row.push(kinds[i].clone());
        row
    });
    print!("{}", table(&headers, &rows.collect::<Vec<_>>()));
    println!(
        "\nKL (nats/token) that each replacement alone costs, on {} tokens; of the choice {damage:.4} in all\n\
         {} of KV cache a token, {} of state\n--layers {}",
        damages.tokens,
        bytes(2 * cost.kv_per_token),
        bytes(4 * cost.state),
        kinds.join(",")
    );
    Ok(())
}

fn show(score: &Score) -> String {
    format!("{:.5} ± {:.5}", score.score, score.standard_error)
}

fn needed<T: Clone>(value: Option<T>, flag: &str) -> Result<T> {
    value.ok_or_else(|| Error::invalid(format!("this method needs {flag}")))
}

fn read(path: &Path) -> Result<Saved> {
    let text = std::fs::read_to_string(path).map_err(Error::io("cannot read", path))?;
    serde_json::from_str(&text).map_err(|e| Error::file(path, format!("not saved scores: {e}")))
}

/// Scores `other`'s layers in `model`, with a bar.
fn score_with(args: &Args, base: &Base, model: &Lm, other: &Lm) -> Result<Sensitivity> {
    let data = needed(args.data.as_ref(), "--data")?;
    let corpus = Corpus::load(data, &base.tokenizer, Packing::Documents)?;
    let windows = (args.tokens / args.seq_len.max(1)).max(1);
    let bar = progress("select", windows.min(corpus.windows(args.seq_len)) as u64);
    let scores = sensitivity(
        &base.lm()?,
        model,
        other,
        &corpus,
        windows,
        args.seq_len,
        &mut |done| bar.set_position(done as u64),
    );
    bar.finish_and_clear();
    scores
}

fn open(args: &Args) -> Result<Base> {
    Base::open(
        needed(args.teacher.as_ref(), "--teacher")?,
        args.device.get()?,
    )
}

fn score(args: &Args) -> Result<Sensitivity> {
    let bank = needed(args.bank.as_ref(), "--bank")?;
    needed(args.count, "--count")?;
    let base = open(args)?;
    let model = |name: &str| Checkpoint::open(&bank.join(name))?.model(&base.device, DType::F32);
    score_with(args, &base, &model("mamba2")?, &model("mla")?)
}

/// Every kind of layer, as the initialisation makes it, in every place of the teacher alone.
fn damages(args: &Args) -> Result<Damages> {
    let base = open(args)?;
    let layers = base.config().layers.len();
    let mla = |rank: &usize| {
        LayerKind::Mla(MlaKind {
            kv_lora_rank: Some(*rank),
            q_lora_rank: None,
        })
    };
    let mut kinds = vec![LayerKind::Mamba2];
    kinds.extend(args.ranks.iter().map(mla));
    // All sizes are checked before the first is made.
    let sized = |kind: &LayerKind| plan(base.config(), &args.plan.with_layers(vec![*kind; layers]));
    if let Some(rule) = args.plan.sizes.kv_lora_rank.filter(RankRule::is_open) {
        return Err(Error::invalid(format!(
            "--kv-rank {rule}: the budget method chooses among --ranks"
        )));
    }
    let students = kinds.iter().map(sized).collect::<Result<Vec<_>>>()?;
    let calibration = args.init.calibration(&base, None)?;
    let teacher = base.lm()?;
    let mut damages = Damages {
        tokens: 0,
        options: Vec::new(),
    };
    for (kind, student) in kinds.into_iter().zip(students) {
        let init: Init = args.init.init(&calibration, false, 0);
        let composed = base.compose(&student, &init)?;
        let weights = Weights::new(composed.tensors).to_device(&base.device, DType::F32)?;
        let lm = Lm::new(&composed.config, &weights)?;
        let found = score_with(args, &base, &teacher, &lm)?;
        damages.tokens = found.tokens;
        let loss = |s: &Score| Score {
            score: -s.score,
            standard_error: s.standard_error,
        };
        damages.options.push(Damage {
            kind,
            cost: student.layers[0].cost(student.hidden_size),
            layers: found.layers.iter().map(loss).collect(),
        });
    }
    Ok(damages)
}
