//! Intermediate Layer Distillation (Zebra-Llama, arXiv 2505.17272): every layer of the student reads the teacher's input of
//! that layer and learns its output and its mixer's output. A *bank* trains several candidates of every
//! layer (all MLA, all Mamba2, ..) in one pass over the teacher, so that later stages choose.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};
use serde::{Deserialize, Serialize};

use super::{Shares, Terms, ids, rows, scalar, share};
use crate::checkpoint::{Bank, Format, Provenance, save};
use crate::data::Batch;
use crate::mixer::LayerKind;
use crate::model::{Group, Layer, LayerOutput, Lm, ModelConfig, Parts};
use crate::op::adamw::sum_of_squares;
use crate::op::linear::Matrix;
use crate::op::loss::{mean_l2, relative_mse};
use crate::op::runtime::each;
use crate::train::at_once::AtOnce;
use crate::train::optimizer::Roles;
use crate::train::params::ParamGroup;
use crate::weights::{Place, Weights};
use crate::{Error, Result};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum IldLoss {
    /// `Σ(x − t)² / Σ t²` of outputs and mixer outputs.
    RelativeMse,
    /// AMD's: the mean un-squared L2 norm.
    L2Norm,
}

impl IldLoss {
    /// Of `x` to `target`, both `[B, T, D]`.
    pub fn of(self, x: &Tensor, target: &Tensor) -> Result<Tensor> {
        let (x, target) = (rows(x)?, rows(target)?);
        Ok(match self {
            IldLoss::RelativeMse => relative_mse(&x, &target)?,
            IldLoss::L2Norm => mean_l2(&x, &target)?,
        })
    }
}

/// What a student's layer reads while it learns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum IldInputs {
    /// The teacher's input of that layer.
    #[default]
    Teacher,
    /// That, and what the student's own layers before it give, each half of the loss (Lillama, arXiv
    /// 2412.16719): a layer learns to make up for those before it.
    Joint,
}

/// The same on the command line and in a recipe's `[ild]`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct IldConfig {
    /// What a layer is measured by.
    #[arg(long, value_enum, default_value_t = Self::default().loss)]
    pub loss: IldLoss,
    /// What a layer reads while it learns.
    #[arg(long, value_enum, default_value_t = Self::default().inputs)]
    pub inputs: IldInputs,
}

impl Default for IldConfig {
    fn default() -> Self {
        Self {
            loss: IldLoss::RelativeMse,
            inputs: IldInputs::Teacher,
        }
    }
}

pub struct Ild {
    teacher: Lm,
    teacher_hash: String,
    candidates: Vec<Candidate>,
    config: IldConfig,
    /// Layers that are trained here, first to last.
    layers: Vec<usize>,
    /// Of the one student or candidate, where all of its layers are trained here: as it is now.
    snapshot: Option<Lm>,
    /// A step in which a layer's gradients are applied before the next layer's are there; its loss is known at the end only.
    pub(super) at_once: Option<AtOnce>,
}

struct Candidate {
    /// What its layers are, and so the folder inside the result that it is written to; none: it is the result.
    kind: Option<LayerKind>,
    /// In metrics.
    name: String,
    /// As it was given.
    parts: Parts,
    /// Those that are trained here, in the order of [`Ild::layers`].
    trained: Vec<Trained>,
}

/// A layer alone: it is clipped and stepped by itself, and the same whatever is trained beside it.
struct Trained {
    layer: Layer,
    params: ParamGroup,
    weights: Weights,
}

/// What the teacher's layer read and gave.
struct Lesson {
    index: usize,
    input: Tensor,
    /// After the final norm, where it is the last layer's.
    hidden: Tensor,
    mixed: Tensor,
}

