//! One HTML file that shows a run to a person: text, tables, plots, samples. It needs neither network nor
//! script, follows the reader's light or dark setting, and prints well.

mod axis;
mod plot;

use std::fmt::Write;
use std::path::Path;

pub use plot::{Bars, Series, line_svg};

use crate::Result;
use crate::checkpoint::write_atomic;

/// Collects parts in the order they are to be read. All text given is shown as it is (HTML-escaped).
#[derive(Debug, Clone)]
pub struct Report {
    title: String,
    body: String,
}

impl Report {
    pub fn new(title: &str) -> Self {
        Self {
            title: escaped(title),
            body: String::new(),
        }
    }

    pub fn heading(&mut self, text: &str) -> &mut Self {
        self.push(format_args!("<h2>{}</h2>\n", escaped(text)))
    }

    pub fn paragraph(&mut self, text: &str) -> &mut Self {
        self.push(format_args!("<p>{}</p>\n", escaped(text)))
    }

    /// Columns of numbers are set to the right; short rows are filled with empty cells.
    pub fn table(&mut self, headers: &[&str], rows: &[Vec<String>]) -> &mut Self {
        let columns = rows
            .iter()
            .map(Vec::len)
            .chain([headers.len()])
            .max()
            .unwrap_or(0);
        let cell = |row: usize, column: usize| rows[row].get(column).map_or("", String::as_str);
        let class: Vec<_> = (0..columns)
            .map(|column| {
                let mut cells = (0..rows.len())
                    .map(|row| cell(row, column))
                    .filter(|c| !c.is_empty())
                    .peekable();
                let numeric = cells.peek().is_some() && cells.all(is_number);
                if numeric { " class=\"n\"" } else { "" }
            })
            .collect();
        let mut html = String::from("<div class=\"scroll\"><table>\n<thead><tr>");
        for (column, class) in class.iter().enumerate() {
            let header = headers.get(column).unwrap_or(&"");
            _ = write!(html, "<th{class}>{}</th>", escaped(header));
        }
        html.push_str("</tr></thead>\n<tbody>\n");
        for row in 0..rows.len() {
            html.push_str("<tr>");
            for (column, class) in class.iter().enumerate() {
                _ = write!(html, "<td{class}>{}</td>", escaped(cell(row, column)));
            }
            html.push_str("</tr>\n");
        }
        self.push(format_args!("{html}</tbody></table></div>\n"))
    }

    /// Curves over a common x axis; `log_y` for a logarithmic y axis.
    pub fn line_plot(
        &mut self,
        title: &str,
        x_label: &str,
        y_label: &str,
        series: &[Series],
        log_y: bool,
    ) -> &mut Self {
        self.figure(title, &plot::lines(title, x_label, y_label, series, log_y))
    }

    /// Groups of bars, one group for each category, one bar in it for each series.
    pub fn bar_plot(
        &mut self,
        title: &str,
        y_label: &str,
        categories: &[&str],
        series: &[Bars],
    ) -> &mut Self {
        self.figure(title, &plot::bars(title, y_label, categories, series))
    }

    /// Shares from 0 to 1 as coloured cells: `values[row][column]`, NaN for none.
    pub fn heat_map(
        &mut self,
        title: &str,
        row_label: &str,
        columns: &[&str],
        rows: &[&str],
        values: &[Vec<f64>],
    ) -> &mut Self {
        let plot = plot::heat_map(title, row_label, columns, rows, values);
        self.figure(title, &plot)
    }

    /// Text in a fixed-width font with its line breaks.
    pub fn code(&mut self, title: &str, text: &str) -> &mut Self {
        self.figure(title, &format!("<pre>{}</pre>\n", escaped(text)))
    }

    /// (title, text) pairs next to each other, for instance what two models wrote.
    pub fn side_by_side(&mut self, texts: &[(&str, &str)]) -> &mut Self {
        self.body.push_str("<div class=\"sides\">\n");
        for (title, text) in texts {
            self.code(title, text);
        }
        self.push(format_args!("</div>\n"))
    }

    /// The whole page.
    pub fn to_html(&self) -> String {
        let Self { title, body } = self;
        let style = include_str!("style.css");
        format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <title>{title}</title>\n<style>\n{style}</style>\n</head>\n\
             <body>\n<h1>{title}</h1>\n{body}</body>\n</html>\n"
        )
    }

    /// Writes the page; a reader sees the old file or the whole new one.
    pub fn write(&self, path: &Path) -> Result<()> {
        write_atomic(path, self.to_html().as_bytes())
    }

    fn figure(&mut self, title: &str, content: &str) -> &mut Self {
        let title = escaped(title);
        self.push(format_args!(
            "<figure>\n<figcaption>{title}</figcaption>\n{content}</figure>\n"
        ))
    }

    fn push(&mut self, html: std::fmt::Arguments) -> &mut Self {
        _ = self.body.write_fmt(html);
        self
    }
}

/// Digits with the signs and units that go with them: `-1.5`, `12 %`, `3.2 MiB`, `1e-4`.
fn is_number(text: &str) -> bool {
    let digits = text.trim_start_matches(['-', '+', '−', '±', '<', '>', '~', ' ']);
    matches!(text, "–" | "—" | "-")
        || digits.starts_with(|c: char| c.is_ascii_digit() || c == '.') && text.len() < 16
}

