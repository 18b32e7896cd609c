//! JSON lines: a `text`, or a `prompt` and its `completion`.

use std::fs;
use std::path::Path;

use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::Value;

use crate::{Error, Result};

/// One example of a text file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Text {
    pub text: String,
    /// Bytes of it that only lead to the rest: a prompt.
    pub prompt: usize,
}

/// Any object: what is not used here may be of any type.
#[derive(Deserialize)]
struct Line {
    text: Option<Value>,
    prompt: Option<Value>,
    completion: Option<Value>,
    messages: Option<IgnoredAny>,
}

const WANTED: &str = "a JSON object with a \"text\" string, or with \"prompt\" and \"completion\"";

/// The texts of every line, other fields ignored.
///
/// # Errors
/// As [`read_lines`].
pub fn read_texts(path: &Path) -> Result<Vec<Text>> {
    let lines: Vec<Line> = read_lines(path, WANTED)?;
    let text = |(i, line): (usize, Line)| match line {
        Line {
            text: Some(Value::String(text)),
            ..
        } => Ok(Text { text, prompt: 0 }),
        Line {
            prompt: Some(Value::String(prompt)),
            completion: Some(Value::String(completion)),
            ..
        } => Ok(Text {
            text: prompt.clone() + &completion,
            prompt: prompt.len(),
        }),
        other => Err(Error::Line {
            path: path.to_owned(),
            line: i + 1,
            message: format!("not {WANTED}{}", other.instead()),
        }),
    };
    lines.into_iter().enumerate().map(text).collect()
}

impl Line {
    /// What is there in the place of strings.
    fn instead(&self) -> &'static str {
        let chat = self.messages.is_some() || matches!(self.prompt, Some(Value::Array(_)));
        match chat {
            true => {
                ": chat messages are not read yet; write each conversation as one \"text\", or its last answer as \
                 \"completion\" to the \"prompt\" before it, with the model's chat template applied"
            }
            false => "",
        }
    }
}

/// One value a line. Empty lines are allowed at the end only.
///
/// # Errors
/// A file without a line; names the file and the line (from 1) that is empty, or not what is `wanted`.
pub fn read_lines<T: DeserializeOwned>(path: &Path, wanted: &str) -> Result<Vec<T>> {
    let bytes = fs::read(path).map_err(Error::io("cannot read", path))?;
    let at = |line: usize, message: String| Error::Line {
        path: path.to_owned(),
        line,
        message,
    };
    let mut values = Vec::new();
    let end = bytes.trim_ascii_end();
    if end.is_empty() {
        let message = format!("the file is empty; each line is to be {wanted}");
        return Err(Error::file(path, message));
    }
    for (i, line) in end.split(|b| *b == b'\n').enumerate() {
        let line = std::str::from_utf8(line).map_err(|e| at(i + 1, format!("not UTF-8: {e}")))?;
        if line.trim().is_empty() {
            return Err(at(
                i + 1,
                "an empty line; give one JSON object a line".into(),
            ));
        }
        let value =
            serde_json::from_str(line).map_err(|e| at(i + 1, format!("not {wanted}: {e}")))?;
        values.push(value);
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(content: &[u8]) -> Result<Vec<Text>> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), content).unwrap();
        read_texts(file.path())
    }

    #[test]
    fn reads_texts_and_ignores_other_fields() {
        let texts = read(b"{\"text\":\"a\"}\n{\"id\":1,\"text\":\"b\\n\"}\n\n").unwrap();
        let whole = |text: &str| Text {
            text: text.into(),
            prompt: 0,
        };
        assert_eq!(texts, [whole("a"), whole("b\n")]);
        let odd = read(b"{\"text\":\"a\",\"prompt\":3,\"messages\":[]}").unwrap();
        assert_eq!(odd, [whole("a")]);
        let asked = read(b"{\"prompt\":\"a \",\"completion\":\"b\"}").unwrap();
        assert_eq!((asked[0].text.as_str(), asked[0].prompt), ("a b", 2));
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
            (b"{\"messages\":[]}", 1, "chat messages are not read yet"),
            (b"{\"prompt\":[],\"completion\":[]}", 1, "chat messages"),
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
}