impl Ild {
    /// `candidates`: full-depth models, initialised from the teacher, each with one kind of layer (a bank), or one hybrid whose places are settled
    /// (no kind). Layers are trained, those of `layers` only where that is said; embedding, final norm and head stay as they are.
    ///
    /// # Errors
    /// A candidate of another depth or width than the teacher, a layer that is not there, or inputs of the student's own without the layers
    /// before them.
    pub fn new(
        teacher: Lm,
        teacher_hash: String,
        candidates: Vec<(Option<LayerKind>, Parts)>,
        config: IldConfig,
        layers: Option<&[usize]>,
        place: &Place,
    ) -> Result<Self> {
        let sizes = |c: &ModelConfig| (c.layers.len(), c.hidden_size);
        let (count, hidden) = sizes(&teacher.config);
        let all: Vec<usize> = (0..count).collect();
        let mut layers = layers.unwrap_or(&all).to_vec();
        layers.sort_unstable();
        layers.dedup();
        if let Some(layer) = layers.iter().find(|layer| **layer >= count) {
            return Err(Error::invalid(format!(
                "layer {layer} does not exist: the teacher has layers 0 to {}",
                count - 1
            )));
        }
        if config.inputs == IldInputs::Joint && layers != all && !layers.is_empty() {
            return Err(Error::invalid(
                "--inputs joint gives a layer what those before it have learned: train all layers at once",
            ));
        }
        let candidates = candidates.into_iter().map(|(kind, parts)| {
            let name = kind.map_or("student".to_owned(), |kind| kind.to_string());
            if sizes(&parts.config) != (count, hidden) {
                return Err(Error::invalid(format!(
                    "{name} has {} layers of {}, the teacher {count} of {hidden}",
                    parts.config.layers.len(),
                    parts.config.hidden_size
                )));
            }
            let trained = layers.iter().map(|i| Trained::new(&parts, *i, place));
            Ok(Candidate {
                kind,
                name,
                trained: trained.collect::<Result<_>>()?,
                parts,
            })
        });
        let candidates = candidates.collect::<Result<Vec<_>>>()?;
        let snapshot = match candidates.as_slice() {
            [only] if layers == all => Some(Lm::new(
                &only.parts.config,
                &only.weights().to(place)?.detach(),
            )?),
            _ => None,
        };
        Ok(Self {
            teacher,
            teacher_hash,
            candidates,
            config,
            layers,
            snapshot,
            at_once: None,
        })
    }

    pub(super) fn teacher(&self) -> &Lm {
        &self.teacher
    }

    /// The layers that are trained here, if not all are.
    pub(super) fn piece(&self) -> Option<&[usize]> {
        let all = self.layers.len() == self.teacher.layers.len();
        (!all).then_some(&self.layers)
    }

    /// What it is told to do, as recipes spell it.
    pub(super) fn settings(&self) -> serde_json::Value {
        let kinds = self.candidates.iter().filter_map(|c| c.kind);
        let kinds: Vec<LayerKind> = kinds.collect();
        serde_json::json!({ "candidates": kinds, "objective": self.config })
    }

    /// Of all layers, whichever are trained here.
    pub(super) fn identity(&self) -> Result<serde_json::Value> {
        let mut candidates = serde_json::Map::new();
        for c in &self.candidates {
            candidates.insert(c.name.clone(), c.parts.hash()?.into());
        }
        Ok(serde_json::json!({
            "stage": "ild",
            "teacher": self.teacher_hash,
            "candidates": candidates,
            "ild": self.config,
        }))
    }

