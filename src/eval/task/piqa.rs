//! PIQA: which of two ways reaches a goal.

use super::{Document, Examples, Metric, Parts, Row, Task, nothing};
use crate::Result;

pub const TASK: Task = Task {
    name: "piqa",
    dataset: "baber/piqa",
    config: "plain_text",
    split: "validation",
    files: "piqa",
    examples: Examples::Random("train"),
    parts: Parts::Whole,
    metrics: &[Metric::Acc, Metric::AccNorm],
    version: 1.0,
    description: nothing,
    document,
    citation: "Bisk et al. 2020, arXiv 1911.11641",
};

fn document(row: &Row) -> Result<Document> {
    let choices = [row.text("sol1")?.to_owned(), row.text("sol2")?.to_owned()];
    let context = format!("Question: {}\nAnswer:", row.text("goal")?);
    Ok(Document::choice(
        context,
        choices.into(),
        row.number("label")?,
    ))
}
