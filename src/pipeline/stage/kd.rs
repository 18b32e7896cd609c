//! `[[kd]]`: the hybrid learns the teacher's next-token distribution.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::training::{self, summary, trained_need};
use super::{Context, Made, Sizes, Stage, check_context, eval};
use crate::checkpoint::{Checkpoint, Input, Key};
use crate::convert::PlanOptions;
use crate::data::{Corpus, Tokenizer};
use crate::mixer::Windows;
use crate::numerics;
use crate::pipeline::base::Base;
use crate::pipeline::need::{Need, Settings, Source, Supply};
use crate::pipeline::texts::Texts;
use crate::train::cost::Learner;
use crate::train::stage::kd::{Kd, KdConfig, Trained};
use crate::train::teacher::{About, Stored, Teacher};
use crate::train::{self, Sources, TrainSettings};
use crate::weights::Place;
use crate::{Error, Result};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct KdStage {
    /// Another teacher than the base, with the same vocabulary: its folder, or its id on the hub.
    pub teacher: Option<PathBuf>,
    /// What `zebroid teach` has written of a teacher on the same training text, in its place.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher_logits: Option<PathBuf>,
    /// Converts more layers before it trains: layers that the student has already stay as they are.
    pub plan: Option<PlanOptions>,
    pub objective: KdConfig,
    pub train: TrainSettings,
}

impl KdStage {
    /// The teacher, where it is not the base.
    fn other(&self, with: &Context) -> Result<Option<Base>> {
        let open = |folder: &PathBuf| Base::open(folder, with.base.place.clone());
        self.teacher.as_ref().map(open).transpose()
    }

    /// As [`Stage::key`]; a large teacher's weights are read for it once, whoever asks again.
    fn key_with(&self, teacher: &Base, with: &Context, made: &Made) -> Result<Key> {
        let teacher = match &self.teacher_logits {
            Some(folder) => About::open(folder)?.hash().to_string(),
            None => teacher.hash()?,
        };
        let student = &made.student()?.key;
        let settings = json!({ "kd": self, "student": student, "teacher": teacher });
        with.key(numerics::Stage::Kd, settings)
    }

    /// KD of `student`, whose layers `settled` an earlier stage has trained.
    ///
    /// # Errors
    /// Models that do not fit each other.
    pub fn distil<'a>(
        &self,
        teacher: &Base,
        student: &Checkpoint,
        settled: &[usize],
        text: &'a Corpus,
    ) -> Result<train::Stage<'a>> {
        let place = teacher.place.training(self.train.weights);
        let of = Teacher::Model {
            lm: Box::new(teacher.parts.lm(&place)?),
            hash: teacher.hash()?,
        };
        self.learn(of, student, settled, text, &place)
    }

    /// The same from what is stored of a teacher, in whose tokens `text` is.
    ///
    /// # Errors
    /// Logits of other windows, or models that do not fit each other.
    pub fn distil_stored<'a>(
        &self,
        logits: &Path,
        tokenizer: &Tokenizer,
        student: &Checkpoint,
        settled: &[usize],
        text: &'a Corpus,
        place: &Place,
    ) -> Result<train::Stage<'a>> {
        let (len, vocab) = (self.train.seq_len, student.config.vocab_size);
        let stored = Stored::open(logits, text, len, tokenizer, vocab)?;
        let place = place.training(self.train.weights);
        self.learn(Teacher::Stored(stored), student, settled, text, &place)
    }

    fn learn<'a>(
        &self,
        teacher: Teacher,
        student: &Checkpoint,
        settled: &[usize],
        text: &'a Corpus,
        place: &Place,
    ) -> Result<train::Stage<'a>> {
        let kd = Kd::new(teacher, &student.parts()?, settled, self.objective, place)?;
        Ok(train::Stage::Kd(Box::new(kd), text))
    }
}

/// What the record of a step says that learns from stored logits.
///
/// # Errors
/// A folder that is none of them.
pub fn stored_input(logits: &Path) -> Result<Input> {
    let about = About::open(logits)?;
    let hash = Some(about.hash().to_string());
    Ok(Input::file("teacher logits", logits, hash))
}

