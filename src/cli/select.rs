//! `zebroid select`: what each layer should become.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::arg::data;
use super::arg::device::DeviceArg;
use super::arg::hub::Model;
use super::arg::init::InitArgs;
use super::positive;
use super::show::{Progress, bytes, check_file, print, print_json, table, thousands};
use crate::checkpoint::{Bank, write_atomic};
use crate::convert::{PlanOptions, Selector};
use crate::data::{Batches, Corpus, Packing};
use crate::eval::sensitivity::Score;
use crate::mixer::{Cost, LayerKind};
use crate::pipeline::stage::select::{Budget, Candidates, Damages, Places, SelectStage, fitting};
use crate::pipeline::{Base, CANDIDATES, Text};
use crate::watch::Watch;
use crate::{Error, Result};

/// Choose places from an ILD bank (smart, greedy, uniform), or the candidate of every layer under a budget (budget).
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    zebroid select --teacher ./teacher --bank ./bank --data validation.jsonl --count 2 --save-scores scores.json\n  \
    zebroid select --scores scores.json --count 3 --method greedy --json\n  \
    zebroid select --teacher ./teacher --bank ./bank --place mla:16 --elsewhere mamba2 --data validation.jsonl --count 2\n  \
    zebroid select --method budget --teacher ./teacher --bank ./bank --data validation.jsonl --kv-bytes 48\n  \
    zebroid select --method budget --teacher ./teacher --data validation.jsonl --calibration train.jsonl \\\n    \
      --kv-bytes 48 --state-bytes 20000 --candidates mamba2,mla:8,mla:16 --rope-dim 4")]
pub struct Args {
    /// Llama checkpoint folder or Hugging Face id.
    #[arg(long, required_unless_present = "scores")]
    teacher: Option<Model>,
    /// Result of train ild, whose candidates are chosen from; budget goes without.
    #[arg(long)]
    bank: Option<PathBuf>,
    /// Texts to score on.
    #[arg(long, value_name = "TEXT", required_unless_present = "scores")]
    data: Vec<Text>,
    /// Scores that an earlier call saved, instead of scoring.
    #[arg(long, conflicts_with_all = ["teacher", "bank", "data"])]
    scores: Option<PathBuf>,
    #[command(flatten)]
    select: SelectStage,
    /// Tokens per window.
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
    Places(Places),
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let selector = args.select.method.selector();
    args.save_scores
        .iter()
        .try_for_each(|path| check_file(path))?;
    let watch = Progress::default();
    let saved = match &args.scores {
        Some(path) => read(path)?,
        None if selector.is_none() => Saved::Damages(measure(&args, &watch)?),
        None => Saved::Places(score(&args, &watch)?),
    };
    drop(watch);
    if let Some(path) = &args.save_scores {
        write_atomic(path, serde_json::to_string_pretty(&saved)?.as_bytes())?;
    }
    match (selector, saved) {
        (Some(selector), Saved::Places(scores)) => {
            args.select
                .validate(Some(&[scores.place, scores.elsewhere]))?;
            show_places(&args, selector, &scores)
        }
        (None, Saved::Damages(damages)) => show_budget(&args, &damages),
        _ => Err(Error::invalid(
            "these scores are of another method: budget needs damages, the others a bank's scores",
        )
        .into()),
    }
}

fn show_places(args: &Args, selector: Selector, places: &Places) -> anyhow::Result<()> {
    let (chosen, kinds) = places.choose(selector, args.select.count()?)?;
    let kinds: Vec<String> = kinds.iter().map(LayerKind::to_string).collect();
    if args.json {
        let found = json!({
            "method": selector,
            "chosen": chosen,
            "layers": kinds,
            "sensitivity": places,
        });
        print_json(&found)?;
        return Ok(());
    }
    let scores = &places.scores;
    let rows = (scores.layers.iter().zip(&kinds).enumerate())
        .map(|(i, (score, kind))| vec![i.to_string(), show(score), kind.clone()]);
    let headers = ["layer", "score (nats/token)", "choice"];
    let list: Vec<String> = chosen.iter().map(usize::to_string).collect();
    // The shorter spelling of a plan, where it says the same.
    let flag = match [places.place, places.elsewhere] == CANDIDATES {
        true => format!("--mla {}", list.join(",")),
        false => format!("--layers {}", kinds.join(",")),
    };
    print(format_args!(
        "{}\nKL of all {}: {:.4} on {} tokens\n{flag}\n",
        table(&headers, &rows.collect::<Vec<_>>()),
        places.elsewhere,
        scores.kl,
        scores.tokens,
    ))?;
    Ok(())
}

fn show_budget(args: &Args, damages: &Damages) -> anyhow::Result<()> {
    let chosen = damages.choose(args.select.budget())?;
    let cost = chosen.iter().fold(Cost::default(), |sum, c| sum + c.cost);
    let damage: f64 = chosen.iter().map(|c| c.damage).sum();
    let kinds: Vec<String> = chosen.iter().map(|c| c.kind.to_string()).collect();
    if args.json {
        let found = json!({
            "method": args.select.method,
            "layers": kinds,
            "length": damages.length,
            "kv_bytes": 2 * cost.cached,
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
         {} of KV cache a token at {} tokens, {} of state\n--layers {}\n",
        table(&headers, &rows.collect::<Vec<_>>()),
        damages.tokens,
        bytes((2 * cost.cached).div_ceil(damages.length.max(1))),
        thousands(damages.length),
        bytes(4 * cost.state),
        kinds.join(",")
    ))?;
    Ok(())
}

fn show(score: &Score) -> String {
    format!("{:.5} ± {:.5}", score.score, score.standard_error)
}

fn needed<T>(value: Option<T>, flag: &str) -> Result<T> {
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

fn open(args: &Args, watch: &dyn Watch) -> Result<(Base, Corpus)> {
    let teacher = needed(args.teacher.as_ref(), "--teacher")?;
    let base = Base::open(&teacher.fetch()?, args.device.place()?)?;
    let corpus = data::corpus(&args.data, &base.tokenizer, Packing::Documents, watch)?;
    corpus.check(1, args.seq_len)?;
    Ok((base, corpus))
}

/// The bank that is chosen from, and whether the settings fit it.
fn bank(args: &Args) -> Result<Option<Bank>> {
    let bank = args.bank.as_ref().map(|folder| Bank::open(folder));
    let bank = bank.transpose()?;
    let kinds = bank.as_ref().map(Bank::kinds);
    args.select.validate(kinds.as_deref())?;
    Ok(bank)
}

fn score(args: &Args, watch: &dyn Watch) -> Result<Places> {
    let bank = needed(bank(args)?, "--bank")?;
    let (base, corpus) = open(args, watch)?;
    args.select
        .scores(&base, &bank, (&corpus, args.seq_len), watch)
}

fn measure(args: &Args, watch: &dyn Watch) -> Result<Damages> {
    let (bank, select) = (bank(args)?, &args.select);
    let (base, corpus) = open(args, watch)?;
    let text = (&corpus, args.seq_len);
    if let Some(bank) = &bank {
        return select.damages(&base, &Candidates::Bank(bank), text, watch);
    }
    // Sizes are refused before the text for the initialisation is read.
    let (length, budget) = (select.length(base.config()), Budget::default());
    fitting(base.config(), &args.plan, select.born(), length, budget)?;
    let calibration = args.init.calibration(&base, &[], watch)?;
    let init = args.init.init(&calibration, false, 0);
    let candidates = Candidates::Born {
        options: &args.plan,
        kinds: select.born(),
        init: &init,
    };
    select.damages(&base, &candidates, text, watch)
}
