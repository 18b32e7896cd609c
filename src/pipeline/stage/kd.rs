//! `[[kd]]`: the hybrid learns the teacher's next-token distribution.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::training::{self, summary, trained_need};
use super::{Context, Made, Sizes, Stage, check_context, eval};
use crate::Result;
use crate::checkpoint::{Checkpoint, Key};
use crate::convert::PlanOptions;
use crate::data::{Corpus, Tokenizer};
use crate::mixer::Windows;
use crate::numerics;
use crate::pipeline::base::Base;
use crate::pipeline::need::{Need, Settings, Source, Supply};
use crate::pipeline::texts::Texts;
use crate::train::cost::Learner;
use crate::train::stage::kd::{Kd, KdConfig, Trained};
use crate::train::{self, Sources, TrainSettings};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct KdStage {
    /// Another teacher than the base, with the same vocabulary: its folder, or its id on the hub.
    pub teacher: Option<PathBuf>,
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
        let (student, teacher) = (&made.student()?.key, teacher.hash()?);
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
        let (lm, hash, place) = (teacher.lm()?, teacher.hash()?, &teacher.place);
        let kd = Kd::new(lm, hash, &student.parts()?, settled, self.objective, place)?;
        Ok(train::Stage::Kd(Box::new(kd), text))
    }
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
        let mut need = trained_need(&config, learner, Some(teacher), windows, with.text, with);
        if let Some(other) = &other {
            let held = |phase| with.weights(phase, "other teacher", (other.bytes, &other.config));
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
            let sources = Sources {
                record: student.provenance()?,
                inputs: vec![teacher.input()?, with.texts.train_input()],
            };
            let stage = self.distil(teacher, &student, &made.settled, &with.texts.train)?;
            Ok((stage.into(), sources))
        };
        let (student, metrics) = training::trained(name, &key, &self.train, with, begin)?;
        made.settled = Checkpoint::config_only(&student.folder)?.0.converted();
        eval::result(name, student, metrics, with, made)
    }
}
