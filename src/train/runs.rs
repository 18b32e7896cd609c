//! Runs as they lie on a disk: results with their metrics or record, and those on the way to one (`NAME.partial`).

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::Serialize;
use serde_json::Value;

use super::state::{BEST, METRICS, PIECES, RESULT, STATE};
use super::{FROZEN, Sample, partial_folder, read_samples};
use crate::checkpoint::{self, Checkpoint, EVENTS, Provenance, RECORD, SAMPLES};
use crate::{Error, Result};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    Finished,
    /// A process works on it.
    Running,
    /// It goes on when its command is given again.
    Stopped,
    /// Its files cannot be read; [`Run::error`] says why.
    Broken,
}

/// A run, as far as it says what it is: those of older versions have no record.
#[derive(Debug, Clone, Serialize)]
pub struct Run {
    /// What its result is called, from the folder that was searched on.
    pub name: String,
    pub folder: PathBuf,
    pub state: State,
    /// `compose`, `ild`, `kd`, ..: what it did last, or is doing.
    pub stage: Option<String>,
    /// Optimizer steps done, and of the whole run.
    pub step: Option<u64>,
    pub steps: Option<u64>,
    /// Trained on.
    pub tokens: Option<u64>,
    pub loss: Option<f64>,
    /// Of its last evaluation.
    pub eval_kl: Option<f64>,
    /// When it wrote last.
    #[serde(skip)]
    written: SystemTime,
    /// Since then.
    pub age_seconds: u64,
    /// On the disk.
    pub bytes: u64,
    /// What is wrong with a broken one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// Folders below that are searched.
const DEPTH: usize = 5;

/// All runs in a folder, or the one that it is; newest first. One that cannot be read is named as such.
///
/// # Errors
/// A folder that is not there or cannot be listed.
pub fn list(folder: &Path) -> Result<Vec<Run>> {
    if is_run(folder) {
        return Ok(vec![Run::open(folder)?]);
    }
    let mut found = Vec::new();
    search(folder, DEPTH, &mut found)?;
    let runs = found.into_iter().filter_map(|path| {
        let inside = path.strip_prefix(folder).unwrap_or(&path);
        let name = result_of(inside).display().to_string();
        match Run::open(&path) {
            Ok(run) => Some(Run { name, ..run }),
            // It has just ended, or was removed.
            Err(_) if !path.exists() => None,
            Err(error) => Some(Run {
                name,
                error: Some(error.to_string()),
                ..Run::bare(&path, State::Broken)
            }),
        }
    });
    let mut runs: Vec<Run> = runs.collect();
    runs.sort_by(|a, b| (b.written, &a.name).cmp(&(a.written, &b.name)));
    Ok(runs)
}

fn search(folder: &Path, depth: usize, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(Error::io("cannot list", folder))? {
        let entry = entry.map_err(Error::io("cannot list", folder))?;
        let path = entry.path();
        let hidden = entry.file_name().to_string_lossy().starts_with('.');
        // What a link leads to is found where it stands.
        if hidden || !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        match is_run(&path) {
            true => found.push(path),
            // A folder that is not for us to see holds none of our runs.
            false if depth > 0 => _ = search(&path, depth - 1, found),
            false => {}
        }
    }
    Ok(())
}

fn is_run(folder: &Path) -> bool {
    [METRICS, RECORD]
        .iter()
        .any(|name| folder.join(name).is_file())
}

const PARTIAL: &str = "partial";

fn is_partial(folder: &Path) -> bool {
    folder.extension().is_some_and(|e| e == PARTIAL)
}

/// What a run is to become.
fn result_of(folder: &Path) -> PathBuf {
    match is_partial(folder) {
        true => folder.with_extension(""),
        false => folder.to_owned(),
    }
}

/// What a process works on: the run, or what it stands in, which may be on its way itself.
fn busy(folder: &Path) -> Option<PathBuf> {
    let folder = fs::canonicalize(folder).ok()?;
    let mut places = folder.ancestors().map(result_of);
    places.find(|place| checkpoint::is_locked(place))
}

impl Run {
    /// A run's folder, or that of its result while it is on the way.
    ///
    /// # Errors
    /// A folder that is neither, or whose files cannot be read.
    pub fn open(folder: &Path) -> Result<Self> {
        let partial = partial_folder(folder);
        let folder = match is_run(folder) {
            false if is_run(&partial) => partial.as_path(),
            true => folder,
            false => {
                let message = "no run: a folder with metrics.jsonl or provenance.json is one";
                return Err(Error::file(folder, message));
            }
        };
        let state = match (is_partial(folder), busy(folder)) {
            (false, _) => State::Finished,
            (true, Some(_)) => State::Running,
            (true, None) => State::Stopped,
        };
        let record = Provenance::read(folder)?;
        let recorded = record.as_ref().and_then(|record| record.steps.last());
        let steps = Metrics::read(folder)?;
        let last = steps.last();
        let number = |name: &str| last.as_ref().and_then(|step| step[name].as_f64());
        let count = |name: &str| last.as_ref().and_then(|step| step[name].as_u64());
        let figure = |name: &str| recorded.and_then(|step| step.figures.get(name).copied());
        Ok(Self {
            stage: recorded.map(|step| step.stage.clone()),
            step: count("step"),
            steps: recorded.and_then(|step| step.steps),
            tokens: count("tokens").or_else(|| recorded.and_then(|step| step.tokens)),
            loss: number("loss").or_else(|| figure("loss")),
            eval_kl: steps.last_with("eval_kl").or_else(|| figure("eval_kl")),
            ..Self::bare(folder, state)
        })
    }

