//! Python literals of lists, dicts, strings and numbers, as some datasets hold them.

use serde_json::{Map, Value};

/// `ast.literal_eval` of those.
pub fn parse(text: &str) -> Result<Value, String> {
    let mut reader = Reader {
        chars: text.chars().collect(),
        at: 0,
    };
    let value = reader.value()?;
    reader.space();
    match reader.at == reader.chars.len() {
        true => Ok(value),
        false => Err(reader.wrong("the end")),
    }
}

struct Reader {
    chars: Vec<char>,
    at: usize,
}

impl Reader {
    fn wrong(&self, wanted: &str) -> String {
        let found = self.chars.get(self.at);
        let found = found.map_or("the end".to_owned(), |c| format!("{c:?}"));
        format!(
            "no Python literal: {found} instead of {wanted} at character {}",
            self.at
        )
    }

    fn space(&mut self) {
        while self.chars.get(self.at).is_some_and(|c| c.is_whitespace()) {
            self.at += 1;
        }
    }

    /// Takes `wanted`, if it comes next.
    fn takes(&mut self, wanted: char) -> bool {
        self.space();
        let there = self.chars.get(self.at) == Some(&wanted);
        self.at += usize::from(there);
        there
    }

    fn expect(&mut self, wanted: char) -> Result<(), String> {
        match self.takes(wanted) {
            true => Ok(()),
            false => Err(self.wrong(&format!("{wanted:?}"))),
        }
    }

    fn value(&mut self) -> Result<Value, String> {
        self.space();
        match self.chars.get(self.at) {
            Some('[') => {
                self.at += 1;
                let mut list = Vec::new();
                while !self.takes(']') {
                    list.push(self.value()?);
                    if !self.takes(',') {
                        self.expect(']')?;
                        break;
                    }
                }
                Ok(Value::Array(list))
            }
            Some('{') => {
                self.at += 1;
                let mut map = Map::new();
                while !self.takes('}') {
                    let Value::String(key) = self.value()? else {
                        return Err(self.wrong("a text as key"));
                    };
                    self.expect(':')?;
                    map.insert(key, self.value()?);
                    if !self.takes(',') {
                        self.expect('}')?;
                        break;
                    }
                }
                Ok(Value::Object(map))
            }
            Some('\'' | '"') => self.string().map(Value::String),
            _ => self.word(),
        }
    }

    fn word(&mut self) -> Result<Value, String> {
        let from = self.at;
        let part = |c: &char| c.is_alphanumeric() || "+-.".contains(*c);
        while self.chars.get(self.at).is_some_and(part) {
            self.at += 1;
        }
        let word: String = self.chars[from..self.at].iter().collect();
        match word.as_str() {
            "True" => Ok(Value::Bool(true)),
            "False" => Ok(Value::Bool(false)),
            "None" => Ok(Value::Null),
            number => serde_json::from_str(number).map_err(|_| {
                self.at = from;
                self.wrong("a list, dict, text or number")
            }),
        }
    }

    fn string(&mut self) -> Result<String, String> {
        let quote = self.chars[self.at];
        self.at += 1;
        let mut text = String::new();
        loop {
            let Some(c) = self.chars.get(self.at).copied() else {
                return Err(self.wrong("the text's end"));
            };
            self.at += 1;
            match c {
                c if c == quote => return Ok(text),
                '\\' => text.extend(self.escape()?),
                c => text.push(c),
            }
        }
    }

    /// What a backslash begins; an escape Python does not know stays as it is.
    fn escape(&mut self) -> Result<Vec<char>, String> {
        let Some(c) = self.chars.get(self.at).copied() else {
            return Err(self.wrong("an escape"));
        };
        self.at += 1;
        let digits = match c {
            'n' => return Ok(vec!['\n']),
            't' => return Ok(vec!['\t']),
            'r' => return Ok(vec!['\r']),
            '\\' | '\'' | '"' => return Ok(vec![c]),
            '\n' => return Ok(Vec::new()),
            'x' => 2,
            'u' => 4,
            'U' => 8,
            other => return Ok(vec!['\\', other]),
        };
        let code: String = self.chars.iter().skip(self.at).take(digits).collect();
        let code = u32::from_str_radix(&code, 16).ok().and_then(char::from_u32);
        let code = code.ok_or_else(|| self.wrong("a character's code"))?;
        self.at += digits;
        Ok(vec![code])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn literals_are_read_as_python_reads_them() {
        let text =
            r#"[{'a': "it's", "b": 'say \"hi\"\n', 'c': [1, -2.5, True, None,],}, '\x41\u00e9']"#;
        let expected =
            json!([{ "a": "it's", "b": "say \"hi\"\n", "c": [1, -2.5, true, null] }, "Aé"]);
        assert_eq!(parse(text).unwrap(), expected);
    }

    #[test]
    fn what_is_none_is_named() {
        for (text, part) in [("[1", "the end"), ("{1: 2}", "a text as key"), ("x", "'x'")] {
            let message = parse(text).unwrap_err();
            assert!(message.contains(part), "{message}");
        }
    }
}
