//! Evaluation tasks, as lm-evaluation-harness 0.4 defines them: what a document asks of a model and how
//! its answer is scored. A task is a file here and a line in [`TASKS`].

use serde::Serialize;
use serde_json::Value;

use crate::{Error, Result};

mod arc;
mod blimp;
mod hellaswag;
mod lambada;
mod mmlu;
mod openbookqa;
mod piqa;
mod python;
mod race;
mod truthfulqa;
mod winogrande;

/// Every task, in the order in which they are listed.
pub const TASKS: &[&Task] = &[
    &arc::EASY,
    &arc::CHALLENGE,
    &hellaswag::TASK,
    &piqa::TASK,
    &winogrande::TASK,
    &openbookqa::TASK,
    &mmlu::TASK,
    &mmlu::CLOZE,
    &race::TASK,
    &lambada::TASK,
    &blimp::TASK,
    &truthfulqa::MC1,
    &truthfulqa::MC2,
];

/// Several tasks under one name, each with its number of examples (`None`: what is asked for) and the
/// metric that is reported.
pub struct Group {
    pub name: &'static str,
    pub tasks: &'static [(&'static str, Option<usize>, Metric)],
}

/// The eight zero-shot tasks of arXiv 2505.17272, and AMD's few-shot ones.
pub const GROUPS: &[Group] = &[
    Group {
        name: "zebra",
        tasks: &[
            ("arc_challenge", None, Metric::AccNorm),
            ("arc_easy", None, Metric::AccNorm),
            ("hellaswag", None, Metric::AccNorm),
            ("mmlu", None, Metric::Acc),
            ("openbookqa", None, Metric::AccNorm),
            ("piqa", None, Metric::AccNorm),
            ("race", None, Metric::Acc),
            ("winogrande", None, Metric::Acc),
        ],
    },
    Group {
        name: "fewshot",
        tasks: &[
            ("arc_challenge", Some(25), Metric::AccNorm),
            ("hellaswag", Some(10), Metric::AccNorm),
            ("mmlu", Some(5), Metric::Acc),
            ("winogrande", Some(5), Metric::Acc),
            ("truthfulqa_mc2", Some(0), Metric::Acc),
        ],
    },
];

/// A figure of a task, under lm-evaluation-harness's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Share of documents whose likeliest continuation is the right one.
    Acc,
    /// The same, log-likelihoods divided by the characters of the continuation.
    AccNorm,
    /// `exp` of the mean negative log-likelihood a document.
    Perplexity,
}

impl Metric {
    pub fn name(self) -> &'static str {
        match self {
            Metric::Acc => "acc",
            Metric::AccNorm => "acc_norm",
            Metric::Perplexity => "perplexity",
        }
    }

    pub fn higher_is_better(self) -> bool {
        self != Metric::Perplexity
    }
}

/// Where few-shot examples come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Examples {
    /// Drawn at random for every document.
    Random(&'static str),
    /// The first of that split.
    First(&'static str),
    /// The task has its examples in its prompt.
    None,
}

/// How a task's documents are divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parts {
    Whole,
    /// By a field: `<task>_<value>`; scores are weighed by size or not.
    Field {
        field: &'static str,
        weigh_by_size: bool,
    },
}

pub struct Task {
    pub name: &'static str,
    /// Hugging Face dataset.
    pub dataset: &'static str,
    pub config: &'static str,
    pub split: &'static str,
    /// What the names of local files begin with.
    pub files: &'static str,
    pub examples: Examples,
    pub parts: Parts,
    pub metrics: &'static [Metric],
    pub version: f64,
    /// What stands before the examples, by the document.
    pub description: fn(&Row) -> Result<String>,
    pub document: fn(&Row) -> Result<Document>,
    pub citation: &'static str,
}

/// What one document asks.
#[derive(Debug, Clone, PartialEq)]
pub struct Document {
    /// (context, continuation) pairs whose log-likelihoods are wanted; few-shot examples go before every context.
    pub requests: Vec<(String, String)>,
    pub scoring: Scoring,
    /// The document with its answer, as an example for others.
    pub example: String,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Scoring {
    /// One of the requests is right; `lengths` in characters normalise `acc_norm`.
    Choice { gold: usize, lengths: Vec<usize> },
    /// The one continuation is to be the likeliest, token by token.
    Greedy,
    /// The probability that the true ones among the continuations have (TruthfulQA's MC2).
    TrueShare { labels: Vec<bool> },
}

/// lm-evaluation-harness's delimiters between question and answer, and between examples.
const ANSWER: &str = " ";
pub const EXAMPLE: &str = "\n\n";

impl Document {
    /// One question with several answers.
    pub fn choice(context: String, choices: Vec<String>, gold: usize) -> Self {
        let right = choices.get(gold).map_or("", String::as_str);
        let example = format!("{context}{ANSWER}{right}");
        let lengths = choices.iter().map(|c| c.chars().count()).collect();
        let requests = choices
            .into_iter()
            .map(|choice| (context.clone(), format!("{ANSWER}{choice}")));
        Self {
            requests: requests.collect(),
            scoring: Scoring::Choice { gold, lengths },
            example,
        }
    }