    /// What a folder says without its files being read.
    fn bare(folder: &Path, state: State) -> Self {
        let (result, written) = (result_of(folder), written(folder));
        Self {
            name: (result.file_name().unwrap_or_default().to_string_lossy()).into_owned(),
            folder: folder.to_owned(),
            state,
            stage: None,
            step: None,
            steps: None,
            tokens: None,
            loss: None,
            eval_kl: None,
            age_seconds: written.elapsed().unwrap_or_default().as_secs(),
            written,
            bytes: bytes(folder),
            error: None,
        }
    }

    /// # Errors
    /// As [`Provenance::read`].
    pub fn record(&self) -> Result<Provenance> {
        Ok(Provenance::read(&self.folder)?.unwrap_or_default())
    }

    /// Its settings and those of the steps before it, by names like `kd.train.lr`; steps of one stage are counted.
    ///
    /// # Errors
    /// As [`Provenance::read`].
    pub fn settings(&self) -> Result<Vec<(String, String)>> {
        let record = self.record()?;
        let mut all = Vec::new();
        if let Some(base) = &record.base {
            all.push((
                "base".to_owned(),
                format!("{} ({})", base.spelled(), base.hash),
            ));
        }
        for (i, step) in record.steps.iter().enumerate() {
            let before = record.steps[..i].iter();
            let name = match before.filter(|other| other.stage == step.stage).count() {
                0 => step.stage.clone(),
                count => format!("{} {}", step.stage, count + 1),
            };
            for input in &step.inputs {
                let hash = input.hash.iter().map(|hash| format!(" ({hash})"));
                let value = hash.fold(input.spelled(), |of, hash| of + &hash);
                all.push((format!("{name}.{}", input.role), value));
            }
            flatten(&step.settings, &name, &mut all);
        }
        Ok(all)
    }

    /// The figures of its last step, but for those of single layers, then those that the record has besides.
    ///
    /// # Errors
    /// Files that cannot be read.
    pub fn figures(&self) -> Result<Vec<(String, f64)>> {
        let last = Metrics::read(&self.folder)?.last();
        let mut all = last.iter().flat_map(numbers).collect::<Vec<_>>();
        all.retain(|(name, _)| !name.starts_with("layer_grad_norm/"));
        let record = self.record()?;
        for (name, value) in record.steps.last().iter().flat_map(|step| &step.figures) {
            if !all.iter().any(|(known, _)| known == name) {
                all.push((name.clone(), *value));
            }
        }
        if let Ok((config, _)) = Checkpoint::config_only(&self.folder) {
            let ratio = record.kv_ratio(&config);
            all.extend(ratio.map(|(ratio, _)| ("kv_ratio".to_owned(), ratio)));
        }
        Ok(all)
    }

    /// What its student wrote now and then.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn samples(&self) -> Result<Vec<Sample>> {
        read_samples(&self.folder.join(SAMPLES))
    }

    /// One of its figures over the steps after `since`, those that have it.
    ///
    /// # Errors
    /// Metrics that cannot be read.
    pub fn curve(&self, metric: &str, since: u64) -> Result<Curve> {
        let mut curve = Curve::default();
        let metrics = Metrics::read(&self.folder)?;
        for line in metrics.backwards() {
            let Some(step) = line["step"].as_u64() else {
                continue;
            };
            if step <= since {
                break;
            }
            let tokens = line["tokens"].as_u64().unwrap_or(0);
            for (name, value) in numbers(&line) {
                if name == metric {
                    curve.points.push((step, tokens, value));
                }
                curve.names.insert(name);
            }
        }
        curve.points.reverse();
        Ok(curve)
    }

    /// Removes the run's folder.
    ///
    /// # Errors
    /// As [`Run::check_removal`], or a folder that cannot be removed.
    pub fn remove(&self) -> Result<()> {
        self.check_removal()?;
        // Nobody begins with it meanwhile.
        let _lock = checkpoint::lock(&result_of(&self.folder))?;
        fs::remove_dir_all(&self.folder).map_err(Error::io("cannot remove", &self.folder))
    }

