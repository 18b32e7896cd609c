//! `zebroid eval ppl`: perplexity of a text.

use std::path::Path;

use super::arg::device::DeviceArg;
use super::arg::hub::{DataFile, Model};
use super::positive;
use super::show::{Progress, print, print_json, table, thousands};
use crate::checkpoint::Checkpoint;
use crate::data::{Records, Text, Tokenizer, texts};
use crate::eval::ppl::{PplConfig, PplMode, ppl};
use crate::{Error, Result};

/// Perplexity (a token, a word) and bits per byte of any text, every token scored once in sliding windows.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    zebroid eval ppl ./hybrid --data validation.jsonl\n  \
    zebroid eval ppl ./hybrid --data book.txt --mode stream --window 2048 --stride 512 --json")]
pub struct Args {
    /// Checkpoint folder, .gguf file or Hugging Face id.
    checkpoint: Model,
    /// A file of texts, here or on the hub (train kd --help says in what forms); any other file is one document.
    #[arg(long)]
    data: DataFile,
    /// Whether the context is reset at each document.
    #[arg(long, value_enum, default_value = "documents")]
    mode: PplMode,
    /// Tokens a window [default: the model's max_position_embeddings, at most 4096].
    #[arg(long, value_parser = positive)]
    window: Option<usize>,
    /// Tokens from a window's beginning to the next one's [default: half a window].
    #[arg(long, value_parser = positive)]
    stride: Option<usize>,
    /// Tokens read at once.
    #[arg(long, value_parser = positive, default_value_t = 8192)]
    batch_tokens: usize,
    #[command(flatten)]
    device: DeviceArg,
    /// One JSON object instead of the table.
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let (place, checkpoint) = (args.device.place()?, args.checkpoint.fetch()?);
    let lm = Checkpoint::open(&checkpoint)?.model(&place)?;
    let tokenizer = Tokenizer::open(&checkpoint)?;
    tokenizer.check(lm.config.vocab_size)?;
    let texts = documents(&args.data.fetch()?, &tokenizer)?;
    let context = lm.config.max_position_embeddings;
    let window = args.window.unwrap_or(context.min(WINDOW));
    let stride = args.stride.unwrap_or(window / 2);
    let watch = Progress::default();
    let config = PplConfig {
        mode: args.mode,
        window,
        stride,
        batch_tokens: args.batch_tokens,
    };
    let report = ppl(&lm, &tokenizer, texts, config, &watch)?;
    drop(watch);
    if args.json {
        print_json(&report)?;
        return Ok(());
    }
    let rows = [
        ("perplexity", format!("{:.4}", report.perplexity)),
        ("bits per byte", format!("{:.4}", report.bits_per_byte)),
        ("word perplexity", format!("{:.4}", report.word_perplexity)),
        ("tokens", thousands(report.tokens)),
        ("bytes", thousands(report.bytes)),
    ];
    let rows = rows.map(|(name, value)| vec![name.to_owned(), value]);
    print(table(&["measure", "value"], &rows))?;
    Ok(())
}

/// Tokens a window at most where nobody says: activations grow with it.
const WINDOW: usize = 4096;

type Documents<'t> = Box<dyn Iterator<Item = Result<(Text, f64)>> + 't>;

/// The documents of a file, with the share of it that has been read with each; one that is no file of records is one document.
fn documents<'t>(path: &Path, tokenizer: &'t Tokenizer) -> Result<Documents<'t>> {
    if Records::is_named(path) {
        return Ok(Box::new(texts(path, tokenizer)?.with_shares()));
    }
    let text = std::fs::read_to_string(path).map_err(Error::io("cannot read", path))?;
    match text.is_empty() {
        true => Err(Error::file(path, "the file is empty")),
        false => Ok(Box::new(std::iter::once(Ok((Text::whole(text), 1.0))))),
    }
}
