//! `zebroid select`: which layers should be MLA.

use std::path::{Path, PathBuf};

use candle_core::DType;
use serde_json::json;

use super::device::DeviceArg;
use super::output::{progress, table};
use crate::checkpoint::{Checkpoint, write_atomic};
use crate::convert::{Selector, select};
use crate::data::{Corpus, Packing, Tokenizer};
use crate::eval::sensitivity::{Sensitivity, sensitivity};
use crate::{Error, Result};

/// Score every layer of an ILD bank and choose the places of MLA.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    zebroid select --teacher ./teacher --bank ./bank --data validation.jsonl --count 2 --save-scores scores.json\n  \
    zebroid select --scores scores.json --count 3 --method greedy --json")]
pub struct Args {
    /// Llama checkpoint folder.
    #[arg(long, required_unless_present = "scores")]
    teacher: Option<PathBuf>,
    /// Result of train --stage ild.
    #[arg(long, required_unless_present = "scores")]
    bank: Option<PathBuf>,
    /// JSON lines to score on.
    #[arg(long, required_unless_present = "scores")]
    data: Option<PathBuf>,
    /// Scores that an earlier call saved, instead of scoring.
    #[arg(long, conflicts_with_all = ["teacher", "bank", "data"])]
    scores: Option<PathBuf>,
    /// Layers to become MLA.
    #[arg(long)]
    count: usize,
    #[arg(long, value_enum, default_value = "smart")]
    method: Selector,
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
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let scores = match (&args.scores, &args.teacher, &args.bank, &args.data) {
        (Some(path), ..) => read(path)?,
        (None, Some(teacher), Some(bank), Some(data)) => score(&args, teacher, bank, data)?,
        _ => return Err(Error::invalid("give --teacher, --bank and --data, or --scores").into()),
    };
    if let Some(path) = &args.save_scores {
        write_atomic(path, serde_json::to_string_pretty(&scores)?.as_bytes())?;
    }
    let values: Vec<f64> = scores.layers.iter().map(|s| s.score).collect();
    let chosen = select(args.method, &values, args.count)?;
    if args.json {
        let found = json!({ "method": args.method, "mla": chosen, "sensitivity": scores });
        println!("{}", serde_json::to_string_pretty(&found)?);
        return Ok(());
    }
    let rows = scores.layers.iter().enumerate().map(|(i, s)| {
        let mark = if chosen.contains(&i) { "mla" } else { "mamba2" };
        vec![
            i.to_string(),
            format!("{:.5} ± {:.5}", s.score, s.standard_error),
            mark.into(),
        ]
    });
    print!(
        "{}",
        table(
            &["layer", "score (nats/token)", "choice"],
            &rows.collect::<Vec<_>>()
        )
    );
    let list: Vec<String> = chosen.iter().map(usize::to_string).collect();
    println!(
        "\nKL of all Mamba2: {:.4} on {} tokens\n--mla {}",
        scores.kl_all_mamba2,
        scores.tokens,
        list.join(",")
    );
    Ok(())
}

fn read(path: &Path) -> Result<Sensitivity> {
    let text = std::fs::read_to_string(path).map_err(Error::io("cannot read", path))?;
    serde_json::from_str(&text).map_err(|e| Error::file(path, format!("not saved scores: {e}")))
}

fn score(args: &Args, teacher: &Path, bank: &Path, data: &Path) -> Result<Sensitivity> {
    let device = args.device.get()?;
    let open = |folder: &Path| Checkpoint::open(folder)?.model(&device, DType::F32);
    let (mla, mamba2) = (open(&bank.join("mla"))?, open(&bank.join("mamba2"))?);
    let corpus = Corpus::load(data, &Tokenizer::open(teacher)?, Packing::Documents)?;
    let windows = (args.tokens / args.seq_len.max(1)).max(1);
    let bar = progress("select", windows.min(corpus.windows(args.seq_len)) as u64);
    let scores = sensitivity(
        &open(teacher)?,
        &mla,
        &mamba2,
        &corpus,
        windows,
        args.seq_len,
        &mut |done| bar.set_position(done as u64),
    );
    bar.finish_and_clear();
    scores
}
