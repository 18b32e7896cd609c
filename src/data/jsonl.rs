//! JSON lines with a `text` field.

use std::fs;
use std::path::Path;

use serde::Deserialize;

use crate::{Error, Result};

#[derive(Deserialize)]
struct Line {
    text: String,
}

/// The `text` of every line, other fields ignored. Empty lines are allowed at the end only.
///
/// # Errors
/// Names the file and the line (from 1) that is empty, no JSON, or without a text.
pub fn read_texts(path: &Path) -> Result<Vec<String>> {
    let bytes = fs::read(path).map_err(Error::io("cannot read", path))?;
    let at = |line: usize, message: String| Error::Line {
        path: path.to_owned(),
        line,
        message,
    };
    let mut texts = Vec::new();
    let end = bytes.trim_ascii_end();
    for (i, line) in end.split(|b| *b == b'\n').enumerate() {
        let line = std::str::from_utf8(line).map_err(|e| at(i + 1, format!("not UTF-8: {e}")))?;
        if line.trim().is_empty() {
            return Err(at(
                i + 1,
                "an empty line; give one JSON object a line".into(),
            ));
        }
        let parsed: Line = serde_json::from_str(line).map_err(|e| {
            at(
                i + 1,
                format!("not a JSON object with a \"text\" string: {e}"),
            )
        })?;
        texts.push(parsed.text);
    }
    Ok(texts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(content: &[u8]) -> Result<Vec<String>> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), content).unwrap();
        read_texts(file.path())
    }

    #[test]
    fn reads_texts_and_ignores_other_fields() {
        let texts = read(b"{\"text\":\"a\"}\n{\"id\":1,\"text\":\"b\\n\"}\n\n").unwrap();
        assert_eq!(texts, ["a", "b\n"]);
    }

    #[test]
    fn bad_lines_are_named() {
        for (content, line, word) in [
            (&b"{\"text\":\"a\"}\nnonsense\n"[..], 2, "JSON"),
            (b"{\"text\":\"a\"}\n\n{\"text\":\"b\"}", 2, "empty"),
            (b"{\"text\":\"a\"}\n{\"txt\":\"a\"}", 2, "text"),
            (b"{\"text\":3}", 1, "string"),
            (b"{\"text\":\"\xff\"}", 1, "UTF-8"),
            (b"", 1, "empty"),
        ] {
            let message = read(content).unwrap_err().to_string();
            assert!(
                message.contains(&format!("line {line}:")) && message.contains(word),
                "{message}"
            );
        }
    }
}
