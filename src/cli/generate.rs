//! `zebroid generate`: text on standard output as it is decoded.

use std::path::PathBuf;

use super::arg::device::DeviceArg;
use super::show::interrupt;
use super::show::{print, print_json};
use crate::checkpoint::Checkpoint;
use crate::data::Tokenizer;
use crate::generate::{Engine, SamplingParams};

/// Continue a prompt.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    zebroid generate ./teacher --prompt \"Once upon a time\" --max-tokens 100\n  \
    zebroid generate ./hybrid --temperature 0.8 --top-p 0.9 --seed 7")]
pub struct Args {
    /// Checkpoint folder of any format, with its tokenizer.
    checkpoint: PathBuf,
    /// Text to continue; empty: start from the BOS token. Several are continued together.
    #[arg(long, default_value = "")]
    prompt: Vec<String>,
    /// 0 takes the likeliest token.
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Only the K likeliest tokens; 0: all.
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Only the likeliest tokens that together reach this probability.
    #[arg(long, default_value_t = 1.0)]
    top_p: f64,
    /// Only tokens with at least this share of the likeliest's probability.
    #[arg(long, default_value_t = 0.0)]
    min_p: f64,
    /// Seed of what is sampled.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Most tokens to add [default: 200, or what the model's context leaves].
    #[arg(long)]
    max_tokens: Option<usize>,
    #[command(flatten)]
    device: DeviceArg,
    /// One JSON object (of several prompts a list of them) with text and timings instead of streaming.
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let params = SamplingParams {
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        min_p: args.min_p,
        seed: args.seed,
        max_tokens: args.max_tokens,
        ..SamplingParams::default()
    };
    params.validate()?;
    let checkpoint = Checkpoint::open(&args.checkpoint)?;
    let tokenizer = Tokenizer::open(&args.checkpoint)?;
    let lm = checkpoint.model(&args.device.place()?)?;
    let engine = Engine::new(&lm, tokenizer)?;
    interrupt::install();
    let prompts: Vec<&str> = args.prompt.iter().map(String::as_str).collect();
    // One text is shown as it grows; several would grow into each other.
    let streams = !args.json && prompts.len() == 1;
    if streams {
        print(prompts[0])?;
    }
    let mut printed = Ok(());
    let found = engine.generate(&prompts, &params, &mut |_, piece| {
        if streams && printed.is_ok() {
            printed = print(piece);
        }
        printed.is_ok() && !interrupt::asked()
    })?;
    printed?;
    match (&found[..], args.json) {
        ([one], true) => print_json(one)?,
        (_, true) => print_json(&found)?,
        ([_], false) => print("\n")?,
        (_, false) => {
            for (prompt, generation) in prompts.iter().zip(&found) {
                print(format_args!("{prompt}{}\n\n", generation.text))?;
            }
        }
    }
    for generation in &found {
        tracing::info!(
            prompt_tokens = generation.prompt_tokens,
            completion_tokens = generation.completion_tokens,
            ttft_s = generation.ttft_s,
            tokens_per_s = generation.decode_tokens_per_s,
            "generated"
        );
    }
    Ok(())
}
