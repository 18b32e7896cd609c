//! What a record of a training text means: a `text`, a `prompt` and its `completion`, or a conversation.

use std::ops::Range;
use std::path::Path;
use std::sync::OnceLock;

use serde_json::{Value, json};

use super::Tokenizer;
use super::chat::ChatTemplate;
use super::records::Records;
use crate::{Error, Result};

/// One example of a text file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Text {
    pub text: String,
    /// Bytes of it that are to be learned: not what only leads to them.
    pub learned: Vec<Range<usize>>,
    /// A chat template has written it: what begins a text is there already.
    pub templated: bool,
}

/// Ids, and whether each is to be learned.
pub(super) type Document = Vec<(u32, bool)>;

/// What records should be.
pub(super) const WANTED: &str =
    "a JSON object with a \"text\" string, \"prompt\" and \"completion\", or \"messages\"";

impl Text {
    /// All of it is to be learned.
    pub fn whole(text: String) -> Self {
        let all = 0..text.len();
        Self {
            text,
            learned: vec![all],
            templated: false,
        }
    }

    /// Its tokens, and whether each is to be learned.
    ///
    /// # Errors
    /// A text that the tokenizer cannot encode.
    pub fn tokens(&self, tokenizer: &Tokenizer) -> Result<Document> {
        let all = 0..self.text.len();
        if self.learned == [all] && !self.templated {
            let ids = tokenizer.encode(&self.text)?;
            return Ok(ids.into_iter().map(|id| (id, true)).collect());
        }
        let ids = tokenizer.encode_with_offsets(&self.text, !self.templated)?;
        // A token across a border holds the beginning of what is to be learned.
        let learned = |at: &Range<usize>| {
            let mut spans = self.learned.iter();
            spans.any(|span| at.end > span.start && at.start < span.end)
        };
        Ok(ids.into_iter().map(|(id, at)| (id, learned(&at))).collect())
    }
}

/// What records mean to a tokenizer.
pub(super) struct Reader<'t> {
    pub tokenizer: &'t Tokenizer,
    /// Once a conversation asked for it.
    template: OnceLock<ChatTemplate>,
}

impl<'t> Reader<'t> {
    pub fn new(tokenizer: &'t Tokenizer) -> Self {
        Self {
            tokenizer,
            template: OnceLock::new(),
        }
    }

    /// By another template than the tokenizer's.
    pub fn by(tokenizer: &'t Tokenizer, template: ChatTemplate) -> Self {
        Self {
            tokenizer,
            template: template.into(),
        }
    }

    /// The tokenizer's chat template.
    ///
    /// # Errors
    /// A checkpoint that has none.
    pub fn template(&self) -> Result<&ChatTemplate> {
        if let Some(template) = self.template.get() {
            return Ok(template);
        }
        let template = self.tokenizer.chat_template()?.ok_or_else(|| {
            Error::invalid(
                "a conversation, and the checkpoint has no chat template: add its chat_template.jinja",
            )
        })?;
        Ok(self.template.get_or_init(|| template))
    }

    /// The text of a record; conversations are written by the chat template.
    ///
    /// # Errors
    /// A record that means nothing.
    pub fn text(&self, record: &Value) -> Result<Text> {
        if let Some(text) = record["text"].as_str() {
            return Ok(Text::whole(text.to_owned()));
        }
        if let (Some(prompt), Some(completion)) =
            (record["prompt"].as_str(), record["completion"].as_str())
        {
            let text = format!("{prompt}{completion}");
            return Ok(Text {
                learned: std::iter::once(prompt.len()..text.len()).collect(),
                text,
                templated: false,
            });
        }
        let list = |name: &str| record[name].as_array().cloned();
        let (messages, from) = match (list("messages"), list("conversations")) {
            (Some(messages), _) => (messages, 0),
            (None, Some(turns)) => (turns.iter().map(turn).collect::<Result<_>>()?, 0),
            (None, None) => match (list("prompt"), list("completion")) {
                (Some(prompt), Some(completion)) => {
                    let from = prompt.len();
                    ([prompt, completion].concat(), from)
                }
                _ => return Err(Error::invalid(format!("not {WANTED}"))),
            },
        };
        if messages.is_empty() {
            return Err(Error::invalid("a conversation without a message"));
        }
        conversation(self.template()?, &messages, &record["tools"], from)
    }
}

