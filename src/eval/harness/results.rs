//! Results in lm-evaluation-harness's schema, so that its tools read them, and as a table.

use serde_json::{Map, Value, json};

use super::{Figure, TaskResult};
use crate::eval::task::{Metric, Parts};

/// The whole run as one object. `model` is what a person named; `about` joins `config`.
pub fn to_json(results: &[TaskResult], model: &str, about: Value, samples: bool) -> Value {
    let mut tables = [
        "results",
        "groups",
        "group_subtasks",
        "configs",
        "versions",
        "n-shot",
    ]
    .map(|name| (name, Map::new()));
    let [figures, groups, subtasks, configs, versions, shots] =
        tables.each_mut().map(|(_, map)| map);
    let (mut better, mut counts, mut logged) = (Map::new(), Map::new(), Map::new());
    for result in results {
        let task = result.task;
        let whole = |named: &str| {
            let each = task.metrics.iter().map(|m| (*m, result.figure(*m)));
            row(named, each.collect::<Vec<_>>())
        };
        if task.parts != Parts::Whole {
            let names: Vec<&str> = result.parts.iter().map(|p| p.name.as_str()).collect();
            subtasks.insert(task.name.to_owned(), json!(names));
            groups.insert(task.name.to_owned(), whole(task.name));
            figures.insert(task.name.to_owned(), whole(task.name));
        } else {
            subtasks.insert(task.name.to_owned(), json!([]));
        }
        for part in &result.parts {
            let each = task.metrics.iter().map(|m| (*m, part.figure(task, *m)));
            let name = part.name.clone();
            figures.insert(name.clone(), row(&name, each.collect::<Vec<_>>()));
            versions.insert(name.clone(), json!(task.version));
            shots.insert(name.clone(), json!(result.num_fewshot));
            let metrics = task.metrics.iter();
            let directions: Map<String, Value> = metrics
                .map(|m| (m.name().to_owned(), json!(m.higher_is_better())))
                .collect();
            better.insert(name.clone(), Value::Object(directions));
            let (original, effective) = (part.documents, part.samples.len());
            counts.insert(
                name.clone(),
                json!({ "original": original, "effective": effective }),
            );
            configs.insert(
                name.clone(),
                json!({
                    "task": name,
                    "dataset_path": task.dataset,
                    "dataset_name": task.config,
                    "test_split": task.split,
                    "num_fewshot": result.num_fewshot,
                    "metadata": { "version": task.version },
                    "data_files": result.data_files,
                    "data_hash": result.data_hash,
                    "dataset_revision": result.revision,
                    "seconds": part.seconds,
                    "citation": task.citation,
                }),
            );
            if samples {
                let rows = part.samples.iter().map(|sample| {
                    let mut row = Map::new();
                    row.insert("doc_id".into(), json!(sample.doc_id));
                    let found = sample.found.iter().map(|(l, g)| json!([[l, g]]));
                    row.insert("resps".into(), found.collect());
                    let filtered = sample.found.iter().map(|(l, g)| json!([l, g]));
                    row.insert("filtered_resps".into(), filtered.collect());
                    for (metric, score) in task.metrics.iter().zip(&sample.scores) {
                        row.insert(metric.name().into(), json!(score));
                    }
                    Value::Object(row)
                });
                logged.insert(name, rows.collect());
            }
        }
    }
    let mut all: Map<String, Value> = tables
        .into_iter()
        .map(|(name, map)| (name.to_owned(), Value::Object(map)))
        .collect();
    all.insert("higher_is_better".into(), better.into());
    all.insert("n-samples".into(), counts.into());
    if samples {
        all.insert("samples".into(), logged.into());
    }
    let mut config = json!({ "model": "zebroid", "model_args": { "pretrained": model } });
    if let (Some(config), Value::Object(about)) = (config.as_object_mut(), about) {
        config.extend(about);
    }
    all.insert("config".into(), config);
    all.insert("zebroid_version".into(), json!(env!("CARGO_PKG_VERSION")));
    Value::Object(all)
}

fn row(name: &str, figures: Vec<(Metric, Figure)>) -> Value {
    let mut row = Map::new();
    row.insert("alias".into(), json!(name));
    for (metric, figure) in figures {
        row.insert(format!("{},none", metric.name()), json!(figure.value));
        row.insert(
            format!("{}_stderr,none", metric.name()),
            // As the peer writes what one document cannot tell.
            match figure.standard_error.is_finite() {
                true => json!(figure.standard_error),
                false => json!("N/A"),
            },
        );
        row.insert("sample_len".into(), json!(figure.count));
    }
    Value::Object(row)
}

/// A Markdown table with the columns of lm-evaluation-harness.
pub fn markdown(results: &[TaskResult]) -> String {
    let mut text = String::from(
        "|Tasks|Version|n-shot|Metric||Value||Stderr|\n|---|--:|--:|---|---|--:|---|--:|\n",
    );
    let mut line = |name: &str, result: &TaskResult, metric: Metric, figure: Figure| {
        let arrow = if metric.higher_is_better() {
            "↑"
        } else {
            "↓"
        };
        text += &format!(
            "|{name}|{}|{}|{}|{arrow}|{:.4}|±|{}|\n",
            result.task.version,
            result.num_fewshot,
            metric.name(),
            figure.value,
            match figure.standard_error.is_finite() {
                true => format!("{:.4}", figure.standard_error),
                false => "N/A".into(),
            }
        );
    };
    for result in results {
        for metric in result.task.metrics {
            line(result.task.name, result, *metric, result.figure(*metric));
            if result.parts.len() > 1 {
                for part in &result.parts {
                    let name = format!(" - {}", part.name);
                    line(&name, result, *metric, part.figure(result.task, *metric));
                }
            }
        }
    }
    text
}
