//! Jinja as `transformers` sets it up, and as Python behaves in it.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{Environment, ErrorKind, Value};
use serde::Serialize;

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
fn tojson(value: Value, options: Kwargs) -> Result<String, minijinja::Error> {
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
    use super::*;

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
