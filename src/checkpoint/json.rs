//! JSON of others, in which nothing is named twice: a parser that keeps the last of two would forget the other without a word.

use std::collections::HashSet;
use std::fmt;
use std::fs;
use std::path::Path;

use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use crate::{Error, Result};

/// # Errors
/// A file that cannot be read, is no JSON, or names something twice.
pub(super) fn read_json(path: &Path) -> Result<Value> {
    let text = fs::read(path).map_err(Error::io("cannot read", path))?;
    distinct(&text)
        .and_then(|()| serde_json::from_slice(&text))
        .map_err(|e| match e.is_data() {
            true => Error::file(path, format!("{e}; keep one of them")),
            false => Error::file(path, format!("not JSON: {e}")),
        })
}

/// # Errors
/// What is no JSON, or has an object that names something twice.
pub(super) fn distinct(json: &[u8]) -> serde_json::Result<()> {
    serde_json::from_slice::<Distinct>(json).map(drop)
}

/// A value whose objects name nothing twice, read and dropped.
struct Distinct;

impl<'de> Deserialize<'de> for Distinct {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Self)
    }
}

impl<'de> Visitor<'de> for Distinct {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E>(self, _: bool) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_str<E>(self, _: &str) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_unit<E>(self) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self, A::Error> {
        while list.next_element::<Self>()?.is_some() {}
        Ok(self)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self, A::Error> {
        let mut seen = HashSet::new();
        while let Some(name) = map.next_key::<String>()? {
            if seen.contains(&name) {
                return Err(de::Error::custom(format!("names {name} twice")));
            }
            seen.insert(name);
            map.next_value::<Self>()?;
        }
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_named_twice_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("config.json");
        let read = |text: &str| {
            fs::write(&file, text).unwrap();
            read_json(&file).map_err(|e| e.to_string())
        };
        let whole = r#"{"a": [1, -2, 3.5, null, true, "é"], "b": {"a": {}}}"#;
        assert_eq!(
            read(whole).unwrap(),
            serde_json::from_str::<Value>(whole).unwrap()
        );
        for (text, wanted) in [
            (
                r#"{"a": 1, "a": 1}"#,
                "config.json: names a twice at line 1",
            ),
            (
                r#"[{"b": {"\u0063": 1, "c": 2}}]"#,
                "names c twice at line 1",
            ),
            (r#"{"a": 1"#, "config.json: not JSON: EOF"),
        ] {
            let said = read(text).unwrap_err();
            assert!(said.contains(wanted), "{said}");
        }
    }
}
