//! `zebroid export`: the same weights, bit for bit, in another checkpoint format.

use std::path::PathBuf;

use super::show::print;
use crate::checkpoint::{self, Checkpoint, Format};

/// Write a checkpoint in another format.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  zebroid export ./Zebra-Llama-1B-4MLA-12Mamba-SFT ./own --format zebroid"
)]
pub struct Args {
    /// Checkpoint folder of any format.
    checkpoint: PathBuf,
    /// Folder to write; must not exist.
    out: PathBuf,
    /// The format to write.
    #[arg(long, value_enum)]
    format: Format,
    /// Replace OUT if it exists.
    #[arg(long)]
    force: bool,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let _lock = checkpoint::claim(&args.out, args.force, &[&args.checkpoint])?;
    let source = Checkpoint::open(&args.checkpoint)?;
    let stored = source.stored()?;
    checkpoint::save(
        &args.out,
        args.format,
        &source.config,
        &stored,
        Some(&args.checkpoint),
        args.force,
    )?;
    print(format_args!("written to {}\n", args.out.display()))?;
    Ok(())
}
