//! `zebroid generate`: text on standard output as it is decoded.

use std::io::Read;
use std::path::{Path, PathBuf};

use super::arg::engine::EngineArg;
use super::arg::hub::Model;
use super::arg::sampling::SamplingArg;
use super::positive;
use super::show::interrupt;
use super::show::{print, print_json};
use crate::generate::Generation;
use crate::{Error, Result};

/// Continue prompts.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    zebroid generate ./teacher --prompt \"Once upon a time\" --max-tokens 100\n  \
    zebroid generate ./hybrid --temperature 0.8 --top-p 0.9 --seed 7 -n 3\n  \
    zebroid generate model.gguf --prompt-file prompt.txt --cache-type int8\n  \
    zebroid generate HuggingFaceTB/SmolLM2-135M --prompt \"Once upon a time\"\n  \
    zebroid generate ./hybrid --prompt \"A person: \" --json-schema person.json\n  \
    zebroid generate ./llama-8b --draft ./hybrid-1b --prompt-file prompt.txt\n  \
    cat prompts.txt | zebroid generate ./hybrid --prompts - --json")]
pub struct Args {
    /// Checkpoint folder of any format, with its tokenizer, a .gguf file, or a Hugging Face id: org/name[@revision][/FILE.gguf].
    checkpoint: Model,
    /// Text to continue; none at all: start from the BOS token. Several are continued together.
    #[arg(long)]
    prompt: Vec<String>,
    /// A file that is a prompt as a whole; - is standard input.
    #[arg(long)]
    prompt_file: Vec<PathBuf>,
    /// A file with a prompt on every line; - is standard input.
    #[arg(long)]
    prompts: Option<PathBuf>,
    /// Answers to each prompt, which is read once for all of them.
    #[arg(short, long, value_parser = positive, default_value_t = 1)]
    n: usize,
    #[command(flatten)]
    sampling: SamplingArg,
    #[command(flatten)]
    engine: EngineArg,
    /// One JSON object (of several answers a list of them) with text and timings instead of streaming.
    #[arg(long)]
    json: bool,
}

impl Args {
    fn texts(&self) -> Result<Vec<String>> {
        let mut texts = self.prompt.clone();
        for path in &self.prompt_file {
            texts.push(read(path)?);
        }
        if let Some(path) = &self.prompts {
            let text = read(path)?;
            let lines = text.lines().filter(|line| !line.trim().is_empty());
            texts.extend(lines.map(str::to_owned));
            if texts.is_empty() {
                return Err(Error::file(
                    path,
                    "holds no prompt: write one on every line",
                ));
            }
        }
        if texts.is_empty() {
            texts.push(String::new());
        }
        Ok(texts)
    }
}

/// A file, or standard input.
fn read(path: &Path) -> Result<String> {
    if path != Path::new("-") {
        return std::fs::read_to_string(path).map_err(Error::io("cannot read", path));
    }
    let mut text = String::new();
    let read = std::io::stdin().read_to_string(&mut text);
    read.map_err(Error::io("cannot read", path))?;
    Ok(text)
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let params = args.sampling.params()?;
    let texts = args.texts()?;
    let engine = args.engine.open(&args.checkpoint.fetch()?)?;
    interrupt::install();
    let prompts: Vec<&str> = texts.iter().map(String::as_str).collect();
    // One text is shown as it grows; several would grow into each other.
    let streams = !args.json && prompts.len() * args.n == 1;
    if streams {
        print(prompts[0])?;
    }
    let mut printed = Ok(());
    let found = engine.generate(&prompts, args.n, &params, &mut |_, piece| {
        if streams && printed.is_ok() {
            printed = print(piece);
        }
        printed.is_ok() && !interrupt::asked()
    })?;
    printed?;
    let found: Vec<Generation> = found.into_iter().flatten().collect();
    match (&found[..], args.json) {
        ([one], true) => print_json(one)?,
        (_, true) => print_json(&found)?,
        ([_], false) => print("\n")?,
        (_, false) => {
            for (i, generation) in found.iter().enumerate() {
                let prompt = prompts[i / args.n];
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
            drafted = generation.drafted_tokens,
            accepted = generation.accepted_tokens,
            "generated"
        );
    }
    Ok(())
}
