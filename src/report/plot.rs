//! Line and bar plots as SVG.

use std::fmt::Write;

use super::{
    axis::{Axis, short, usable},
    escaped,
};

/// A named curve; points that cannot be drawn (NaN, infinite, not positive on a logarithmic axis)
/// leave a gap.
#[derive(Debug, Clone)]
pub struct Series {
    pub name: String,
    /// (x, y)
    pub points: Vec<(f64, f64)>,
}

impl Series {
    pub fn new(name: impl Into<String>, points: Vec<(f64, f64)>) -> Self {
        Self {
            name: name.into(),
            points,
        }
    }
}

/// Named bars, one value for each category of the plot (NaN for none).
#[derive(Debug, Clone)]
pub struct Bars {
    pub name: String,
    pub values: Vec<f64>,
}

impl Bars {
    pub fn new(name: impl Into<String>, values: Vec<f64>) -> Self {
        Self {
            name: name.into(),
            values,
        }
    }
}

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 340.0;
const TOP: f64 = 14.0;
const RIGHT: f64 = WIDTH - 16.0;
const COLOURS: usize = 8;
/// Beyond this many points the curve speaks for itself.
const MARKED: usize = 40;

/// The frame that both kinds share: y axis with grid and label; what is inside comes after.
struct Frame {
    svg: String,
    y: Axis,
    left: f64,
    bottom: f64,
}

impl Frame {
    /// `below` is the room for what the x axis says.
    fn new(title: &str, y_label: &str, y: Axis, below: f64) -> Self {
        let labels: Vec<_> = y.ticks.iter().map(|&tick| short(tick)).collect();
        let longest = labels
            .iter()
            .map(|label| label.chars().count())
            .max()
            .unwrap_or(1);
        let left = 34.0 + 7.0 * longest as f64;
        let bottom = HEIGHT - below;
        let y = y.drawn(bottom, TOP);
        let mut svg = format!(
            "<svg class=\"plot\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">\n",
            escaped(title)
        );
        for (&tick, label) in y.ticks.iter().zip(&labels) {
            let at = y.pixel(tick);
            _ = writeln!(
                svg,
                "<line class=\"grid\" x1=\"{left:.1}\" x2=\"{RIGHT}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
                 <text class=\"end\" x=\"{:.1}\" y=\"{:.1}\">{label}</text>",
                left - 8.0,
                at + 4.0
            );
        }
        let middle = (TOP + bottom) / 2.0;
        _ = writeln!(
            svg,
            "<text class=\"middle\" transform=\"translate(14 {middle:.1}) rotate(-90)\">{}</text>",
            escaped(y_label)
        );
        Self {
            svg,
            y,
            left,
            bottom,
        }
    }

    fn baseline(&mut self, at: f64) {
        let left = self.left;
        _ = writeln!(
            self.svg,
            "<line class=\"axis\" x1=\"{left:.1}\" x2=\"{RIGHT}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>"
        );
    }

    fn text_below(&mut self, x: f64, down: f64, text: &str) {
        let y = self.bottom + down;
        _ = writeln!(
            self.svg,
            "<text class=\"middle\" x=\"{x:.1}\" y=\"{y:.1}\">{}</text>",
            escaped(text)
        );
    }

    fn finish(mut self, drawn: usize) -> String {
        if drawn == 0 {
            let (x, y) = ((self.left + RIGHT) / 2.0, (TOP + self.bottom) / 2.0);
            _ = writeln!(
                self.svg,
                "<text class=\"middle\" x=\"{x:.1}\" y=\"{y:.1}\">no data</text>"
            );
        }
        self.svg + "</svg>\n"
    }
}

