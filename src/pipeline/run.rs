//! Carrying out a recipe. Every stage's result stands in a folder (or file) named by the stage and by a
//! hash of everything that decides it: its settings and the results that it starts from. What is there is
//! not made again, so a run that was killed goes on where it was, and a changed setting repeats only what
//! depends on it.

use std::path::{Path, PathBuf};

use serde::{Serialize, de::DeserializeOwned};
use serde_json::json;

use super::base::Base;
use super::budget::{Candidates, Damages, damages};
use super::check::Checked;
use super::places::Places;
use super::recipe::{DpoStage, IldStage, KdStage, Recipe, SelectStage};
use super::training::{start_training, tell_step};
use crate::checkpoint::{self, Bank, Checkpoint, Format};
use crate::convert::{Calibration, Init, InitName, PlanOptions, compose_from_bank, grow};
use crate::data::{Batches, Corpus, Preferences};
use crate::eval::kl::{self, KlReport};
use crate::hash::Hash;
use crate::numerics;
use crate::train::stage::dpo::Dpo;
use crate::train::{RunOptions, Stage, StepMetrics, TrainConfig, partial_folder, train};
use crate::watch::Watch;
use crate::weights::Place;
use crate::{Error, Result};

/// What the surroundings of a run decide; none of it changes the result.
pub struct Surroundings<'a> {
    pub out: &'a Path,
    pub place: Place,
    /// Optimizer steps between saves.
    pub save_every: u64,
    pub watch: &'a dyn Watch,
}

/// A result of a run, and the figures of what was trained.
#[derive(Debug, Clone, Serialize)]
pub struct StageResult {
    /// `compose`, `ild`, `kd 1`, ..
    pub name: String,
    pub folder: PathBuf,
    /// Held-out, against the base; a bank has none.
    pub kl: Option<KlReport>,
    #[serde(skip)]
    pub metrics: Vec<StepMetrics>,
}

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
    let run = Run::open(recipe, with)?;
    run.all(with).map_err(kept(with.out))
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
pub fn clear(out: &Path) -> Result<()> {
    for entry in std::fs::read_dir(out).map_err(Error::io("cannot list", out))? {
        let path = entry.map_err(Error::io("cannot list", out))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        // A stage's result is named by its key; the rest by what it is of.
        let stem = name.split('.').next().unwrap_or_default();
        let keyed = stem
            .rsplit_once('-')
            .is_some_and(|(_, key)| Hash::is_name(key));
        let text = ["stories-", "preferences-"].iter().any(|kind| {
            let numbers = name
                .strip_prefix(kind)
                .and_then(|n| n.strip_suffix(".jsonl"));
            numbers.is_some_and(|n| n.bytes().all(|b| b.is_ascii_digit() || b == b'-'))
        });
        if keyed || text || name == "teacher" {
            let removed = match path.is_dir() {
                true => std::fs::remove_dir_all(&path),
                false => std::fs::remove_file(&path),
            };
            removed.map_err(Error::io("cannot remove", &path))?;
        }
    }
    Ok(())
}

struct Run<'a> {
    recipe: &'a Recipe,
    base: Base,
    /// Of the base.
    hash: String,
    train: Corpus,
    validation: Corpus,
    preferences: Option<Preferences>,
}

/// A checkpoint on the way, and what decided it.
struct Student {
    folder: PathBuf,
    key: String,
}

impl<'a> Run<'a> {
    fn open(recipe: &'a Recipe, with: &Surroundings) -> Result<Self> {
        let checked = Checked::open(recipe, with.out, with.out)?;
        let base = Base::open(&checked.teacher, with.place.clone())?;
        Ok(Self {
            hash: base.hash()?,
            recipe,
            base,
            train: checked.train,
            validation: checked.validation,
            preferences: checked.preferences,
        })
    }

