//! `[ild]`: layers are trained towards the teacher's, those of a bank of candidates or of the hybrid.

use std::num::NonZeroUsize;

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::candidates::{CANDIDATES, bank_plans};
use super::compose::{Birth, Source, recorded, sized};
use super::training::{self, saved, summary};
use super::{Context, Made, Sizes, Stage, StageResult, check_context, eval};
use crate::Result;
use crate::checkpoint::{Checkpoint, Key};
use crate::convert::{Init, PlanOptions};
use crate::data::Corpus;
use crate::mixer::{LayerKind, Windows};
use crate::model::Parts;
use crate::numerics;
use crate::pipeline::base::Base;
use crate::pipeline::need::{FEW, Need, Settings, Supply};
use crate::pipeline::texts::Texts;
use crate::train::cost::{IldSizes, Learner, in_layers};
use crate::train::stage::ild::{Ild, IldConfig, IldInputs};
use crate::train::{self, Sources, TrainSettings, Training};
use crate::watch::Watch;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IldTarget {
    /// Every candidate in all layers; the hybrid is composed of theirs.
    #[default]
    Bank,
    /// The hybrid, whose places are settled.
    Hybrid,
}

/// What ILD trains: a bank's candidates, or one hybrid, which has no kind.
pub type Students = Vec<(Option<LayerKind>, Parts)>;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct IldStage {
    pub target: IldTarget,
    /// Of the bank, as `layers` of a plan spells them.
    pub candidates: Vec<LayerKind>,
    pub objective: IldConfig,
    pub train: TrainSettings,
    /// Layers that are trained at once, with the memory that they take; the result is that of all. Not said: all.
    #[serde(skip_serializing)]
    pub layers_at_once: Option<NonZeroUsize>,
}

impl Default for IldStage {
    fn default() -> Self {
        Self {
            target: IldTarget::default(),
            candidates: CANDIDATES.to_vec(),
            objective: IldConfig::default(),
            train: TrainSettings::default(),
            layers_at_once: None,
        }
    }
}

impl IldStage {
    /// A bank of the candidates, in all layers each.
    ///
    /// # Errors
    /// As [`bank_plans`], or a candidate that the teacher cannot give.
    pub fn bank(
        &self,
        base: &Base,
        options: &PlanOptions,
        init: &Init,
        watch: &dyn Watch,
    ) -> Result<Students> {
        let plans = bank_plans(options, &self.candidates, base.config().layers.len())?;
        let candidates = plans.into_iter().map(|(kind, options)| {
            let student = base.plan(&options, init)?;
            Ok((Some(kind), base.compose(&student, init, watch)?))
        });
        candidates.collect()
    }

    /// Trains these layers of the students (none said: all) towards the teacher's.
    ///
    /// # Errors
    /// A student of another depth or width than the teacher, or a layer that is not there.
    pub fn align<'a>(
        &self,
        base: &Base,
        students: &Students,
        layers: Option<&[usize]>,
        text: &'a Corpus,
    ) -> Result<train::Stage<'a>> {
        let place = base.place.training(self.train.weights);
        let (lm, hash, students) = (base.parts.lm(&place)?, base.hash()?, students.clone());
        let ild = Ild::new(lm, hash, students, self.objective, layers, &place)?;
        Ok(train::Stage::Ild(ild, text))
    }

    /// The training of all layers, some at a time where that is said.
    ///
    /// # Errors
    /// As [`IldStage::align`].
    pub fn training<'a>(
        &'a self,
        base: &'a Base,
        students: Students,
        text: &'a Corpus,
    ) -> Result<Training<'a>> {
        let layers = base.config().layers.len();
        match self.layers_at_once.map(NonZeroUsize::get) {
            Some(at_once) if at_once < layers => Ok(Training::ByLayers {
                stage: Box::new(move |layers| self.align(base, &students, Some(layers), text)),
                data: text,
                layers,
                at_once,
            }),
            _ => Ok(self.align(base, &students, None, text)?.into()),
        }
    }
}

impl Stage for IldStage {
    fn about(&self) -> String {
        let kinds: Vec<String> = self.candidates.iter().map(LayerKind::to_string).collect();
        match self.target {
            IldTarget::Bank => format!("{}, {}", kinds.join(" | "), summary(&self.train)),
            IldTarget::Hybrid => summary(&self.train),
        }
    }

    fn check(&self, sizes: &mut Sizes) -> Result<()> {
        self.train.settle()?;
        check_context(sizes.teacher, self.train.seq_len)?;
        if self.target == IldTarget::Bank {
            let layers = sizes.teacher.layers.len();
            // Layers that the plan cannot name are told of as the plan's.
            if sizes.plan.kinds(layers).is_ok() {
                bank_plans(&sizes.plan, &self.candidates, layers)?;
            }
            sizes.bank = Some(self.candidates.clone());
        }
        Ok(())
    }

