//! RACE (high school): the last question about an article, the earlier ones answered in the prompt. The
//! dataset holds its questions as a Python literal.

use serde_json::Value;

use super::{Document, Examples, Metric, Parts, Row, Task, nothing, python};
use crate::Result;

pub const TASK: Task = Task {
    name: "race",
    dataset: "EleutherAI/race",
    config: "high",
    split: "test",
    files: "race",
    // lm-evaluation-harness takes them from the test split where there is no other.
    examples: Examples::Random("test"),
    parts: Parts::Whole,
    metrics: &[Metric::Acc],
    version: 3.0,
    description: nothing,
    document,
    citation: "Lai et al. 2017, arXiv 1704.04683",
};

struct Problem {
    question: String,
    options: Vec<String>,
    gold: usize,
}

fn document(row: &Row) -> Result<Document> {
    let literal = row.text("problems")?;
    let parsed =
        python::parse(literal).map_err(|e| row.error(format!("field \"problems\": {e}")))?;
    let problems = parsed
        .as_array()
        .map(|list| list.iter().map(problem).collect());
    let Some(Some(problems)) = problems else {
        return Err(row.error("field \"problems\" holds no questions, options and answers"));
    };
    let problems: Vec<Problem> = problems;
    let Some((last, before)) = problems.split_last() else {
        return Err(row.error("field \"problems\" is empty"));
    };
    let mut context = format!("Article: {}\n\n", row.text("article")?);
    for problem in before {
        let answer = &problem.options[problem.gold];
        // A statement with a gap at its end is completed.
        match problem.question.strip_suffix(" _  .") {
            Some(statement) if problem.question.ends_with("  _  .") => {
                context += &format!("{statement}{answer}\n");
            }
            _ => context += &format!("Question: {}\nAnswer: {answer}\n", problem.question),
        }
    }
    context += &last.question;
    Ok(Document::choice(context, last.options.clone(), last.gold))
}

fn problem(value: &Value) -> Option<Problem> {
    let options = value["options"].as_array()?.iter();
    let options: Option<Vec<String>> = options.map(|o| o.as_str().map(str::to_owned)).collect();
    let gold = "ABCD".find(value["answer"].as_str()?)?;
    Some(Problem {
        question: value["question"].as_str()?.to_owned(),
        options: options.filter(|o| o.len() == 4)?,
        gold,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn earlier_questions_are_answered_in_the_prompt() {
        let problems = r#"[{'question': "Tom  _  .", 'answer': 'B', 'options': ['a', 'b', 'c', 'd']},
            {'question': 'Who?', 'answer': 'A', 'options': ['e', 'f', 'g', 'h']},
            {'question': 'Why?', 'answer': 'D', 'options': ['i', "j's", 'k', 'l']}]"#;
        let value = serde_json::json!({ "article": "Text.", "problems": problems });
        let row = Row {
            dataset: "race",
            index: 0,
            value: &value,
        };
        let document = document(&row).unwrap();
        let (context, continuation) = &document.requests[1];
        assert_eq!(
            context,
            "Article: Text.\n\nTom b\nQuestion: Who?\nAnswer: e\nWhy?"
        );
        assert_eq!(continuation, " j's");
        assert_eq!(document.requests.len(), 4);
    }
}
