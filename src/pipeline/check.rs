//! Everything that a recipe names, opened and checked before the first stage is made.

use std::path::{Path, PathBuf};

use super::embedded;
use super::recipe::{Recipe, Teacher, Text, at, check_context};
use crate::checkpoint::{self, Checkpoint};
use crate::data::{Batches, Corpus, Packing, Preferences, Tokenizer, stories};
use crate::model::ModelConfig;
use crate::train::TrainConfig;
use crate::{Error, Result};

/// What a run starts with; weights are looked at, not loaded.
pub(super) struct Checked {
    /// The teacher's folder.
    pub teacher: PathBuf,
    pub train: Corpus,
    pub validation: Corpus,
    /// Where there is a DPO stage.
    pub preferences: Option<Preferences>,
}

/// What [`super::run`] checks before it makes anything: the recipe against its teachers, texts and `out`. Nothing is written
/// there.
///
/// # Errors
/// Names what cannot work.
pub fn check(recipe: &Recipe, out: &Path) -> Result<()> {
    let scratch = tempfile::tempdir().map_err(Error::io("cannot create", &std::env::temp_dir()))?;
    Checked::open(recipe, out, scratch.path()).map(|_| ())
}

/// The teacher's folder; the embedded one is written into `folder`.
pub fn teacher_folder(teacher: &Teacher, folder: &Path) -> Result<PathBuf> {
    match teacher {
        Teacher::Folder(folder) => Ok(folder.clone()),
        Teacher::Embedded => {
            let folder = folder.join("teacher");
            if !folder.exists() {
                embedded::write_teacher(&folder)?;
            }
            Ok(folder)
        }
    }
}

impl Checked {
    /// `made`: where the embedded teacher and the texts of `stories:` go.
    pub fn open(recipe: &Recipe, out: &Path, made: &Path) -> Result<Self> {
        if out.exists() && !out.is_dir() {
            return Err(Error::file(
                out,
                "is a file, and results need a folder: choose --out",
            ));
        }
        std::fs::create_dir_all(made).map_err(Error::io("cannot create", made))?;
        let folder = teacher_folder(&recipe.teacher, made)?;
        let teacher = Checkpoint::open(&folder)?.config;
        let tokenizer = Tokenizer::open(&folder)?;
        let students = recipe.check(&teacher)?;
        let pairs = match recipe.dpo {
            Some(_) => recipe.data.preferences.as_ref(),
            None => None,
        };
        // All files, before the first of them is read.
        let data = &recipe.data;
        let texts = [
            ("train", Some(&data.train)),
            ("validation", Some(&data.validation)),
            ("preferences", pairs),
        ];
        for (name, text) in texts {
            if let Some(Text::File(path)) = text
                && !path.is_file()
            {
                let problem = match path.is_dir() {
                    true => "a directory",
                    false => "No such file",
                };
                return Err(at("data")(Error::invalid(format!(
                    "{name} {}: {problem}; name a file there, or with --{name}",
                    path.display()
                ))));
            }
        }
        // The first student is composed, the others come out of the KD stages.
        for (i, student) in students[1..].iter().enumerate() {
            let stage = at(&format!("kd {}", i + 1));
            check_kd_teacher(recipe, i, &teacher, student).map_err(stage)?;
        }
        let checked = Self {
            train: Corpus::load(&file(&data.train, made, false)?, &tokenizer, data.packing)?,
            validation: {
                let path = file(&data.validation, made, false)?;
                Corpus::load(&path, &tokenizer, Packing::Documents)?
            },
            preferences: match (&recipe.dpo, pairs) {
                (Some(dpo), Some(text)) => {
                    let path = file(text, made, true)?;
                    let dpo = &dpo.objective;
                    let (prompt, length) = (dpo.max_prompt, dpo.max_length);
                    Some(Preferences::load(&path, &tokenizer, prompt, length)?)
                }
                _ => None,
            },
            teacher: folder,
        };
        checked.fill(recipe)?;
        Ok(checked)
    }

    /// Whether the texts fill the batches that the stages ask for.
    fn fill(&self, recipe: &Recipe) -> Result<()> {
        let enough = |data: &dyn Batches, config: &TrainConfig| -> Result<()> {
            data.check(config.batch_size, config.seq_len)?;
            config.steps(data.examples(config.seq_len)).map(|_| ())
        };
        if recipe.needs_calibration() {
            (recipe.calibration.check(&self.train)).map_err(at("calibration"))?;
        }
        if let Some(ild) = &recipe.ild {
            enough(&self.train, &ild.train).map_err(at("ild.train"))?;
        }
        for (i, kd) in recipe.kd.iter().enumerate() {
            enough(&self.train, &kd.train).map_err(at(&format!("kd {}", i + 1)))?;
        }
        if let (Some(dpo), Some(pairs)) = (&recipe.dpo, &self.preferences) {
            enough(pairs, &dpo.train).map_err(at("dpo.train"))?;
        }
        (self.validation.check(1, recipe.eval.seq_len)).map_err(at("eval"))
    }
}

/// Another teacher of KD stage `i`: whether it is there and fits.
fn check_kd_teacher(
    recipe: &Recipe,
    i: usize,
    base: &ModelConfig,
    student: &ModelConfig,
) -> Result<()> {
    let kd = &recipe.kd[i];
    let other;
    let teacher = match &kd.teacher {
        Some(folder) => {
            Tokenizer::open(folder)?;
            other = Checkpoint::open(folder)?.config;
            &other
        }
        None => base,
    };
    check_context(teacher, kd.train.seq_len)?;
    kd.objective.fits(teacher, student)
}

/// A text's file; what the program writes itself goes into `made`.
fn file(text: &Text, made: &Path, preferences: bool) -> Result<PathBuf> {
    let (seed, count) = match text {
        Text::File(path) => return Ok(path.clone()),
        Text::Stories { seed, count } => (*seed, *count),
    };
    let (kind, lines) = match preferences {
        true => ("preferences", stories::preferences_to_jsonl(seed, count)),
        false => ("stories", stories::to_jsonl(seed, count)),
    };
    let path = made.join(format!("{kind}-{seed}-{count}.jsonl"));
    checkpoint::write_atomic(&path, lines.as_bytes())?;
    Ok(path)
}
