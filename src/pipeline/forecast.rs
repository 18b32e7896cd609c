//! What a recipe will take, before anything is loaded: memory, disk, tokens, operations and hours, stage by stage, and what to
//! change where it does not fit.

use candle_core::DType;
use serde::Serialize;

use super::device::Device;
use super::need::{FEW, Settings, Source, Supply, fingerprint, reading};
use super::recipe::Recipe;
use super::run::teacher_folder;
use super::stage::{Sizes, at};
use super::text::{Mixture, Text};
use crate::mixer::Windows;
use crate::op::runtime::OWN;
use crate::train::cost::{Memory, forward};
use crate::weights::Precision;
use crate::{Error, Result};

/// A stage's figures.
#[derive(Debug, Clone, Serialize)]
pub struct StageForecast {
    pub name: String,
    pub memory: Memory,
    /// Bytes that stay on disk, and those that come and go.
    pub disk: usize,
    pub scratch: usize,
    pub tokens: Option<u64>,
    pub operations: Option<f64>,
    /// As the program computes.
    pub hours: Option<f64>,
    /// On units for bf16.
    pub hours_bf16: Option<f64>,
}

#[derive(Debug, Clone, Serialize)]
pub struct Forecast {
    pub stages: Vec<StageForecast>,
    /// Of the process: what it has freed stays with the allocator for a while, beside files of later stages.
    pub peak: usize,
    /// Bytes of files among it that the system may drop and read again.
    pub peak_mapped: usize,
    /// Whether the training text was there to be counted, about: its tokens stand in memory.
    pub text_is_there: bool,
    pub disk: usize,
    pub hours: Option<f64>,
    pub hours_bf16: Option<f64>,
    /// Table of the recipe whose stage is the largest, and what it could change.
    #[serde(skip)]
    largest: Option<(String, Settings)>,
    /// The tables with what their stages take.
    #[serde(skip)]
    tables: Vec<(String, usize)>,
}

impl Forecast {
    pub fn fits(&self, memory: f64) -> bool {
        self.peak as f64 <= memory
    }

    fn of(&self, table: &str) -> f64 {
        let found = self.tables.iter().find(|(name, _)| name == table);
        found.map_or(0.0, |(_, bytes)| *bytes as f64)
    }
}

