//! `zebroid stories`: the text that the embedded teacher was trained on.

use std::path::PathBuf;

use super::positive;
use super::show::print;
use crate::checkpoint::check_output;
use crate::data::stories;
use crate::{Error, Result};

/// Write generated stories, preference pairs about them, exercises in their words (JSON lines), and their tokenizer.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  zebroid stories ./stories --count 40000 --seed 1")]
pub struct Args {
    /// Folder for stories.jsonl, preferences.jsonl, exercises.jsonl, tokenizer.json and tokenizer_config.json; must not exist.
    out: PathBuf,
    /// Stories, pairs and exercises, of each.
    #[arg(long, value_parser = positive, default_value_t = 40_000)]
    count: usize,
    /// Different seeds give unrelated stories.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    // Nothing is replaced here, as there is no --force.
    if args.out.symlink_metadata().is_ok() {
        let message = "already exists; choose another folder, or remove this one";
        return Err(Error::file(&args.out, message).into());
    }
    check_output(&args.out, false, &[])?;
    write(&args)?;
    print(format_args!("written to {}\n", args.out.display()))?;
    Ok(())
}

fn write(args: &Args) -> Result<()> {
    std::fs::create_dir_all(&args.out).map_err(Error::io("cannot create", &args.out))?;
    stories::write_tokenizer(&args.out)?;
    stories::write_jsonl(&args.out.join("stories.jsonl"), args.seed, args.count)?;
    stories::write_preferences(&args.out.join("preferences.jsonl"), args.seed, args.count)?;
    stories::write_exercises(&args.out.join("exercises.jsonl"), args.seed, args.count)
}
