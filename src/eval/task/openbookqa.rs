//! OpenBookQA: elementary science facts and common sense.

use super::{Document, Examples, Metric, Parts, Row, Task, nothing};
use crate::Result;

pub const TASK: Task = Task {
    name: "openbookqa",
    dataset: "allenai/openbookqa",
    config: "main",
    split: "test",
    files: "openbookqa",
    examples: Examples::Random("train"),
    parts: Parts::Whole,
    metrics: &[Metric::Acc, Metric::AccNorm],
    version: 1.0,
    description: nothing,
    document,
    citation: "Mihaylov et al. 2018, arXiv 1809.02789",
};

fn document(row: &Row) -> Result<Document> {
    Ok(Document::choice(
        row.text("question_stem")?.to_owned(),
        row.texts("choices.text")?,
        row.place("answerKey", "choices.label")?,
    ))
}
