//! `zebroid runs`: what has been trained, how it went, and what may go.

use std::path::PathBuf;
use std::time::Duration;

use indicatif::HumanDuration;
use serde_json::{Map, json};

use super::plot::curve;
use super::show::{bytes, check_file, note, print, print_json, table, thousands};
use crate::Result;
use crate::checkpoint::{Checkpoint, write_atomic};
use crate::report::line_svg;
use crate::train::runs::{Run, State, list};

/// List runs, finished or not, newest first: all folders inside that train or compose has made, each stage of a recipe for
/// itself.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
#[command(after_help = "Examples:\n  \
    zebroid runs\n  \
    zebroid runs show ./distilled\n  \
    zebroid runs compare ./published ./refined --plot kl.svg --metric eval_kl\n  \
    zebroid runs prune runs --partial --yes")]
pub struct Args {
    #[command(subcommand)]
    action: Option<Action>,
    /// Folder to look in.
    #[arg(default_value = ".")]
    folder: PathBuf,
    /// A JSON list instead of the table.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Settings, layers and last figures of a run.
    Show(ShowArgs),
    /// Settings that differ, and figures side by side.
    Compare(CompareArgs),
    /// Remove old or unfinished runs; without --yes only say which.
    Prune(PruneArgs),
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  zebroid runs show ./distilled")]
struct ShowArgs {
    /// Folder of a result, there already or on its way.
    run: PathBuf,
    /// One JSON object instead of the tables.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  \
    zebroid runs compare ./published ./refined --plot kl.svg --metric eval_kl")]
struct CompareArgs {
    /// Folders of results, there already or on their way.
    #[arg(required = true, num_args = 2.., value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// Draw the runs' curves (SVG).
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// What is drawn, a field of metrics.jsonl.
    #[arg(long, default_value = "loss", requires = "plot")]
    metric: String,
    /// One JSON object instead of the tables.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("which").required(true))]
#[command(after_help = "Examples:\n  \
    zebroid runs prune runs --keep 3\n  \
    zebroid runs prune . --partial --yes")]
struct PruneArgs {
    /// Folder to look in.
    #[arg(default_value = ".")]
    folder: PathBuf,
    /// Remove all finished runs but the newest so many.
    #[arg(long, value_name = "COUNT", group = "which")]
    keep: Option<usize>,
    /// Remove the unfinished runs that no process works on.
    #[arg(long, group = "which")]
    partial: bool,
    /// Remove them, and do not only say which.
    #[arg(long)]
    yes: bool,
    /// One JSON object instead of the table.
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    match args.action {
        Some(Action::Show(args)) => show(&args),
        Some(Action::Compare(args)) => compare(&args),
        Some(Action::Prune(args)) => prune(&args),
        None => {
            let runs = list(&args.folder)?;
            match (args.json, runs.is_empty()) {
                (true, _) => print_json(&runs),
                (false, true) => print(format_args!("no runs in {}\n", args.folder.display())),
                (false, false) => {
                    runs.iter().flat_map(|run| &run.error).for_each(note);
                    print(listed(&runs))
                }
            }
        }
    }?;
    Ok(())
}

const SHOWN_SAMPLES: usize = 3;

const HEADERS: [&str; 9] = [
    "run", "state", "stage", "steps", "tokens", "loss", "eval KL", "age", "size",
];

fn listed(runs: &[Run]) -> String {
    table(&HEADERS, &runs.iter().map(row).collect::<Vec<_>>())
}

fn row(run: &Run) -> Vec<String> {
    let figure = |value: Option<f64>| value.map_or("-".into(), |x| format!("{x:.4}"));
    let done = match run.state {
        State::Finished => run.step.or(run.steps),
        State::Running | State::Stopped => Some(run.step.unwrap_or(0)),
        State::Broken => None,
    };
    let steps = match (done, run.steps) {
        (Some(done), Some(steps)) if done != steps => format!("{done}/{steps}"),
        (Some(done), _) => done.to_string(),
        (None, _) => "-".into(),
    };
    vec![
        run.name.clone(),
        state(run.state).into(),
        run.stage.clone().unwrap_or("-".into()),
        steps,
        run.tokens.map_or("-".into(), |n| thousands(n as usize)),
        figure(run.loss),
        figure(run.eval_kl),
        age(run),
        bytes(run.bytes as usize),
    ]
}

fn state(state: State) -> &'static str {
    match state {
        State::Finished => "finished",
        State::Running => "running",
        State::Stopped => "stopped",
        State::Broken => "broken",
    }
}

fn age(run: &Run) -> String {
    let age = Duration::from_secs(run.age_seconds);
    format!("{:#}", HumanDuration(age))
}

/// Four places, or as many as a small number needs.
fn shown(value: f64) -> String {
    match value {
        whole if whole.fract() == 0.0 && whole.abs() < 1e15 => format!("{whole}"),
        small if small.abs() < 1e-2 => format!("{small:.3e}"),
        value => format!("{value:.4}"),
    }
}

fn show(args: &ShowArgs) -> Result<()> {
    let run = Run::open(&args.run)?;
    let (settings, figures, samples) = (run.settings()?, run.figures()?, run.samples()?);
    // A bank has several plans, a run on the way none yet.
    let config = Checkpoint::config_only(&run.folder).ok();
    let layers = config.iter().flat_map(|(config, _)| &config.layers);
    if args.json {
        return print_json(&json!({
            "run": run,
            "record": run.record()?,
            "layers": layers.collect::<Vec<_>>(),
            "figures": figures.into_iter().collect::<std::collections::BTreeMap<_, _>>(),
            "samples": samples,
        }));
    }
    print(listed(std::slice::from_ref(&run)))?;
    let settings = settings.into_iter().map(|(name, value)| vec![name, value]);
    section(&["setting", "value"], settings.collect())?;
    let layers = layers
        .enumerate()
        .map(|(i, mixer)| vec![i.to_string(), mixer.name().into(), mixer.show()]);
    section(&["layer", "mixer", "sizes"], layers.collect())?;
    let figures = figures
        .into_iter()
        .map(|(name, value)| vec![name, shown(value)]);
    section(&["figure", "last"], figures.collect())?;
    let last = samples.iter().rev().take(SHOWN_SAMPLES).rev();
    let last = last.map(|s| {
        vec![
            s.step.to_string(),
            format!("{:?}", s.prompt.clone() + &s.text),
        ]
    });
    section(&["step", "what the student writes"], last.collect())
}

/// A table under what was printed, if it has rows.
fn section(headers: &[&str], rows: Vec<Vec<String>>) -> Result<()> {
    match rows.is_empty() {
        true => Ok(()),
        false => print(format_args!("\n{}", table(headers, &rows))),
    }
}

/// What several runs say under the same names, in the order in which the names come up; none: nothing.
fn beside<T: Clone>(each: &[Vec<(String, T)>]) -> Vec<(String, Vec<Option<T>>)> {
    let mut all: Vec<(String, Vec<Option<T>>)> = Vec::new();
    for (i, values) in each.iter().enumerate() {
        for (name, value) in values {
            let at = all.iter().position(|(known, _)| known == name);
            let at = at.unwrap_or_else(|| {
                all.push((name.clone(), vec![None; each.len()]));
                all.len() - 1
            });
            all[at].1[i] = Some(value.clone());
        }
    }
    all
}

fn compare(args: &CompareArgs) -> Result<()> {
    args.plot.iter().try_for_each(|path| check_file(path))?;
    let runs = args.runs.iter().map(|folder| Run::open(folder));
    let runs = runs.collect::<Result<Vec<_>>>()?;
    let settings = runs.iter().map(Run::settings).collect::<Result<Vec<_>>>()?;
    let mut settings = beside(&settings);
    settings.retain(|(_, values)| values.iter().any(|value| *value != values[0]));
    let figures = runs.iter().map(Run::figures).collect::<Result<Vec<_>>>()?;
    let figures = beside(&figures);
    if let Some(out) = &args.plot {
        let series = args.runs.iter().zip(&runs).map(|(name, run)| {
            let folder = [run.folder.as_path()].into_iter();
            curve(&name.display().to_string(), folder, &args.metric)
        });
        let series = series.collect::<Result<Vec<_>>>()?;
        let svg = line_svg("", "tokens", &args.metric, &series, true);
        write_atomic(out, svg.as_bytes())?;
    }
    if args.json {
        let settings = settings
            .into_iter()
            .map(|(name, values)| (name, json!(values)));
        let figures = figures
            .into_iter()
            .map(|(name, values)| (name, json!(values)));
        return print_json(&json!({
            "runs": runs,
            "settings": settings.collect::<Map<_, _>>(),
            "figures": figures.collect::<Map<_, _>>(),
        }));
    }
    let names = args.runs.iter().map(|run| run.display().to_string());
    let names: Vec<String> = names.collect();
    let headers = |first| -> Vec<&str> {
        let names = names.iter().map(String::as_str);
        [first].into_iter().chain(names).collect()
    };
    let rows = |name: String, values: Vec<Option<String>>| {
        let values = values.into_iter().map(|value| value.unwrap_or("-".into()));
        [name].into_iter().chain(values).collect::<Vec<_>>()
    };
    match settings.is_empty() {
        true => print("no setting differs\n")?,
        false => {
            let rows = settings
                .into_iter()
                .map(|(name, values)| rows(name, values));
            print(table(&headers("setting"), &rows.collect::<Vec<_>>()))?;
        }
    }
    let rows = figures.into_iter().map(|(name, values)| {
        let values = values.into_iter().map(|value| value.map(shown));
        rows(name, values.collect())
    });
    section(&headers("figure"), rows.collect())?;
    match &args.plot {
        Some(out) => print(format_args!("\nwritten to {}\n", out.display())),
        None => Ok(()),
    }
}

fn prune(args: &PruneArgs) -> Result<()> {
    let runs = list(&args.folder)?;
    let chosen: Vec<Run> = match args.keep {
        Some(keep) => {
            let finished = runs.into_iter().filter(|run| run.state == State::Finished);
            finished.skip(keep).collect()
        }
        None => {
            let partial = runs.into_iter().filter(|run| run.state == State::Stopped);
            partial.collect()
        }
    };
    let mut going = Vec::new();
    for run in chosen {
        match run.check_removal() {
            Ok(()) => going.push(run),
            Err(error) => note(error),
        }
    }
    if args.yes {
        going.iter().try_for_each(Run::remove)?;
    }
    let total: u64 = going.iter().map(|run| run.bytes).sum();
    if args.json {
        return print_json(&json!({ "removed": args.yes, "bytes": total, "runs": going }));
    }
    if going.is_empty() {
        return print("nothing to remove\n");
    }
    let (count, size) = (going.len(), bytes(total as usize));
    let said = match args.yes {
        true => format!("removed {count} runs, {size}"),
        false => format!("would remove {count} runs, {size}; --yes removes them"),
    };
    print(format_args!("{}\n{said}\n", listed(&going)))
}
