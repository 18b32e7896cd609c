//! What a recipe will take, for people and programs.

use std::fmt::Write;

use serde_json::json;

use super::{bytes, table, thousands};
use crate::pipeline::Variant;
use crate::pipeline::device::{Device, UTILISATION};
use crate::pipeline::forecast::{Change, Forecast};

pub fn forecast_json(
    variant: &Variant,
    device: &Device,
    memory: f64,
    forecast: &Forecast,
    changes: &[Change],
) -> serde_json::Value {
    json!({
        "variant": variant.label,
        "device": device,
        "utilisation": UTILISATION,
        "memory": memory,
        "fits": forecast.fits(memory),
        "forecast": forecast,
        "changes": changes,
    })
}

/// A stage a row, and below it what its memory is for.
pub fn forecast_table(
    variant: &Variant,
    device: &Device,
    memory: f64,
    forecast: &Forecast,
    changes: &[Change],
) -> String {
    let unknown = || "?".to_owned();
    let mut headers = vec!["stage", "memory", "disk", "tokens", "operations", "hours"];
    if device.bf16.is_some() {
        headers.push("hours in bf16");
    }
    let hours = |hours: Option<f64>| hours.map_or_else(unknown, |hours| format!("{hours:.3}"));
    let width = headers.len();
    let mut rows = Vec::new();
    for stage in &forecast.stages {
        let mut row = vec![
            stage.name.clone(),
            bytes(stage.memory.total()),
            bytes(stage.disk + stage.scratch),
            stage.tokens.map_or_else(unknown, |n| thousands(n as usize)),
            stage
                .operations
                .map_or_else(unknown, |n| format!("{n:.2e}")),
            hours(stage.hours),
            hours(stage.hours_bf16),
        ];
        row.truncate(width);
        rows.push(row);
        let mut parts: Vec<_> = stage.memory.parts.iter().collect();
        parts.sort_by_key(|part| std::cmp::Reverse(part.bytes));
        for part in parts {
            let kind = if part.mapped { ", file" } else { "" };
            let mut row = vec![String::new(); width];
            (row[0], row[1]) = (format!("  {}{kind}", part.name), bytes(part.bytes));
            rows.push(row);
        }
    }
    let mut last = vec![
        "all".to_owned(),
        bytes(forecast.peak),
        bytes(forecast.disk),
        String::new(),
        String::new(),
        hours(forecast.hours),
        hours(forecast.hours_bf16),
    ];
    last.truncate(width);
    rows.push(last);
    let mut text = String::new();
    for about in [&variant.label, &variant.recipe.about] {
        if !about.is_empty() {
            text += &format!("{about}\n\n");
        }
    }
    text += &table(&headers, &rows);
    let verdict = match forecast.fits(memory) {
        true => "fits",
        false => "does not fit",
    };
    let _ = write!(
        text,
        "\n{}: {:.3e} operations a second in f32, {:.3e} bytes ({}).\n\
         Hours are those of stages whose operations are counted (? is not, or a text is not there), at {:.0} % of that rate, which is an assumption.\n\
         Peak {} {} into {} of {}; {} of it are pages of files, which the system may drop and read again.\n",
        device.about,
        device.f32,
        device.bandwidth,
        device.source,
        100.0 * UTILISATION,
        bytes(forecast.peak),
        verdict,
        bytes(memory as usize),
        device.name,
        bytes(forecast.peak_mapped),
    );
    if !forecast.text_is_there {
        text += "The training text is not there: what its tokens take in memory is not counted.\n";
    }
    if !device.is_cpu() {
        text += "The program has no kernels for it yet: this is as if it had those of the CPU, all weights in f32 on the device.\n";
    }
    if !changes.is_empty() {
        text += "\nChanges, each on top of those above: the peak that is left, what they cost, how they are said.\n";
    }
    for change in changes {
        let verdict = if change.fits { " (fits)" } else { "" };
        let _ = write!(
            text,
            "  {}{verdict}: {}\n   ",
            bytes(change.peak),
            change.price
        );
        for setting in &change.settings {
            text += &format!(" --set {setting}");
        }
        text += "\n";
    }
    if !forecast.fits(memory) && !changes.last().is_some_and(|change| change.fits) {
        text += "No change of settings makes it fit: take a smaller teacher, or a device with more memory.\n";
    }
    text
}
