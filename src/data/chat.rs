//! Chat templates: what a checkpoint makes of a conversation, rendered as Hugging Face `transformers` does.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind, Value};
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::gguf::{self, Gguf};
use crate::hash::Hash;
use crate::{Error, Result};

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
    /// `bos_token`, `eos_token`, ..
    tokens: Vec<(String, String)>,
}

/// The files that a template may stand in.
const OWN_FILE: &str = "chat_template.jinja";
const CONFIG: &str = "tokenizer_config.json";
const GGUF_KEY: &str = "tokenizer.chat_template";

/// ChatML (OpenAI's, Qwen's), for models whose checkpoint says nothing.
pub const CHATML: &str = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}\
                          {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

impl ChatTemplate {
    /// # Errors
    /// A template that is none, with its line.
    pub fn new(source: &str, tokens: Vec<(String, String)>) -> Result<Self> {
        // Marks for training only.
        let mut source = source.to_owned();
        for word in ["generation", "endgeneration"] {
            for (open, close) in [("{%", "%}"), ("{%-", "%}"), ("{%", "-%}"), ("{%-", "-%}")] {
                source = source.replace(&format!("{open} {word} {close}"), "");
            }
        }
        let template = Self { source, tokens };
        let tried = environment()
            .template_from_str(&template.source)
            .map(|_| ());
        tried.map_err(|e| Error::invalid(format!("chat template: {e:#}")))?;
        Ok(template)
    }

    /// The template of a checkpoint folder or a .gguf file, if it has one.
    ///
    /// # Errors
    /// A file that cannot be read, or a template that is none.
    pub fn open(path: &Path) -> Result<Option<Self>> {
        if Gguf::is_named(path) {
            let gguf = Gguf::open(path)?;
            let Some(gguf::Value::Text(source)) = gguf.header.metadata.get(GGUF_KEY) else {
                return Ok(None);
            };
            let named = gguf::tokenizer::special(&gguf.header.metadata);
            let template = Self::new(source, named);
            return template
                .map(Some)
                .map_err(|e| Error::file(path, e.to_string()));
        }
        let config = path.join(CONFIG);
        let json: Json = match std::fs::read(&config) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|e| Error::file(&config, format!("{e}: fetch or save the file again")))?,
            Err(_) => Json::Null,
        };
        let own = path.join(OWN_FILE);
        let (file, source) = match std::fs::read_to_string(&own) {
            Ok(text) => (own, Some(text)),
            Err(_) => (config, of_config(&json["chat_template"])),
        };
        let Some(source) = source else {
            return Ok(None);
        };
        let template = Self::new(&source, special(&json));
        template
            .map(Some)
            .map_err(|e| Error::file(&file, e.to_string()))
    }

    /// Hash of all that it is.
    pub fn hash(&self) -> Hash {
        let named = self.tokens.iter().flat_map(|(name, text)| [name, text]);
        let parts = std::iter::once(&self.source).chain(named);
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

    /// The same from JSON as OpenAI has it, with tools.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn render_json(&self, messages: &Json, tools: &Json, answer: bool) -> Result<String> {
        let environment = environment();
        let failed = |e: minijinja::Error| Error::invalid(format!("chat template: {e:#}"));
        let template = environment
            .template_from_str(&self.source)
            .map_err(failed)?;
        let tools = match tools {
            Json::Null => Value::from(()),
            tools => Value::from(Serde(tools)),
        };
        let tokens = self.tokens.iter();
        let tokens = tokens.map(|(name, text)| (name.as_str(), Value::from(text.as_str())));
        let own = [
            ("messages", Value::from(Serde(messages))),
            ("tools", tools),
            ("add_generation_prompt", Value::from(answer)),
        ];
        let context = Value::from_pairs(tokens.chain(own));
        template.render(context).map_err(failed)
    }
}

/// A template, or several with names, of which one is the default.
fn of_config(template: &Json) -> Option<String> {
    match template {
        Json::String(text) => Some(text.clone()),
        Json::Array(all) => {
            let default = all.iter().find(|t| t["name"] == "default");
            Some(default?["template"].as_str()?.to_owned())
        }
        _ => None,
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

/// Jinja as `transformers` sets it up.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build();
    environment.set_syntax(syntax.expect("the usual delimiters"));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function(
        "raise_exception",
        |said: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, said))
        },
    );
    environment.add_function("strftime_now", |format: String| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        strftime(now.map_or(0, |t| t.as_secs()), &format)
    });
    environment.add_filter("tojson", tojson);
    environment
}

/// As Python's `json.dumps(x, ensure_ascii=False, indent=indent)`.
fn tojson(value: Value, options: minijinja::value::Kwargs) -> Result<String, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    let failed =
        |e: serde_json::Error| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string());
    let mut bytes = Vec::new();
    match indent {
        Some(width) => {
            let spaces = vec![b' '; width];
            let pretty = serde_json::ser::PrettyFormatter::with_indent(&spaces);
            let mut to = serde_json::Serializer::with_formatter(&mut bytes, pretty);
            value.serialize(&mut to).map_err(failed)?;
        }
        None => {
            let mut to = serde_json::Serializer::with_formatter(&mut bytes, Spaced);
            value.serialize(&mut to).map_err(failed)?;
        }
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Python's separators.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: std::io::Write + ?Sized>(
        &mut self,
        to: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        match first {
            true => Ok(()),
            false => to.write_all(b", "),
        }
    }

    fn begin_object_key<W: std::io::Write + ?Sized>(
        &mut self,
        to: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        self.begin_array_value(to, first)
    }

    fn begin_object_value<W: std::io::Write + ?Sized>(
        &mut self,
        to: &mut W,
    ) -> std::io::Result<()> {
        to.write_all(b": ")
    }
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// The codes that templates use, in UTC.
fn strftime(seconds: u64, format: &str) -> String {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Civil date from days since 1970 (Hinnant).
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let day = doy - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    let year = yoe + era * 400 + u64::from(month <= 2);
    let name = MONTHS[month as usize - 1];
    let mut text = String::new();
    let mut codes = format.chars();
    while let Some(c) = codes.next() {
        if c != '%' {
            text.push(c);
            continue;
        }
        let found = match codes.next() {
            Some('d') => format!("{day:02}"),
            Some('m') => format!("{month:02}"),
            Some('Y') => year.to_string(),
            Some('y') => format!("{:02}", year % 100),
            Some('b') => name[..3].to_owned(),
            Some('B') => name.to_owned(),
            Some('H') => format!("{:02}", second / 3600),
            Some('M') => format!("{:02}", second / 60 % 60),
            Some('S') => format!("{:02}", second % 60),
            Some(other) => format!("%{other}"),
            None => "%".to_owned(),
        };
        text.push_str(&found);
    }
    text
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
        let template = ChatTemplate::new(llama, vec![("bos_token".into(), "<s>".into())]).unwrap();
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

    #[test]
    fn dates_are_civil() {
        assert_eq!(
            strftime(1_774_000_000, "%d %b %Y, %H:%M"),
            "20 Mar 2026, 09:46"
        );
        assert_eq!(
            strftime(951_782_400, "%Y-%m-%d %B %y"),
            "2000-02-29 February 00"
        );
    }
}