    fn need(&self, sizes: &Sizes, with: &Supply) -> Result<Need> {
        let config = self.train.settle()?;
        let candidates = match self.target {
            IldTarget::Bank => {
                let plans = bank_plans(
                    &sizes.common.plan,
                    &self.candidates,
                    sizes.teacher.layers.len(),
                )?;
                let each = plans.iter().map(|(_, plan)| sized(sizes.teacher, plan));
                each.collect::<Result<Vec<_>>>()?
            }
            IldTarget::Hybrid => vec![sizes.student()?.clone()],
        };
        let count = sizes.teacher.layers.len();
        let ild = IldSizes {
            teacher: sizes.teacher,
            candidates: &candidates,
            windows: Windows {
                rows: config.batch_size,
                len: config.seq_len,
            },
            accumulation: config.accumulation,
            weights: config.weights,
            compute: config.weights.compute(with.mapped),
            optimizer: config.optimizer,
            joint: self.objective.inputs == IldInputs::Joint,
            at_once: self
                .layers_at_once
                .map_or(count, NonZeroUsize::get)
                .min(count),
            applied: config.applies_at_once(),
        };
        let tokens = with.length(&config, with.text, config.tokens_per_step());
        let learners = candidates.iter().map(|config| Learner {
            config,
            trained: &in_layers,
        });
        let saves = learners.map(|learner| saved(learner, &config));
        let (state, moved) = saves.fold((0, 0.0), |(a, b), (c, d)| (a + c, b + d));
        let steps = tokens.unwrap_or(0) as f64 / config.tokens_per_step() as f64;
        // Layers as they are trained, embedding and head as the teacher has them.
        let result = candidates.iter().map(|student| {
            let layers = Learner {
                config: student,
                trained: &in_layers,
            };
            let ends = student.parameters() - layers.entries();
            layers.bytes(config.weights) + (ends as f64 * with.base.width()) as usize
        });
        let result: usize = result.sum();
        let bank = self.target == IldTarget::Bank;
        Ok(Need {
            phases: vec![ild.memory()],
            student: (!bank).then_some(result),
            kept: if bank { result } else { 0 },
            scratch: 2 * state,
            tokens,
            operations: Some(ild.operations()),
            moved: moved * steps,
            measured: !bank,
            compute: ild.compute,
            settings: Some(Settings {
                train: self.train.clone(),
                all: false,
                layers: !ild.joint && ild.at_once > FEW,
            }),
            ..Need::default()
        })
    }

    fn fill(&self, texts: &Texts) -> Result<()> {
        training::fill(&texts.train, &self.train)
    }

    fn key(&self, with: &Context, made: &Made) -> Result<Key> {
        let settings = match self.target {
            IldTarget::Bank => {
                json!({ "ild": self, "plan": with.common.plan, "birth": with.birth() })
            }
            IldTarget::Hybrid => json!({ "ild": self, "student": made.student()?.key }),
        };
        with.key(numerics::Stage::Ild, settings)
    }

    fn carry_out(&self, name: &str, with: &Context, made: &mut Made) -> Result<()> {
        let (key, text) = (self.key(with, made)?, &with.texts.train);
        let (base, watch) = (with.base, with.surroundings.watch);
        match self.target {
            IldTarget::Bank => {
                let init = made.init(with.common, false);
                let begin = || {
                    let plan = &with.common.plan;
                    let born = Birth::new(&init, with.common, with.texts);
                    let sources = Sources {
                        record: recorded(base, plan, &Source::Teacher, born)?,
                        inputs: vec![base.input()?, with.texts.train_input()],
                    };
                    let students = self.bank(base, plan, &init, watch)?;
                    Ok((self.training(base, students, text)?, sources))
                };
                let (bank, metrics) = training::trained("bank", &key, &self.train, with, begin)?;
                made.results.push(StageResult {
                    name: name.to_owned(),
                    folder: bank.folder.clone(),
                    kl: None,
                    metrics,
                });
                made.bank = Some(bank);
                Ok(())
            }
            IldTarget::Hybrid => {
                let before = made.student()?;
                let begin = || {
                    let student = Checkpoint::open(&before.folder)?;
                    let sources = Sources {
                        record: student.provenance()?,
                        inputs: vec![base.input()?, with.texts.train_input()],
                    };
                    let students = vec![(None, student.parts()?)];
                    Ok((self.training(base, students, text)?, sources))
                };
                let (student, metrics) = training::trained(name, &key, &self.train, with, begin)?;
                eval::result(name, student, metrics, with, made)
            }
        }
    }
}
