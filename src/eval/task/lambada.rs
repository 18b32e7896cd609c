//! LAMBADA (OpenAI's variant): the last word of a passage.

use super::{Document, Examples, Metric, Parts, Row, Scoring, Task, nothing};
use crate::Result;

pub const TASK: Task = Task {
    name: "lambada_openai",
    dataset: "EleutherAI/lambada_openai",
    config: "default",
    split: "test",
    files: "lambada_openai",
    // lm-evaluation-harness takes them from the test split where there is no other.
    examples: Examples::Random("test"),
    parts: Parts::Whole,
    metrics: &[Metric::Perplexity, Metric::Acc],
    version: 1.0,
    description: nothing,
    document,
    citation: "Paperno et al. 2016, arXiv 1606.06031",
};

fn document(row: &Row) -> Result<Document> {
    let text = row.text("text")?;
    let Some((context, word)) = text.rsplit_once(' ') else {
        return Err(row.error("field \"text\" is a single word"));
    };
    let continuation = format!(" {word}");
    Ok(Document {
        example: format!("{context} {continuation}"),
        requests: vec![(context.to_owned(), continuation)],
        scoring: Scoring::Greedy,
    })
}
