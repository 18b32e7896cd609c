//! `zebroid bench data`: tokenising a text, drawing batches from it, and in how much memory.

use std::time::Instant;

use serde::Serialize;

use crate::cli::arg::data;
use crate::cli::arg::hub::Model;
use crate::cli::positive;
use crate::cli::show::{Progress, bytes, print, print_json, table, thousands};
use crate::data::{Batches, Packing, Tokenizer};
use crate::hub::Part;
use crate::op::runtime::peak_memory;
use crate::pipeline::Text;

/// A text's tokens, made or found in the cache (ZEBROID_CACHE), and batches of them in training's order.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  \
    zebroid bench data train.jsonl --tokenizer ./teacher --seq-len 2048 --batch-size 16")]
pub struct Args {
    /// Texts (train kd --help says in what forms).
    #[arg(value_name = "TEXT", required = true)]
    data: Vec<Text>,
    /// Folder with tokenizer.json, a GGUF file, or a Hugging Face id.
    #[arg(long)]
    tokenizer: Model,
    /// Windows a batch.
    #[arg(long, value_parser = positive, default_value_t = 16)]
    batch_size: usize,
    /// Tokens a window.
    #[arg(long, value_parser = positive, default_value_t = 256)]
    seq_len: usize,
    /// Batches drawn.
    #[arg(long, value_parser = positive, default_value_t = 1000)]
    batches: usize,
    /// One JSON object instead of the table.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    tokens: usize,
    /// Seconds until the first batch can be drawn.
    open_s: f64,
    open_tokens_per_s: f64,
    draw_tokens_per_s: f64,
    /// Of the whole process; absent where the system does not tell.
    peak_rss_bytes: Option<usize>,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let tokenizer = Tokenizer::open(&args.tokenizer.part(Part::Tokenizer)?)?;
    let (rows, len) = (args.batch_size, args.seq_len);
    let (watch, started) = (Progress::default(), Instant::now());
    let corpus = data::corpus(&args.data, &tokenizer, Packing::Documents, &watch)?;
    corpus.check(rows, len)?;
    let open_s = started.elapsed().as_secs_f64();
    drop(watch);
    let started = Instant::now();
    for index in 0..args.batches {
        std::hint::black_box(corpus.batch(0, index as u64, rows, len)?);
    }
    let drawn = (args.batches * rows * len) as f64;
    let report = Report {
        tokens: corpus.tokens(),
        open_s,
        open_tokens_per_s: corpus.tokens() as f64 / open_s,
        draw_tokens_per_s: drawn / started.elapsed().as_secs_f64(),
        peak_rss_bytes: peak_memory(),
    };
    if args.json {
        print_json(&report)?;
        return Ok(());
    }
    let peak = report.peak_rss_bytes;
    let rows = [
        ("tokens", thousands(report.tokens)),
        ("seconds to open", format!("{:.1}", report.open_s)),
        (
            "tokens/s opened",
            thousands(report.open_tokens_per_s as usize),
        ),
        (
            "tokens/s drawn",
            thousands(report.draw_tokens_per_s as usize),
        ),
        ("peak memory", peak.map_or("unknown".into(), bytes)),
    ];
    let rows = rows.map(|(name, value)| vec![name.to_owned(), value]);
    print(table(&["data", ""], &rows))?;
    Ok(())
}