/// The texts of a file, one after the other.
pub struct Texts<'t> {
    records: Records,
    reader: Reader<'t>,
}

/// # Errors
/// Those of [`Records`]; names the record that means nothing.
pub fn texts<'t>(path: &Path, tokenizer: &'t Tokenizer) -> Result<Texts<'t>> {
    Ok(Texts {
        records: Records::open(path, WANTED)?,
        reader: Reader::new(tokenizer),
    })
}

impl Iterator for Texts<'_> {
    type Item = Result<Text>;

    fn next(&mut self) -> Option<Result<Text>> {
        let record = self.records.next()?;
        Some(record.and_then(|record| {
            let text = self.reader.text(&record);
            text.map_err(|e| self.records.wrong(e.to_string()))
        }))
    }
}

impl Texts<'_> {
    /// Each with the share of the file that has been read with it.
    pub fn with_shares(mut self) -> impl Iterator<Item = Result<(Text, f64)>> {
        std::iter::from_fn(move || {
            let text = self.next()?;
            Some(text.map(|text| (text, self.records.share())))
        })
    }
}

/// ShareGPT's turn as a message.
fn turn(turn: &Value) -> Result<Value> {
    let (Some(from), Some(value)) = (turn["from"].as_str(), turn["value"].as_str()) else {
        return Err(Error::invalid(
            "a turn of \"conversations\" wants \"from\" and \"value\"",
        ));
    };
    let role = match from {
        "human" | "user" => "user",
        "gpt" | "assistant" | "model" | "chatgpt" | "bing" => "assistant",
        other => other,
    };
    Ok(json!({"role": role, "content": value}))
}

