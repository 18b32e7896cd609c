//! `[plan]`: the hybrid, from the teacher, from a bank's layers, or by converting more layers of what there is.

use serde_json::{Value, json};

use super::candidates::bank_plans;
use super::{Common, Context, Made, Sizes, Stage, Student, eval};
use crate::Result;
use crate::checkpoint::{self, Bank, Checkpoint, Format, Input, Key, Provenance, Step};
use crate::convert::{
    CHOICE, CalibrationConfig, Init, InitName, PIECE, PlanOptions, bank_layers, check_growth,
    check_ranks, compose_from_bank, grow, plan,
};
use crate::mixer::{LayerKind, Windows};
use crate::model::{ModelConfig, Parts};
use crate::numerics;
use crate::pipeline::base::Base;
use crate::pipeline::need::{Need, Supply};
use crate::pipeline::texts::Texts;
use crate::train::cost::{Learner, Memory};
use crate::watch::Watch;
use crate::weights::Precision;

/// What a hybrid is composed of besides the teacher.
pub enum Source<'a> {
    Teacher,
    /// Whole layers.
    Bank(&'a Bank),
    /// A hybrid whose layers stay as they are.
    Before(&'a Checkpoint),
}

/// What a record says of how mixers are born.
pub struct Birth {
    settings: Value,
    inputs: Vec<Input>,
}

impl Birth {
    /// `calibration` and `text`: of a refined initialisation, the latter by its name.
    pub fn of(init: &Init, calibration: &CalibrationConfig, text: &str) -> Self {
        match init {
            Init::Published { seed } => Self {
                settings: json!({ "init": InitName::Published, "seed": seed }),
                inputs: Vec::new(),
            },
            Init::Refined {
                calibration: found, ..
            } => Self {
                settings: json!({ "init": InitName::Refined, "calibration": calibration }),
                inputs: vec![Input::new("calibration", text, Some(found.data.clone()))],
            },
        }
    }

    /// In a recipe.
    pub(super) fn new(init: &Init, common: &Common, texts: &Texts) -> Self {
        Self::of(init, &common.calibration, &texts.train_input().name)
    }
}

/// The record of a hybrid of `options`: that of what it is made of, and the making.
///
/// # Errors
/// A record or weights that cannot be read.
pub fn recorded(
    base: &Base,
    options: &PlanOptions,
    source: &Source,
    born: Birth,
) -> Result<Provenance> {
    let Birth { settings, inputs } = born;
    let composed = |mut settings: Value, inputs: Vec<Input>| {
        settings["plan"] = json!(options);
        Step::new("compose", settings, inputs)
    };
    Ok(match source {
        Source::Teacher => base.provenance()?.then(composed(settings, inputs)),
        Source::Before(before) => before.provenance()?.then(composed(settings, inputs)),
        Source::Bank(bank) => {
            let record = match bank.candidates.first() {
                Some((_, candidate)) => Provenance::read(&candidate.folder)?,
                None => None,
            };
            let record = record.map_or_else(|| base.provenance(), Ok)?;
            let bank = Input::file("bank", &bank.folder, None);
            record.then(composed(json!({}), vec![bank]))
        }
    })
}

/// The hybrid of `options`: planned, then born from the teacher's layers or taken from where they are.
///
/// # Errors
/// A plan that the teacher, the bank or the hybrid before does not allow, or [`Error::Interrupted`](crate::Error).
pub fn hybrid(
    base: &Base,
    options: &PlanOptions,
    init: &Init,
    source: &Source,
    watch: &dyn Watch,
) -> Result<Parts> {
    let student = base.plan(options, init)?;
    match source {
        Source::Teacher => base.compose(&student, init, watch),
        Source::Bank(bank) => compose_from_bank(&base.parts.weights, &student, bank),
        Source::Before(before) => {
            let grown = base.compose(&student, init, watch)?;
            grow(grown, &before.parts()?)
        }
    }
}

impl Stage for PlanOptions {
    fn about(&self) -> String {
        String::new()
    }

    fn check(&self, sizes: &mut Sizes) -> Result<()> {
        let options = match sizes.students.is_empty() {
            true => &sizes.plan,
            false => self,
        };
        let student = sized(sizes.teacher, options)?;
        match (sizes.students.last(), &sizes.bank) {
            (Some(before), _) => check_growth(&student, before)?,
            (None, Some(kinds)) => {
                check_bank(sizes.teacher, &student, &sizes.common.plan, kinds)?;
            }
            (None, None) => {}
        }
        sizes.students.push(student);
        Ok(())
    }

    /// New mixers in f32, and for one of them at a time: the attention that it comes from and decompositions in f64; where it is
    /// fitted, the text that it is chosen by and a piece of all on its way through it. The streams of all are on the disk.
    fn need(&self, sizes: &Sizes, with: &Supply) -> Result<Need> {
        let student = sizes.student()?;
        let (d, taken) = (student.hidden_size, sizes.bank.is_some());
        let before = sizes
            .students
            .len()
            .checked_sub(2)
            .map(|i| &sizes.students[i]);
        let is_new =
            |i: usize| student.is_converted(i) && before.is_none_or(|b| !b.is_converted(i));
        let made = |name: &str| {
            let layers = 0..student.layers.len();
            let mut prefixes = layers
                .filter(|i| is_new(*i))
                .map(|i| format!("model.layers.{i}.{}.", student.layers[i].prefix()));
            prefixes.any(|prefix| name.starts_with(&prefix))
        };
        let born = Learner {
            config: student,
            trained: &made,
        };
        let memory = Memory::default().with(
            "new mixers",
            if taken { 0 } else { born.bytes(Precision::F32) },
        );
        let memory = memory.with("decompositions", MATRICES * 8 * d * d);
        let calibration = &sizes.common.calibration;
        let windows = Windows {
            rows: (calibration.fit_tokens).div_ceil(calibration.seq_len.max(1)),
            len: calibration.seq_len,
        };
        let fitted = sizes.common.init == InitName::Refined && !taken;
        let (sample, scratch) = match fitted {
            true => {
                let piece = Windows {
                    rows: (PIECE / windows.len.max(1)).clamp(1, windows.rows.max(1)),
                    ..windows
                };
                let layers = (0..student.layers.len()).filter(|i| is_new(*i));
                let mixers = layers.map(|i| student.layers[i].pass(piece).kept);
                let streams = SAMPLES * windows.tokens().min(CHOICE) * d;
                let at_once = 4 * (streams + mixers.max().unwrap_or(0));
                (at_once, 2 * 4 * windows.tokens() * d)
            }
            false => (0, 0),
        };
        let stored = match before {
            Some(_) => with.student as f64 / student.parameters() as f64,
            None => with.base.width(),
        };
        let others = student.parameters() - born.entries();
        let bytes = match taken && before.is_none() {
            // A bank's layers are in f32.
            true => 4 * student.parameters(),
            false => born.bytes(Precision::F32) + (others as f64 * stored) as usize,
        };
        Ok(Need {
            phases: vec![memory.with("sample", sample)],
            student: Some(bytes),
            scratch,
            tokens: fitted.then(|| windows.tokens() as u64),
            measured: true,
            ..Need::default()
        })
    }

    fn fill(&self, _: &Texts) -> Result<()> {
        Ok(())
    }

    fn key(&self, with: &Context, made: &Made) -> Result<Key> {
        let options = options(self, made);
        let settings = json!({
            "plan": options,
            "birth": with.birth(),
            "bank": made.bank.as_ref().map(|bank| &bank.key),
            "before": made.student.as_ref().map(|student| &student.key),
        });
        with.key(numerics::Stage::Init, settings)
    }

    fn carry_out(&self, name: &str, with: &Context, made: &mut Made) -> Result<()> {
        let key = self.key(with, made)?;
        let folder = with.store.path("hybrid", &key);
        if !folder.exists() {
            let (composed, record) = {
                // What has been trained since is not what layers could be fitted to: they get the teacher's inputs.
                let init = made.init(with.common, made.student.is_none());
                let (bank, before);
                let source = match (&made.student, &made.bank) {
                    (Some(student), _) => {
                        before = Checkpoint::open(&student.folder)?;
                        Source::Before(&before)
                    }
                    (None, Some(student)) => {
                        bank = Bank::open(&student.folder)?;
                        Source::Bank(&bank)
                    }
                    (None, None) => Source::Teacher,
                };
                let (base, options) = (with.base, options(self, made));
                let composed = hybrid(base, options, &init, &source, with.surroundings.watch)?;
                let born = Birth::new(&init, with.common, with.texts);
                (composed, recorded(base, options, &source, born)?)
            };
            checkpoint::save(
                &folder,
                Format::Zebroid,
                &composed.config,
                &composed.weights,
                Some(with.base.folder()),
                &record,
                false,
            )?;
        }
        let key = key.to_string();
        eval::result(name, Student { folder, key }, Vec::new(), with, made)
    }
}

/// Squares of the model's width in f64 at once, about, while a mixer is born: moments, a decomposition's sides, products.
const MATRICES: usize = 10;
/// What a mixer is chosen by: what the teacher's reads, writes, and makes that of. Each of the model's width.
const SAMPLES: usize = 3;

/// The first hybrid is as it was chosen, later ones as they are asked for.
fn options<'a>(asked: &'a PlanOptions, made: &'a Made) -> &'a PlanOptions {
    match (&made.student, &made.plan) {
        (None, Some(chosen)) => chosen,
        _ => asked,
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
pub(super) fn sized(teacher: &ModelConfig, options: &PlanOptions) -> Result<ModelConfig> {
    check_ranks(teacher, options)?;
    let options = PlanOptions {
        sizes: options.sizes.without_open_ranks(),
        ..options.clone()
    };
    plan(teacher, &options)
}
