//! Conversations as Hugging Face transformers renders them (`chat/make.py`).

use std::path::Path;

use serde_json::{Value as Json, json};
use zebroid::data::chat::{ChatTemplate, End, Rendering};

const FOLDER: &str = "tests/golden/chat";

/// The template of a case: a file's name, the source of one, or sources by their names.
fn template(named: &Json) -> ChatTemplate {
    let folder = tempfile::tempdir().unwrap();
    let source = match named {
        Json::String(text) => {
            let file = format!("{FOLDER}/templates/{text}.jinja");
            json!(std::fs::read_to_string(file).unwrap_or_else(|_| text.clone()))
        }
        several => {
            let all = several.as_object().unwrap().iter();
            all.map(|(name, template)| json!({"name": name, "template": template}))
                .collect()
        }
    };
    let config =
        json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": source});
    let file = folder.path().join("tokenizer_config.json");
    std::fs::write(file, config.to_string()).unwrap();
    ChatTemplate::open(folder.path()).unwrap().unwrap()
}

#[test]
fn conversations_are_rendered_as_by_transformers() {
    let cases = std::fs::read(Path::new(FOLDER).join("cases.json")).unwrap();
    let cases: Vec<Json> = serde_json::from_slice(&cases).unwrap();
    let today = ChatTemplate::new("{{ strftime_now('%d %B %Y') }}", Vec::new()).unwrap();
    let today = today.render(&[]).unwrap();
    let mut wrong = Vec::new();
    for case in &cases {
        let template = template(&case["template"]);
        let end = match case["end"].as_str() {
            Some("answer") => End::Answer,
            Some("continued") => End::Continued,
            _ => End::Whole,
        };
        let rendering = Rendering {
            tools: &case["tools"],
            documents: &case["documents"],
            variables: &case["variables"],
            end,
        };
        let messages = template.of_openai(&case["messages"]);
        let found = messages.and_then(|messages| template.render_with(&messages, &rendering));
        match (found, case["text"].as_str()) {
            (Ok(found), Some(text)) if found.replace(&today, "{TODAY}") == text => {}
            (Err(_), None) => {}
            (found, text) => wrong.push(format!(
                "{}\n ours {found:?}\n theirs {:?}",
                case["template"],
                text.map_or_else(|| &case["refused"], |_| &case["text"]),
            )),
        }
    }
    assert!(
        cases.len() > 100 && wrong.is_empty(),
        "{}",
        wrong.join("\n")
    );
}
