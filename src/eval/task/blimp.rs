//! BLiMP: which of two sentences is grammatical, 67 paradigms.

use super::{Document, Examples, Metric, Parts, Row, Task, nothing};
use crate::Result;

pub const TASK: Task = Task {
    name: "blimp",
    dataset: "nyu-mll/blimp",
    config: "*",
    split: "train",
    files: "blimp",
    examples: Examples::None,
    parts: Parts::Field {
        field: "UID",
        weigh_by_size: false,
    },
    metrics: &[Metric::Acc],
    version: 1.0,
    description: nothing,
    document,
    citation: "Warstadt et al. 2020, arXiv 1912.00582",
};

fn document(row: &Row) -> Result<Document> {
    let sentences = ["sentence_good", "sentence_bad"].map(|field| row.text(field));
    let sentences = sentences.into_iter().collect::<Result<Vec<_>>>()?;
    let sentences = sentences.into_iter().map(str::to_owned).collect();
    Ok(Document::choice(String::new(), sentences, 0))
}
