//! `zebroid plot`: curves of training runs.

use std::path::{Path, PathBuf};

use super::show::{check_file, print};
use crate::checkpoint::write_atomic;
use crate::report::{Series, line_svg};
use crate::{Error, Result};

/// Draw a figure of several runs over the tokens they saw, from their metrics.jsonl.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    zebroid plot kl.svg ./distilled\n  \
    zebroid plot kl.svg refined=runs/a published=runs/b --metric eval_kl --title \"Held-out KL\"")]
pub struct Args {
    /// The picture (SVG).
    out: PathBuf,
    /// Results of train, each as FOLDER or NAME=FOLDER; several folders of one curve are joined with +
    /// (NAME=ild+kd).
    #[arg(required = true, value_name = "[NAME=]RUN")]
    runs: Vec<String>,
    /// A field of metrics.jsonl: loss, kl, eval_kl, grad_norm, layer_grad_norm/3 ..
    #[arg(long, default_value = "loss")]
    metric: String,
    /// Words above the curves.
    #[arg(long, default_value = "")]
    title: String,
    /// A linear y axis instead of a logarithmic one.
    #[arg(long)]
    linear: bool,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    check_file(&args.out)?;
    let series = args.runs.iter().map(|run| {
        let (name, folders) = run.split_once('=').unwrap_or((run, run));
        curve(name, folders.split('+').map(Path::new), &args.metric)
    });
    let series = series.collect::<Result<Vec<_>>>()?;
    let svg = line_svg(&args.title, "tokens", &args.metric, &series, !args.linear);
    write_atomic(&args.out, svg.as_bytes())?;
    print(format_args!("written to {}\n", args.out.display()))?;
    Ok(())
}

/// A figure over the tokens of runs that went on from each other.
///
/// # Errors
/// Metrics that cannot be read, or a run without that figure.
pub fn curve<'a>(
    name: &str,
    folders: impl Iterator<Item = &'a Path>,
    metric: &str,
) -> Result<Series> {
    let mut points = Vec::new();
    let mut before = 0.0;
    for folder in folders {
        let path = folder.join("metrics.jsonl");
        let text = std::fs::read_to_string(&path).map_err(Error::io("cannot read", &path))?;
        let mut tokens = 0.0;
        let found = points.len();
        for line in text.lines() {
            let step: serde_json::Value =
                serde_json::from_str(line).map_err(|e| Error::file(&path, e))?;
            let part = metric.split_once('/');
            let part = part.and_then(|(name, index)| Some((name, index.parse::<usize>().ok()?)));
            let field = match part {
                Some((name, index)) => &step[name][index],
                None => &step[metric],
            };
            tokens = step["tokens"].as_f64().unwrap_or(0.0);
            let value = field.as_f64().or_else(|| field[0].as_f64());
            points.extend(value.map(|value| (before + tokens, value)));
        }
        if points.len() == found {
            return Err(Error::file(&path, format!("no step has a number {metric}")));
        }
        before += tokens;
    }
    Ok(Series::new(name, points))
}
