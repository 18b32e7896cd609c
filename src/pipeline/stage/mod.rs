//! The stages of a recipe, a file each. A stage is a table of the recipe: what it says, whether it can work, what decides
//! its result, and how that is made. A command makes the same result from the same table, out of its flags.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::base::Base;
use super::need::{Need, Supply};
use super::texts::Texts;
use crate::checkpoint::{Key, Store};
use crate::convert::{Calibration, CalibrationConfig, Init, InitName, PlanOptions};
use crate::data::Batches;
use crate::eval::kl::KlReport;
use crate::mixer::LayerKind;
use crate::model::ModelConfig;
use crate::numerics;
use crate::train::StepMetrics;
use crate::watch::Watch;
use crate::weights::Place;
use crate::{Error, Result};

pub mod calibrate;
mod candidates;
pub mod compose;
pub mod dpo;
pub mod eval;
pub mod ild;
pub mod kd;
pub mod select;
pub mod training;

pub use candidates::{CANDIDATES, Pair};

use select::{Damages, Places};

/// A table of a recipe that is carried out.
pub trait Stage {
    /// What it will do, in a few words.
    fn about(&self) -> String;

    /// What can be said from configs alone. Leaves in `sizes` what the next stage starts from; of what is chosen by
    /// measurements, one possible outcome.
    ///
    /// # Errors
    /// Names the setting that cannot work.
    fn check(&self, sizes: &mut Sizes) -> Result<()>;

    /// What it will take, from sizes that [`Stage::check`] has seen.
    ///
    /// # Errors
    /// Another teacher's config that cannot be read.
    fn need(&self, sizes: &Sizes, with: &Supply) -> Result<Need>;

    /// Whether the texts are long enough.
    ///
    /// # Errors
    /// Says what is missing.
    fn fill(&self, texts: &Texts) -> Result<()>;

    /// Everything that decides the result.
    ///
    /// # Errors
    /// An input that cannot be read.
    fn key(&self, with: &Context, made: &Made) -> Result<Key>;

    /// Finds the result that the key names, or makes it.
    ///
    /// # Errors
    /// What went wrong, or [`Error::Interrupted`].
    fn carry_out(&self, name: &str, with: &Context, made: &mut Made) -> Result<()>;
}

/// What a recipe says for all of its stages.
#[derive(Debug, Clone)]
pub struct Common {
    /// Of what the initialisation draws; added to the seeds of all stages.
    pub seed: u64,
    pub init: InitName,
    pub calibration: CalibrationConfig,
    pub plan: PlanOptions,
    pub eval: eval::EvalStage,
}

/// What is known of the models before anything is made.
pub struct Sizes<'a> {
    pub common: &'a Common,
    pub teacher: &'a ModelConfig,
    /// Candidates that have been trained.
    pub bank: Option<Vec<LayerKind>>,
    /// The plan as it was asked or chosen.
    pub plan: PlanOptions,
    /// The hybrid as it is composed, and after each conversion of more layers.
    pub students: Vec<ModelConfig>,
    /// Whether the data have preference pairs.
    pub preferences: bool,
    /// Whether other teachers are looked at, which may lie elsewhere when a recipe is only read.
    pub open_teachers: bool,
}

impl<'a> Sizes<'a> {
    pub fn new(common: &'a Common, teacher: &'a ModelConfig) -> Self {
        Self {
            plan: common.plan.clone(),
            bank: None,
            students: Vec::new(),
            preferences: false,
            open_teachers: false,
            common,
            teacher,
        }
    }

    /// The hybrid that the next stage gets.
    ///
    /// # Errors
    /// When none is composed.
    pub fn student(&self) -> Result<&ModelConfig> {
        let missing = || Error::invalid("no hybrid has been composed");
        self.students.last().ok_or_else(missing)
    }
}

/// What stages are carried out with.
pub struct Context<'a> {
    pub common: &'a Common,
    pub base: &'a Base,
    pub texts: &'a Texts,
    pub surroundings: &'a Surroundings<'a>,
    pub store: Store,
}

/// What the surroundings of a run decide; none of it changes the result.
pub struct Surroundings<'a> {
    pub out: &'a Path,
    pub place: Place,
    /// Optimizer steps between saves.
    pub save_every: u64,
    /// Where tokens of large texts are kept.
    pub cache: &'a Path,
    pub watch: &'a dyn Watch,
}

impl Context<'_> {
    /// Teacher and training text are part of every key.
    ///
    /// # Errors
    /// A teacher that cannot be read.
    pub fn key(&self, stage: numerics::Stage, settings: Value) -> Result<Key> {
        let inputs = json!({
            "base": self.base.hash()?,
            "data": self.texts.train.hash(),
            "settings": settings,
        });
        Ok(Key::new(stage, &self.base.place.device, inputs))
    }

    /// What decides how mixers are born.
    pub fn birth(&self) -> Value {
        let device = &self.base.place.device;
        json!({
            "init": self.common.init,
            "calibration": self.common.calibration,
            "seed": self.common.seed,
            "numerics": [
                numerics::version(numerics::Stage::Calibration, device),
                numerics::version(numerics::Stage::Init, device),
            ],
        })
    }
}

/// A checkpoint or bank on the way, and what decided it.
#[derive(Debug, Clone)]
pub struct Student {
    pub folder: PathBuf,
    pub key: String,
}

/// What has been made so far.
#[derive(Default)]
pub struct Made {
    pub calibration: Option<Calibration>,
    pub bank: Option<Student>,
    /// The plan that was chosen, where one is.
    pub plan: Option<PlanOptions>,
    pub student: Option<Student>,
    /// Layers that an earlier KD has trained.
    pub settled: Vec<usize>,
    pub results: Vec<StageResult>,
    pub scores: Option<Places>,
    pub damages: Option<Damages>,
}

impl Made {
    /// The hybrid that the next stage gets.
    ///
    /// # Errors
    /// When none is composed.
    pub fn student(&self) -> Result<&Student> {
        let missing = || Error::invalid("no hybrid has been composed");
        self.student.as_ref().ok_or_else(missing)
    }

    /// How mixers are born; `own_inputs` as in [`Init::Refined`].
    pub fn init(&self, common: &Common, own_inputs: bool) -> Init<'_> {
        match (common.init, &self.calibration) {
            (InitName::Refined, Some(calibration)) => Init::Refined {
                calibration,
                own_inputs,
            },
            _ => Init::Published { seed: common.seed },
        }
    }
}

/// A result of a run, and the figures of what was trained.
#[derive(Debug, Clone, serde::Serialize)]
pub struct StageResult {
    /// `compose`, `ild`, `kd 1`, ..
    pub name: String,
    pub folder: PathBuf,
    /// Held-out, against the base; a bank has none.
    pub kl: Option<KlReport>,
    #[serde(skip)]
    pub metrics: Vec<StepMetrics>,
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
