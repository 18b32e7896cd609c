//! Jinja as `transformers` sets it up, and as Python behaves in it.

use std::fmt::{Display, Write};

use chrono::format::StrftimeItems;
use chrono::{DateTime, Local, TimeZone};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Tuple, ValueKind, from_args};
use minijinja::{Environment, ErrorKind, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde_json::Value as Json;

/// A source with the marks of what is to be learned, which are for training only, as blocks that do nothing else.
pub fn plain(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((before, behind)) = rest.split_once("{%") {
        let Some((inside, behind)) = behind.split_once("%}") else {
            break;
        };
        let word = inside.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let inside = match word {
            "generation" | "endgeneration" => inside.replace("generation", "with"),
            _ => inside.to_owned(),
        };
        text.extend([before, "{%", &inside, "%}"]);
        rest = behind;
    }
    text + rest
}

/// Jinja as `transformers` sets it up.
pub fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build();
    environment.set_syntax(syntax.expect("the usual delimiters"));
    environment.set_unknown_method_callback(method);
    environment.add_function(
        "raise_exception",
        |said: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, said))
        },
    );
    environment.add_function("strftime_now", |format: String| {
        strftime(&Local::now(), &format)
    });
    environment.add_filter("tojson", tojson);
    // To Python what has a length and items is one.
    environment.add_test("sequence", |value: Value| {
        matches!(
            value.kind(),
            ValueKind::Seq | ValueKind::Map | ValueKind::String
        )
    });
    environment
}

/// Methods of Python's texts that `pycompat` lacks, and those that it has.
fn method(
    state: &mut State,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, minijinja::Error> {
    let Some(text) = value.as_str() else {
        return unknown_method_callback(state, value, name, args);
    };
    match name {
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Ok(text.strip_prefix(prefix).unwrap_or(text).into())
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Ok(text.strip_suffix(suffix).unwrap_or(text).into())
        }
        "partition" => {
            let (mark,): (&str,) = from_args(args)?;
            let (before, behind) = text.split_once(mark).unwrap_or((text, ""));
            let found = &text[before.len()..text.len() - behind.len()];
            Ok(Tuple::from([before, found, behind].map(Value::from)).into())
        }
        "rsplit" => {
            let (mark, most): (&str, Option<usize>) = from_args(args)?;
            let most = most.unwrap_or(usize::MAX - 1);
            let mut parts: Vec<&str> = text.rsplitn(most + 1, mark).collect();
            parts.reverse();
            Ok(parts.into_iter().map(Value::from).collect())
        }
        _ => unknown_method_callback(state, value, name, args),
    }
}

/// As Python's `json.dumps` with these arguments, but that it leaves Unicode as it is.
fn tojson(value: Value, options: Kwargs) -> Result<String, minijinja::Error> {
    let failed = |said: String| minijinja::Error::new(ErrorKind::BadSerialization, said);
    if value.is_undefined() {
        return Err(failed("what is undefined is not JSON".to_owned()));
    }
    let mut json = serde_json::to_value(&value).map_err(|e| failed(e.to_string()))?;
    if options.get::<Option<bool>>("sort_keys")? == Some(true) {
        json.sort_all_objects();
    }
    let indent: Option<usize> = options.get("indent")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.as_str(), key.as_str()),
        _ if indent.is_some() => (",", ": "),
        _ => (", ", ": "),
    };
    let mut text = String::new();
    Dump { indent, item, key }.write(&json, 0, &mut text);
    if options.get::<Option<bool>>("ensure_ascii")? == Some(true) {
        text = escaped(&text);
    }
    options.assert_all_used()?;
    Ok(text)
}

/// JSON with only ASCII in it.
fn escaped(text: &str) -> String {
    let units = |c: char| {
        let mut units = [0; 2];
        let units = c.encode_utf16(&mut units).iter();
        units.map(|unit| format!("\\u{unit:04x}")).collect()
    };
    let all = text.chars().map(|c| match c.is_ascii() {
        true => c.to_string(),
        false => units(c),
    });
    all.collect()
}

/// How JSON is laid out.
struct Dump<'a> {
    indent: Option<usize>,
    item: &'a str,
    key: &'a str,
}

impl Dump<'_> {
    fn write(&self, json: &Json, depth: usize, to: &mut String) {
        let line = |depth: usize, to: &mut String| {
            if let Some(indent) = self.indent {
                to.push('\n');
                to.extend(std::iter::repeat_n(' ', indent * depth));
            }
        };
        let brackets = if json.is_array() {
            ['[', ']']
        } else {
            ['{', '}']
        };
        let items: Vec<(Option<&String>, &Json)> = match json {
            Json::Array(all) => all.iter().map(|item| (None, item)).collect(),
            Json::Object(all) => all.iter().map(|(key, item)| (Some(key), item)).collect(),
            Json::Number(number) if number.is_f64() => {
                return to.push_str(&float(number.as_f64().unwrap_or_default()));
            }
            other => return to.push_str(&other.to_string()),
        };
        to.push(brackets[0]);
        for (i, (key, item)) in items.iter().enumerate() {
            if i > 0 {
                to.push_str(self.item);
            }
            line(depth + 1, to);
            if let Some(key) = key {
                to.push_str(&Json::from(key.as_str()).to_string());
                to.push_str(self.key);
            }
            self.write(item, depth + 1, to);
        }
        if !items.is_empty() {
            line(depth, to);
        }
        to.push(brackets[1]);
    }
}

/// As Python's `repr`.
fn float(x: f64) -> String {
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    match exponent {
        -4..16 => format!("{x:?}"),
        _ => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.abs())
        }
    }
}

/// As Python's `strftime`: what is no code stands as it is.
fn strftime<Z: TimeZone<Offset: Display>>(
    time: &DateTime<Z>,
    format: &str,
) -> Result<String, minijinja::Error> {
    let mut text = String::new();
    let items = StrftimeItems::new_lenient(format);
    write!(text, "{}", time.format_with_items(items)).map_err(|_| {
        let message = format!("strftime_now cannot say {format:?}");
        minijinja::Error::new(ErrorKind::InvalidOperation, message)
    })?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_said_as_by_python() {
        let time = DateTime::parse_from_rfc3339("2026-03-02T09:46:05+02:00").unwrap();
        // datetime(2026, 3, 2, 9, 46, 5).strftime(...)
        for (format, text) in [
            ("%d %b %Y, %H:%M", "02 Mar 2026, 09:46"),
            (
                "%A %-d %B %y, %I:%M:%S %p",
                "Monday 2 March 26, 09:46:05 AM",
            ),
            ("%a %j %%", "Mon 061 %"),
            ("100% %!", "100% %!"),
        ] {
            assert_eq!(strftime(&time, format).unwrap(), text);
        }
    }
}
