//! Chat templates: what a checkpoint makes of a conversation, rendered as Hugging Face `transformers` does.

mod jinja;
mod tools;

use std::path::Path;

use minijinja::Value;
use minijinja::value::Serde;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::gguf::{self, Gguf};
use crate::hash::Hash;
use crate::{Error, Result};

pub use tools::{Piece, ToolFormat, ToolReader};

/// Who says what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant` or what else the template knows.
    pub role: String,
    pub content: String,
}

/// A Jinja template and the texts of special tokens that it may name.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    source: String,
    /// What takes its place where there are tools, of checkpoints that have two.
    tool_use: Option<String>,
    /// `bos_token`, `eos_token`, ..
    tokens: Vec<(String, String)>,
}

/// How a conversation ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum End {
    /// With its last message.
    #[default]
    Whole,
    /// With the beginning of an answer.
    Answer,
    /// Within its last message, which is to be continued.
    Continued,
}

/// What a template is told beside the messages.
#[derive(Debug, Clone, Copy)]
pub struct Rendering<'a> {
    /// OpenAI's list of tools, or null.
    pub tools: &'a Json,
    /// A list of `{"title": .., "text": ..}`, or null.
    pub documents: &'a Json,
    /// An object of whatever else a template asks for (OpenAI's `chat_template_kwargs`), or null.
    pub variables: &'a Json,
    pub end: End,
}

impl Default for Rendering<'_> {
    fn default() -> Self {
        Self {
            tools: &Json::Null,
            documents: &Json::Null,
            variables: &Json::Null,
            end: End::Whole,
        }
    }
}

