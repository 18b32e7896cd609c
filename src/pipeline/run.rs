//! Carrying out a recipe, stage by stage. Every result stands in a folder (or file) named by the stage and by a
//! hash of everything that decides it. What is there is not made again, so a run that was killed goes on where it was, and
//! a changed setting repeats only what depends on it; variants of a sweep share what they have in common.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::base::Base;
use super::embedded;
use super::recipe::{Recipe, Teacher};
use super::stage::select::{Damages, Places};
use super::stage::{Context, Made, StageResult, Surroundings, at};
use super::text::Text;
use super::texts::Texts;
use crate::checkpoint::{Checkpoint, Store};
use crate::data::{Reading, Tokenizer};
use crate::hash::Hash;
use crate::hub::Part;
use crate::watch::Watch;
use crate::{Error, Result};

/// What a run made.
#[derive(Debug, Clone, Serialize)]
pub struct Outcome {
    pub base: PathBuf,
    pub stages: Vec<StageResult>,
    /// The last checkpoint.
    pub student: PathBuf,
    /// Of the base's cache, at its whole context.
    pub kv_ratio: f64,
    /// Of a bank's layers, where they were selected by them.
    pub scores: Option<Places>,
    /// What a budget was filled by.
    pub damages: Option<Damages>,
}

/// Carries out what is not done yet.
///
/// # Errors
/// A recipe that does not fit its teacher or data (before anything is made), or [`Error::Interrupted`]
/// (what was done is kept).
pub fn run(recipe: &Recipe, with: &Surroundings) -> Result<Outcome> {
    let recipe = &recipe.fetched(Part::Whole, with.watch)?;
    let (teacher, texts) = open(recipe, with.out, with.out, (with.cache, with.watch))?;
    let base = Base::open(&teacher, with.place.clone())?;
    let context = Context {
        common: &recipe.common(),
        base: &base,
        texts: &texts,
        surroundings: with,
        store: Store::new(with.out),
    };
    let mut made = Made::default();
    for entry in recipe.stages() {
        let done = entry.stage.carry_out(&entry.name, &context, &mut made);
        done.map_err(kept(with.out))?;
    }
    let student = made.student()?.folder.clone();
    let (last, _) = Checkpoint::config_only(&student)?;
    Ok(Outcome {
        base: base.folder().to_owned(),
        kv_ratio: last.kv_ratio(base.config(), base.config().max_position_embeddings),
        student,
        stages: made.results,
        scores: made.scores,
        damages: made.damages,
    })
}

/// What [`run`] checks before it makes anything: the recipe against its teachers, texts and `out`. Nothing is written
/// there; tokens of large texts are kept in `cache`.
///
/// # Errors
/// Names what cannot work.
pub fn check(recipe: &Recipe, out: &Path, cache: &Path, watch: &dyn Watch) -> Result<()> {
    let scratch = tempfile::tempdir().map_err(Error::io("cannot create", &std::env::temp_dir()))?;
    let recipe = recipe.fetched(Part::Whole, watch)?;
    open(&recipe, out, scratch.path(), (cache, watch)).map(drop)
}

/// The teacher's folder and the texts, checked; `made`: where the embedded teacher and texts that are written go.
fn open(
    recipe: &Recipe,
    out: &Path,
    made: &Path,
    (cache, watch): (&Path, &dyn Watch),
) -> Result<(PathBuf, Texts)> {
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
    // All files, before the first of them is read.
    recipe.check(&teacher)?;
    (recipe.data.check(recipe.dpo.is_some())).map_err(at("data"))?;
    recipe.check_with(&teacher, true)?;
    let against = recipe.data.decontaminate.as_ref();
    let ngrams = against.map(|against| against.ngrams(watch));
    let ngrams = ngrams.transpose().map_err(at("data"))?;
    let reading = Reading {
        packing: recipe.data.packing,
        eos: recipe.data.eos,
        decontaminate: ngrams.as_ref(),
        cache: Some(cache),
        ..Reading::plain(&tokenizer, watch)
    };
    let dpo = recipe.dpo.as_ref().map(|dpo| &dpo.objective);
    let texts = Texts::open(&recipe.data, dpo, made, &reading)?;
    for entry in recipe.stages() {
        entry.stage.fill(&texts).map_err(at(&entry.table))?;
    }
    (recipe.eval.fill(&texts.validation)).map_err(at("eval"))?;
    Ok((folder, texts))
}

/// The teacher's folder; the embedded one is written into `folder`.
///
/// # Errors
/// A folder that cannot be written.
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

/// What an interrupted run keeps besides what its stage says.
pub fn kept(out: &Path) -> impl Fn(Error) -> Error {
    move |error| match error {
        Error::Interrupted(what) => Error::Interrupted(format!(
            "{what} (finished stages are kept in {})",
            out.display()
        )),
        other => other,
    }
}

/// Removes what [`run`] made in `out`, and nothing else.
///
/// # Errors
/// What cannot be listed or removed.
pub fn clear(out: &Path) -> Result<()> {
    for entry in std::fs::read_dir(out).map_err(Error::io("cannot list", out))? {
        let path = entry.map_err(Error::io("cannot list", out))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        // A stage's result is named by its key; the rest by what it is of.
        let stem = name.split('.').next().unwrap_or_default();
        let keyed = stem
            .rsplit_once('-')
            .is_some_and(|(_, key)| Hash::is_name(key));
        if keyed || Text::is_made(&name) || name == "teacher" {
            let removed = match path.is_dir() {
                true => std::fs::remove_dir_all(&path),
                false => std::fs::remove_file(&path),
            };
            removed.map_err(Error::io("cannot remove", &path))?;
        }
    }
    Ok(())
}
