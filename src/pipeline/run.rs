//! Carrying out a recipe. Every stage's result stands in a folder (or file) named by the stage and by a
//! hash of everything that decides it: its settings and the results that it starts from. What is there is
//! not made again, so a run that was killed goes on where it was, and a changed setting repeats only what
//! depends on it.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::json;

use super::base::{Base, open_bank};
use super::embedded;
use super::recipe::{DpoStage, IldStage, IldTarget, KdStage, Recipe, SelectStage, Teacher, Text};
use crate::checkpoint::{self, Checkpoint, Format};
use crate::convert::{
    Calibration, Composed, Init, InitName, PlanOptions, compose_from_bank, grow, select,
};
use crate::data::{Batches, Corpus, Packing, Preferences, stories};
use crate::eval::kl::{self, KlReport};
use crate::eval::sensitivity::{Sensitivity, sensitivity};
use crate::hash::Hash;
use crate::train::stage::dpo::Dpo;
use crate::train::{RunOptions, Stage, StepMetrics, TrainConfig, train};
use crate::{Error, Result};

/// Where a run shows how far it is.
pub trait Progress {
    /// A stage begins (or is found done, with nothing to do).
    fn start(&mut self, stage: &str);
    fn at(&mut self, done: u64, all: u64, note: &str);
    fn end(&mut self);
}

/// What the surroundings of a run decide; none of it changes the result.
pub struct Surroundings<'a> {
    pub out: &'a Path,
    pub device: Device,
    /// Asked often: true saves and stops.
    pub stop: &'a dyn Fn() -> bool,
    pub progress: &'a mut dyn Progress,
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
    pub kv_ratio: f64,
    pub scores: Option<Sensitivity>,
}

/// Carries out what is not done yet.
///
/// # Errors
/// A recipe that does not fit its teacher or data (before anything is made), or [`Error::Interrupted`]
/// (what was done is kept).
pub fn run(recipe: &Recipe, mut surroundings: Surroundings) -> Result<Outcome> {
    let run = Run::open(recipe, &mut surroundings)?;
    run.all(&mut surroundings)
}

