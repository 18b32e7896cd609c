//! `zebroid completions`: what a shell completes.

use clap::CommandFactory;
use clap_complete::Shell;

use super::Cli;
use super::show::print;

/// Write a shell's completions of commands and flags to standard output.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    zebroid completions bash > ~/.local/share/bash-completion/completions/zebroid\n  \
    zebroid completions zsh > ~/.zfunc/_zebroid   (with ~/.zfunc in fpath)\n  \
    zebroid completions fish > ~/.config/fish/completions/zebroid.fish")]
pub struct Args {
    /// The shell that reads them.
    #[arg(value_enum)]
    shell: Shell,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "zebroid", &mut text);
    print(String::from_utf8(text)?)?;
    Ok(())
}