/// The whole figure, legend and a note on points left out included.
pub fn lines(title: &str, x_label: &str, y_label: &str, series: &[Series], log_y: bool) -> String {
    let points = || series.iter().flat_map(|s| &s.points);
    let drawable = |&&(x, y): &&(f64, f64)| usable(x, false) && usable(y, log_y);
    let x = Axis::over(points().filter(drawable).map(|p| p.0), false, 0.0);
    let y = Axis::over(points().filter(drawable).map(|p| p.1), log_y, 0.05);
    let mut frame = Frame::new(title, y_label, y, 46.0);
    // Marks at both ends stay inside the picture.
    let x = x.drawn(frame.left + 6.0, RIGHT - 6.0);
    frame.baseline(frame.bottom);
    for &tick in &x.ticks {
        frame.text_below(x.pixel(tick), 18.0, &short(tick));
    }
    frame.text_below((frame.left + RIGHT) / 2.0, 38.0, x_label);
    for (i, Series { name, points }) in series.iter().enumerate() {
        let mut path = String::new();
        let mut pen = 'M';
        for &(a, b) in points {
            if drawable(&&(a, b)) {
                _ = write!(path, "{pen}{:.1} {:.1}", x.pixel(a), frame.y.pixel(b));
                pen = 'L';
            } else {
                pen = 'M';
            }
        }
        _ = writeln!(frame.svg, "<g><title>{}</title>", escaped(name));
        if !path.is_empty() {
            _ = writeln!(
                frame.svg,
                "<path class=\"curve {}\"{} d=\"{path}\"/>",
                stroke(i),
                dash(i)
            );
        }
        if points.len() <= MARKED {
            for point in points.iter().filter(drawable) {
                _ = writeln!(
                    frame.svg,
                    "<circle class=\"{}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"3.5\">\
                     <title>{}: {}, {}</title></circle>",
                    fill(i),
                    x.pixel(point.0),
                    frame.y.pixel(point.1),
                    escaped(name),
                    short(point.0),
                    short(point.1)
                );
            }
        }
        frame.svg.push_str("</g>\n");
    }
    let (all, drawn) = (points().count(), points().filter(drawable).count());
    let swatch = |i| {
        format!(
            "<line class=\"curve {}\"{} x1=\"1\" x2=\"25\" y1=\"5\" y2=\"5\"/>",
            stroke(i),
            dash(i)
        )
    };
    let mut figure = legend(series.iter().map(|s| s.name.as_str()), swatch);
    figure += &frame.finish(drawn);
    if drawn < all {
        let kind = if log_y {
            "not finite or not positive"
        } else {
            "not finite"
        };
        _ = writeln!(
            figure,
            "<p class=\"note\">{} of {all} points left out: {kind}.</p>",
            all - drawn
        );
    }
    figure
}

/// [`lines`] as a file of its own: style, background, title and legend are inside.
pub fn line_svg(
    title: &str,
    x_label: &str,
    y_label: &str,
    series: &[Series],
    log_y: bool,
) -> String {
    const ABOVE: f64 = 46.0;
    let figure = lines(title, x_label, y_label, series, log_y);
    let (from, to) = (figure.find("<svg class=\"plot\""), figure.rfind("</svg>"));
    let (Some(from), Some(to)) = (from, to) else {
        unreachable!("a figure has a picture")
    };
    let plot = &figure[from..to];
    let inside = plot.find('>').map_or("", |at| &plot[at + 1..]);
    let mut legend = String::new();
    let mut x = 40.0;
    for (i, Series { name, .. }) in series.iter().enumerate() {
        _ = writeln!(
            legend,
            "<line class=\"curve {}\"{} x1=\"{x:.1}\" x2=\"{:.1}\" y1=\"-8\" y2=\"-8\"/>\
             <text x=\"{:.1}\" y=\"-4\">{}</text>",
            stroke(i),
            dash(i),
            x + 24.0,
            x + 30.0,
            escaped(name)
        );
        x += 50.0 + 7.0 * name.chars().count() as f64;
    }
    let height = HEIGHT + ABOVE;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 -{ABOVE} {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\">\n\
         <style>\n{}</style>\n<rect x=\"0\" y=\"-{ABOVE}\" width=\"{WIDTH}\" height=\"{height}\" style=\"fill: var(--back)\"/>\n\
         <text x=\"40\" y=\"-28\" style=\"font-weight: 600\">{}</text>\n{legend}{inside}</svg>\n",
        include_str!("style.css"),
        escaped(title)
    )
}

