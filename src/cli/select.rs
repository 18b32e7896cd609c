//! `zebroid select`: what each layer should become.

use std::path::{Path, PathBuf};

use candle_core::DType;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::device::DeviceArg;
use super::init::InitArgs;
use super::output::{Progress, bytes, check_file, print, print_json, table};
use super::positive;
use crate::checkpoint::{Checkpoint, write_atomic};
use crate::convert::{PlanOptions, Selector, select};
use crate::data::{Batches, Corpus, Packing};
use crate::eval::sensitivity::{Score, Sensitivity, sensitivity};
use crate::mixer::Cost;
use crate::pipeline::{Base, Budget, Damages, Method, candidates, damages};
use crate::watch::Watch;
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
    #[arg(long, value_parser = positive)]
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
    #[arg(long, value_parser = positive, value_delimiter = ',', default_value = "8,16,32")]
    ranks: Vec<usize>,
    /// Tokens to score on.
    #[arg(long, value_parser = positive, default_value_t = 16_384)]
    tokens: usize,
    /// Tokens a window.
    #[arg(long, value_parser = positive, default_value_t = 256)]
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

/// What `--save-scores` keeps.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Saved {
    Damages(Damages),
    Sensitivity(Sensitivity),
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let selector = args.method.selector();
    args.save_scores
        .iter()
        .try_for_each(|path| check_file(path))?;
    let watch = Progress::default();
    let saved = match &args.scores {
        Some(path) => read(path)?,
        None if selector.is_none() => Saved::Damages(measure(&args, &watch)?),
        None => Saved::Sensitivity(score(&args, &watch)?),
    };
    drop(watch);
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
        print_json(&found)?;
        return Ok(());
    }
    let rows = scores.layers.iter().enumerate().map(|(i, s)| {
        let mark = if chosen.contains(&i) { "mla" } else { "mamba2" };
        vec![i.to_string(), show(s), mark.into()]
    });
    let headers = ["layer", "score (nats/token)", "choice"];
    let list: Vec<String> = chosen.iter().map(usize::to_string).collect();
    print(format_args!(
        "{}\nKL of all Mamba2: {:.4} on {} tokens\n--mla {}\n",
        table(&headers, &rows.collect::<Vec<_>>()),
        scores.kl,
        scores.tokens,
        list.join(",")
    ))?;
    Ok(())
}

fn show_budget(args: &Args, damages: &Damages) -> anyhow::Result<()> {
    let budget = Budget {
        kv_bytes: args.kv_bytes,
        state_bytes: args.state_bytes,
    };
    let chosen = damages.choose(budget)?;
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
        print_json(&found)?;
        return Ok(());
    }
    let names: Vec<String> = damages.options.iter().map(|o| o.kind.to_string()).collect();
    let mut headers = vec!["layer"];
    headers.extend(names.iter().map(String::as_str));
    headers.push("choice");
    let rows = (0..kinds.len()).map(|i| {
        let mut row = vec![i.to_string()];
        row.extend(damages.options.iter().map(|o| show(&o.layers[i])));
        row.push(kinds[i].clone());
        row
    });
    print(format_args!(
        "{}\nKL (nats/token) that each replacement alone costs, on {} tokens; of the choice {damage:.4} in all\n\
         {} of KV cache a token, {} of state\n--layers {}\n",
        table(&headers, &rows.collect::<Vec<_>>()),
        damages.tokens,
        bytes(2 * cost.kv_per_token),
        bytes(4 * cost.state),
        kinds.join(",")
    ))?;
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
    serde_json::from_str(&text).map_err(|e| {
        Error::file(
            path,
            format!("not scores that select --save-scores wrote: {e}"),
        )
    })
}

fn open(args: &Args) -> Result<(Base, Corpus)> {
    let base = Base::open(
        needed(args.teacher.as_ref(), "--teacher")?,
        args.device.get()?,
    )?;
    let data = needed(args.data.as_ref(), "--data")?;
    let corpus = Corpus::load(data, &base.tokenizer, Packing::Documents)?;
    corpus.check(1, args.seq_len)?;
    Ok((base, corpus))
}

fn score(args: &Args, watch: &dyn Watch) -> Result<Sensitivity> {
    let bank = needed(args.bank.as_ref(), "--bank")?;
    for name in ["mla", "mamba2"] {
        if !bank.join(name).is_dir() {
            let message =
                format!("no {name}/ inside: not an ILD bank (train --stage ild makes one)");
            return Err(Error::file(bank, message));
        }
    }
    needed(args.count, "--count")?;
    let (base, corpus) = open(args)?;
    let model = |name: &str| Checkpoint::open(&bank.join(name))?.model(&base.device, DType::F32);
    let windows = (args.tokens / args.seq_len.max(1)).max(1);
    let (teacher, len) = (base.lm()?, args.seq_len);
    let [mamba2, mla] = [model("mamba2")?, model("mla")?];
    sensitivity(&teacher, &mamba2, &mla, &corpus, windows, len, watch)
}

fn measure(args: &Args, watch: &dyn Watch) -> Result<Damages> {
    let (base, corpus) = open(args)?;
    candidates(base.config(), &args.plan, &args.ranks)?;
    let calibration = args.init.calibration(&base, None, watch)?;
    let init = args.init.init(&calibration, false, 0);
    let text = (&corpus, args.tokens, args.seq_len);
    damages(&base, &args.plan, &args.ranks, &init, text, watch)
}
