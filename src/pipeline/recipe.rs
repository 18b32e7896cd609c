//! A recipe: the whole way from a teacher to a trained hybrid, as a TOML file. Every table holds the
//! settings of one stage, under the names that the command line has for them; unknown keys are refused.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::stage::dpo::DpoStage;
use super::stage::eval::EvalStage;
use super::stage::ild::{IldStage, IldTarget};
use super::stage::kd::KdStage;
use super::stage::select::SelectStage;
use super::stage::{Common, Sizes, Stage, at};
use super::sweep;
use super::texts::Data;
use crate::convert::{CalibrationConfig, InitName, PlanOptions};
use crate::hub::{self, Part};
use crate::mixer::LayerKind;
use crate::model::ModelConfig;
use crate::watch::Watch;
use crate::{Error, Result};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// What it makes, and where it is from.
    #[serde(default)]
    pub about: String,
    /// Folder of a Llama checkpoint, the id of one on the hub, or `embedded`.
    pub teacher: Teacher,
    pub data: Data,
    /// Of what the initialisation draws; added to the seeds of all stages.
    #[serde(default)]
    pub seed: u64,
    #[serde(default)]
    pub init: InitName,
    #[serde(default)]
    pub calibration: CalibrationConfig,
    #[serde(default)]
    pub plan: PlanOptions,
    #[serde(default)]
    pub ild: Option<IldStage>,
    #[serde(default)]
    pub select: Option<SelectStage>,
    /// In order; each goes on from the one before.
    #[serde(default)]
    pub kd: Vec<KdStage>,
    #[serde(default)]
    pub dpo: Option<DpoStage>,
    #[serde(default)]
    pub eval: EvalStage,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum Teacher {
    /// The one that the program carries.
    Embedded,
    Folder(PathBuf),
}

impl From<String> for Teacher {
    fn from(text: String) -> Self {
        match text.as_str() {
            "embedded" => Teacher::Embedded,
            _ => Teacher::Folder(text.into()),
        }
    }
}

impl From<Teacher> for String {
    fn from(teacher: Teacher) -> String {
        match teacher {
            Teacher::Embedded => "embedded".into(),
            Teacher::Folder(path) => path.display().to_string(),
        }
    }
}

/// One recipe of a sweep.
#[derive(Debug, Clone)]
pub struct Variant {
    /// What makes it differ; empty where there is no sweep.
    pub label: String,
    pub recipe: Recipe,
}

/// A stage in its place.
pub struct Entry<'a> {
    /// `calibrate`, `ild`, `select`, `compose`, `kd 1`, ..
    pub name: String,
    /// The table that mistakes are in.
    pub table: String,
    pub stage: &'a dyn Stage,
}

impl Recipe {
    /// Puts these in the place of its teacher, and of the teachers of KD that it names.
    pub fn teach(&mut self, teacher: Option<&Path>, kd_teacher: Option<&Path>) {
        if let Some(teacher) = teacher {
            self.teacher = Teacher::Folder(teacher.to_owned());
        }
        if let Some(teacher) = kd_teacher {
            for kd in self.kd.iter_mut().filter(|kd| kd.teacher.is_some()) {
                kd.teacher = Some(teacher.to_owned());
            }
        }
    }

    /// Reads a recipe; its relative paths start at its own folder.
    ///
    /// # Errors
    /// Names the file, and the line and key that cannot be used; a recipe with a sweep.
    pub fn load(path: &Path) -> Result<Self> {
        let mut all = Self::load_all(path, &[])?;
        match (all.pop(), all.is_empty()) {
            (Some(variant), true) => Ok(variant.recipe),
            _ => Err(Error::file(path, "a sweep, where one recipe is wanted")),
        }
    }

    /// The recipe, or every variant of one with a sweep; `settings` (`KEY=VALUE`) replace what the file says.
    ///
    /// # Errors
    /// Names the file, and the key that cannot be used.
    pub fn load_all(path: &Path, settings: &[String]) -> Result<Vec<Variant>> {
        let text = std::fs::read_to_string(path).map_err(Error::io("cannot read", path))?;
        let tables = sweep::tables(&text, settings).map_err(|e| Error::file(path, e))?;
        let alone = tables.len() == 1 && tables[0].0.is_empty() && settings.is_empty();
        let folder = path.parent().unwrap_or(Path::new(""));
        let variant = |(label, table): (String, toml::Table)| {
            let recipe = match alone {
                // The text knows its lines.
                true => Self::parse(&text),
                false => table
                    .try_into()
                    .map_err(|e: toml::de::Error| match label.as_str() {
                        "" => Error::invalid(e),
                        label => Error::invalid(format!("{label}: {e}")),
                    }),
            };
            let mut recipe = recipe.map_err(|e| Error::file(path, e))?;
            recipe.settle(folder);
            Ok(Variant { label, recipe })
        };
        tables.into_iter().map(variant).collect()
    }