    fn all(&self, with: &Surroundings) -> Result<Outcome> {
        let recipe = self.recipe;
        let calibration = self.calibrate(with)?;
        let calibration = calibration.as_ref();
        let mut stages = Vec::new();
        let (mut scores, mut damages) = (None, None);
        let bank = match &recipe.ild {
            Some(ild) if recipe.bank().is_some() => {
                let (bank, metrics) = self.bank(ild, calibration, with)?;
                stages.push(StageResult {
                    name: "ild".into(),
                    folder: bank.folder.clone(),
                    kl: None,
                    metrics,
                });
                Some(bank)
            }
            _ => None,
        };
        let mut options = recipe.plan.clone();
        if let Some(stage) = &recipe.select {
            match (stage.method.selector(), &bank) {
                (Some(selector), Some(bank)) => {
                    let found = self.scores(stage, bank, with)?;
                    options = options.with_layers(found.choose(selector, stage.count()?)?.1);
                    scores = Some(found);
                }
                _ => {
                    let found = self.damages(stage, bank.as_ref(), calibration, with)?;
                    let chosen = found.choose(stage.budget())?;
                    options = options.with_layers(chosen.iter().map(|c| c.kind).collect());
                    damages = Some(found);
                }
            }
        }
        let mut student = self.compose(&options, bank.as_ref(), None, calibration, with)?;
        stages.push(self.result("compose", &student, Vec::new(), with)?);
        if let (Some(ild), None) = (&recipe.ild, &bank) {
            let settings = json!({ "ild": ild, "student": student.key });
            let key = self.key(numerics::Stage::Ild, "ild", settings);
            let metrics;
            (student, metrics) = self.train("ild", key, &ild.train, &self.train, with, || {
                self.base
                    .ild(&Checkpoint::open(&student.folder)?, ild.objective)
            })?;
            stages.push(self.result("ild", &student, metrics, with)?);
        }
        let mut settled = Vec::new();
        for (i, kd) in recipe.kd.iter().enumerate() {
            let name = format!("kd {}", i + 1);
            if let Some(options) = &kd.plan {
                student = self.compose(options, None, Some(&student), calibration, with)?;
            }
            let metrics;
            (student, metrics) = self.kd(&name, kd, &student, &settled, with)?;
            settled = Checkpoint::config_only(&student.folder)?.0.converted();
            stages.push(self.result(&name, &student, metrics, with)?);
        }
        if let (Some(dpo), Some(pairs)) = (&recipe.dpo, &self.preferences) {
            let metrics;
            (student, metrics) = self.dpo(dpo, pairs, &student, with)?;
            stages.push(self.result("dpo", &student, metrics, with)?);
        }
        let (last, _) = Checkpoint::config_only(&student.folder)?;
        Ok(Outcome {
            base: self.base.folder().to_owned(),
            kv_ratio: last.kv_ratio(
                self.base.config(),
                self.base.config().max_position_embeddings,
            ),
            student: student.folder,
            stages,
            scores,
            damages,
        })
    }

    /// The hash of everything that decides a result; teacher, training text, what the program computes and on which kind
    /// of device are always part of it.
    fn key(&self, stage: numerics::Stage, name: &str, settings: serde_json::Value) -> String {
        let all = json!({
            "stage": name,
            "numerics": numerics::version(stage, &self.base.place.device),
            "base": self.hash,
            "data": self.train.hash(),
            "settings": settings,
        });
        Hash::of(all.to_string().as_bytes()).to_string()
    }

    fn seeded(&self, train: &TrainConfig) -> TrainConfig {
        TrainConfig {
            seed: train.seed.wrapping_add(self.recipe.seed),
            ..train.clone()
        }
    }

    fn calibrate(&self, with: &Surroundings) -> Result<Option<Calibration>> {
        if !self.recipe.needs_calibration() {
            return Ok(None);
        }
        let config = &self.recipe.calibration;
        let found = (self.base).calibrate(&self.train, config, with.out, with.watch)?;
        Ok(Some(found))
    }

