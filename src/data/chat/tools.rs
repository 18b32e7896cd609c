//! Calls of tools in answers: how a template teaches a model to write them, read as they come, and as a grammar.

use serde_json::Value as Json;

use super::ChatTemplate;
use crate::{Error, Result};

/// How calls are written; one row of [`FORMATS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ToolFormat {
    pub name: &'static str,
    /// A template that holds one of them teaches it.
    taught_by: &'static [&'static str],
    /// Before a call, or a list of them.
    open: &'static str,
    /// An answer that begins with it may be a call without `open`: it is a special token, which decoding leaves out, or
    /// the models go without.
    bare: Option<char>,
    /// Behind a call. Models forget it.
    close: &'static str,
    /// The field beside `name`.
    arguments: &'static str,
    /// How an answer of calls is spelled: before them, between two of them (if there can be two), behind them.
    spelled: (&'static str, Option<&'static str>, &'static str),
}

/// The first that a template teaches is its own.
const FORMATS: [ToolFormat; 3] = [
    // Hermes 2 Pro, Qwen 2.5 and 3, SmolLM3.
    ToolFormat {
        name: "hermes",
        taught_by: &["<tool_call>"],
        open: "<tool_call>",
        bare: None,
        close: "</tool_call>",
        arguments: "arguments",
        spelled: (
            "<tool_call>\n",
            Some("\n</tool_call>\n<tool_call>\n"),
            "\n</tool_call>",
        ),
    },
    // Mistral's of version 3 of its tokenizer.
    ToolFormat {
        name: "mistral",
        taught_by: &["[TOOL_CALLS] [", "[TOOL_CALLS]["],
        open: "[TOOL_CALLS]",
        bare: Some('['),
        close: "",
        arguments: "arguments",
        spelled: ("[", Some(", "), "]"),
    },
    // Llama 3.1 and on.
    ToolFormat {
        name: "llama",
        taught_by: &["<|python_tag|>", "{\"name\": function name, \"parameters\""],
        open: "<|python_tag|>",
        bare: Some('{'),
        close: ";",
        arguments: "parameters",
        spelled: ("", None, ""),
    },
];

impl ToolFormat {
    /// The format that a template teaches, if it is a known one.
    pub fn of(template: &ChatTemplate) -> Option<Self> {
        // Quotes are escaped where they stand in a quoted text.
        let text = template.with_tools().replace('\\', "");
        let taught = |format: &&Self| format.taught_by.iter().any(|mark| text.contains(mark));
        FORMATS.iter().find(taught).copied()
    }

    /// The spellings around calls, which a tokenizer may hold as special tokens: decode with
    /// [`showing`](crate::data::DecodeStream::showing) them.
    pub fn marks(&self) -> [&'static str; 2] {
        [self.open, self.close]
    }

    /// A grammar in Lark's syntax (as `llguidance` reads it) of an answer that is calls and nothing else: of tool `only`,
    /// or of any; of one, or with `several` of one or more where the format has lists. `tools` is OpenAI's list.
    ///
    /// # Errors
    /// Tools that are none, and an `only` that is not among them.
    pub fn grammar(&self, tools: &Json, only: Option<&str>, several: bool) -> Result<String> {
        let tools = tools.as_array().map_or(&[][..], Vec::as_slice);
        let mut rules = String::new();
        let mut names = Vec::new();
        let mut calls = Vec::new();
        for (i, tool) in tools.iter().enumerate() {
            let function = &tool["function"];
            let Some(name) = function["name"].as_str() else {
                return Err(Error::invalid(format!(
                    "tools[{i}] has no function.name: give {{\"type\": \"function\", \"function\": {{\"name\": .., \"parameters\": ..}}}}"
                )));
            };
            names.push(name);
            if only.is_some_and(|only| only != name) {
                continue;
            }
            let mut parameters = match &function["parameters"] {
                Json::Null => serde_json::json!({"type": "object", "properties": {}}),
                schema => schema.clone(),
            };
            if let Some(fields) = parameters.as_object_mut() {
                // As templates write them, which models have seen; left free, a model may go on in blanks for ever.
                let spelled = || serde_json::json!({"whitespace_flexible": false, "item_separator": ", ", "key_separator": ": "});
                fields.entry("x-guidance").or_insert_with(spelled);
            }
            let name = Json::from(name);
            let before = format!("{{\"name\": {name}, \"{}\": ", self.arguments);
            rules += &format!(
                "call_{i}: {} arguments_{i} \"}}\"\narguments_{i}: %json {parameters}\n",
                quoted(&before)
            );
            calls.push(format!("call_{i}"));
        }
        if calls.is_empty() {
            let names = names.join(", ");
            return Err(Error::invalid(match only {
                Some(only) => {
                    format!("tool_choice names {only:?}, which is not among the tools ({names})")
                }
                None => "tool_choice asks for a call, and there are no tools".to_owned(),
            }));
        }
        let (before, between, behind) = self.spelled;
        let more = match between.filter(|_| several) {
            Some(between) => format!(" ({} call)*", quoted(between)),
            None => String::new(),
        };
        let parts = [quoted(before), format!("call{more}"), quoted(behind)];
        let parts: Vec<String> = parts.into_iter().filter(|part| part != "\"\"").collect();
        Ok(format!(
            "start: {}\ncall: {}\n{rules}",
            parts.join(" "),
            calls.join(" | ")
        ))
    }
}