    /// # Errors
    /// Names the line and key that cannot be used.
    pub fn parse(text: &str) -> Result<Self> {
        toml::from_str(text).map_err(Error::invalid)
    }

    fn settle(&mut self, folder: &Path) {
        self.data.settle(folder);
        for path in self.teachers() {
            *path = hub::settled(path, folder);
        }
        for logits in self
            .kd
            .iter_mut()
            .filter_map(|kd| kd.teacher_logits.as_mut())
        {
            *logits = folder.join(&*logits);
        }
    }

    /// Its teacher, where it is named, and those of KD.
    fn teachers(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        let own = match &mut self.teacher {
            Teacher::Embedded => None,
            Teacher::Folder(path) => Some(path),
        };
        let others = self.kd.iter_mut().filter_map(|kd| kd.teacher.as_mut());
        own.into_iter().chain(others)
    }

    /// With its teachers' paths on this machine; what the hub has is downloaded.
    ///
    /// # Errors
    /// As [`hub::model`].
    pub fn fetched(&self, part: Part, watch: &dyn Watch) -> Result<Self> {
        let mut fetched = self.clone();
        for path in fetched.teachers() {
            *path = hub::model(&*path, part, watch)?;
        }
        Ok(fetched)
    }

    /// With the teachers of a recipe that differs in nothing but settings.
    pub fn taught_as(mut self, other: &Self) -> Self {
        self.teacher = other.teacher.clone();
        for (kd, other) in self.kd.iter_mut().zip(&other.kd) {
            kd.teacher = other.teacher.clone();
        }
        self
    }

    /// What holds for all stages.
    pub fn common(&self) -> Common {
        Common {
            seed: self.seed,
            init: self.init,
            calibration: self.calibration,
            plan: self.plan.clone(),
            eval: self.eval.clone(),
        }
    }

    /// What it goes through, in order.
    pub fn stages(&self) -> Vec<Entry<'_>> {
        fn entry<'a>(name: &str, table: &str, stage: &'a dyn Stage) -> Entry<'a> {
            Entry {
                name: name.to_owned(),
                table: table.to_owned(),
                stage,
            }
        }
        let mut all = Vec::new();
        if self.init == InitName::Refined {
            all.push(entry("calibrate", "calibration", &self.calibration));
        }
        let ild = |target: IldTarget| {
            let ild = self.ild.iter().filter(move |ild| ild.target == target);
            ild.map(|ild| entry("ild", "ild", ild))
        };
        all.extend(ild(IldTarget::Bank));
        all.extend(self.select.iter().map(|s| entry("select", "select", s)));
        all.push(entry("compose", "plan", &self.plan));
        all.extend(ild(IldTarget::Hybrid));
        for (i, kd) in self.kd.iter().enumerate() {
            let name = format!("kd {}", i + 1);
            let more = kd.plan.iter();
            all.extend(more.map(|plan| entry(&format!("compose for {name}"), &name, plan)));
            all.push(entry(&name, &name, kd));
        }
        all.extend(self.dpo.iter().map(|dpo| entry("dpo", "dpo", dpo)));
        all
    }

    /// The candidates for every layer that ILD trains, if it does.
    pub fn bank(&self) -> Option<&[LayerKind]> {
        let ild = self.ild.as_ref();
        let bank = ild.filter(|ild| ild.target == IldTarget::Bank);
        bank.map(|ild| ild.candidates.as_slice())
    }

    /// What can be said of the recipe from the teacher's config alone. Gives the hybrid as it is composed, and after each
    /// conversion of more layers; of what `select` will choose, one possible outcome.
    ///
    /// # Errors
    /// Names the table and the setting that cannot work with this teacher.
    pub fn check(&self, teacher: &ModelConfig) -> Result<Vec<ModelConfig>> {
        self.check_with(teacher, false)
    }

    /// The same; other teachers are opened where `open_teachers` says so.
    pub(super) fn check_with(
        &self,
        teacher: &ModelConfig,
        open_teachers: bool,
    ) -> Result<Vec<ModelConfig>> {
        let common = self.common();
        self.eval.check(teacher).map_err(at("eval"))?;
        let mut sizes = Sizes {
            preferences: self.data.preferences.is_some(),
            open_teachers,
            ..Sizes::new(&common, teacher)
        };
        for entry in self.stages() {
            entry.stage.check(&mut sizes).map_err(at(&entry.table))?;
        }
        Ok(sizes.students)
    }
}
