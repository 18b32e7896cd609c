//! `zebroid doctor`: what is wrong with this machine or a checkpoint, and what mends it.

use std::process::ExitCode;

use serde::Serialize;

use super::arg::hub::Model;
use super::show::{Progress, print, print_json};

mod machine;
mod model;

/// Check this machine (processor, memory, disk, caches, Hugging Face's settings) and, where one is named, a checkpoint: its config,
/// tensors, checksums, numbers, tokenizer and chat template. Exits with 1 if something fails; each failure says what mends it.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    zebroid doctor\n  \
    zebroid doctor ./hybrid\n  \
    zebroid doctor model.gguf --json")]
pub struct Args {
    /// Checkpoint folder of any format, or a GGUF file; all of it is read.
    model: Option<Model>,
    /// A JSON list instead of the lines.
    #[arg(long)]
    json: bool,
}

/// How a check went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Ok,
    /// It works, not as well as it could.
    Warning,
    Failure,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    state: State,
    found: String,
    /// A sentence that says what to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    mend: Option<String>,
}

impl Check {
    fn ok(name: &'static str, found: impl ToString) -> Self {
        Self {
            name,
            state: State::Ok,
            found: found.to_string(),
            mend: None,
        }
    }

    fn warning(name: &'static str, found: impl ToString, mend: impl ToString) -> Self {
        Self {
            state: State::Warning,
            mend: Some(mend.to_string()),
            ..Self::ok(name, found)
        }
    }

    fn failure(name: &'static str, found: impl ToString, mend: impl ToString) -> Self {
        Self {
            state: State::Failure,
            ..Self::warning(name, found, mend)
        }
    }

    fn line(&self) -> String {
        let state = match self.state {
            State::Ok => "ok",
            State::Warning => "warning",
            State::Failure => "FAILURE",
        };
        let mut line = format!("{state:<8} {:<18} {}\n", self.name, self.found);
        if let Some(mend) = &self.mend {
            line += &format!("{:<8} {:<18} → {mend}\n", "", "");
        }
        line
    }
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let mut checks = machine::checks();
    if let Some(model) = &args.model {
        checks.extend(model::checks(&model.fetch()?, &Progress::default())?);
    }
    let failures = checks.iter().filter(|c| c.state == State::Failure).count();
    match args.json {
        true => print_json(&checks)?,
        false => {
            let lines: String = checks.iter().map(Check::line).collect();
            let end = match failures {
                0 => "nothing failed".to_owned(),
                n => format!("{n} of {} checks failed", checks.len()),
            };
            print(format_args!("{lines}\n{end}\n"))?;
        }
    }
    Ok(ExitCode::from(u8::from(failures > 0)))
}