/// A text as a literal of Lark's.
fn quoted(text: &str) -> String {
    Json::from(text).to_string()
}

/// A part of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    Text(String),
    Call {
        name: String,
        /// A JSON object.
        arguments: String,
    },
}

/// Tells text from calls while an answer comes. What may yet be a call is held back; what only looked like one is text.
/// White space beside calls is theirs.
#[derive(Debug, Clone)]
pub struct ToolReader {
    format: ToolFormat,
    /// What has come and is not yet certain.
    held: String,
    /// Whether some text is out, so that nothing is a beginning.
    said: bool,
    called: bool,
    /// In a call: where its JSON stands.
    scan: Option<Scan>,
}

impl ToolReader {
    pub fn new(format: ToolFormat) -> Self {
        Self {
            format,
            held: String::new(),
            said: false,
            called: false,
            scan: None,
        }
    }

    /// What has become certain with `text`.
    pub fn push(&mut self, text: &str) -> Vec<Piece> {
        self.held += text;
        self.read(false)
    }

    /// What is still held: a call that was not finished is text.
    pub fn finish(mut self) -> Vec<Piece> {
        self.read(true)
    }

    fn read(&mut self, last: bool) -> Vec<Piece> {
        let mut pieces = Vec::new();
        loop {
            let more = match self.scan {
                None => self.text(last, &mut pieces),
                Some(_) => self.call(last, &mut pieces),
            };
            if !more {
                return pieces;
            }
        }
    }

    /// Gives out text up to what may be a call; whether one begins.
    fn text(&mut self, last: bool, pieces: &mut Vec<Piece>) -> bool {
        let open = self.format.open;
        let rest = self.held.trim_start();
        let marked = open.starts_with(rest) || rest.starts_with(open);
        if !self.said && !marked && rest.starts_with(|c| self.format.bare == Some(c)) {
            self.scan = Some(Scan::new(0));
            return true;
        }
        let found = self.held.find(open);
        let certain = match found {
            Some(at) => self.held[..at].trim_end().len(),
            None if last && self.called => self.held.trim_end().len(),
            None if last => self.held.len(),
            None => {
                let begun = (1..open.len())
                    .rev()
                    .find(|n| self.held.ends_with(&open[..*n]));
                let before = &self.held[..self.held.len() - begun.unwrap_or(0)];
                before.trim_end().len()
            }
        };
        // White space behind a call is the call's; at the beginning of an answer it waits for what follows.
        if certain > 0 {
            let text = &self.held[..certain];
            let text = match self.called && !self.said {
                true => text.trim_start(),
                false => text,
            };
            say(text, pieces);
            self.said = true;
            self.called = false;
        }
        self.held.drain(..certain);
        self.scan = found.map(|at| Scan::new(at - certain + open.len()));
        found.is_some()
    }

    /// Reads on in what may be a call; whether it is decided.
    fn call(&mut self, last: bool, pieces: &mut Vec<Piece>) -> bool {
        let Some(scan) = &mut self.scan else {
            return false;
        };
        let end = match scan.end(&self.held) {
            Found::End(end) => end,
            Found::More if !last => return false,
            Found::More | Found::Nothing => return self.no_call(pieces),
        };
        let json = serde_json::from_str(&self.held[scan.from..end]);
        let Some(calls) = json.ok().and_then(|json| calls(&json)) else {
            return self.no_call(pieces);
        };
        let (rest, close) = (self.held[end..].trim_start(), self.format.close);
        let end = match rest.strip_prefix(close) {
            Some(behind) => self.held.len() - behind.len(),
            None if close.starts_with(rest) && !last => return false,
            None => end,
        };
        pieces.extend(calls);
        self.held.drain(..end);
        (self.said, self.called, self.scan) = (false, true, None);
        true
    }