/// The files that a template may stand in, and one for conversations with tools beside the first.
const OWN_FILE: &str = "chat_template.jinja";
const TOOL_USE_FILE: &str = "additional_chat_templates/tool_use.jinja";
const CONFIG: &str = "tokenizer_config.json";
/// Of old processors.
const PROCESSOR: &str = "chat_template.json";
const GGUF_KEY: &str = "tokenizer.chat_template";
/// Behind a message that is to be continued, to find where it ends.
const CONTINUED: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// ChatML (OpenAI's, Qwen's), for models whose checkpoint says nothing.
pub const CHATML: &str = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}\
                          {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

impl ChatTemplate {
    /// # Errors
    /// A template that is none, with its line.
    pub fn new(source: &str, tokens: Vec<(String, String)>) -> Result<Self> {
        Self::with(source, None, tokens)
    }

    fn with(source: &str, tool_use: Option<&str>, tokens: Vec<(String, String)>) -> Result<Self> {
        let template = Self {
            source: jinja::plain(source),
            tool_use: tool_use.map(jinja::plain),
            tokens,
        };
        let environment = jinja::environment();
        for source in std::iter::once(&template.source).chain(&template.tool_use) {
            environment.template_from_str(source).map_err(failed)?;
        }
        Ok(template)
    }

    /// The template of a checkpoint folder or a .gguf file, if it has one.
    ///
    /// # Errors
    /// A file that cannot be read, or a template that is none.
    pub fn open(path: &Path) -> Result<Option<Self>> {
        if Gguf::is_named(path) {
            let gguf = Gguf::open(path)?;
            let metadata = &gguf.header.metadata;
            let text = |key: &str| match metadata.get(key) {
                Some(gguf::Value::Text(text)) => Some(text.as_str()),
                _ => None,
            };
            let Some(source) = text(GGUF_KEY) else {
                return Ok(None);
            };
            let tool_use = text(&format!("{GGUF_KEY}.tool_use"));
            let template = Self::with(source, tool_use, gguf::tokenizer::special(metadata));
            return template
                .map(Some)
                .map_err(|e| Error::file(path, e.to_string()));
        }
        let config = path.join(CONFIG);
        let config_json = json(&config)?;
        let own = path.join(OWN_FILE);
        let (file, source, tool_use) = match std::fs::read_to_string(&own) {
            Ok(text) => {
                let tool_use = std::fs::read_to_string(path.join(TOOL_USE_FILE)).ok();
                (own, Some(text), tool_use)
            }
            Err(_) => {
                let (file, found) = match &config_json["chat_template"] {
                    Json::Null => {
                        let processor = path.join(PROCESSOR);
                        let found = json(&processor)?["chat_template"].take();
                        (processor, found)
                    }
                    found => (config, found.clone()),
                };
                (file, named(&found, "default"), named(&found, "tool_use"))
            }
        };
        let Some(source) = source else {
            return Ok(None);
        };
        let template = Self::with(&source, tool_use.as_deref(), special(&config_json));
        template
            .map(Some)
            .map_err(|e| Error::file(&file, e.to_string()))
    }

    /// The texts of special tokens that templates for a checkpoint may name.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn tokens(checkpoint: &Path) -> Result<Vec<(String, String)>> {
        match Gguf::is_named(checkpoint) {
            true => {
                let gguf = Gguf::open(checkpoint)?;
                Ok(gguf::tokenizer::special(&gguf.header.metadata))
            }
            false => Ok(special(&json(&checkpoint.join(CONFIG))?)),
        }
    }

    /// Hash of all that it is.
    pub fn hash(&self) -> Hash {
        let tokens = self.tokens.iter().flat_map(|(name, text)| [name, text]);
        let parts = std::iter::once(&self.source)
            .chain(tokens)
            .chain(&self.tool_use);
        parts.fold(Hash::new(), |hash, part| {
            hash.with(part.as_bytes()).with(&[0])
        })
    }

    /// The text of a conversation, with the beginning of an answer behind it.
    ///
    /// # Errors
    /// What the template refuses, in its own words.
    pub fn render(&self, messages: &[Message]) -> Result<String> {
        let messages = serde_json::to_value(messages).expect("messages are texts");
        self.render_json(&messages, &Json::Null, true)
    }

    /// The same from JSON, with tools.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn render_json(&self, messages: &Json, tools: &Json, answer: bool) -> Result<String> {
        let end = match answer {
            true => End::Answer,
            false => End::Whole,
        };
        let rendering = Rendering {
            tools,
            end,
            ..Rendering::default()
        };
        self.render_with(messages, &rendering)
    }

    /// What `apply_chat_template` gives: a list of messages in the shape that the template knows (see
    /// [`ChatTemplate::of_openai`]), with all that it may be told.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`]; a last message that cannot be continued.
    pub fn render_with(&self, messages: &Json, rendering: &Rendering) -> Result<String> {
        let mut messages = messages.clone();
        let all = messages
            .as_array_mut()
            .map_or(&mut [][..], Vec::as_mut_slice);
        all.iter_mut().for_each(normalise);
        let continued = match rendering.end {
            End::Continued => Some(all.last_mut().and_then(mark).ok_or_else(|| {
                Error::invalid("the last message has no text that could be continued")
            })?),
            _ => None,
        };
        let value = |json: &Json| match json {
            Json::Null => Value::from(()),
            json => Value::from(Serde(json)),
        };
        let tokens = self.tokens.iter();
        let tokens = tokens.map(|(name, text)| (name.as_str(), Value::from(text.as_str())));
        let variables = rendering.variables.as_object().into_iter().flatten();
        let variables = variables.map(|(name, json)| (name.as_str(), value(json)));
        let own = [
            ("messages", value(&messages)),
            ("tools", value(rendering.tools)),
            ("documents", value(rendering.documents)),
            (
                "add_generation_prompt",
                Value::from(rendering.end == End::Answer),
            ),
        ];
        let context = Value::from_pairs(tokens.chain(variables).chain(own));
        let source = match rendering.tools {
            Json::Null => &self.source,
            _ => self.with_tools(),
        };
        let environment = jinja::environment();
        let template = environment.template_from_str(source).map_err(failed)?;
        let text = template.render(context).map_err(failed)?;
        match continued {
            Some(said) => cut(&text, &said),
            None => Ok(text),
        }
    }

    /// The source of what renders conversations with tools.
    fn with_tools(&self) -> &str {
        self.tool_use.as_ref().unwrap_or(&self.source)
    }

    /// Messages as OpenAI's clients send them in the shape that templates are written for (as vLLM does): arguments of
    /// calls, a text there, as the object that they spell; a content of text parts as one text, its parts on lines of
    /// their own, unless the template takes parts.
    ///
    /// # Errors
    /// A content part that is not text, by message and part.
    pub fn of_openai(&self, messages: &Json) -> Result<Json> {
        let mut messages = messages.clone();
        let all = messages
            .as_array_mut()
            .map_or(&mut [][..], Vec::as_mut_slice);
        for (i, message) in all.iter_mut().enumerate() {
            // OpenAI's newer word, which official clients send.
            if message["role"] == "developer" && !self.source.contains("developer") {
                message["role"] = "system".into();
            }
            let calls = message.get_mut("tool_calls").and_then(Json::as_array_mut);
            for call in calls.into_iter().flatten() {
                let arguments = call.pointer_mut("/function/arguments");
                let Some((arguments, text)) =
                    arguments.and_then(|json| json.as_str().map(str::to_owned).map(|t| (json, t)))
                else {
                    continue;
                };
                if let Ok(object @ Json::Object(_)) = serde_json::from_str(&text) {
                    *arguments = object;
                }
            }
            let Some(Json::Array(parts)) = message.get("content") else {
                continue;
            };
            let text = |(j, part): (usize, &Json)| match part {
                Json::String(text) => Ok(text.clone()),
                part => part["text"].as_str().map(str::to_owned).ok_or_else(|| {
                    Error::invalid(format!(
                        "messages[{i}].content[{j}] is {}: only parts of type \"text\" are read",
                        part["type"]
                    ))
                }),
            };
            let texts: Vec<String> = parts.iter().enumerate().map(text).collect::<Result<_>>()?;
            if !self.takes_parts() {
                message["content"] = texts.join("\n").into();
            }
        }
        Ok(messages)
    }

    /// Whether the template reads a list of parts: it then gives their text, and not the list.
    fn takes_parts(&self) -> bool {
        const TEXT: &str = "a needle";
        let content = serde_json::json!([{"type": "text", "text": TEXT}]);
        let messages = serde_json::json!([{"role": "user", "content": content}]);
        let text = self.render_json(&messages, &Json::Null, false);
        text.is_ok_and(|text| text.contains(TEXT) && !text.contains("type"))
    }
}

