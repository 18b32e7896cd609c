//! A recipe: the whole way from a teacher to a trained hybrid, as a TOML file. Every table holds the
//! settings of one stage, under the names that the command line has for them; unknown keys are refused.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::bank::{CANDIDATES, Pair, bank_plans};
use super::budget::{self, BUDGET_CANDIDATES, Budget};
use crate::convert::{
    CalibrationConfig, InitName, PlanOptions, Selector, bank_layers, check_growth, check_ranks,
    plan, select,
};
use crate::data::Packing;
use crate::mixer::LayerKind;
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
    /// Every candidate in all layers; the hybrid is composed of theirs.
    #[default]
    Bank,
    /// The hybrid, whose places are settled.
    Hybrid,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct IldStage {
    pub target: IldTarget,
    /// Of the bank, as `layers` of a plan spells them.
    pub candidates: Vec<LayerKind>,
    pub objective: IldConfig,
    pub train: TrainConfig,
}

impl Default for IldStage {
    fn default() -> Self {
        Self {
            target: IldTarget::default(),
            candidates: CANDIDATES.to_vec(),
            objective: IldConfig::default(),
            train: TrainConfig::default(),
        }
    }
}

/// How mixers are chosen. The same on the command line and in a recipe's `[select]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Zebra-Llama's: ends kept, near-uniform gaps, the largest total score.
    #[default]
    Smart,
    /// Evenly spaced, whatever the scores.
    Uniform,
    /// The largest scores, wherever they stand.
    Greedy,
    /// Candidate of every layer: least KL within the bytes given. Each layer alone is replaced in the
    /// teacher, and damages are taken to add up.
    Budget,
}

