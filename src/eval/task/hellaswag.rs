//! HellaSwag: the most sensible end of a scene.

use super::{Document, Examples, Metric, Parts, Row, Task, nothing};
use crate::Result;

pub const TASK: Task = Task {
    name: "hellaswag",
    dataset: "Rowan/hellaswag",
    config: "default",
    split: "validation",
    files: "hellaswag",
    examples: Examples::Random("train"),
    parts: Parts::Whole,
    metrics: &[Metric::Acc, Metric::AccNorm],
    version: 1.0,
    description: nothing,
    document,
    citation: "Zellers et al. 2019, arXiv 1905.07830",
};

fn document(row: &Row) -> Result<Document> {
    let scene = format!(
        "{}: {} {}",
        row.text("activity_label")?,
        row.text("ctx_a")?,
        capitalized(row.text("ctx_b")?)
    );
    let endings = row.texts("endings")?;
    let endings = endings.iter().map(|ending| cleaned(ending)).collect();
    Ok(Document::choice(
        cleaned(&scene),
        endings,
        row.number("label")?,
    ))
}

/// Python's `str.capitalize`: the first letter large, all others small.
fn capitalized(text: &str) -> String {
    let mut letters = text.chars();
    match letters.next() {
        Some(first) => first.to_uppercase().collect::<String>() + &letters.as_str().to_lowercase(),
        None => String::new(),
    }
}

/// Without the marks that WikiHow pages left in the texts.
fn cleaned(text: &str) -> String {
    let text = text.trim().replace(" [title]", ". ");
    let mut kept = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some(open) = rest.find('[') {
        // The shortest match of `\[.*?\]`, which stops at line ends.
        let inside = &rest[open..];
        match inside
            .find(']')
            .filter(|close| !inside[..*close].contains('\n'))
        {
            Some(close) => {
                kept.push_str(&rest[..open]);
                rest = &inside[close + 1..];
            }
            None => {
                kept.push_str(&rest[..=open]);
                rest = &rest[open + 1..];
            }
        }
    }
    kept.push_str(rest);
    kept.replace("  ", " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cleaned_as_the_harness_does() {
        assert_eq!(cleaned(" a [title] b [step] c  d "), "a. b c d");
        assert_eq!(cleaned("no [close"), "no [close");
        assert_eq!(capitalized("then HE went"), "Then he went");
    }
}