fn failed(e: minijinja::Error) -> Error {
    Error::invalid(format!("chat template: {e:#}"))
}

/// Names under which messages hold what a model thought; templates read the first.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// As `transformers` does: what is null is not there, and thoughts have the names that templates know.
fn normalise(message: &mut Json) {
    let Some(fields) = message.as_object_mut() else {
        return;
    };
    fields.retain(|_, value| !value.is_null());
    let thought = REASONING.iter().find_map(|name| fields.get(*name)).cloned();
    if let Some(thought) = thought {
        fields.entry("thinking").or_insert_with(|| thought.clone());
        fields.insert(REASONING[0].to_owned(), thought);
    }
}

/// Marks the end of a message's text; what the text was.
fn mark(message: &mut Json) -> Option<String> {
    let text = match message.get_mut("content")? {
        Json::Array(parts) => parts
            .iter_mut()
            .rev()
            .find_map(|part| part.get_mut("text"))?,
        content => content,
    };
    let Json::String(text) = text else {
        return None;
    };
    let said = text.clone();
    text.push_str(CONTINUED);
    Some(said)
}

/// A rendered conversation up to where its last message, `said`, was marked.
fn cut(text: &str, said: &str) -> Result<String> {
    let found = text.rfind(CONTINUED.trim_end());
    let Some(at) = found.filter(|_| text.contains(said.trim())) else {
        return Err(Error::invalid(
            "the chat template changes the last message, which therefore cannot be continued",
        ));
    };
    let before = &text[..at];
    // The template may have trimmed the message, mark and all.
    Ok(match text[at..].starts_with(CONTINUED) {
        true => before.to_owned(),
        false => before.trim_end().to_owned(),
    })
}

