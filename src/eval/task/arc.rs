//! ARC: school science questions. `acc_norm` is the paper's metric.

use super::{Document, Examples, Metric, Parts, Row, Task, nothing};
use crate::Result;

pub const EASY: Task = Task {
    name: "arc_easy",
    dataset: "allenai/ai2_arc",
    config: "ARC-Easy",
    split: "test",
    files: "arc_easy",
    examples: Examples::Random("train"),
    parts: Parts::Whole,
    metrics: &[Metric::Acc, Metric::AccNorm],
    version: 1.0,
    description: nothing,
    document,
    citation: "Clark et al. 2018, arXiv 1803.05457",
};

pub const CHALLENGE: Task = Task {
    name: "arc_challenge",
    config: "ARC-Challenge",
    files: "arc_challenge",
    ..EASY
};

fn document(row: &Row) -> Result<Document> {
    Ok(Document::choice(
        format!("Question: {}\nAnswer:", row.text("question")?),
        row.texts("choices.text")?,
        row.place("answerKey", "choices.label")?,
    ))
}
