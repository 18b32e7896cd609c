//! `zebroid parity`: a checkpoint against recorded outputs.

use std::path::PathBuf;
use std::process::ExitCode;

use super::arg::device::DeviceArg;
use super::arg::hub::Model;
use super::show::{note, print, print_json, table};
use crate::checkpoint::Checkpoint;
use crate::eval::parity::parity;

/// Maximum differences per layer; exits with 1 past the tolerance and names the first layer that departs.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  zebroid parity ./hybrid ./hybrid/expected.safetensors --tolerance 1e-4"
)]
pub struct Args {
    /// Checkpoint folder of any format, .gguf file or Hugging Face id.
    checkpoint: Model,
    /// input_ids with hidden_states, mixer_out and logits.
    expected: PathBuf,
    /// Greatest difference that is taken for equal.
    #[arg(long, default_value_t = 1e-4)]
    tolerance: f64,
    #[command(flatten)]
    device: DeviceArg,
    /// One JSON object instead of the table.
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let lm = Checkpoint::open(&args.checkpoint.fetch()?)?.model(&args.device.place()?)?;
    let report = parity(&lm, &args.expected)?;
    let departure = report.first_departure(args.tolerance);
    let printed = if args.json {
        let mut value = serde_json::to_value(&report)?;
        value["tolerance"] = args.tolerance.into();
        value["departs_at"] = departure.as_ref().map(|(name, _)| name.clone()).into();
        print_json(&value)
    } else {
        let show = |gap: Option<f64>| gap.map_or("-".into(), |gap| format!("{gap:.2e}"));
        let mut rows: Vec<_> = report
            .layers
            .iter()
            .enumerate()
            .map(|(i, l)| vec![i.to_string(), show(l.input), show(l.mixer_out)])
            .collect();
        rows.push(vec![
            "final norm".into(),
            show(report.final_hidden),
            String::new(),
        ]);
        rows.push(vec!["logits".into(), show(report.logits), String::new()]);
        print(table(&["layer", "input", "mixer output"], &rows))
    };
    Ok(match departure {
        None => printed.map(|()| ExitCode::SUCCESS)?,
        // Whoever closes the pipe is told of it all the same.
        Some((name, gap)) => {
            note(format_args!(
                "departs at {name}: {gap:.2e} is above the tolerance {:.0e}",
                args.tolerance
            ));
            ExitCode::from(1)
        }
    })
}