    /// # Errors
    /// A process that works on it or on what it stands in, or an entry that zebroid did not write.
    pub fn check_removal(&self) -> Result<()> {
        if let Some(busy) = busy(&self.folder) {
            let message = format!("a zebroid process works on {}", busy.display());
            return Err(Error::file(&self.folder, message));
        }
        if let Some(entry) = self.foreign()? {
            return Err(Error::file(
                &entry,
                "not written by zebroid, so its run stays: move it away, or remove the folder yourself",
            ));
        }
        Ok(())
    }

    /// The first entry that is none of ours.
    fn foreign(&self) -> Result<Option<PathBuf>> {
        let folder = &self.folder;
        if !is_partial(folder) {
            return checkpoint::foreign(folder);
        }
        for entry in fs::read_dir(folder).map_err(Error::io("cannot list", folder))? {
            let path = entry.map_err(Error::io("cannot list", folder))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let known = [METRICS, EVENTS, SAMPLES, RECORD, FROZEN].contains(&name.as_ref())
                || name.starts_with(STATE) && name.ends_with(".safetensors");
            let piece = name.starts_with(PIECES) && path.is_dir();
            let found = match name.as_ref() {
                // On its way to its place, when the run was killed.
                RESULT | BEST => checkpoint::foreign(&path)?,
                name if piece && is_partial(Path::new(name)) => Run {
                    folder: path.clone(),
                    ..self.clone()
                }
                .foreign()?,
                _ if piece => checkpoint::foreign(&path)?,
                name if known || name.starts_with(".zebroid-") => None,
                _ => Some(path.clone()),
            };
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }
}

/// How a figure went.
#[derive(Debug, Default, PartialEq)]
pub struct Curve {
    /// Of all figures that these steps have.
    pub names: BTreeSet<String>,
    /// Step, tokens so far, value; first to last.
    pub points: Vec<(u64, u64, f64)>,
}

/// The figures of a line; one of several values is several, `NAME/INDEX`.
fn numbers(line: &Value) -> Vec<(String, f64)> {
    let mut all = Vec::new();
    for (name, value) in line.as_object().into_iter().flatten() {
        match value {
            Value::Array(list) => {
                let each = list.iter().enumerate();
                all.extend(each.filter_map(|(i, x)| Some((format!("{name}/{i}"), x.as_f64()?))));
            }
            value => all.extend(value.as_f64().map(|x| (name.clone(), x))),
        }
    }
    all
}

/// `metrics.jsonl`, as text: only few of its lines are looked at.
struct Metrics(String);

impl Metrics {
    fn read(folder: &Path) -> Result<Self> {
        let file = folder.join(METRICS);
        match file.exists() {
            false => Ok(Self(String::new())),
            true => fs::read_to_string(&file)
                .map(Self)
                .map_err(Error::io("cannot read", &file)),
        }
    }

    /// Steps from the last to the first; a line that is being written is none.
    fn backwards(&self) -> impl Iterator<Item = Value> {
        let lines = self.0.lines().rev();
        lines.filter_map(|line| serde_json::from_str(line).ok())
    }

    fn last(&self) -> Option<Value> {
        self.backwards().next()
    }

    /// Of the last step that has this figure.
    fn last_with(&self, name: &str) -> Option<f64> {
        // Cheaper than to read every line.
        let key = format!("\"{name}\":");
        let lines = self.0.lines().rev().filter(|line| line.contains(&key));
        let steps = lines.filter_map(|line| serde_json::from_str::<Value>(line).ok());
        steps.into_iter().find_map(|step| step[name].as_f64())
    }
}

fn flatten(value: &Value, at: &str, all: &mut Vec<(String, String)>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                flatten(value, &format!("{at}.{name}"), all);
            }
        }
        Value::String(text) => all.push((at.to_owned(), text.clone())),
        other => all.push((at.to_owned(), other.to_string())),
    }
}

/// When the newest file of a run was.
fn written(folder: &Path) -> SystemTime {
    let files = fs::read_dir(folder).into_iter().flatten().flatten();
    let times = files.filter_map(|file| file.metadata().ok()?.modified().ok());
    times.max().unwrap_or(SystemTime::UNIX_EPOCH)
}

/// Of all files inside.
fn bytes(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let each = entries.map(|entry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => bytes(&entry.path()),
        Ok(kind) if kind.is_file() => entry.metadata().map_or(0, |file| file.len()),
        _ => 0,
    });
    each.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_cannot_be_read_hides_no_other() {
        let root = tempfile::tempdir().unwrap();
        for (name, record) in [("torn", "{"), ("whole", "{}")] {
            fs::create_dir(root.path().join(name)).unwrap();
            fs::write(root.path().join(name).join(RECORD), record).unwrap();
        }
        let mut runs = list(root.path()).unwrap();
        runs.sort_by(|a, b| a.name.cmp(&b.name));
        let found: Vec<_> = runs.iter().map(|run| (&*run.name, run.state)).collect();
        assert_eq!(found, [("torn", State::Broken), ("whole", State::Finished)]);
        let said = runs[0].error.as_ref().unwrap();
        assert!(said.contains("torn/provenance.json: not JSON"), "{said}");
        assert_eq!(runs[1].error, None);
    }
}