    /// What looked like a call is text: its beginning for certain, the rest is looked at again.
    fn no_call(&mut self, pieces: &mut Vec<Piece>) -> bool {
        let (rest, open) = (self.held.trim_start(), self.format.open);
        let blank = self.held.len() - rest.len();
        let mark = match rest.starts_with(open) {
            true => blank + open.len(),
            false => blank + 1,
        };
        say(&self.held[..mark], pieces);
        self.held.drain(..mark);
        (self.said, self.called, self.scan) = (true, false, None);
        true
    }
}

/// Appends to the text before it.
fn say(text: &str, pieces: &mut Vec<Piece>) {
    match pieces.last_mut() {
        _ if text.is_empty() => {}
        Some(Piece::Text(before)) => before.push_str(text),
        _ => pieces.push(Piece::Text(text.to_owned())),
    }
}

/// One call, or a list of them: a name and arguments each, under either of the words that models use.
fn calls(json: &Json) -> Option<Vec<Piece>> {
    if let Json::Array(all) = json {
        let all: Option<Vec<Vec<Piece>>> = all.iter().map(calls).collect();
        return all.map(|all| all.concat()).filter(|all| !all.is_empty());
    }
    let name = json["name"].as_str().filter(|name| !name.is_empty())?;
    let given = json.get("arguments").or_else(|| json.get("parameters"))?;
    let arguments = match given {
        Json::Object(_) => given.to_string(),
        Json::String(text) => {
            let object: Json = serde_json::from_str(text).ok()?;
            object.is_object().then(|| text.clone())?
        }
        _ => return None,
    };
    let name = name.to_owned();
    Some(vec![Piece::Call { name, arguments }])
}

/// Looks for the end of a JSON object or list that comes piece by piece, every byte once.
#[derive(Debug, Clone)]
struct Scan {
    /// Where it begins, behind white space.
    from: usize,
    at: usize,
    depth: usize,
    in_text: bool,
    escaped: bool,
}

enum Found {
    End(usize),
    More,
    /// No JSON begins here.
    Nothing,
}

impl Scan {
    fn new(from: usize) -> Self {
        Self {
            from,
            at: from,
            depth: 0,
            in_text: false,
            escaped: false,
        }
    }

    fn end(&mut self, text: &str) -> Found {
        for byte in text.as_bytes()[self.at..].iter() {
            self.at += 1;
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' if self.in_text => self.escaped = true,
                b'"' if self.depth > 0 => self.in_text = !self.in_text,
                _ if self.in_text => {}
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' if self.depth > 0 => self.depth -= 1,
                b' ' | b'\n' | b'\r' | b'\t' if self.depth == 0 => {
                    self.from = self.at;
                    continue;
                }
                _ if self.depth == 0 => return Found::Nothing,
                _ => {}
            }
            if self.depth == 0 {
                // Asked again while what closes the call is waited for.
                let end = self.at;
                self.at = self.from;
                return Found::End(end);
            }
        }
        Found::More
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn format(name: &str) -> ToolFormat {
        *FORMATS.iter().find(|format| format.name == name).unwrap()
    }

    /// What comes of an answer, whole and in pieces of every size; texts joined.
    fn read(name: &str, answer: &str) -> Vec<Piece> {
        let letters: Vec<char> = answer.chars().collect();
        let mut found: Vec<Vec<Piece>> = Vec::new();
        for size in 1..=letters.len() {
            let mut reader = ToolReader::new(format(name));
            let mut pieces = Vec::new();
            for part in letters.chunks(size) {
                pieces.extend(reader.push(&part.iter().collect::<String>()));
            }
            pieces.extend(reader.finish());
            let mut joined = Vec::new();
            for piece in pieces {
                match piece {
                    Piece::Text(text) => say(&text, &mut joined),
                    call => joined.push(call),
                }
            }
            found.push(joined);
        }
        assert!(found.iter().all(|pieces| *pieces == found[0]), "{found:?}");
        found.swap_remove(0)
    }

    fn text(text: &str) -> Piece {
        Piece::Text(text.to_owned())
    }

    fn call(name: &str, arguments: &str) -> Piece {
        let (name, arguments) = (name.to_owned(), arguments.to_owned());
        Piece::Call { name, arguments }
    }

