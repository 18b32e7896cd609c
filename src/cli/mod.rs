//! The command line: one file per command; what they share is in `arg` (options) and `show` (what is printed).

// See `show`.
#![deny(clippy::print_stdout, clippy::print_stderr)]

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::LazyLock;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::numerics;

pub mod arg;
pub mod bench;
pub mod calibrate;
pub mod chat;
pub mod completions;
pub mod compose;
pub mod data;
pub mod demo;
pub mod doctor;
pub mod eval;
pub mod export;
pub mod generate;
pub mod harness;
pub mod info;
pub mod man;
pub mod parity;
pub mod plan;
pub mod plot;
pub mod ppl;
pub mod pretrain;
pub mod probe;
pub mod quantize;
pub mod retention;
pub mod run;
pub mod runs;
pub mod select;
pub mod serve;
pub mod show;
pub mod stories;
pub mod teach;
pub mod train;

/// Compose efficient hybrid (MLA + Mamba2) language models from pretrained Llama checkpoints.
#[derive(Debug, Parser)]
#[command(name = "zebroid", version = version(), arg_required_else_help = true)]
#[command(after_help = "Start with:  zebroid demo\n\
    Models can be named by Hugging Face ids, org/name[@revision][/FILE.gguf], files of data by \
    hf://datasets/org/name[@revision]/FILE, or splits by hf://datasets/org/name[/CONFIG/SPLIT]; a path that exists goes before an id. What is downloaded is kept where Hugging Face's own \
    tools keep it (HF_HUB_CACHE, HF_HOME/hub, or ~/.cache/huggingface/hub); HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE work as there.\n\
    Exit codes: 0 done, 1 failure, 2 bad input, 130 interrupted (it says what is kept).")]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
    /// More of what happens on standard error (RUST_LOG has the last word).
    #[arg(short, long, global = true)]
    pub verbose: bool,
}

/// With the fingerprint of what is computed: equal figures, equal results.
fn version() -> &'static str {
    static VERSION: LazyLock<String> = LazyLock::new(|| {
        format!(
            "{} (numerics {})",
            env!("CARGO_PKG_VERSION"),
            numerics::fingerprint()
        )
    });
    &VERSION
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// The whole pipeline on the embedded teacher: plan, compose, ILD bank, KD, evaluation, report.
    Demo(demo::Args),
    /// Carry out a recipe: from a teacher to a trained hybrid, resumable at any point.
    Run(run::Args),
    /// What a hybrid would cost, per layer and in total, before any weight is touched.
    Plan(plan::Args),
    /// Make a hybrid from a Llama checkpoint (or from an ILD bank's layers).
    Compose(compose::Args),
    /// Tokenise texts, and say what a corpus is made of.
    Data(data::Args),
    /// Keep statistics of the teacher's layers on a text, for the refined initialisation.
    Calibrate(calibrate::Args),
    /// Write down a teacher's likeliest tokens, for KD without it.
    Teach(teach::Args),
    /// Train a hybrid: ILD, KD (end to end or stepwise), preference optimisation.
    Train(train::Args),
    /// Train a small Llama from scratch.
    Pretrain(pretrain::Args),
    /// Score the layers of an ILD bank and choose the places of MLA (SMART and others).
    Select(select::Args),
    /// Write generated stories and their tokenizer.
    Stories(stories::Args),
    /// Measure a model.
    #[command(subcommand)]
    Eval(eval::Eval),
    /// Draw training curves.
    Plot(plot::Args),
    /// List, compare and remove runs.
    Runs(runs::Args),
    /// Compare a checkpoint with recorded outputs, layer by layer.
    Parity(parity::Args),
    /// Continue prompts.
    Generate(generate::Args),
    /// Talk with a model.
    Chat(chat::Args),
    /// Serve models over HTTP: OpenAI's interface, and a page to talk with them.
    Serve(serve::Args),
    /// Write a checkpoint in another format (zebroid, AMD's, Hugging Face Llama, GGUF).
    Export(export::Args),
    /// Round matrices to 8, 6 or 4 bits, in a GGUF file.
    Quantize(quantize::Args),
    /// Measure speed and memory.
    #[command(subcommand)]
    Bench(bench::Bench),
    /// What a checkpoint is: sizes, layers, memory, tokenizer, origin.
    Info(info::Args),
    /// Check this machine, and a checkpoint.
    Doctor(doctor::Args),
    /// Write a shell's completions.
    Completions(completions::Args),
    /// Write the manual pages.
    Man(man::Args),
}