impl Stage for KdStage {
    fn about(&self) -> String {
        summary(&self.train)
    }

    fn check(&self, sizes: &mut Sizes) -> Result<()> {
        self.train.settle()?;
        self.objective.validate(sizes.teacher.vocab_size)?;
        check_context(sizes.teacher, self.train.seq_len)?;
        let student = sizes.student()?;
        if let Some(logits) = &self.teacher_logits {
            if self.teacher.is_some() {
                return Err(Error::invalid(
                    "teacher and teacher_logits: give one of them",
                ));
            }
            if !sizes.open_teachers {
                return Ok(());
            }
            let about = About::open(logits)?;
            about.check_len(logits, self.train.seq_len)?;
            return self.objective.fits_stored(&about, student);
        }
        match &self.teacher {
            None => self.objective.fits(sizes.teacher, student),
            Some(folder) if sizes.open_teachers => {
                Tokenizer::open(folder)?;
                let teacher = Checkpoint::open(folder)?.config;
                check_context(&teacher, self.train.seq_len)?;
                self.objective.fits(&teacher, student)
            }
            Some(_) => Ok(()),
        }
    }

    fn need(&self, sizes: &Sizes, with: &Supply) -> Result<Need> {
        let config = self.train.settle()?;
        let other = self.teacher.as_deref().map(Source::open).transpose()?;
        let teacher = other.as_ref().map_or(sizes.teacher, |other| &other.config);
        let student = sizes.student()?;
        let windows = Windows {
            rows: config.batch_size,
            len: config.seq_len,
        };
        let trains = self.objective.trains(student);
        let learner = Learner {
            config: student,
            trained: &trains,
        };
        // Stored logits of a batch are a few bytes beside its activations.
        let teacher = self.teacher_logits.is_none().then_some(teacher);
        let mut need = trained_need(&config, learner, teacher, windows, with.text, with);
        if let Some(other) = &other {
            let (compute, of) = (need.compute, (other.bytes, &other.config));
            let held = |phase| with.weights(phase, "other teacher", of, compute);
            need.phases = need.phases.into_iter().map(held).collect();
        }
        need.settings = Some(Settings {
            train: self.train.clone(),
            all: self.objective.trained == Trained::Everything,
            layers: false,
        });
        Ok(need)
    }

    fn fill(&self, texts: &Texts) -> Result<()> {
        if let Some(logits) = &self.teacher_logits {
            About::open(logits)?.check_data(logits, &texts.train)?;
        }
        training::fill(&texts.train, &self.train)
    }

    fn key(&self, with: &Context, made: &Made) -> Result<Key> {
        let other = self.other(with)?;
        self.key_with(other.as_ref().unwrap_or(with.base), with, made)
    }

    fn carry_out(&self, name: &str, with: &Context, made: &mut Made) -> Result<()> {
        let other = self.other(with)?;
        let teacher = other.as_ref().unwrap_or(with.base);
        let (key, before) = (self.key_with(teacher, with, made)?, made.student()?);
        let begin = || {
            let student = Checkpoint::open(&before.folder)?;
            let (text, settled) = (&with.texts.train, &made.settled);
            let (stage, input) = match &self.teacher_logits {
                None => (
                    self.distil(teacher, &student, settled, text)?,
                    teacher.input()?,
                ),
                Some(logits) => {
                    let (tokenizer, place) = (&with.base.tokenizer, &with.base.place);
                    let stage =
                        self.distil_stored(logits, tokenizer, &student, settled, text, place)?;
                    (stage, stored_input(logits)?)
                }
            };
            let sources = Sources {
                record: student.provenance()?,
                inputs: vec![input, with.texts.train_input()],
            };
            Ok((stage.into(), sources))
        };
        let (student, metrics) = training::trained(name, &key, &self.train, with, begin)?;
        made.settled = Checkpoint::config_only(&student.folder)?.0.converted();
        eval::result(name, student, metrics, with, made)
    }
}