/// The template of a name, of several; of one that has none, the default.
fn named(template: &Json, name: &str) -> Option<String> {
    match template {
        Json::String(text) => (name == "default").then(|| text.clone()),
        Json::Array(all) => {
            let found = all.iter().find(|t| t["name"] == name);
            Some(found?["template"].as_str()?.to_owned())
        }
        _ => None,
    }
}

/// A file of JSON; null where there is none.
fn json(file: &Path) -> Result<Json> {
    match std::fs::read(file) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map_err(|e| Error::file(file, format!("{e}: fetch or save the file again"))),
        Err(_) => Ok(Json::Null),
    }
}

/// Special tokens that a tokenizer's config names: texts, or objects with a `content`.
fn special(config: &Json) -> Vec<(String, String)> {
    let all = config.as_object().into_iter().flatten();
    let tokens = all.filter(|(name, _)| name.ends_with("_token"));
    tokens
        .filter_map(|(name, token)| {
            let text = token.as_str().or_else(|| token["content"].as_str())?;
            Some((name.clone(), text.to_owned()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn conversation() -> Vec<Message> {
        let said = |role: &str, content: &str| Message {
            role: role.into(),
            content: content.into(),
        };
        vec![said("system", "Be brief. "), said("user", "Hi <you>")]
    }

    #[test]
    fn conversations_are_rendered_as_the_template_says() {
        let llama = "{{- bos_token }}{% for m in messages %}\n    {%- if m['role'] == 'system' %}\n        \
                     {{- '[' + m['content'].strip() + ']' }}\n    {%- else %}\n        {{- m.content }}\n    {%- endif %}\n\
                     {% endfor %}\n{% generation %}{% if add_generation_prompt %}>{% endif %}{% endgeneration %}";
        let tokens = ChatTemplate::tokens(Path::new("assets/teacher")).unwrap();
        let template = ChatTemplate::new(llama, tokens).unwrap();
        assert_eq!(
            template.render(&conversation()).unwrap(),
            "<s>[Be brief.]Hi <you>>"
        );
        let chatml = ChatTemplate::new(CHATML, Vec::new()).unwrap();
        let text = chatml.render(&conversation()).unwrap();
        assert_eq!(
            text,
            "<|im_start|>system\nBe brief. <|im_end|>\n<|im_start|>user\nHi <you><|im_end|>\n<|im_start|>assistant\n"
        );
    }

    #[test]
    fn json_is_pythons() {
        let template = ChatTemplate::new(
            "{{ tools | tojson }}{{ tools | tojson(indent=1) }}",
            Vec::new(),
        );
        let tools = json!([{"name": "<é>", "n": [1, 2.5, null, true]}]);
        let text = template
            .unwrap()
            .render_json(&json!([]), &tools, false)
            .unwrap();
        assert!(
            text.starts_with(
                r#"[{"name": "<é>", "n": [1, 2.5, null, true]}][
 {"#
            ),
            "{text}"
        );
    }

    #[test]
    fn refusals_and_garbage_are_said() {
        let template = ChatTemplate::new("{{ raise_exception('no system please') }}", Vec::new());
        let said = template
            .unwrap()
            .render(&conversation())
            .unwrap_err()
            .to_string();
        assert!(said.contains("no system please"), "{said}");
        let said = ChatTemplate::new("{% for %}", Vec::new())
            .unwrap_err()
            .to_string();
        assert!(said.contains("chat template"), "{said}");
    }
}
