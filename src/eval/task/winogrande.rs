//! WinoGrande: whom a pronoun's place means. The choice goes into the context, and the rest of the sentence
//! is scored (partial evaluation).

use super::{ANSWER, Document, Examples, Metric, Parts, Row, Scoring, Task, nothing};
use crate::Result;

pub const TASK: Task = Task {
    name: "winogrande",
    dataset: "allenai/winogrande",
    config: "winogrande_xl",
    split: "validation",
    files: "winogrande",
    examples: Examples::Random("train"),
    parts: Parts::Whole,
    metrics: &[Metric::Acc],
    version: 1.0,
    description: nothing,
    document,
    citation: "Sakaguchi et al. 2019, arXiv 1907.10641",
};

fn document(row: &Row) -> Result<Document> {
    let sentence = row.text("sentence")?;
    let Some((before, after)) = sentence.split_once('_') else {
        return Err(row.error("field \"sentence\" has no _ to fill"));
    };
    let gold = match row.number("answer")? {
        answer @ 1..=2 => answer - 1,
        other => return Err(row.error(format!("field \"answer\" is {other}, not 1 or 2"))),
    };
    let contexts = ["option1", "option2"].map(|option| {
        let option = row.text(option)?;
        Ok(format!("{before}{option}"))
    });
    let contexts = contexts.into_iter().collect::<Result<Vec<String>>>()?;
    let rest = format!("{ANSWER}{}", after.trim());
    Ok(Document {
        example: format!("{}{rest}", contexts[gold]),
        scoring: Scoring::Choice {
            gold,
            lengths: contexts.iter().map(|c| c.chars().count()).collect(),
        },
        requests: contexts.into_iter().map(|c| (c, rest.clone())).collect(),
    })
}