/// A conversation as the template writes it; what the assistant says from message `from` on is to be learned.
pub(super) fn conversation(
    template: &ChatTemplate,
    messages: &[Value],
    tools: &Value,
    from: usize,
) -> Result<Text> {
    let render = |count: usize, answer: bool| {
        template.render_json(&Value::from(messages[..count].to_vec()), tools, answer)
    };
    let text = render(messages.len(), false)?;
    let mut learned: Vec<Range<usize>> = Vec::new();
    for (i, message) in messages.iter().enumerate().skip(from) {
        if message["role"] != "assistant" {
            continue;
        }
        let (before, after) = (render(i, true), render(i + 1, false));
        let span = match (&before, after) {
            (Ok(before), Ok(after))
                if text.starts_with(before.as_str()) && text.starts_with(&after) =>
            {
                before.len()..after.len()
            }
            // The template writes what was said otherwise in the middle than at the end: find the words.
            _ => {
                let words = message["content"].as_str().unwrap_or_default().trim();
                let begin = match &before {
                    Ok(before) if text.starts_with(before.as_str()) => before.len(),
                    _ => learned.last().map_or(0, |span| span.end),
                };
                let Some(at) = text[begin..].find(words).filter(|_| !words.is_empty()) else {
                    continue;
                };
                begin + at..begin + at + words.len()
            }
        };
        if span.start < span.end {
            learned.push(span);
        }
    }
    Ok(Text {
        text,
        learned,
        templated: true,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokenizer() -> Tokenizer {
        let folder = tempfile::tempdir().unwrap();
        super::super::stories::write_tokenizer(folder.path()).unwrap();
        Tokenizer::open(folder.path()).unwrap()
    }

    fn read(content: &[u8]) -> Result<Vec<Text>> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        texts(file.path(), &tokenizer())?.collect()
    }

    #[test]
    fn reads_texts_and_ignores_other_fields() {
        let texts = read(b"{\"text\":\"a\"}\n{\"id\":1,\"text\":\"b\\n\"}\n\n").unwrap();
        let whole = |text: &str| Text::whole(text.into());
        assert_eq!(texts, [whole("a"), whole("b\n")]);
        let odd = read(b"{\"text\":\"a\",\"prompt\":3,\"messages\":[]}").unwrap();
        assert_eq!(odd, [whole("a")]);
        let asked = read(b"{\"prompt\":\"a \",\"completion\":\"b\"}").unwrap();
        assert_eq!(
            (asked[0].text.as_str(), &asked[0].learned),
            ("a b", &std::iter::once(2..3).collect())
        );
    }

    #[test]
    fn bad_lines_are_named() {
        for (content, line, word) in [
            (&b"{\"text\":\"a\"}\nnonsense\n"[..], 2, "JSON"),
            (b"{\"text\":\"a\"}\n\n{\"text\":\"b\"}", 2, "empty"),
            (b"{\"text\":\"a\"}\n{\"txt\":\"a\"}", 2, "text"),
            (b"{\"prompt\":\"a\"}", 1, "completion"),
            (b"{\"text\":3}", 1, "string"),
            (b"{\"text\":\"\xff\"}", 1, "UTF-8"),
            (b"{\"messages\":[]}", 1, "without a message"),
            (
                b"{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]}",
                1,
                "chat template",
            ),
            (b"{\"conversations\":[{\"who\":1}]}", 1, "\"from\""),
        ] {
            let message = read(content).unwrap_err().to_string();
            assert!(
                message.contains(&format!("line {line}:")) && message.contains(word),
                "{message}"
            );
        }
        for content in ["", "\n\n"] {
            let message = read(content.as_bytes()).unwrap_err().to_string();
            assert!(message.contains("the file is empty"), "{message}");
        }
    }

    #[test]
    fn conversations_become_tokens_by_the_checkpoints_template() {
        let folder = tempfile::tempdir().unwrap();
        super::super::stories::write_tokenizer(folder.path()).unwrap();
        let template = "{% for m in messages %}{{ m.role[0] }}: {{ m.content }} {% endfor %}\
                        {% if add_generation_prompt %}a: {% endif %}";
        std::fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
        let tokenizer = Tokenizer::open(folder.path()).unwrap();
        let data = folder.path().join("talks.jsonl");
        let openai = r#"{"messages":[{"role":"user","content":"Tom"},{"role":"assistant","content":"ran"}]}"#;
        let sharegpt =
            r#"{"conversations":[{"from":"human","value":"Tom"},{"from":"gpt","value":"ran"}]}"#;
        let parts = r#"{"prompt":[{"role":"user","content":"Tom"}],"completion":[{"role":"assistant","content":"ran"}]}"#;
        std::fs::write(&data, [openai, sharegpt, parts].join("\n")).unwrap();
        let all: Vec<Text> = texts(&data, &tokenizer)
            .unwrap()
            .map(Result::unwrap)
            .collect();
        assert_eq!(all[0].text, "u: Tom a: ran ");
        assert!(all[1] == all[0] && all[2] == all[0]);
        let tokens = all[0].tokens(&tokenizer).unwrap();
        let of = |learned: bool| {
            let ids = tokens
                .iter()
                .filter(|(_, l)| *l == learned)
                .map(|(id, _)| *id);
            tokenizer.decode(&ids.collect::<Vec<_>>()).unwrap()
        };
        assert_eq!((of(false).trim(), of(true).trim()), ("u: Tom a:", "ran"));
        // The template has written what begins a text.
        let plain = tokenizer.encode_plain(&all[0].text).unwrap();
        assert!(tokens.iter().map(|(id, _)| *id).eq(plain));
    }

    #[test]
    fn of_a_conversation_answers_are_learned() {
        let chatml = ChatTemplate::new(super::super::chat::CHATML, Vec::new()).unwrap();
        let messages = [
            json!({"role": "user", "content": "Hi"}),
            json!({"role": "assistant", "content": "Hello."}),
            json!({"role": "user", "content": "Bye"}),
            json!({"role": "assistant", "content": "See you."}),
        ];
        let said = |template: &ChatTemplate, from: usize| {
            let text = conversation(template, &messages, &Value::Null, from).unwrap();
            let spans = text
                .learned
                .iter()
                .map(|span| text.text[span.clone()].to_owned());
            spans.collect::<Vec<_>>()
        };
        assert_eq!(
            said(&chatml, 0),
            ["Hello.<|im_end|>\n", "See you.<|im_end|>\n"]
        );
        assert_eq!(said(&chatml, 2), ["See you.<|im_end|>\n"]);
        // One that writes earlier answers otherwise.
        let odd = "{% for m in messages %}{% if loop.last %}<{{ m.content }}>{% else %}{{ m.content }}|{% endif %}{% endfor %}";
        let odd = ChatTemplate::new(odd, Vec::new()).unwrap();
        assert_eq!(said(&odd, 0), ["Hello.", "See you."]);
        let sharegpt = json!({"from": "gpt", "value": "x"});
        assert_eq!(
            turn(&sharegpt).unwrap(),
            json!({"role": "assistant", "content": "x"})
        );
    }
}
