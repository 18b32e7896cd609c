//! `zebroid generate`: text on standard output as it is decoded.

use std::path::PathBuf;

use candle_core::DType;

use super::device::DeviceArg;
use super::interrupt;
use super::output::{print, print_json};
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
    /// Empty: start from the BOS token.
    #[arg(long, default_value = "")]
    prompt: String,
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
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Most tokens to add [default: 200, or what the model's context leaves].
    #[arg(long)]
    max_tokens: Option<usize>,
    #[command(flatten)]
    device: DeviceArg,
    /// One JSON object with text and timings instead of streaming.
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
    };
    params.validate()?;
    let checkpoint = Checkpoint::open(&args.checkpoint)?;
    let tokenizer = Tokenizer::open(&args.checkpoint)?;
    let lm = checkpoint.model(&args.device.get()?, DType::F32)?;
    let engine = Engine::new(lm, tokenizer)?;
    interrupt::install();
    if !args.json {
        print(&args.prompt)?;
    }
    let mut printed = Ok(());
    let generation = engine.generate(&args.prompt, &params, &mut |piece| {
        if !args.json && printed.is_ok() {
            printed = print(piece);
        }
        printed.is_ok() && !interrupt::asked()
    })?;
    printed?;
    if args.json {
        print_json(&generation)?;
        return Ok(());
    }
    print("\n")?;
    tracing::info!(
        prompt_tokens = generation.prompt_tokens,
        completion_tokens = generation.completion_tokens,
        ttft_s = generation.ttft_s,
        tokens_per_s = generation.decode_tokens_per_s,
        "generated"
    );
    Ok(())
}