fn escaped(text: &str) -> String {
    let mut html = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => html.push_str("&amp;"),
            '<' => html.push_str("&lt;"),
            '>' => html.push_str("&gt;"),
            '"' => html.push_str("&quot;"),
            '\'' => html.push_str("&#39;"),
            // Not allowed in HTML in any spelling; a small model may well write them.
            c if c.is_control() && !matches!(c, '\n' | '\t') => html.push('\u{FFFD}'),
            c => html.push(c),
        }
    }
    html
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// Every opened element is closed, in order; attributes hold no stray quote or bracket.
    fn check(html: &str) {
        let mut open = Vec::new();
        let mut rest = html;
        while let Some(at) = rest.find('<') {
            assert!(
                !rest[..at].contains('>') || open.last() == Some(&"style"),
                "{}",
                &rest[..at]
            );
            let end = rest[at..].find('>').expect("a tag ends") + at;
            let tag = &rest[at + 1..end];
            rest = &rest[end + 1..];
            assert!(tag.matches('"').count().is_multiple_of(2), "{tag}");
            let name = tag.split([' ', '\n']).next().unwrap();
            if let Some(name) = name.strip_prefix('/') {
                assert_eq!(open.pop(), Some(name), "{tag}");
            } else if !tag.ends_with('/') && !["!DOCTYPE", "meta"].contains(&name) {
                open.push(name);
            }
        }
        assert!(open.is_empty(), "{open:?}");
        assert!(
            !html.contains("NaN") && !html.contains("inf "),
            "a number that is none"
        );
    }

    pub fn full() -> Report {
        let curve = |scale: f64| {
            (0..200)
                .map(|i| (i as f64 * 50.0, scale * (-i as f64 / 60.0).exp() + 0.01))
                .collect()
        };
        let mut report = Report::new("Distilled <stories> & \"friends\"");
        report
            .paragraph("A hybrid of 1 < 2 layers, distilled.")
            .heading("Numbers")
            .table(
                &["model", "recall", "cache"],
                &[
                    vec!["teacher".into(), "98.1 %".into(), "512 KiB".into()],
                    vec!["<hybrid>".into(), "95.0 %".into()],
                ],
            )
            .line_plot(
                "Loss",
                "step",
                "KL (nats)",
                &[
                    Series::new("ILD", curve(3.0)),
                    Series::new("KD <2>", curve(1.0)),
                ],
                true,
            )
            .line_plot(
                "Recall",
                "stories",
                "share",
                &[Series::new(
                    "few",
                    vec![(1.0, 0.2), (2.0, f64::NAN), (3.0, 0.5), (4.0, 0.9)],
                )],
                false,
            )
            .bar_plot(
                "Tokens a second",
                "tokens/s",
                &["prefill", "decode <1>", "none"],
                &[
                    Bars::new("teacher", vec![1500.0, 210.0, f64::NAN]),
                    Bars::new("hybrid", vec![1320.0, 390.0]),
                ],
            )
            .code("Config", "[model]\nname = \"a<b\"\n\u{1}")
            .side_by_side(&[("teacher", "Once & again"), ("student", "Once <again>")]);
        report
    }

    #[test]
    fn page_is_well_formed_and_complete() {
        let html = full().to_html();
        check(&html);
        for text in [
            "ILD",
            "KD &lt;2&gt;",
            "decode &lt;1&gt;",
            "&lt;hybrid&gt;",
            "Once &lt;again&gt;",
            "1 of 4 points",
        ] {
            assert!(html.contains(text), "{text}");
        }
        assert_eq!(html.matches("<path class=\"curve").count(), 3);
        assert_eq!(html.matches("<rect class=\"f0\" x=").count(), 2);
        for outside in ["http", "<script", "url("] {
            assert!(!html.contains(outside), "{outside}");
        }
    }

    #[test]
    fn odd_series_are_drawn_or_noted() {
        let plot = |points: Vec<(f64, f64)>, log_y| {
            let mut report = Report::new("t");
            report.line_plot("p", "x", "y", &[Series::new("odd", points)], log_y);
            let html = report.to_html();
            check(&html);
            assert!(html.contains("odd"));
            html
        };
        assert!(plot(vec![], false).contains("no data"));
        assert!(plot(vec![(0.0, f64::NAN), (f64::INFINITY, 1.0)], false).contains("no data"));
        assert!(plot(vec![(3.0, 5.0)], false).contains("<circle"));
        assert!(plot(vec![(3.0, 5.0)], true).contains("<circle"));
        assert!(plot(vec![(0.0, 0.0), (1.0, -2.0)], true).contains("no data"));
        let gap = plot(vec![(0.0, 1.0), (1.0, 2.0), (2.0, 0.0), (3.0, 4.0)], true);
        let path = gap
            .split(" d=\"")
            .nth(1)
            .unwrap()
            .split('"')
            .next()
            .unwrap();
        assert_eq!(
            (path.matches('M').count(), path.matches('L').count()),
            (2, 1)
        );
        assert!(gap.contains("1 of 4 points left out: not finite or not positive"));
        plot(vec![(0.0, 1e-300), (1.0, 1e300)], true);
        plot(vec![(0.0, -1e300), (1.0, 1e300)], false);
        let mut report = Report::new("t");
        report.line_plot("none", "x", "y", &[], false);
        report.bar_plot("none", "y", &[], &[]);
        report.bar_plot("zero", "y", &["a"], &[Bars::new("b", vec![0.0])]);
        report.bar_plot("below", "y", &["a"], &[Bars::new("b", vec![-2.0])]);
        report.table(&[], &[]);
        check(&report.to_html());
    }

    #[test]
    fn write_replaces_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report.html");
        fs::write(&path, "old").unwrap();
        full().write(&path).unwrap();
        assert!(
            fs::read_to_string(&path)
                .unwrap()
                .starts_with("<!DOCTYPE html>")
        );
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        let missing = full().write(Path::new("nowhere/report.html")).unwrap_err();
        assert!(missing.to_string().contains("nowhere/report.html"));
    }
}