/// Reads the command line, and does what it says.
///
/// # Errors
/// What a command could not do. [`crate::Error::Closed`] is no failure: whoever read the output has left.
pub fn main() -> anyhow::Result<ExitCode> {
    let parsed = signed(Cli::command()).try_get_matches();
    let cli = match parsed.and_then(|found| Cli::from_arg_matches(&found)) {
        Ok(cli) => cli,
        // Help and version too: they go to standard output.
        Err(said) => {
            let written = said.print().and_then(|()| io::stdout().flush());
            if !said.use_stderr() {
                show::printed(written)?;
            }
            return Ok(ExitCode::from(said.exit_code() as u8));
        }
    };
    let level = match &cli.command {
        _ if cli.verbose => "zebroid=debug",
        Command::Serve(_) => "zebroid=info",
        _ => "zebroid=warn",
    };
    let filter =
        tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| level.into());
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        // It would be said on the standard error that just failed, with a panic.
        .log_internal_errors(false);
    // A second initialisation (tests) keeps the first.
    let _ = match &cli.command {
        Command::Serve(args) if args.log_json => lines.json().flatten_event(true).try_init(),
        _ => lines.try_init(),
    };
    match cli.command {
        Command::Demo(args) => demo::run(args)?,
        Command::Run(args) => run::run(args)?,
        Command::Plan(args) => plan::run(args)?,
        Command::Compose(args) => compose::run(args)?,
        Command::Data(args) => data::run(args)?,
        Command::Calibrate(args) => calibrate::run(args)?,
        Command::Teach(args) => teach::run(args)?,
        Command::Train(args) => train::run(args)?,
        Command::Pretrain(args) => pretrain::run(args)?,
        Command::Select(args) => select::run(args)?,
        Command::Stories(args) => stories::run(args)?,
        Command::Eval(args) => eval::run(args)?,
        Command::Plot(args) => plot::run(args)?,
        Command::Runs(args) => runs::run(args)?,
        Command::Parity(args) => return parity::run(args),
        Command::Generate(args) => generate::run(args)?,
        Command::Chat(args) => chat::run(args)?,
        Command::Serve(args) => serve::run(args)?,
        Command::Export(args) => export::run(args)?,
        Command::Quantize(args) => quantize::run(args)?,
        Command::Bench(args) => bench::run(args)?,
        Command::Info(args) => info::run(args)?,
        Command::Doctor(args) => return doctor::run(args),
        Command::Completions(args) => completions::run(args)?,
        Command::Man(args) => man::run(args)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The value of an option that counts what cannot be none.
fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("must not be 0".into()),
        Ok(count) => Ok(count),
        Err(error) => Err(format!("not a whole number above 0 ({error})")),
    }
}

/// Every option takes a negative number for its value and not for a flag, so that the option's own check says
/// what is wrong with it (`--lr -1`).
fn signed(command: clap::Command) -> clap::Command {
    let option = |arg: clap::Arg| match arg.is_positional() || !arg.get_action().takes_values() {
        true => arg,
        false => arg.allow_negative_numbers(true),
    };
    command.mut_args(option).mut_subcommands(signed)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use clap::CommandFactory;

    use super::Cli;
    use crate::convert::PlanOptions;
    use crate::pipeline::stage::select::SelectStage;
    use crate::train::TrainSettings;
    use crate::train::stage::dpo::DpoConfig;
    use crate::train::stage::ild::IldConfig;
    use crate::train::stage::kd::KdConfig;

    /// Settings that several stages share are flattened into one command: two flags of one name would
    /// hide each other (clap says so in debug builds only).
    #[test]
    fn flags_of_a_command_have_names_of_their_own() {
        fn check(command: &clap::Command) {
            let (mut ids, mut flags) = (BTreeSet::new(), BTreeSet::new());
            for argument in command.get_arguments() {
                let (command, id) = (command.get_name(), argument.get_id());
                assert!(ids.insert(id), "{command} has two arguments {id}");
                if let Some(long) = argument.get_long() {
                    assert!(flags.insert(long), "{command} has two --{long}");
                }
            }
            command.get_subcommands().for_each(check);
        }
        check(&Cli::command());
    }

    #[test]
    fn every_flag_has_help() {
        fn check(command: &clap::Command) {
            for argument in command.get_arguments() {
                let said = argument.get_help().or(argument.get_long_help());
                let (name, argument) = (command.get_name(), argument.get_id());
                assert!(said.is_some(), "{name}: {argument} has no help");
            }
            command.get_subcommands().for_each(check);
        }
        check(&Cli::command());
    }

    /// A setting is spelled on the command line as in a recipe.
    #[test]
    fn settings_have_one_spelling() {
        fn fields<T: serde::Serialize>(of: &T) -> Vec<String> {
            let value = serde_json::to_value(of).unwrap();
            value.as_object().unwrap().keys().cloned().collect()
        }
        let cli = Cli::command();
        let train = cli.find_subcommand("train").unwrap();
        let command = |name: &str| train.find_subcommand(name).unwrap();
        let select = cli.find_subcommand("select").unwrap();
        for (command, fields) in [
            (select, fields(&SelectStage::default())),
            (command("kd"), fields(&TrainSettings::default())),
            (command("kd"), fields(&KdConfig::default())),
            (command("ild"), fields(&IldConfig::default())),
            (command("dpo"), fields(&DpoConfig::default())),
            (command("ild"), fields(&PlanOptions::default())),
        ] {
            for field in fields {
                let flag = field.replace('_', "-");
                let known = command.get_arguments().any(|argument| {
                    let names = argument.get_long_and_visible_aliases().unwrap_or_default();
                    names.contains(&flag.as_str())
                });
                assert!(known, "{}: no --{flag}", command.get_name());
            }
        }
    }
}