/// The whole figure with its legend; the y axis begins at 0.
pub fn bars(title: &str, y_label: &str, categories: &[&str], series: &[Bars]) -> String {
    let values = || {
        series
            .iter()
            .flat_map(|s| s.values.iter().take(categories.len()))
            .copied()
    };
    let finite = values().filter(|v| v.is_finite());
    let bounds = finite
        .clone()
        .fold((0.0, 0.0), |(low, high): (f64, f64), v| {
            (low.min(v), high.max(v))
        });
    // Room for the number above the highest bar, none below zero.
    let y = Axis::over([bounds.0 * 1.08, bounds.1 * 1.08].into_iter(), false, 0.0);
    let mut frame = Frame::new(title, y_label, y, 30.0);
    let slot = (RIGHT - frame.left) / categories.len().max(1) as f64;
    let bar = (slot * 0.78 / series.len().max(1) as f64).min(64.0);
    let zero = frame.y.pixel(0.0);
    for (c, category) in categories.iter().enumerate() {
        let middle = frame.left + (c as f64 + 0.5) * slot;
        frame.text_below(middle, 18.0, category);
        for (i, Bars { name, values }) in series.iter().enumerate() {
            let Some(&value) = values.get(c).filter(|v| v.is_finite()) else {
                continue;
            };
            let x = middle + (i as f64 - series.len() as f64 / 2.0) * bar;
            let end = frame.y.pixel(value);
            let number = short(value);
            _ = writeln!(
                frame.svg,
                "<rect class=\"{}\" x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" rx=\"2\">\
                 <title>{}, {}: {number}</title></rect>",
                fill(i),
                x + bar * 0.04,
                zero.min(end),
                bar * 0.92,
                (zero - end).abs(),
                escaped(name),
                escaped(category)
            );
            if number.chars().count() as f64 * 7.0 <= bar {
                let above = if value < 0.0 { end + 14.0 } else { end - 5.0 };
                _ = writeln!(
                    frame.svg,
                    "<text class=\"middle\" x=\"{:.1}\" y=\"{above:.1}\">{number}</text>",
                    x + bar / 2.0
                );
            }
        }
    }
    frame.baseline(zero);
    let swatch = |i| {
        format!(
            "<rect class=\"{}\" width=\"26\" height=\"10\" rx=\"2\"/>",
            fill(i)
        )
    };
    let mut figure = legend(series.iter().map(|s| s.name.as_str()), swatch);
    figure += &frame.finish(finite.count());
    figure
}

/// Shares from 0 (pale) to 1 (full colour), the number in each cell.
pub fn heat_map(
    title: &str,
    row_label: &str,
    columns: &[&str],
    rows: &[&str],
    values: &[Vec<f64>],
) -> String {
    const CELL: f64 = 34.0;
    const LEFT: f64 = 90.0;
    let height = TOP + CELL * rows.len() as f64 + 30.0;
    let width = (RIGHT - LEFT) / columns.len().max(1) as f64;
    let mut svg = format!(
        "<svg class=\"plot\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{}\">\n\
         <text class=\"middle\" transform=\"translate(14 {:.1}) rotate(-90)\">{}</text>\n",
        escaped(title),
        (height - 30.0) / 2.0,
        escaped(row_label)
    );
    for (r, name) in rows.iter().enumerate() {
        let y = TOP + CELL * r as f64;
        _ = writeln!(
            svg,
            "<text class=\"end\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            LEFT - 8.0,
            y + CELL / 2.0 + 4.0,
            escaped(name)
        );
        for c in 0..columns.len() {
            let value = values.get(r).and_then(|row| row.get(c)).copied();
            let Some(value) = value.filter(|v| v.is_finite()) else {
                continue;
            };
            let x = LEFT + width * c as f64;
            _ = writeln!(
                svg,
                "<rect class=\"f0\" x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" rx=\"2\" fill-opacity=\"{:.3}\"/>\
                 <text class=\"middle cell\" x=\"{:.1}\" y=\"{:.1}\">{:.0} %</text>",
                x + 1.0,
                y + 1.0,
                width - 2.0,
                CELL - 2.0,
                0.06 + 0.74 * value.clamp(0.0, 1.0),
                x + width / 2.0,
                y + CELL / 2.0 + 4.0,
                100.0 * value
            );
        }
    }
    for (c, name) in columns.iter().enumerate() {
        _ = writeln!(
            svg,
            "<text class=\"middle\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            LEFT + width * (c as f64 + 0.5),
            height - 12.0,
            escaped(name)
        );
    }
    svg + "</svg>\n"
}

fn legend<'a>(names: impl Iterator<Item = &'a str>, swatch: impl Fn(usize) -> String) -> String {
    let mut html = String::from("<ul class=\"legend\">\n");
    for (i, name) in names.enumerate() {
        let swatch = swatch(i);
        _ = writeln!(
            html,
            "<li><svg viewBox=\"0 0 26 10\">{swatch}</svg>{}</li>",
            escaped(name)
        );
    }
    html + "</ul>\n"
}

fn stroke(series: usize) -> String {
    format!("s{}", series % COLOURS)
}

fn fill(series: usize) -> String {
    format!("f{}", series % COLOURS)
}

/// Colours repeat after eight series; dashes then tell them apart.
fn dash(series: usize) -> &'static str {
    ["", " stroke-dasharray=\"7 5\"", " stroke-dasharray=\"2 5\""][series / COLOURS % 3]
}