/// What `recipe` takes on a device with `memory` bytes.
///
/// # Errors
/// What [`Recipe::check`] refuses, or another teacher's config that is not there.
pub fn forecast(recipe: &Recipe, device: &Device, memory: f64) -> Result<Forecast> {
    let scratch = tempfile::tempdir().map_err(Error::io("cannot create", &std::env::temp_dir()))?;
    let base = Source::open(&teacher_folder(&recipe.teacher, scratch.path())?)?;
    // Nothing is read but configs; where preferences are missing a run says so.
    let common = recipe.common();
    let mut sizes = Sizes {
        preferences: true,
        ..Sizes::new(&common, &base.config)
    };
    let text = |text: &Text| text.bytes().map(|bytes| bytes / BYTES_PER_TOKEN);
    let mixture = |mixture: &Mixture| mixture.bytes().map(|bytes| bytes / BYTES_PER_TOKEN);
    let mut supply = Supply {
        base: &base,
        student: 0,
        text: mixture(&recipe.data.train),
        pairs: recipe.data.preferences.as_ref().and_then(text),
        free: (memory as usize).saturating_sub(OWN.own + OPENED),
        mapped: device.is_cpu(),
    };
    let (mut needs, mut statistics) = (Vec::new(), 0);
    for entry in recipe.stages() {
        let at = at(&entry.table);
        entry.stage.check(&mut sizes).map_err(&at)?;
        let need = entry.stage.need(&sizes, &supply).map_err(&at)?;
        supply.student = need.student.unwrap_or(supply.student);
        needs.push((entry, need));
    }
    let texts = (supply.text.unwrap_or(0) as usize).min(MOST_TOKENS) * TOKEN_BYTES;
    let (mut stages, mut own, mut peak) = (Vec::new(), 0, Memory::default());
    let (mut largest, mut tables) = (None, Vec::new());
    let mut measurements = 0;
    let held = Memory::default()
        .with("program", OWN.own + OPENED)
        .with_file("program file", OWN.file);
    let held = held.with("texts", texts);
    let base_model = |held, compute| {
        let source = (base.bytes, &base.config);
        supply.weights(held, "base model", source, compute)
    };
    let windows = Windows {
        rows: recipe.eval.batch_size,
        len: recipe.eval.seq_len,
    };
    for (entry, need) in needs {
        statistics += need.statistics;
        let held = base_model(held.clone(), need.compute).with("statistics", statistics);
        let mut phases = need.phases.clone();
        phases.push(fingerprint(&base.config, 2));
        if need.measured {
            measurements += 1;
            let student = sizes.student()?;
            let read = reading(student, windows, 2);
            let source = (need.student.unwrap_or(0), student);
            phases.push(supply.weights(read, "hybrid", source, DType::F32));
        }
        let phases = phases
            .iter()
            .map(|phase| held.clone().and(phase).resident());
        let phases: Vec<Memory> = phases.collect();
        for phase in &phases {
            let live = phase.own();
            if own.max(live) + phase.mapped() > peak.total() {
                peak = Memory::default()
                    .with("own", own.max(live))
                    .with_file("files", phase.mapped());
                if let (Some(settings), true) = (&need.settings, live >= own) {
                    largest = Some((entry.table.clone(), settings.clone()));
                }
            }
            own = own.max(live);
        }
        let memory = Memory::peak(phases);
        tables.push((entry.table.clone(), memory.total()));
        let total = need.operations.zip(need.tokens);
        let total = total.map(|(each, tokens)| each * tokens as f64);
        let hours = |rate: f64| total.map(|all| device.seconds(rate, all, need.moved) / 3600.0);
        stages.push(StageForecast {
            name: entry.name.clone(),
            memory,
            disk: need.kept + need.student.unwrap_or(0),
            scratch: need.scratch,
            tokens: need.tokens,
            operations: total,
            hours: hours(match (need.compute, device.bf16) {
                (DType::BF16, Some(bf16)) => bf16,
                _ => device.f32,
            }),
            hours_bf16: device.bf16.and_then(hours),
        });
    }
    let held_out = mixture(&recipe.data.validation).map(|tokens| measurements * tokens);
    let each = 2.0 * forward(&base.config, windows);
    let total = held_out.map(|tokens| each * tokens as f64);
    let hours = |rate: f64| total.map(|all| device.seconds(rate, all, 0.0) / 3600.0);
    let read = reading(&base.config, windows, 2);
    let source = (supply.student, sizes.student()?);
    let read = supply.weights(read, "hybrid", source, DType::F32);
    let held = base_model(held, DType::F32);
    stages.push(StageForecast {
        name: "measuring".into(),
        memory: held.and(&read),
        disk: 0,
        scratch: 0,
        tokens: held_out,
        operations: total,
        hours: hours(device.f32),
        hours_bf16: device.bf16.and_then(hours),
    });
    let sum = |of: fn(&StageForecast) -> Option<f64>| {
        let known: Vec<f64> = stages.iter().filter_map(of).collect();
        (!known.is_empty()).then(|| known.iter().sum())
    };
    let scratch = stages.iter().map(|stage| stage.scratch).max();
    Ok(Forecast {
        peak: peak.total(),
        peak_mapped: peak.mapped(),
        text_is_there: supply.text.is_some(),
        disk: stages.iter().map(|stage| stage.disk).sum::<usize>() + scratch.unwrap_or(0),
        hours: sum(|stage| stage.hours),
        hours_bf16: sum(|stage| stage.hours_bf16),
        largest,
        tables,
        stages,
    })
}

/// A run's own memory when it has opened its recipe, tokenizer and texts: measured, of one that stops there.
const OPENED: usize = 11 << 20;
/// Of a token in memory; the tokens of large texts are mapped, and their pages given back as they are read.
const TOKEN_BYTES: usize = size_of::<u32>();
/// Of the tokens that are kept in memory.
const MOST_TOKENS: usize = 4 << 20;
/// Of text, about, where nobody has counted them.
const BYTES_PER_TOKEN: u64 = 4;

/// A change of settings, and the peak that the recipe has with it.
#[derive(Debug, Clone, Serialize)]
pub struct Change {
    /// As `--set` takes them.
    pub settings: Vec<String>,
    /// What it costs.
    pub price: &'static str,
    pub peak: usize,
    pub fits: bool,
}

