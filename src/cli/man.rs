//! `zebroid man`: the manual, a page a command.

use std::path::{Path, PathBuf};

use clap::CommandFactory;
use clap_mangen::Man;

use super::Cli;
use super::show::print;
use crate::checkpoint::write_atomic;
use crate::{Error, Result};

/// Write the manual: a page for every command, as man reads them.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    zebroid man ~/.local/share/man/man1 && man zebroid-train-kd")]
pub struct Args {
    /// Folder for the pages; is made if it is not there.
    out: PathBuf,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    std::fs::create_dir_all(&args.out).map_err(Error::io("cannot create", &args.out))?;
    // `help` is clap's own.
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    let pages = write(&command, &args.out)?;
    print(format_args!(
        "{pages} pages written to {}\n",
        args.out.display()
    ))?;
    Ok(())
}

/// The page of a command and those of its own commands; how many there are.
fn write(command: &clap::Command, out: &Path) -> Result<usize> {
    let man = Man::new(command.clone());
    let path = out.join(man.get_filename());
    let mut text = Vec::new();
    man.render(&mut text)
        .map_err(Error::io("cannot write", &path))?;
    write_atomic(&path, &text)?;
    let inner = command.get_subcommands().map(|inner| write(inner, out));
    Ok(1 + inner.sum::<Result<usize>>()?)
}