    fn init<'c>(&self, calibration: Option<&'c Calibration>, own_inputs: bool) -> Init<'c> {
        match (self.recipe.init, calibration) {
            (InitName::Refined, Some(calibration)) => Init::Refined {
                calibration,
                own_inputs,
            },
            _ => Init::Published {
                seed: self.recipe.seed,
            },
        }
    }

    /// What decides an initialisation.
    fn birth(&self) -> serde_json::Value {
        let device = &self.base.place.device;
        json!({
            "init": self.recipe.init,
            "calibration": self.recipe.calibration,
            "seed": self.recipe.seed,
            "numerics": [
                numerics::version(numerics::Stage::Calibration, device),
                numerics::version(numerics::Stage::Init, device),
            ],
        })
    }

    fn bank(
        &self,
        ild: &IldStage,
        calibration: Option<&Calibration>,
        with: &Surroundings,
    ) -> Result<(Student, Vec<StepMetrics>)> {
        let plan = &self.recipe.plan;
        let settings = json!({ "ild": ild, "plan": plan, "birth": self.birth() });
        let key = self.key(numerics::Stage::Ild, "bank", settings);
        self.train("bank", key, &ild.train, &self.train, with, || {
            let init = self.init(calibration, false);
            self.base
                .bank(plan, &ild.candidates, &init, ild.objective, with.watch)
        })
    }

    /// What a bank's layers are worth.
    fn scores(&self, stage: &SelectStage, bank: &Student, with: &Surroundings) -> Result<Places> {
        let seq_len = self.recipe.eval.seq_len;
        let sample = json!([
            bank.key,
            stage.pair,
            stage.tokens,
            seq_len,
            self.validation.hash()
        ]);
        let key = self.key(numerics::Stage::Scores, "scores", sample);
        let path = with.out.join(format!("scores-{key}.json"));
        self.once(&path, || {
            let bank = Bank::open(&bank.folder)?;
            let text = (&self.validation, stage.tokens, seq_len);
            Places::score(&self.base, &bank, &stage.pair, text, with.watch)
        })
    }

    /// What each kind of layer costs the teacher.
    fn damages(
        &self,
        stage: &SelectStage,
        bank: Option<&Student>,
        calibration: Option<&Calibration>,
        with: &Surroundings,
    ) -> Result<Damages> {
        let seq_len = self.recipe.eval.seq_len;
        let length = stage.length(self.base.config());
        let settings = json!({
            "plan": self.recipe.plan,
            "bank": bank.map(|bank| &bank.key),
            "candidates": stage.born(),
            "length": length,
            "birth": self.birth(),
            "sample": [stage.tokens, seq_len],
            "validation": self.validation.hash(),
        });
        let key = self.key(numerics::Stage::Scores, "damages", settings);
        let path = with.out.join(format!("damages-{key}.json"));
        self.once(&path, || {
            let opened = bank.map(|bank| Bank::open(&bank.folder)).transpose()?;
            let init = self.init(calibration, false);
            let candidates = match &opened {
                Some(bank) => Candidates::Bank(bank),
                None => Candidates::Born {
                    options: &self.recipe.plan,
                    kinds: stage.born(),
                    init: &init,
                },
            };
            let text = (&self.validation, stage.tokens, seq_len);
            damages(&self.base, &candidates, length, text, with.watch)
        })
    }

    /// A hybrid from the teacher, from a bank, or by converting more layers of `before`.
    fn compose(
        &self,
        options: &PlanOptions,
        bank: Option<&Student>,
        before: Option<&Student>,
        calibration: Option<&Calibration>,
        with: &Surroundings,
    ) -> Result<Student> {
        let settings = json!({
            "plan": options,
            "birth": self.birth(),
            "bank": bank.map(|b| &b.key),
            "before": before.map(|b| &b.key),
        });
        let key = self.key(numerics::Stage::Init, "compose", settings);
        let folder = with.out.join(format!("hybrid-{key}"));
        if !folder.exists() {
            let student = self.base.plan(options, calibration)?;
            let composed = match (bank, before) {
                (Some(bank), _) => compose_from_bank(
                    &self.base.parts.weights,
                    &student,
                    &Bank::open(&bank.folder)?,
                )?,
                // What has been trained since is not what layers could be fitted to: they get the teacher's inputs.
                (None, before) => {
                    let own_inputs = before.is_none();
                    let init = self.init(calibration, own_inputs);
                    let composed = self.base.compose(&student, &init, with.watch)?;
                    match before {
                        Some(before) => {
                            grow(composed, &Checkpoint::open(&before.folder)?.parts()?)?
                        }
                        None => composed,
                    }
                }
            };
            checkpoint::save(
                &folder,
                Format::Zebroid,
                &composed.config,
                &composed.weights,
                Some(self.base.folder()),
                false,
            )?;
        }
        Ok(Student { folder, key })
    }

    fn kd(
        &self,
        name: &str,
        kd: &KdStage,
        student: &Student,
        settled: &[usize],
        with: &Surroundings,
    ) -> Result<(Student, Vec<StepMetrics>)> {
        let other = match &kd.teacher {
            Some(folder) => Some(Base::open(folder, with.place.clone())?),
            None => None,
        };
        let teacher = other.as_ref().unwrap_or(&self.base);
        let settings = json!({ "kd": kd, "student": student.key, "teacher": teacher.hash()? });
        let key = self.key(numerics::Stage::Kd, "kd", settings);
        self.train(name, key, &kd.train, &self.train, with, || {
            let student = Checkpoint::open(&student.folder)?;
            teacher.kd(&student, settled, kd.objective)
        })
    }

    fn dpo(
        &self,
        dpo: &DpoStage,
        pairs: &Preferences,
        student: &Student,
        with: &Surroundings,
    ) -> Result<(Student, Vec<StepMetrics>)> {
        let settings = json!({ "dpo": dpo, "student": student.key, "pairs": pairs.hash() });
        let key = self.key(numerics::Stage::Dpo, "dpo", settings);
        let stored = with.out.join(format!("frozen-{key}.safetensors"));
        self.train("dpo", key, &dpo.train, pairs, with, || {
            let student = Checkpoint::open(&student.folder)?.parts()?;
            let config = dpo.objective;
            let dpo = Dpo::new(&student, pairs, config, &stored, &with.place, with.watch);
            Ok(Stage::Dpo(dpo?))
        })
    }

    /// Trains a stage to its folder, or reads the metrics of one that is done.
    fn train(
        &self,
        name: &str,
        key: String,
        config: &TrainConfig,
        data: &dyn Batches,
        with: &Surroundings,
        stage: impl FnOnce() -> Result<Stage>,
    ) -> Result<(Student, Vec<StepMetrics>)> {
        let config = self.seeded(config);
        let folder = with.out.join(format!("{}-{key}", name.replace(' ', "")));
        let metrics = match folder.exists() {
            true => {
                // Killed between its last two acts, a run leaves its workplace.
                let left = partial_folder(&folder);
                if left.exists() {
                    std::fs::remove_dir_all(&left).map_err(Error::io("cannot remove", &left))?;
                }
                read_metrics(&folder.join("metrics.jsonl"))?
            }
            false => {
                let (mut stage, watch) = (stage()?, with.watch);
                start_training(watch, name, &config, data, &folder)?;
                train(
                    &mut stage,
                    data,
                    &config,
                    RunOptions {
                        out: folder.clone(),
                        tokenizer: self.base.folder().to_owned(),
                        force: false,
                        save_every: with.save_every,
                        validation: None,
                        stop: &|| watch.stop(),
                        observe: &mut |metrics, _| tell_step(watch, metrics),
                    },
                )?
            }
        };
        Ok((Student { folder, key }, metrics))
    }

    fn result(
        &self,
        name: &str,
        student: &Student,
        metrics: Vec<StepMetrics>,
        with: &Surroundings,
    ) -> Result<StageResult> {
        let settings = json!([student.key, self.recipe.eval, self.validation.hash()]);
        let key = self.key(numerics::Stage::Kl, "eval", settings);
        let path = with.out.join(format!("eval-{key}.json"));
        let eval = &self.recipe.eval;
        let kl = self.once(&path, || {
            let lm = Checkpoint::open(&student.folder)?.model(&with.place)?;
            kl::evaluate(
                &self.base.lm()?,
                &lm,
                &self.validation,
                eval.batch_size,
                eval.seq_len,
                with.watch,
            )
        })?;
        Ok(StageResult {
            name: name.to_owned(),
            folder: student.folder.clone(),
            kl: Some(kl),
            metrics,
        })
    }

    /// Reads what a file keeps, or makes and keeps it.
    fn once<T: Serialize + DeserializeOwned>(
        &self,
        path: &Path,
        make: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        if path.exists() {
            let text = std::fs::read_to_string(path).map_err(Error::io("cannot read", path))?;
            return serde_json::from_str(&text).map_err(|e| Error::file(path, e));
        }
        let made = make()?;
        let text = serde_json::to_string_pretty(&made).expect("results serialise");
        checkpoint::write_atomic(path, text.as_bytes())?;
        Ok(made)
    }
}

fn read_metrics(path: &Path) -> Result<Vec<StepMetrics>> {
    let text = std::fs::read_to_string(path).map_err(Error::io("cannot read", path))?;
    text.lines()
        .map(|line| serde_json::from_str(line).map_err(|e| Error::file(path, e)))
        .collect()
}
