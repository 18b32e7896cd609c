//! What a student keeps of its base, task by task: from two results in lm-evaluation-harness's schema. An
//! average hides losses when other tasks rise; every task's own loss is tested here.

use std::collections::BTreeMap;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use serde_json::Value;

use super::task::{GROUPS, Metric, TASKS};
use crate::{Error, Result};

/// A student's figure on one task beside its base's.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TaskRetention {
    pub task: String,
    pub metric: &'static str,
    pub base: f64,
    pub student: f64,
    pub teacher: Option<f64>,
    /// Student over base.
    pub retention: f64,
    /// 95 % interval of student minus base.
    pub interval: (f64, f64),
    /// By paired bootstrap over documents, or, without logged samples, from both standard errors.
    pub paired: bool,
    /// The whole interval is below zero.
    pub significant_loss: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Retention {
    pub tasks: Vec<TaskRetention>,
    /// Means over tasks.
    pub base: f64,
    pub student: f64,
    pub retention: f64,
    /// Tasks with a significant loss that the average does not show: it is within a hundredth of the base's,
    /// or above, while the task lost more than that.
    pub hidden: Vec<String>,
}

/// Losses that the average is allowed before it is said to show them.
const AVERAGE_SHOWS: f64 = 0.01;
const RESAMPLES: usize = 2000;
/// Of the normal distribution at 95 %.
const Z: f64 = 1.959_963_984_540_054;

/// All tasks that both results have.
///
/// # Errors
/// No common task, or a result without figures.
pub fn retention(base: &Value, student: &Value, teacher: Option<&Value>) -> Result<Retention> {
    let mut tasks = Vec::new();
    for task in TASKS {
        let metric = metric_of(task.name, task.metrics);
        let of = |results: &Value| figure(results, task.name, metric);
        let (Some(base_figure), Some(student_figure)) = (of(base), of(student)) else {
            continue;
        };
        let paired = differences(base, student, task.name, metric);
        let interval = match &paired {
            Some(differences) => bootstrap(differences),
            None => {
                let spread = base_figure.1.hypot(student_figure.1) * Z;
                let gap = student_figure.0 - base_figure.0;
                (gap - spread, gap + spread)
            }
        };
        tasks.push(TaskRetention {
            task: task.name.to_owned(),
            metric: metric.name(),
            base: base_figure.0,
            student: student_figure.0,
            teacher: teacher.and_then(of).map(|(value, _)| value),
            retention: student_figure.0 / base_figure.0,
            interval,
            paired: paired.is_some(),
            significant_loss: interval.1 < 0.0,
        });
    }
    if tasks.is_empty() {
        return Err(Error::invalid(
            "the two results have no task in common: give files that eval harness --json (or lm_eval) wrote",
        ));
    }
    let mean =
        |of: fn(&TaskRetention) -> f64| tasks.iter().map(of).sum::<f64>() / tasks.len() as f64;
    let (base, student) = (mean(|t| t.base), mean(|t| t.student));
    let shown = student < (1.0 - AVERAGE_SHOWS) * base;
    let lost = |t: &&TaskRetention| t.significant_loss && t.retention < 1.0 - AVERAGE_SHOWS;
    let hidden = match shown {
        // Where the average falls too, the tasks that fell further than twice as much are still news.
        true => {
            let average = student / base;
            let further = |t: &&TaskRetention| lost(t) && 1.0 - t.retention > 2.0 * (1.0 - average);
            tasks
                .iter()
                .filter(further)
                .map(|t| t.task.clone())
                .collect()
        }
        false => tasks.iter().filter(lost).map(|t| t.task.clone()).collect(),
    };
    Ok(Retention {
        retention: student / base,
        tasks,
        base,
        student,
        hidden,
    })
}

/// The metric that the paper reports for a task, or the task's first.
fn metric_of(task: &str, metrics: &[Metric]) -> Metric {
    let reported = GROUPS
        .iter()
        .flat_map(|g| g.tasks)
        .find(|(name, ..)| *name == task);
    let accuracy = metrics.iter().find(|m| **m == Metric::Acc);
    reported
        .map(|(.., metric)| *metric)
        .or(accuracy.copied())
        .unwrap_or(metrics[0])
}

/// Value and standard error.
fn figure(results: &Value, task: &str, metric: Metric) -> Option<(f64, f64)> {
    let row = &results["results"][task];
    let name = metric.name();
    let value = row[format!("{name},none")].as_f64()?;
    // Nothing is significant where no spread is known.
    let error = row[format!("{name}_stderr,none")].as_f64();
    Some((value, error.unwrap_or(f64::INFINITY)))
}

/// Student minus base of every document, if both logged the same ones.
fn differences(base: &Value, student: &Value, task: &str, metric: Metric) -> Option<Vec<f64>> {
    let (base, student) = (scores(base, task, metric)?, scores(student, task, metric)?);
    let same = base.keys().eq(student.keys()) && !base.is_empty();
    same.then(|| {
        let pairs = base.values().zip(student.values());
        pairs.map(|(base, student)| student - base).collect()
    })
}