/// The teacher's folder; the embedded one is written into `out`.
pub fn teacher_folder(teacher: &Teacher, out: &Path) -> Result<PathBuf> {
    match teacher {
        Teacher::Folder(folder) => Ok(folder.clone()),
        Teacher::Embedded => {
            let folder = out.join("teacher");
            if !folder.exists() {
                embedded::write_teacher(&folder)?;
            }
            Ok(folder)
        }
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
    preferences: Option<PathBuf>,
}

/// A checkpoint on the way, and what decided it.
struct Student {
    folder: PathBuf,
    key: String,
}

impl<'a> Run<'a> {
    fn open(recipe: &'a Recipe, with: &mut Surroundings) -> Result<Self> {
        std::fs::create_dir_all(with.out).map_err(Error::io("cannot create", with.out))?;
        let folder = teacher_folder(&recipe.teacher, with.out)?;
        let base = Base::open(&folder, with.device.clone())?;
        recipe.check(base.config())?;
        let file = |text: &Text, preferences: bool| -> Result<PathBuf> {
            match text {
                Text::File(path) => Ok(path.clone()),
                Text::Stories { seed, count } => {
                    let kind = if preferences {
                        "preferences"
                    } else {
                        "stories"
                    };
                    let path = with.out.join(format!("{kind}-{seed}-{count}.jsonl"));
                    let lines = match preferences {
                        true => stories::preferences_to_jsonl(*seed, *count),
                        false => stories::to_jsonl(*seed, *count),
                    };
                    checkpoint::write_atomic(&path, lines.as_bytes())?;
                    Ok(path)
                }
            }
        };
        let data = &recipe.data;
        let load = |text: &Text, packing: Packing| -> Result<Corpus> {
            Corpus::load(&file(text, false)?, &base.tokenizer, packing)
        };
        let (train, validation) = (
            load(&data.train, data.packing)?,
            load(&data.validation, Packing::Documents)?,
        );
        let trained = recipe.ild.iter().map(|s| &s.train);
        for config in trained.chain(recipe.kd.iter().map(|s| &s.train)) {
            train.check(config.batch_size, config.seq_len)?;
            config.steps(train.windows(config.seq_len))?;
        }
        validation.check(1, recipe.eval.seq_len)?;
        let preferences = match (&recipe.dpo, &data.preferences) {
            (Some(_), Some(text)) => Some(file(text, true)?),
            _ => None,
        };
        Ok(Self {
            hash: base.hash()?,
            recipe,
            base,
            train,
            validation,
            preferences,
        })
    }

    fn all(&self, with: &mut Surroundings) -> Result<Outcome> {
        let recipe = self.recipe;
        let calibration = self.calibrate(with)?;
        let calibration = calibration.as_ref();
        let mut stages = Vec::new();
        let mut scores = None;
        let bank = match &recipe.ild {
            Some(ild) if ild.target == IldTarget::Bank => {
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
        if let (Some(stage), Some(bank)) = (&recipe.select, &bank) {
            let (placement, found) = self.select(stage, bank, with)?;
            options.mla = placement;
            scores = Some(found);
        }
        let mut student = self.compose(&options, bank.as_ref(), None, calibration, with)?;
        stages.push(self.result("compose", &student, Vec::new(), with)?);
        if let (Some(ild), None) = (&recipe.ild, &bank) {
            let key = self.key("ild", json!({ "ild": ild, "student": student.key }));
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
            kv_ratio: last.kv_ratio(self.base.config()),
            student: student.folder,
            stages,
            scores,
        })
    }

    /// The hash of everything that decides a result; teacher and training text are always part of it.
    fn key(&self, stage: &str, settings: serde_json::Value) -> String {
        let all = json!({
            "stage": stage,
            "version": env!("CARGO_PKG_VERSION"),
            "base": self.hash,
            "data": self.train.hash(),
            "settings": settings,
        });
        Hash::of(all.to_string().as_bytes()).to_string()
    }

    fn seeded(&self, train: &TrainConfig) -> TrainConfig {
        TrainConfig {
            seed: train.seed + self.recipe.seed,
            ..train.clone()
        }
    }

    fn calibrate(&self, with: &mut Surroundings) -> Result<Option<Calibration>> {
        let ranks = |plan: &PlanOptions| plan.needs_weights();
        let needed = self.recipe.init == InitName::Refined
            || ranks(&self.recipe.plan)
            || self
                .recipe
                .kd
                .iter()
                .filter_map(|kd| kd.plan.as_ref())
                .any(ranks);
        if !needed {
            return Ok(None);
        }
        with.progress.start("calibrate");
        let progress = &mut *with.progress;
        let found = self.base.calibrate(
            &self.train,
            &self.recipe.calibration,
            with.out,
            with.stop,
            &mut |done, all| progress.at(done as u64, all as u64, "windows"),
        );
        with.progress.end();
        found.map(Some)
    }

    fn init<'c>(&self, calibration: Option<&'c Calibration>, own_inputs: bool) -> Init<'c> {
        match (self.recipe.init, calibration) {
            (InitName::Refined, Some(calibration)) => Init::Refined {
                calibration,
                own_inputs,
            },
            _ => Init::Reference {
                seed: self.recipe.seed,
            },
        }
    }

    /// What decides an initialisation.
    fn birth(&self) -> serde_json::Value {
        json!({
            "init": self.recipe.init,
            "calibration": self.recipe.calibration,
            "seed": self.recipe.seed,
        })
    }

    fn bank(
        &self,
        ild: &IldStage,
        calibration: Option<&Calibration>,
        with: &mut Surroundings,
    ) -> Result<(Student, Vec<StepMetrics>)> {
        let plan = &self.recipe.plan;
        let key = self.key(
            "bank",
            json!({ "ild": ild, "plan": plan, "birth": self.birth() }),
        );
        self.train("bank", key, &ild.train, &self.train, with, || {
            let init = self.init(calibration, false);
            self.base.bank(plan, &init, ild.objective)
        })
    }

    fn select(
        &self,
        stage: &SelectStage,
        bank: &Student,
        with: &mut Surroundings,
    ) -> Result<(Vec<usize>, Sensitivity)> {
        let sample = json!([bank.key, stage.tokens, self.validation.hash()]);
        let path = with
            .out
            .join(format!("scores-{}.json", self.key("scores", sample)));
        let seq_len = self.recipe.eval.seq_len;
        let scores: Sensitivity = self.once(&path, "select", with, |run, with| {
            let open = |name: &str| {
                Checkpoint::open(&bank.folder.join(name))?.model(&with.device, DType::F32)
            };
            let windows = (stage.tokens / seq_len).max(1);
            let all = windows.min(run.validation.windows(seq_len)) as u64;
            let progress = &mut *with.progress;
            sensitivity(
                &run.base.lm()?,
                &open("mamba2")?,
                &open("mla")?,
                &run.validation,
                windows,
                seq_len,
                &mut |done| progress.at(done as u64, all, "windows"),
            )
        })?;
        let values: Vec<f64> = scores.layers.iter().map(|s| s.score).collect();
        Ok((select(stage.method, &values, stage.count)?, scores))
    }

    /// A hybrid from the teacher, from a bank, or by converting more layers of `before`.
    fn compose(
        &self,
        options: &PlanOptions,
        bank: Option<&Student>,
        before: Option<&Student>,
        calibration: Option<&Calibration>,
        with: &mut Surroundings,
    ) -> Result<Student> {
        let settings = json!({
            "plan": options,
            "birth": self.birth(),
            "bank": bank.map(|b| &b.key),
            "before": before.map(|b| &b.key),
        });
        let key = self.key("compose", settings);
        let folder = with.out.join(format!("hybrid-{key}"));
        if !folder.exists() {
            with.progress.start("compose");
            let student = self.base.plan(options, calibration)?;
            let composed: Composed = match (bank, before) {
                (Some(bank), _) => {
                    compose_from_bank(&self.base.weights, &student, &open_bank(&bank.folder)?)?
                }
                // What has been trained since is not what layers could be fitted to: they get the teacher's inputs.
                (None, before) => {
                    let own_inputs = before.is_none();
                    let mut composed = self
                        .base
                        .compose(&student, &self.init(calibration, own_inputs))?;
                    if let Some(before) = before {
                        let before = Checkpoint::open(&before.folder)?;
                        let weights = before.weights(DType::F32, &Device::Cpu)?;
                        grow(&mut composed, &before.config, &weights)?;
                    }
                    composed
                }
            };
            checkpoint::save(
                &folder,
                Format::Zebroid,
                &composed.config,
                &composed.tensors,
                Some(self.base.folder()),
                false,
            )?;
            with.progress.end();
        }
        Ok(Student { folder, key })
    }

    fn kd(
        &self,
        name: &str,
        kd: &KdStage,
        student: &Student,
        settled: &[usize],
        with: &mut Surroundings,
    ) -> Result<(Student, Vec<StepMetrics>)> {
        let other = match &kd.teacher {
            Some(folder) => Some(Base::open(folder, with.device.clone())?),
            None => None,
        };
        let teacher = other.as_ref().unwrap_or(&self.base);
        let settings = json!({ "kd": kd, "student": student.key, "teacher": teacher.hash()? });
        let key = self.key("kd", settings);
        self.train(name, key, &kd.train, &self.train, with, || {
            let student = Checkpoint::open(&student.folder)?;
            teacher.kd(&student, settled, kd.objective)
        })
    }

    fn dpo(
        &self,
        dpo: &DpoStage,
        pairs: &Path,
        student: &Student,
        with: &mut Surroundings,
    ) -> Result<(Student, Vec<StepMetrics>)> {
        let pairs = Preferences::load(pairs, &self.base.tokenizer, dpo.objective.max_length)?;
        let settings = json!({ "dpo": dpo, "student": student.key, "pairs": pairs.hash() });
        let key = self.key("dpo", settings);
        let stored = with.out.join(format!("reference-{key}.safetensors"));
        let device = with.device.clone();
        self.train("dpo", key, &dpo.train, &pairs, with, || {
            let student = Checkpoint::open(&student.folder)?;
            let weights = student.weights(DType::F32, &device)?;
            let config = dpo.objective;
            let dpo = Dpo::new(
                &student.config,
                &weights,
                &pairs,
                config,
                &stored,
                &mut |_, _| {},
            );
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
        with: &mut Surroundings,
        stage: impl FnOnce() -> Result<Stage>,
    ) -> Result<(Student, Vec<StepMetrics>)> {
        let config = self.seeded(config);
        let folder = with.out.join(format!("{}-{key}", name.replace(' ', "")));
        let metrics = match folder.exists() {
            true => read_metrics(&folder.join("metrics.jsonl"))?,
            false => {
                with.progress.start(name);
                let progress = &mut *with.progress;
                let metrics = train(
                    &mut stage()?,
                    data,
                    &config,
                    RunOptions {
                        out: folder.clone(),
                        tokenizer: self.base.folder().to_owned(),
                        force: false,
                        save_every: 100,
                        validation: None,
                        stop: with.stop,
                        observe: &mut |m, steps| {
                            let note = format!("loss {:.4} {:.0} tokens/s", m.loss, m.tokens_per_s);
                            progress.at(m.step, steps, &note);
                        },
                    },
                );
                with.progress.end();
                metrics?
            }
        };
        Ok((Student { folder, key }, metrics))
    }

    fn result(
        &self,
        name: &str,
        student: &Student,
        metrics: Vec<StepMetrics>,
        with: &mut Surroundings,
    ) -> Result<StageResult> {
        let settings = json!([student.key, self.recipe.eval, self.validation.hash()]);
        let path = with
            .out
            .join(format!("eval-{}.json", self.key("eval", settings)));
        let eval = &self.recipe.eval;
        let kl = self.once(&path, "eval", with, |run, with| {
            let lm = Checkpoint::open(&student.folder)?.model(&with.device, DType::F32)?;
            let progress = &mut *with.progress;
            kl::evaluate(
                &run.base.lm()?,
                &lm,
                &run.validation,
                eval.batch_size,
                eval.seq_len,
                &mut |done, all| progress.at(done as u64, all as u64, "windows"),
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
        name: &str,
        with: &mut Surroundings,
        make: impl FnOnce(&Self, &mut Surroundings) -> Result<T>,
    ) -> Result<T> {
        if path.exists() {
            let text = std::fs::read_to_string(path).map_err(Error::io("cannot read", path))?;
            return serde_json::from_str(&text).map_err(|e| Error::file(path, e));
        }
        with.progress.start(name);
        let made = make(self, with);
        with.progress.end();
        let made = made?;
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