    /// Layers do not touch each other, so each is walked back at once and its graph let go.
    pub(super) fn backward(&mut self, batch: &Batch, shares: &Shares) -> Result<Terms> {
        let joint = self.config.inputs == IldInputs::Joint;
        let mut energies = shares.energies.iter();
        let mut part = |loss: Tensor| -> Result<Tensor> {
            let share = energies.next().copied().unwrap_or(shares.positions);
            Ok((loss * share)?)
        };
        let (teacher, candidates) = (&self.teacher, &mut self.candidates);
        let (at_once, layers) = (&mut self.at_once, self.layers.len());
        let mut sums = vec![0.0; candidates.len()];
        let mut named: Vec<Vec<(String, f64)>> = vec![Vec::new(); candidates.len()];
        let mut own: Vec<Option<Tensor>> = vec![None; candidates.len()];
        teach(teacher, &self.layers, batch, |slot, lesson| {
            let (loss, index) = (self.config.loss, lesson.index);
            let goal = Goal::new(teacher, loss, &lesson.hidden, index);
            for (c, candidate) in candidates.iter_mut().enumerate() {
                let Trained { layer, params, .. } = &mut candidate.trained[slot];
                let groups = params.groups(&lesson.input, &batch.documents)?;
                let mut passes = vec![Passed::new(layer, &lesson.input, &groups)?];
                let (hidden, mixer) = goal.terms(&passes[0].given, &lesson.mixed)?;
                let mut loss = (part(hidden)? + part(mixer)?)?;
                if joint {
                    let x = own[c].take().unwrap_or_else(|| lesson.input.clone());
                    let alone = Passed::new(layer, &x, &groups)?;
                    let (hidden, mixer) = goal.terms(&alone.given, &lesson.missing(layer, &x)?)?;
                    loss = ((loss + part(hidden)?)? + part(mixer)?)?.affine(0.5, 0.0)?;
                    own[c] = Some(alone.given.hidden.detach());
                    passes.push(alone);
                }
                let grads = loss.backward()?;
                params.add(&grads)?;
                for passed in passes {
                    for grads in passed.back(&grads)? {
                        params.add(&grads)?;
                    }
                }
                if let Some(step) = at_once.as_mut() {
                    step.apply(c * layers + slot, params)?;
                }
                let loss = scalar(&loss)?;
                named[c].push((format!("{}.{}", candidate.name, lesson.index), loss));
                sums[c] += loss;
            }
            Ok(())
        })?;
        let mut terms = Terms::default();
        for ((candidate, mut named), sum) in candidates.iter().zip(named).zip(sums) {
            terms.named.append(&mut named);
            terms.named.push((candidate.name.clone(), sum));
            terms.loss += sum;
        }
        Ok(terms)
    }

    /// The shares of relative errors: each is divided by its target's sum of squares, of which a micro-batch has a
    /// part.
    pub(super) fn share_energies(&self, batches: &[Batch], shares: &mut [Shares]) -> Result<()> {
        if self.config.loss != IldLoss::RelativeMse {
            return Ok(());
        }
        let parts = batches.iter().map(|batch| self.energies(batch));
        let parts = parts.collect::<Result<Vec<_>>>()?;
        for term in 0..parts[0].len() {
            let of_term = share(parts.iter().map(|energies| energies[term]));
            for (shares, share) in shares.iter_mut().zip(of_term) {
                shares.energies.push(share);
            }
        }
        Ok(())
    }

    /// Sums of squares of a batch's targets, in the order in which [`Ild::backward`] meets them.
    fn energies(&self, batch: &Batch) -> Result<Vec<f64>> {
        let documents = Some(&batch.documents);
        let mut energies = Vec::new();
        let mut own: Vec<Option<Tensor>> = vec![None; self.candidates.len()];
        teach(&self.teacher, &self.layers, batch, |slot, lesson| {
            let hidden = sum_of_squares(&lesson.hidden)?;
            let mixed = sum_of_squares(&lesson.mixed)?;
            for (c, candidate) in self.candidates.iter().enumerate() {
                energies.extend([hidden, mixed]);
                if self.config.inputs == IldInputs::Joint {
                    let layer = &candidate.trained[slot].layer;
                    let x = own[c].take().unwrap_or_else(|| lesson.input.clone());
                    energies.extend([hidden, sum_of_squares(&lesson.missing(layer, &x)?)?]);
                    own[c] = Some(layer.forward(&x, documents)?.hidden.detach());
                }
            }
            Ok(())
        })?;
        Ok(energies)
    }

    pub(super) fn snapshot(&self) -> Option<&Lm> {
        self.snapshot.as_ref()
    }

    pub(super) fn groups_mut(&mut self) -> Vec<&mut ParamGroup> {
        let trained = self.candidates.iter_mut().flat_map(|c| &mut c.trained);
        trained.map(|trained| &mut trained.params).collect()
    }

