//! Prompts as lm-evaluation-harness makes them, and scores.

use serde_json::json;

use super::*;

fn row(value: &Value) -> Row<'_> {
    Row {
        dataset: "data.jsonl",
        index: 3,
        value,
    }
}

#[test]
fn names_are_unique_and_groups_name_tasks() {
    for (i, task) in TASKS.iter().enumerate() {
        assert!(
            TASKS[..i].iter().all(|t| t.name != task.name),
            "{}",
            task.name
        );
        assert!(!task.citation.is_empty() && !task.metrics.is_empty());
    }
    for group in GROUPS {
        for (name, _, metric) in group.tasks {
            assert!(find(name).unwrap().metrics.contains(metric), "{name}");
        }
    }
}

#[test]
fn unknown_tasks_get_suggestions() {
    let message = find("arc-easy").err().unwrap().to_string();
    assert!(message.contains("near it: arc_easy"), "{message}");
    let message = find("winogrand").err().unwrap().to_string();
    assert!(message.contains("near it: winogrande"), "{message}");
}

#[test]
fn wrong_rows_are_named() {
    for (value, part) in [
        (json!({}), "data.jsonl row 3: field \"question\" is missing"),
        (
            json!({ "question": 4 }),
            "field \"question\" is 4 instead of a text",
        ),
        (
            json!({ "question": "q", "choices": { "text": ["a"], "label": ["A"] }, "answerKey": "B" }),
            "field \"answerKey\" is \"B\" instead of one of the labels",
        ),
    ] {
        let message = (arc::EASY.document)(&row(&value)).unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn winogrande_puts_the_choice_into_the_context() {
    let value = json!({ "sentence": "Ann saw Eve because _ came home .", "option1": "Ann", "option2": "Eve", "answer": "2" });
    let document = (winogrande::TASK.document)(&row(&value)).unwrap();
    let expected = ["Ann saw Eve because Ann", "Ann saw Eve because Eve"];
    for ((context, rest), expected) in document.requests.iter().zip(expected) {
        assert_eq!(
            (context.as_str(), rest.as_str()),
            (expected, " came home .")
        );
    }
    assert_eq!(document.example, "Ann saw Eve because Eve came home .");
    assert_eq!(
        document.score(Metric::Acc, &[(-2.0, false), (-1.0, false)]),
        1.0
    );
}

#[test]
fn norms_divide_by_characters_and_ties_go_to_the_first() {
    let document = Document::choice("q".into(), vec!["éé".into(), "abcd".into()], 1);
    let found = [(-2.0, false), (-3.0, false)];
    assert_eq!(document.score(Metric::Acc, &found), 0.0);
    assert_eq!(
        document.score(Metric::AccNorm, &found),
        1.0,
        "-1 against -0.75"
    );
    let tie = [(-2.0, false), (-2.0, false)];
    assert_eq!(document.score(Metric::Acc, &tie), 0.0);
}

#[test]
fn true_share_is_a_probability() {
    let value = json!({ "question": "Is it so?", "mc2_targets": { "choices": ["yes", "no"], "labels": [1, 0] } });
    let document = (truthfulqa::MC2.document)(&row(&value)).unwrap();
    assert!(
        document.requests[0]
            .0
            .ends_with("Spain.\n\nQ: Is it so?\nA:")
    );
    let found = [(0.75f64.ln(), false), (0.25f64.ln(), false)];
    assert!((document.score(Metric::Acc, &found) - 0.75).abs() < 1e-12);
}