    #[test]
    fn calls_are_read_in_every_format() {
        let a = call("f", r#"{"x":"} </tool_call> \" ]"}"#);
        let json = r#"{"name": "f", "arguments": {"x": "} </tool_call> \" ]"}}"#;
        let g = call("g", "{}");
        let hermes = format!(
            "Let me see.\n\n<tool_call>\n{json}\n</tool_call>\n<tool_call>{{\"name\": \"g\", \"arguments\": {{}}}}\n"
        );
        assert_eq!(
            read("hermes", &hermes),
            [text("Let me see."), a.clone(), g.clone()]
        );
        let mistral =
            format!(" [{json}, {{\"name\": \"g\", \"arguments\": {{}}, \"id\": \"abcdefghi\"}}]");
        for answer in [format!("[TOOL_CALLS]{mistral}"), mistral] {
            assert_eq!(read("mistral", &answer), [a.clone(), g.clone()]);
        }
        let llama = json.replace("arguments", "parameters");
        assert_eq!(read("llama", &llama), std::slice::from_ref(&a));
        let two = format!("<|python_tag|>{llama}; {{\"name\": \"g\", \"parameters\": {{}}}}");
        assert_eq!(read("llama", &two), [a.clone(), g]);
        let texts = r#"{"name": "f", "arguments": "{\"x\":1}"}"#;
        assert_eq!(read("llama", texts), [call("f", r#"{"x":1}"#)]);
        let behind = format!("<tool_call>{json}</tool_call> \n Done <b> ");
        assert_eq!(read("hermes", &behind), [a, text("Done <b> ")]);
    }

    #[test]
    fn what_only_looks_like_a_call_is_text() {
        for (name, answer) in [
            ("hermes", " a < b\n<tool_\ncall> "),
            (
                "hermes",
                "Say <tool_call> to call\n <tool_call>{\"name\": 3}</tool_call>",
            ),
            (
                "hermes",
                "x <tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": ",
            ),
            ("mistral", "[1] is a source, [TOOL_CALLS] a mark "),
            ("llama", "{\"name\": \"Tom\", \"age\": 3}\n"),
            ("llama", "Tom: {\"name\": \"f\", \"parameters\": {}}"),
            ("llama", " \n"),
        ] {
            assert_eq!(read(name, answer), [text(answer)]);
        }
        // Nothing is held that cannot become a call.
        let mut reader = ToolReader::new(format("hermes"));
        assert_eq!(reader.push("a < b"), [text("a < b")]);
        assert!(reader.push(" <tool").is_empty());
        assert_eq!(reader.push("s"), [text(" <tools")]);
    }

    #[test]
    fn templates_tell_their_format() {
        for (file, name) in [
            ("llama3", Some("llama")),
            ("qwen2", Some("hermes")),
            ("qwen3", Some("hermes")),
            ("smollm3", Some("hermes")),
            ("mistral", Some("mistral")),
            ("smollm2", None),
        ] {
            let file = format!("tests/golden/chat/templates/{file}.jinja");
            let source = std::fs::read_to_string(file).unwrap();
            let template = ChatTemplate::new(&source, Vec::new()).unwrap();
            assert_eq!(ToolFormat::of(&template).map(|format| format.name), name);
        }
    }

    #[test]
    fn grammars_name_the_tools() {
        let tools = json!([
            {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},
            {"type": "function", "function": {"name": "g"}},
        ]);
        let grammar = format("hermes").grammar(&tools, None, true).unwrap();
        let spelled = r#","x-guidance":{"whitespace_flexible":false,"item_separator":", ","key_separator":": "}}"#;
        let expected = r#"start: "<tool_call>\n" call ("\n</tool_call>\n<tool_call>\n" call)* "\n</tool_call>"
call: call_0 | call_1
call_0: "{\"name\": \"f\", \"arguments\": " arguments_0 "}"
arguments_0: %json {"type":"object"}
call_1: "{\"name\": \"g\", \"arguments\": " arguments_1 "}"
arguments_1: %json {"type":"object","properties":{}}
"#;
        let plain = grammar.replace(spelled, "}");
        assert_eq!(plain, expected);
        assert_eq!(grammar.matches(spelled).count(), 2);

        let one = format("llama").grammar(&tools, Some("g"), true).unwrap();
        assert!(
            one.starts_with("start: call\ncall: call_1\ncall_1: "),
            "{one}"
        );
        let refused = |tools: &Json, only| {
            let refused = format("llama").grammar(tools, only, false).unwrap_err();
            refused.to_string()
        };
        assert!(refused(&tools, Some("h")).contains("(f, g)"));
        assert!(refused(&json!([{"name": "f"}]), None).contains("tools[0]"));
        assert!(refused(&Json::Null, None).contains("no tools"));
    }
}