    /// The hybrid, or a bank: one checkpoint folder a candidate.
    pub(super) fn write(&self, out: &Path, tokenizer: &Path, record: &Provenance) -> Result<()> {
        let mut kinds = Vec::new();
        for candidate in &self.candidates {
            let (config, weights) = (&candidate.parts.config, &candidate.weights());
            let write = |to: &Path| {
                save(
                    to,
                    Format::Zebroid,
                    config,
                    weights,
                    Some(tokenizer),
                    record,
                    false,
                )
            };
            let Some(kind) = candidate.kind else {
                return write(out);
            };
            std::fs::create_dir_all(out).map_err(Error::io("cannot create", out))?;
            write(&out.join(kind.folder()))?;
            kinds.push(kind);
        }
        record.write(out)?;
        Bank::write_index(out, kinds)
    }

    /// The layers that were trained here, of every candidate, as they are.
    pub(super) fn layers(&self) -> BTreeMap<String, Tensor> {
        let mut all = BTreeMap::new();
        for candidate in &self.candidates {
            let trained = candidate.trained.iter().flat_map(|t| t.params.tensors());
            let of = |name: &str| format!("{}.{name}", candidate.name);
            all.extend(trained.map(|(name, value)| (of(name), value.detach())));
        }
        all
    }

    /// Takes over layers that were trained elsewhere.
    ///
    /// # Errors
    /// Names the tensor that no candidate has in that shape, or the layers that are not among those of `pieces`.
    pub(super) fn take(&mut self, pieces: Vec<BTreeMap<String, Matrix>>) -> Result<()> {
        let mut tensors: BTreeMap<String, Matrix> = BTreeMap::new();
        for (name, tensor) in pieces.into_iter().flatten() {
            if tensors.insert(name.clone(), tensor).is_some() {
                return Err(Error::invalid(format!("two pieces have trained {name}")));
            }
        }
        for candidate in &mut self.candidates {
            let mut all = candidate.parts.weights.to_map();
            for (name, weight) in &mut all {
                if !name.starts_with("model.layers.") {
                    continue;
                }
                let full = format!("{}.{name}", candidate.name);
                match tensors.remove(&full) {
                    Some(tensor) if tensor.shape() == weight.shape() => *weight = tensor,
                    Some(tensor) => {
                        return Err(Error::invalid(format!(
                            "{full} has the shape {:?} instead of {:?}",
                            tensor.shape(),
                            weight.shape()
                        )));
                    }
                    None => return Err(Error::invalid(format!("no piece has trained {full}"))),
                }
            }
            candidate.parts.weights = all.into();
        }
        match tensors.keys().next() {
            Some(name) => Err(Error::invalid(format!("no candidate has {name}"))),
            None => Ok(()),
        }
    }
}

/// A batch that went through a layer, in groups beside each other.
struct Passed<'g> {
    /// Of the whole batch; of several groups without their graphs.
    given: LayerOutput,
    /// Of several groups, with their graphs.
    parts: Vec<(&'g Group, LayerOutput)>,
}

impl<'g> Passed<'g> {
    fn new(layer: &Layer, x: &Tensor, groups: &'g [Group]) -> Result<Self> {
        let pass = |group: &Group| layer.forward_rows(x, group);
        if let [all] = groups {
            let (given, parts) = (pass(all)?, Vec::new());
            return Ok(Self { given, parts });
        }
        let parts = each(groups.iter().collect(), pass)?;
        let whole = LayerOutput::join(&parts)?;
        let apart = |x: Tensor| -> Result<Tensor> { Ok(Var::from_tensor(&x)?.into_inner()) };
        let given = LayerOutput {
            hidden: apart(whole.hidden)?,
            mixed: apart(whole.mixed)?,
        };
        let parts = groups.iter().zip(parts).collect();
        Ok(Self { given, parts })
    }

