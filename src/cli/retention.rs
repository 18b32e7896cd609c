//! `zebroid eval retention`: what a student keeps of its base.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::show::{check_file, print, print_json, table};
use crate::eval::retention::{Retention, retention};
use crate::report::{Bars, Report};
use crate::{Error, Result};

/// Compare results of eval harness (or lm_eval) task by task: student against base, with 95 % intervals
/// and the losses that the average hides. Files with logged samples are compared document by document.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    zebroid eval retention --base llama.json --student hybrid.json --report retention.html\n  \
    zebroid eval retention --base llama.json --student hybrid.json --teacher llama-8b.json --json")]
pub struct Args {
    /// Results of the model that the student was made from.
    #[arg(long)]
    base: PathBuf,
    /// Results of the student (eval harness --json).
    #[arg(long)]
    student: PathBuf,
    /// Results of the model that it was distilled from, shown beside.
    #[arg(long)]
    teacher: Option<PathBuf>,
    /// An HTML page.
    #[arg(long)]
    report: Option<PathBuf>,
    /// One JSON object instead of the table.
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    args.report.iter().try_for_each(|path| check_file(path))?;
    let (base, student) = (read(&args.base)?, read(&args.student)?);
    let teacher = args.teacher.as_deref().map(read).transpose()?;
    let found = retention(&base, &student, teacher.as_ref())?;
    let costs = costs(&base, &student);
    if let Some(path) = &args.report {
        page(&found, &costs).write(path)?;
    }
    if args.json {
        let all = json!({ "retention": found, "costs": costs });
        print_json(&all)?;
        return Ok(());
    }
    let (table, words) = (table(&HEADERS, &rows(&found)), words(&found));
    let costs: String = (costs
        .iter()
        .map(|(name, value)| format!("{name}: {value}\n")))
    .collect();
    print(format_args!("{table}\n{words}{costs}"))?;
    Ok(())
}

fn read(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).map_err(Error::io("cannot read", path))?;
    serde_json::from_str(&text).map_err(|e| Error::file(path, format!("not JSON: {e}")))
}

/// Cache, state and speed beside the scores, where the files tell.
fn costs(base: &Value, student: &Value) -> Vec<(String, String)> {
    let number = |of: &Value, name: &str| of["config"][name].as_f64();
    let mut costs = Vec::new();
    let kv = (
        number(base, "kv_per_token"),
        number(student, "kv_per_token"),
    );
    if let (Some(base), Some(student)) = kv {
        costs.push((
            "KV ratio".into(),
            format!("{:.2} %", 100.0 * student / base),
        ));
    }
    if let Some(state) = number(student, "state") {
        let bytes = super::show::bytes(4 * state as usize);
        costs.push(("state a sequence (f32)".into(), bytes));
    }
    for (name, of) in [("base", base), ("student", student)] {
        if let Some(speed) = number(of, "tokens_per_second") {
            costs.push((
                format!("{name}, tokens scored a second"),
                format!("{speed:.0}"),
            ));
        }
    }
    costs
}

const HEADERS: [&str; 7] = [
    "task",
    "metric",
    "base",
    "student",
    "teacher",
    "retention",
    "student - base, 95 %",
];

fn rows(found: &Retention) -> Vec<Vec<String>> {
    let percent = |x: f64| format!("{:.2}", 100.0 * x);
    let mut rows: Vec<_> = (found.tasks.iter())
        .map(|t| {
            let mark = if t.significant_loss { " loss" } else { "" };
            vec![
                t.task.clone(),
                t.metric.to_owned(),
                percent(t.base),
                percent(t.student),
                t.teacher.map_or("-".into(), percent),
                percent(t.retention) + " %",
                format!(
                    "{:+.2} .. {:+.2}{mark}",
                    100.0 * t.interval.0,
                    100.0 * t.interval.1
                ),
            ]
        })
        .collect();
    rows.push(vec![
        "average".into(),
        String::new(),
        percent(found.base),
        percent(found.student),
        String::new(),
        percent(found.retention) + " %",
        String::new(),
    ]);
    rows
}

fn words(found: &Retention) -> String {
    match found.hidden.is_empty() {
        true => "No significant loss is hidden by the average.\n".into(),
        false => format!(
            "The average hides significant losses on: {}\n",
            found.hidden.join(", ")
        ),
    }
}

fn page(found: &Retention, costs: &[(String, String)]) -> Report {
    let tasks: Vec<&str> = found.tasks.iter().map(|t| t.task.as_str()).collect();
    let bars = |name: &str, of: fn(&crate::eval::retention::TaskRetention) -> f64| {
        Bars::new(name, found.tasks.iter().map(|t| 100.0 * of(t)).collect())
    };
    let costs: Vec<Vec<String>> = costs
        .iter()
        .map(|(n, v)| vec![n.clone(), v.clone()])
        .collect();
    let mut report = Report::new("Retention");
    report
        .paragraph(words(found).trim())
        .table(&HEADERS, &rows(found))
        .bar_plot(
            "Scores",
            "%",
            &tasks,
            &[bars("base", |t| t.base), bars("student", |t| t.student)],
        )
        .heading("Costs")
        .table(&["", ""], &costs);
    report
}