    /// Scores each metric of the task, given the log-likelihoods and whether each continuation was the
    /// likeliest token by token.
    pub fn score(&self, metric: Metric, found: &[(f64, bool)]) -> f64 {
        let best = |of: &dyn Fn(usize) -> f64| {
            // The first of equals, as numpy's argmax.
            (0..found.len()).reduce(|a, b| if of(b) > of(a) { b } else { a })
        };
        let hit = |right: bool| f64::from(u8::from(right));
        match (&self.scoring, metric) {
            (Scoring::Choice { gold, .. }, Metric::Acc) => {
                hit(best(&|i| found[i].0) == Some(*gold))
            }
            (Scoring::Choice { gold, lengths }, Metric::AccNorm) => {
                hit(best(&|i| found[i].0 / lengths[i] as f64) == Some(*gold))
            }
            (Scoring::Greedy, Metric::Acc) => hit(found[0].1),
            // Averaged and put through `exp` when all documents are in.
            (Scoring::Greedy, _) => found[0].0,
            (Scoring::TrueShare { labels }, _) => {
                let share = |keep: &dyn Fn(bool) -> bool| -> f64 {
                    let kept = labels.iter().zip(found).filter(|(l, _)| keep(**l));
                    kept.map(|(_, (log_likelihood, _))| log_likelihood.exp())
                        .sum()
                };
                share(&|label| label) / share(&|_| true)
            }
            (Scoring::Choice { .. }, Metric::Perplexity) => f64::NAN,
        }
    }
}

/// A row of a dataset, with errors that name what is wrong with it.
#[derive(Debug, Clone, Copy)]
pub struct Row<'a> {
    pub dataset: &'a str,
    pub index: usize,
    pub value: &'a Value,
}

impl<'a> Row<'a> {
    fn wrong(&self, field: &str, wanted: &str) -> Error {
        let found = self.find(field).map_or_else(
            || "is missing".to_owned(),
            |v| format!("is {} instead of {wanted}", short(v)),
        );
        Error::invalid(format!(
            "{} row {}: field {field:?} {found}",
            self.dataset, self.index
        ))
    }

    /// `a.b` is field `b` of field `a`.
    fn find(&self, field: &str) -> Option<&'a Value> {
        field.split('.').try_fold(self.value, |v, name| v.get(name))
    }

    pub fn text(&self, field: &str) -> Result<&'a str> {
        let found = self.find(field).and_then(Value::as_str);
        found.ok_or_else(|| self.wrong(field, "a text"))
    }

    pub fn texts(&self, field: &str) -> Result<Vec<String>> {
        let list = self.find(field).and_then(Value::as_array);
        let texts = list.and_then(|l| l.iter().map(|v| v.as_str().map(str::to_owned)).collect());
        texts.ok_or_else(|| self.wrong(field, "a list of texts"))
    }

    /// A whole number, or a text of one.
    pub fn number(&self, field: &str) -> Result<usize> {
        let found = self.find(field).and_then(|v| match v {
            Value::String(text) => text.parse().ok(),
            other => other.as_u64().map(|n| n as usize),
        });
        found.ok_or_else(|| self.wrong(field, "a whole number"))
    }

    pub fn flags(&self, field: &str) -> Result<Vec<bool>> {
        let list = self.find(field).and_then(Value::as_array);
        let flags = list.and_then(|l| l.iter().map(|v| v.as_u64().map(|n| n == 1)).collect());
        flags.ok_or_else(|| self.wrong(field, "a list of 0 and 1"))
    }

    /// The place of the label `field` in the list of labels.
    pub fn place(&self, field: &str, labels: &str) -> Result<usize> {
        let (label, labels) = (self.text(field)?, self.texts(labels)?);
        let place = labels.iter().position(|l| l == label.trim_start());
        place.ok_or_else(|| self.wrong(field, "one of the labels"))
    }

    /// An error about this row.
    pub fn error(&self, message: impl std::fmt::Display) -> Error {
        Error::invalid(format!("{} row {}: {message}", self.dataset, self.index))
    }
}

fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.chars().count() > 40 {
        true => text.chars().take(40).collect::<String>() + "..",
        false => text,
    }
}

/// No description.
fn nothing(_: &Row) -> Result<String> {
    Ok(String::new())
}

/// The task of that name.
///
/// # Errors
/// An unknown name; the nearest known ones are suggested.
pub fn find(name: &str) -> Result<&'static Task> {
    if let Some(task) = TASKS.iter().find(|t| t.name == name) {
        return Ok(task);
    }
    let names = || {
        let groups = GROUPS.iter().map(|g| g.name);
        TASKS.iter().map(|t| t.name).chain(groups)
    };
    let mut near: Vec<(usize, &str)> = names().map(|n| (strsim::levenshtein(n, name), n)).collect();
    near.sort_unstable();
    let near: Vec<&str> = near.iter().take(3).map(|(_, n)| *n).collect();
    Err(Error::invalid(format!(
        "no task {name:?}; near it: {}. All: {}",
        near.join(", "),
        names().collect::<Vec<_>>().join(", ")
    )))
}

#[cfg(test)]
mod tests;