    /// The groups' gradients, of a loss whose `grads` by the whole are known.
    fn back(self, grads: &GradStore) -> Result<Vec<GradStore>> {
        let by = |of: &Tensor| grads.get(of).map(Tensor::detach);
        let wholes = [by(&self.given.hidden), by(&self.given.mixed)];
        each(self.parts, |(group, part)| {
            let mut sum = Tensor::zeros((), part.hidden.dtype(), part.hidden.device())?;
            for (own, whole) in [&part.hidden, &part.mixed].into_iter().zip(&wholes) {
                if let Some(whole) = whole {
                    sum = (sum + (own * group.rows_of(whole)?)?.sum_all()?)?;
                }
            }
            Ok(sum.backward()?)
        })
    }
}

/// `teacher` on its way to the last of `layers`, whose places in the list `at` is told: no other activations are there at once.
fn teach(
    teacher: &Lm,
    layers: &[usize],
    batch: &Batch,
    mut at: impl FnMut(usize, Lesson) -> Result<()>,
) -> Result<()> {
    let documents = Some(&batch.documents);
    let mut x = teacher.embed(&ids(batch, teacher.device())?)?;
    let end = layers.last().map_or(0, |last| last + 1);
    let mut slots = layers.iter().enumerate().peekable();
    for (index, layer) in teacher.layers[..end].iter().enumerate() {
        let LayerOutput { hidden, mixed } = layer.forward_all(&x, documents)?;
        let input = std::mem::replace(&mut x, hidden);
        if let Some((slot, _)) = slots.next_if(|(_, layer)| **layer == index) {
            let hidden = match index + 1 == teacher.layers.len() {
                true => teacher.normed(&x)?,
                false => x.clone(),
            };
            at(
                slot,
                Lesson {
                    index,
                    input,
                    hidden,
                    mixed,
                },
            )?;
        }
    }
    Ok(())
}

impl Candidate {
    /// As they are now.
    fn weights(&self) -> Weights {
        let mut all = self.parts.weights.to_map();
        for trained in &self.trained {
            all.extend(trained.weights.to_map());
        }
        all.into()
    }
}

impl Trained {
    fn new(parts: &Parts, index: usize, place: &Place) -> Result<Self> {
        let own = format!("model.layers.{index}.");
        let all = parts.weights.to_map().into_iter();
        let all: BTreeMap<_, _> = all.filter(|(name, _)| name.starts_with(&own)).collect();
        let roles = Roles::new(&parts.config);
        let (params, weights) = ParamGroup::new(&all.into(), |_| true, &roles, place)?;
        Ok(Self {
            layer: Layer::new(&parts.config, index, &weights)?,
            params,
            weights,
        })
    }
}

impl Lesson {
    /// What a student's mixer that reads `own` is to give: whatever is missing from it to the teacher's residual stream.
    fn missing(&self, layer: &Layer, own: &Tensor) -> Result<Tensor> {
        Ok((layer.missing(&self.input, own)? + &self.mixed)?)
    }
}

/// What the teacher's layer gave.
pub struct Goal<'a> {
    teacher: &'a Lm,
    loss: IldLoss,
    /// The layer's output.
    hidden: &'a Tensor,
    last: bool,
}

impl<'a> Goal<'a> {
    /// Of layer `index`, after the final norm if it is the last.
    pub fn new(teacher: &'a Lm, loss: IldLoss, hidden: &'a Tensor, index: usize) -> Self {
        Self {
            teacher,
            loss,
            hidden,
            last: index + 1 == teacher.layers.len(),
        }
    }

    /// The two terms: of the layer's output (the last layer's after the final norm, on both sides), and
    /// of its mixer's output, which is to be `mixer`.
    pub fn terms(&self, given: &LayerOutput, mixer: &Tensor) -> Result<(Tensor, Tensor)> {
        let LayerOutput { hidden: out, mixed } = given;
        let hidden = match self.last {
            true => self.loss.of(&self.teacher.normed(out)?, self.hidden)?,
            false => self.loss.of(out, self.hidden)?,
        };
        Ok((hidden, self.loss.of(mixed, mixer)?))
    }
}