/// What makes a recipe fit into `memory` bytes, the cheapest first and each on top of those before it, up to the first that does;
/// `with`: the forecast under settings.
///
/// # Errors
/// Those of `with`.
pub fn changes(
    forecast: &Forecast,
    memory: f64,
    with: impl Fn(&[String]) -> Result<Forecast>,
) -> Result<Vec<Change>> {
    let (mut found, mut taken) = (Vec::<Change>::new(), Vec::<String>::new());
    let mut now = forecast.clone();
    // The same table may be the largest again, under what was changed: each rung of its ladder is climbed once.
    let mut climbed: Vec<(String, usize)> = Vec::new();
    while !now.fits(memory) {
        let Some((stage, settings)) = now.largest.clone() else {
            break;
        };
        let table = stage.split(' ').next().unwrap_or_default().to_owned();
        let rung = |i: &usize| !climbed.contains(&(table.clone(), *i));
        let Some((i, (keys, price))) = ladder(&table, &settings)
            .into_iter()
            .enumerate()
            .find(|(i, (keys, _))| !keys.is_empty() && rung(i))
        else {
            break;
        };
        // A halving may be followed by another, as long as it helps.
        let halves = keys
            .iter()
            .any(|key| key.contains("batch_size=") || key.contains("seq_len="));
        let key = |setting: &String| setting.split('=').next().unwrap_or_default().to_owned();
        let mut with_it = taken.clone();
        with_it.retain(|old| !keys.iter().any(|new| key(new) == key(old)));
        with_it.extend(keys);
        let next = with(&with_it)?;
        // Other stages may be as large as this one.
        let helps = next.of(&stage) < WORTH * now.of(&stage);
        if !(halves && helps) {
            climbed.push((table.clone(), i));
        }
        if !helps {
            continue;
        }
        let change = Change {
            settings: with_it.clone(),
            price,
            peak: next.peak,
            fits: next.fits(memory),
        };
        match found.last_mut() {
            // Only where a row of halvings ends is told.
            Some(last) if last.price == price && halves && taken == last.settings => *last = change,
            _ => found.push(change),
        }
        taken = with_it;
        now = next;
    }
    Ok(found)
}

/// A change that leaves more of its stage than this is not worth its words.
const WORTH: f64 = 0.99;

/// Steps that make a stage smaller: settings (none: it cannot be taken, or not again), and what they cost.
fn ladder(table: &str, settings: &Settings) -> Vec<(Vec<String>, &'static str)> {
    use crate::train::ClipBy;
    use crate::train::OptimizerName::{Adamw, Adamw8bit};
    let Settings { train, all, layers } = settings;
    let set = |key: &str, value: String| format!("{table}.{key}={value}");
    let number = |key: &str, value: usize| set(&format!("train.{key}"), value.to_string());
    let portion = match train.batch_size {
        even if even.is_multiple_of(2) => even / 2,
        _ => 1,
    };
    let portions = match portion == train.batch_size {
        true => Vec::new(),
        false => vec![
            number("batch_size", portion),
            number(
                "accumulation",
                train.accumulation * (train.batch_size / portion),
            ),
        ],
    };
    let mut steps = vec![(portions, "nothing: the same steps, in smaller portions")];
    let few = match layers {
        true => vec![set("layers_at_once", FEW.to_string())],
        false => Vec::new(),
    };
    steps.push((few, "the teacher reads anew for every few layers"));
    let eight = match train.optimizer {
        Adamw => vec![set("train.optimizer", "adamw_8bit".into())],
        _ => Vec::new(),
    };
    steps.push((eight, "rounded moments"));
    let apart = match (train.accumulation, train.clip_by) {
        (1, ClipBy::All) => vec![set("train.clip_by", "layer".into())],
        _ => Vec::new(),
    };
    steps.push((apart, "gradients are clipped layer by layer"));
    let rounded = match train.weights {
        Precision::F32 => vec![set("train.weights", "bf16".into())],
        Precision::Bf16 => Vec::new(),
    };
    steps.push((rounded, "matrices in bf16, rounded at each step"));
    let galore = match train.optimizer {
        Adamw | Adamw8bit => vec![set("train.optimizer", "galore_8bit".into())],
        _ => Vec::new(),
    };
    steps.push((galore, "steps in a subspace of each matrix's gradient"));
    let mixers = match all {
        true => vec![set("objective.trained", "mixers".into())],
        false => Vec::new(),
    };
    steps.push((mixers, "norms, MLPs, embedding and head stay as they are"));
    let shorter = match train.seq_len {
        256.. => vec![number("seq_len", train.seq_len / 2)],
        _ => Vec::new(),
    };
    steps.push((shorter, "shorter windows"));
    steps
}