impl Method {
    /// How places are chosen from a bank's scores; a budget needs no bank.
    pub fn selector(self) -> Option<Selector> {
        match self {
            Method::Smart => Some(Selector::Smart),
            Method::Uniform => Some(Selector::Uniform),
            Method::Greedy => Some(Selector::Greedy),
            Method::Budget => None,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SelectStage {
    pub method: Method,
    /// Layers whose place is chosen (all methods but budget).
    pub count: Option<usize>,
    /// What is placed, over what (all methods but budget).
    #[serde(flatten)]
    pub pair: Pair,
    /// Most bytes of KV cache a token, bf16 (budget).
    pub kv_bytes: Option<usize>,
    /// Most bytes of recurrent state a sequence, f32 (budget).
    pub state_bytes: Option<usize>,
    /// Kinds of layer to choose from, where there is no bank [default: mamba2, mla:8, mla:16, mla:32] (budget).
    pub candidates: Option<Vec<LayerKind>>,
    /// Tokens of a sequence that costs are for [default: the teacher's context] (budget).
    pub length: Option<usize>,
    /// Tokens of the validation text to score on.
    pub tokens: usize,
}

impl Default for SelectStage {
    fn default() -> Self {
        Self {
            method: Method::Smart,
            count: None,
            pair: Pair::default(),
            kv_bytes: None,
            state_bytes: None,
            candidates: None,
            length: None,
            tokens: 16_384,
        }
    }
}

impl SelectStage {
    pub fn budget(&self) -> Budget {
        Budget {
            kv_bytes: self.kv_bytes,
            state_bytes: self.state_bytes,
        }
    }

    /// A plan as this stage could choose it; what is measured decides among such.
    fn likely(
        &self,
        teacher: &ModelConfig,
        options: &PlanOptions,
        bank: Option<&[LayerKind]>,
    ) -> Result<PlanOptions> {
        if !(options.mla.is_empty() && options.layers.is_none()) {
            return Err(Error::invalid(
                "[plan] names the MLA layers already: leave mla and layers out of it, or [select]",
            ));
        }
        let layers = teacher.layers.len();
        if self.method == Method::Budget {
            if self.count.is_some() || self.pair != Pair::default() || !options.attention.is_empty()
            {
                return Err(Error::invalid(
                    "a budget decides every layer: leave out count, place and elsewhere, and attention in [plan]",
                ));
            }
            if bank.is_some() && self.candidates.is_some() {
                return Err(Error::invalid(
                    "a budget chooses among the bank's candidates where there is one: name them in [ild]",
                ));
            }
            let kinds = bank.unwrap_or(self.born());
            let length = self.length(teacher);
            let kinds = budget::fitting(teacher, options, kinds, length, self.budget())?;
            return Ok(options.with_layers(kinds));
        }
        let Some(kinds) = bank else {
            return Err(Error::invalid(
                "places are chosen from an ILD bank: [ild] target must be bank",
            ));
        };
        if self.budget() != Budget::default() || self.candidates.is_some() || self.length.is_some()
        {
            return Err(Error::invalid(
                "kv_bytes, state_bytes, candidates and length are for method = \"budget\"",
            ));
        }
        if let Some(layer) = options.attention.first() {
            return Err(Error::invalid(format!(
                "layer {layer} keeps its attention in [plan], and a bank's candidates take all places: leave attention out of it"
            )));
        }
        let [place, elsewhere] = self.pair.of(kinds)?;
        let chosen = select(Selector::Uniform, &vec![0.0; layers], self.count()?)?;
        let kind = |i: usize| match chosen.contains(&i) {
            true => kinds[place],
            false => kinds[elsewhere],
        };
        Ok(options.with_layers((0..layers).map(kind).collect()))
    }

    /// What a budget chooses from where there is no bank.
    pub fn born(&self) -> &[LayerKind] {
        self.candidates.as_deref().unwrap_or(&BUDGET_CANDIDATES)
    }

    /// Tokens of a sequence that costs are for.
    pub fn length(&self, teacher: &ModelConfig) -> usize {
        self.length.unwrap_or(teacher.max_position_embeddings)
    }

    /// # Errors
    /// When it is missing.
    pub fn count(&self) -> Result<usize> {
        let missing = || Error::invalid("count is missing: how many layers become MLA");
        self.count.ok_or_else(missing)
    }
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

impl EvalStage {
    /// # Errors
    /// Names the field that cannot work.
    fn validate(&self) -> Result<()> {
        // The rules of a batch are the same as in training.
        let batch = TrainConfig {
            batch_size: self.batch_size,
            seq_len: self.seq_len,
            ..TrainConfig::default()
        };
        batch.validate()
    }
}

/// # Errors
/// Windows of more tokens than the model has positions for.
pub(super) fn check_context(model: &ModelConfig, seq_len: usize) -> Result<()> {
    let context = model.max_position_embeddings;
    match seq_len > context {
        true => Err(Error::invalid(format!(
            "seq_len {seq_len} is above the teacher's context of {context}"
        ))),
        false => Ok(()),
    }
}

/// What of a recipe an error is about.
pub(super) fn at(stage: &str) -> impl Fn(Error) -> Error + use<> {
    let stage = stage.to_owned();
    move |e| Error::invalid(format!("[{stage}] {e}"))
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

    /// Whether anything is fitted to the teacher's activations.
    pub fn needs_calibration(&self) -> bool {
        let mut plans = std::iter::once(&self.plan).chain(self.kd.iter().flat_map(|kd| &kd.plan));
        self.init == InitName::Refined || plans.any(PlanOptions::needs_weights)
    }

    /// The candidates for every layer that ILD trains, if it does.
    pub fn bank(&self) -> Option<&[LayerKind]> {
        let ild = self.ild.as_ref();
        let bank = ild.filter(|ild| ild.target == IldTarget::Bank);
        bank.map(|ild| ild.candidates.as_slice())
    }

    /// What can be said of the recipe from the teacher's config alone. Gives what each KD stage makes of the layers: the
    /// student's configs, the first before any KD, one for each stage after it. Of what `select` will choose, one
    /// possible outcome is taken: a uniform placement, or anything within the budget.
    ///
    /// # Errors
    /// Names the stage and the setting that cannot work with this teacher.
    pub fn check(&self, teacher: &ModelConfig) -> Result<Vec<ModelConfig>> {
        let window = |seq_len: usize| check_context(teacher, seq_len);
        self.eval.validate().map_err(at("eval"))?;
        window(self.eval.seq_len).map_err(at("eval"))?;
        if self.needs_calibration() {
            window(self.calibration.seq_len).map_err(at("calibration"))?;
        }
        let bank = self.bank();
        if let Some(ild) = &self.ild {
            ild.train.validate().map_err(at("ild.train"))?;
            window(ild.train.seq_len).map_err(at("ild.train"))?;
        }
        let options = match &self.select {
            Some(select) => select
                .likely(teacher, &self.plan, bank)
                .map_err(at("select"))?,
            None => self.plan.clone(),
        };
        let first = sized(teacher, &options).map_err(at("plan"))?;
        if let Some(kinds) = bank {
            check_bank(teacher, &first, &self.plan, kinds).map_err(at("ild"))?;
        }
        let mut students = vec![first];
        for (i, kd) in self.kd.iter().enumerate() {
            let at = at(&format!("kd {}", i + 1));
            kd.train.validate().map_err(&at)?;
            kd.objective.validate(teacher.vocab_size).map_err(&at)?;
            window(kd.train.seq_len).map_err(&at)?;
            let before = students.last().expect("starts with one");
            let student = match &kd.plan {
                Some(options) => {
                    let student = sized(teacher, options).map_err(&at)?;
                    check_growth(&student, before).map_err(&at)?;
                    student
                }
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

/// # Errors
/// Candidates that cannot be trained, or a hybrid that cannot be composed of their layers.
fn check_bank(
    teacher: &ModelConfig,
    student: &ModelConfig,
    options: &PlanOptions,
    kinds: &[LayerKind],
) -> Result<()> {
    let plans = bank_plans(options, kinds, teacher.layers.len())?;
    let sized = plans.iter().map(|(_, options)| sized(teacher, options));
    let models = sized.collect::<Result<Vec<_>>>()?;
    bank_layers(student, &models.iter().collect::<Vec<_>>()).map(|_| ())
}

/// The plan with ranks that depend on weights left at their defaults.
fn sized(teacher: &ModelConfig, options: &PlanOptions) -> Result<ModelConfig> {
    check_ranks(teacher, options)?;
    let options = PlanOptions {
        sizes: options.sizes.without_open_ranks(),
        ..options.clone()
    };
    plan(teacher, &options)
}