/// Of every document of a task or of its parts: its score.
fn scores(results: &Value, task: &str, metric: Metric) -> Option<BTreeMap<(String, u64), f64>> {
    let samples = results["samples"].as_object()?;
    let parts = results["group_subtasks"][task]
        .as_array()
        .cloned()
        .unwrap_or_default();
    let own = |name: &str| name == task || parts.iter().any(|p| p == name);
    let mut scores = BTreeMap::new();
    for (name, rows) in samples.iter().filter(|(name, _)| own(name)) {
        for row in rows.as_array()? {
            let score = row[metric.name()].as_f64()?;
            scores.insert((name.clone(), row["doc_id"].as_u64()?), score);
        }
    }
    Some(scores)
}

/// The 95 % interval of the mean, by resampling documents.
fn bootstrap(differences: &[f64]) -> (f64, f64) {
    let mut random = ChaCha8Rng::seed_from_u64(1234);
    let n = differences.len();
    let mut means: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            (0..n)
                .map(|_| differences[random.random_range(0..n)])
                .sum::<f64>()
                / n as f64
        })
        .collect();
    means.sort_by(f64::total_cmp);
    let at = |share: f64| means[(share * (RESAMPLES - 1) as f64).round() as usize];
    (at(0.025), at(0.975))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const TASKS: [(&str, Metric, f64); 8] = [
        ("arc_challenge", Metric::AccNorm, 1172.0),
        ("arc_easy", Metric::AccNorm, 2376.0),
        ("hellaswag", Metric::AccNorm, 10042.0),
        ("mmlu", Metric::Acc, 14042.0),
        ("openbookqa", Metric::AccNorm, 500.0),
        ("piqa", Metric::AccNorm, 1838.0),
        ("race", Metric::Acc, 1045.0),
        ("winogrande", Metric::Acc, 1267.0),
    ];

    /// A row of the paper's zero-shot table (arXiv 2505.17272), with binomial standard errors.
    fn results(percent: [f64; 8]) -> Value {
        let mut rows = serde_json::Map::new();
        for ((task, metric, n), percent) in TASKS.into_iter().zip(percent) {
            let p = percent / 100.0;
            let name = metric.name();
            rows.insert(
                task.to_owned(),
                json!({ format!("{name},none"): p, format!("{name}_stderr,none"): (p * (1.0 - p) / n).sqrt() }),
            );
        }
        json!({ "results": rows })
    }

    /// The averages of Zebra-Llama rise or hold; MMLU falls in all three sizes.
    #[test]
    fn the_papers_averages_hide_mmlu() {
        let pairs = [
            (
                [37.97, 63.30, 60.65, 46.05, 34.80, 74.32, 38.18, 59.67],
                [42.49, 67.38, 60.54, 38.94, 41.60, 72.91, 38.37, 61.25],
            ),
            (
                [46.08, 67.93, 70.38, 60.34, 36.40, 75.79, 40.86, 67.25],
                [51.28, 76.14, 72.57, 52.10, 42.40, 77.53, 45.93, 67.56],
            ),
            (
                [54.86, 79.55, 79.23, 68.13, 43.00, 80.90, 44.69, 73.88],
                [58.62, 78.37, 79.27, 58.17, 43.40, 80.03, 49.28, 72.61],
            ),
        ];
        for (base, student) in pairs {
            let found = retention(&results(base), &results(student), None).unwrap();
            assert!(found.retention > 0.99, "{}", found.retention);
            assert_eq!(found.hidden, ["mmlu"]);
        }
    }

    /// Logs of as many documents, but others, are not paired.
    #[test]
    fn other_documents_are_no_pairs() {
        let run = |doc_id: u64| {
            json!({ "results": { "piqa": { "acc_norm,none": 1.0, "acc_norm_stderr,none": "N/A" } },
                    "samples": { "piqa": [{ "doc_id": doc_id, "acc_norm": 1.0 }] } })
        };
        let found = retention(&run(0), &run(1), None).unwrap();
        assert!(!found.tasks[0].paired && !found.tasks[0].significant_loss);
    }

    /// Paired documents see a loss that two standard errors do not.
    #[test]
    fn pairs_are_resampled_together() {
        let run = |right: &dyn Fn(u64) -> bool| {
            let rows: Vec<Value> = (0..200)
                .map(|i| json!({ "doc_id": i, "acc": f64::from(u8::from(right(i))) }))
                .collect();
            let mean = (0..200).filter(|i| right(*i)).count() as f64 / 200.0;
            let error = (mean * (1.0 - mean) / 200.0).sqrt();
            json!({ "results": { "winogrande": { "acc,none": mean, "acc_stderr,none": error } }, "samples": { "winogrande": rows } })
        };
        let base = run(&|i| i % 2 == 0);
        let student = run(&|i| i % 2 == 0 && i % 20 != 0);
        let found = retention(&base, &student, None).unwrap();
        assert!(
            found.tasks[0].paired && found.tasks[0].significant_loss,
            "{found:?}"
        );
        let unpaired = |mut v: Value| {
            v.as_object_mut().unwrap().remove("samples");
            v
        };
        let found = retention(&unpaired(base), &unpaired(student), None).unwrap();
        assert!(!found.tasks[0].paired && !found.tasks[0].significant_loss);
    }

    #[test]
    fn results_without_a_common_task_are_refused() {
        let error = retention(&json!({}), &json!({}), None).unwrap_err();
        assert!(error.to_string().contains("no task in common"));
    }
}
