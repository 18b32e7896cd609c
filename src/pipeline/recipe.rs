//! A recipe: the whole way from a teacher to a trained hybrid, as a TOML file. Every table holds the
//! settings of one stage, under the names that the command line has for them; unknown keys are refused.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::convert::{CalibrationConfig, InitName, PlanOptions, Selector, plan};
use crate::data::Packing;
use crate::model::ModelConfig;
use crate::train::TrainConfig;
use crate::train::stage::dpo::DpoConfig;
use crate::train::stage::ild::IldConfig;
use crate::train::stage::kd::KdConfig;
use crate::{Error, Result};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// What it makes, and where it is from.
    #[serde(default)]
    pub about: String,
    /// Folder of a Llama checkpoint, or `embedded`.
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

/// A text: a file of JSON lines, or `stories:SEED:COUNT`, which the program writes itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Text {
    File(PathBuf),
    Stories { seed: u64, count: usize },
}

impl FromStr for Text {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        let Some(rest) = text.strip_prefix("stories:") else {
            return Ok(Text::File(text.into()));
        };
        let parts = rest.split_once(':');
        let parsed =
            parts.and_then(|(seed, count)| Some((seed.parse().ok()?, count.parse().ok()?)));
        match parsed {
            Some((seed, count)) => Ok(Text::Stories { seed, count }),
            None => Err(Error::invalid(format!(
                "data {text:?}: give stories:SEED:COUNT"
            ))),
        }
    }
}

impl TryFrom<String> for Text {
    type Error = Error;
    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Text::File(path) => write!(f, "{}", path.display()),
            Text::Stories { seed, count } => write!(f, "stories:{seed}:{count}"),
        }
    }
}

impl From<Text> for String {
    fn from(text: Text) -> String {
        text.to_string()
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    pub train: Text,
    /// Held out: scores and results are measured on it.
    pub validation: Text,
    #[serde(default)]
    pub preferences: Option<Text>,
    #[serde(default)]
    pub packing: Packing,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IldTarget {
    /// All layers as MLA and all as Mamba2; the hybrid is composed of theirs.
    #[default]
    Bank,
    /// The hybrid, whose places are settled.
    Hybrid,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct IldStage {
    pub target: IldTarget,
    pub objective: IldConfig,
    pub train: TrainConfig,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SelectStage {
    #[serde(default)]
    pub method: Selector,
    /// Layers to become MLA.
    pub count: usize,
    /// Tokens of the validation text to score on.
    #[serde(default = "sixteen_thousand")]
    pub tokens: usize,
}

fn sixteen_thousand() -> usize {
    16_384
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct KdStage {
    /// Another teacher than the base, with the same vocabulary.
    pub teacher: Option<PathBuf>,
    /// Converts more layers before it trains: layers that the student has already stay as they are.
    pub plan: Option<PlanOptions>,
    pub objective: KdConfig,
    pub train: TrainConfig,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct DpoStage {
    pub objective: DpoConfig,
    pub train: TrainConfig,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvalStage {
    pub batch_size: usize,
    pub seq_len: usize,
}

impl Default for EvalStage {
    fn default() -> Self {
        Self {
            batch_size: 16,
            seq_len: 256,
        }
    }
}

impl Recipe {
    /// Reads a recipe; its relative paths start at its own folder.
    ///
    /// # Errors
    /// Names the file, and the line and key that cannot be used.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io("cannot read", path))?;
        let mut recipe = Self::parse(&text).map_err(|e| Error::file(path, e))?;
        let folder = path.parent().unwrap_or(Path::new(""));
        let settle = |path: &mut PathBuf| *path = folder.join(&*path);
        if let Teacher::Folder(path) = &mut recipe.teacher {
            settle(path);
        }
        let data = &mut recipe.data;
        for text in [
            Some(&mut data.train),
            Some(&mut data.validation),
            data.preferences.as_mut(),
        ] {
            if let Some(Text::File(path)) = text {
                settle(path);
            }
        }
        recipe
            .kd
            .iter_mut()
            .filter_map(|kd| kd.teacher.as_mut())
            .for_each(settle);
        Ok(recipe)
    }

    /// # Errors
    /// Names the line and key that cannot be used.
    pub fn parse(text: &str) -> Result<Self> {
        toml::from_str(text).map_err(Error::invalid)
    }

    /// What each KD stage makes of the layers: the student's configs, the first before any KD, one for each
    /// stage after it. Placements that `select` will choose are taken to be uniform.
    ///
    /// # Errors
    /// Names the stage and the setting that cannot work with this teacher.
    pub fn check(&self, teacher: &ModelConfig) -> Result<Vec<ModelConfig>> {
        let at = |stage: &str| {
            let stage = stage.to_owned();
            move |e: Error| Error::invalid(format!("[{stage}] {e}"))
        };
        let layers = teacher.layers.len();
        let bank = self
            .ild
            .as_ref()
            .is_some_and(|ild| ild.target == IldTarget::Bank);
        if let Some(ild) = &self.ild {
            ild.train.validate().map_err(at("ild.train"))?;
        }
        let mut options = self.plan.clone();
        if let Some(select) = &self.select {
            if !bank {
                return Err(at("select")(Error::invalid(
                    "places are chosen from an ILD bank: [ild] target must be bank",
                )));
            }
            if !(self.plan.mla.is_empty() && self.plan.layers.is_none()) {
                return Err(at("select")(Error::invalid(
                    "[plan] names the MLA layers already: leave mla and layers out of it, or [select]",
                )));
            }
            let scores = vec![0.0; layers];
            options.mla = crate::convert::select(Selector::Uniform, &scores, select.count)
                .map_err(at("select"))?;
        }
        let mut students = vec![sized(teacher, &options).map_err(at("plan"))?];
        for (i, kd) in self.kd.iter().enumerate() {
            let stage = format!("kd {}", i + 1);
            kd.train.validate().map_err(at(&stage))?;
            kd.objective
                .validate(teacher.vocab_size)
                .map_err(at(&stage))?;
            let before = students.last().expect("starts with one");
            let student = match &kd.plan {
                Some(options) => sized(teacher, options).map_err(at(&stage))?,
                None => before.clone(),
            };
            students.push(student);
        }
        if let Some(dpo) = &self.dpo {
            dpo.train.validate().map_err(at("dpo.train"))?;
            dpo.objective.validate().map_err(at("dpo.objective"))?;
            if self.data.preferences.is_none() {
                return Err(at("dpo")(Error::invalid(
                    "preferences are missing from [data]",
                )));
            }
        }
        Ok(students)
    }
}

/// The plan with ranks that depend on weights left at their defaults.
fn sized(teacher: &ModelConfig, options: &PlanOptions) -> Result<ModelConfig> {
    let options = PlanOptions {
        sizes: options.sizes.without_open_ranks(),
        ..options.clone()
    };
    plan(teacher, &options)
}
