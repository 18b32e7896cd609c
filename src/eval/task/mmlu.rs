//! MMLU: 57 subjects, answered by a letter; and in cloze form, by the answer's text (hybrids fail at formats
//! before they fail at knowledge: arXiv 2406.07887).

use super::{Document, Examples, Metric, Parts, Row, Task};
use crate::Result;

pub const TASK: Task = Task {
    name: "mmlu",
    dataset: "cais/mmlu",
    config: "all",
    split: "test",
    files: "mmlu",
    examples: Examples::First("dev"),
    parts: Parts::Field {
        field: "subject",
        weigh_by_size: true,
    },
    metrics: &[Metric::Acc],
    version: 1.0,
    description,
    document,
    citation: "Hendrycks et al. 2021, arXiv 2009.03300",
};

/// The question alone, then each answer's text (MMLU-continuation).
pub const CLOZE: Task = Task {
    name: "mmlu_cloze",
    metrics: &[Metric::Acc, Metric::AccNorm],
    description: |row| {
        let subject = row.text("subject")?.replace('_', " ");
        Ok(format!(
            "The following are questions (with answers) about {subject}.\n\n"
        ))
    },
    document: |row| {
        let context = format!("Question: {}\nAnswer:", row.text("question")?.trim());
        Ok(Document::choice(
            context,
            row.texts("choices")?,
            row.number("answer")?,
        ))
    },
    ..TASK
};

fn description(row: &Row) -> Result<String> {
    let subject = row.text("subject")?.replace('_', " ");
    Ok(format!(
        "The following are multiple choice questions (with answers) about {subject}.\n\n"
    ))
}

fn document(row: &Row) -> Result<Document> {
    let choices = row.texts("choices")?;
    let [a, b, c, d] = choices.as_slice() else {
        return Err(row.error(format!("{} choices instead of 4", choices.len())));
    };
    let context = format!(
        "{}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:",
        row.text("question")?.trim()
    );
    let letters = ["A", "B", "C", "D"].map(str::to_owned);
    Ok(Document::choice(
        context,
        letters.into(),
        row.number("answer")?,
    ))
}
