//! A model whose weights are (partly) trained, and how they get their gradients: the logits of a batch are never whole, and where
//! memory is short a layer's activations are computed anew on the way back (Chen et al. 2016, arXiv 1604.06174).

use std::ops::Range;
use std::path::Path;

use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};

use super::{Laps, rows, scalar};
use crate::Result;
use crate::checkpoint::{self, Format, Provenance};
use crate::mixer::Windows;
use crate::model::{Group, LOGITS, Layer, Lm, Parts, pieces};
use crate::op::Documents;
use crate::op::linear::{WeightGradient, back};
use crate::op::runtime::{each, free_memory};
use crate::train::at_once::AtOnce;
use crate::train::cost::Learner;
use crate::train::optimizer::Roles;
use crate::train::params::ParamGroup;
use crate::weights::{Place, Weights};

pub struct Student {
    pub lm: Lm,
    pub params: ParamGroup,
    /// The same weights without gradients.
    plain: Lm,
    weights: Weights,
    /// Whether activations are computed anew on the way back; none: where they would not fit.
    pub checkpointing: Option<bool>,
    /// Tokens of the largest batch that fitted without.
    fitting: usize,
    /// Of a model, there at once.
    pub(in crate::train) logits: usize,
    /// A step whose gradients are applied as they appear, so that they are never all there; else they are left in `params`.
    pub at_once: Option<AtOnce>,
}

/// A summand of a loss, of some rows of a batch's logits.
pub struct Summand {
    pub name: &'static str,
    /// A scalar.
    pub value: Tensor,
    pub weight: f64,
}

/// What a pass forward and back brought.
#[derive(Default)]
pub struct Learned {
    pub loss: f64,
    /// Sums of the summands' values, by name.
    pub named: Vec<(String, f64)>,
    /// In seconds.
    pub phases: Vec<(&'static str, f64)>,
}

/// A batch on its way through the model.
pub struct Pass {
    /// `[B·T]`
    ids: Tensor,
    segments: Vec<Segment>,
    /// What the last layer made, and its final norm: `[B, T, D]`.
    last: Tensor,
    normed: Tensor,
    laps: Laps,
}

/// Layers on the way back.
struct Segment {
    layers: Range<usize>,
    strands: Vec<Strand>,
}

/// Rows of a batch on their way through layers, beside others.
struct Strand {
    rows: Group,
    input: Tensor,
    /// What layers made of the input, with its graph; none: made again.
    output: Option<Tensor>,
}

impl Student {
    /// `trained`: which weights, by name.
    pub fn new(parts: &Parts, trained: impl Fn(&str) -> bool, place: &Place) -> Result<Self> {
        let config = &parts.config;
        let roles = Roles::new(config);
        let (params, weights) = ParamGroup::new(&parts.weights, trained, &roles, place)?;
        Ok(Self {
            lm: Lm::new(config, &weights)?,
            plain: Lm::new(config, &weights.detach())?,
            params,
            weights,
            checkpointing: None,
            fitting: 0,
            logits: LOGITS,
            at_once: None,
        })
    }

    /// The same weights (shared, as they are now) without gradients, for evaluation.
    pub fn snapshot(&self) -> &Lm {
        &self.plain
    }

    /// Forward and back: adds the gradients of a loss of the logits that follow `ids [B, T]`. `stand_in`: another layer in the place of
    /// one of its own. `loss` gets some rows of `B·T`, in their order, with their logits `[rows, V]`; its weighted summands are the loss.
    pub fn learn<'s>(
        &mut self,
        ids: &Tensor,
        documents: &Documents,
        stand_in: impl Fn(usize) -> Option<&'s Layer> + Sync,
        loss: impl Fn(Range<usize>, &Tensor) -> Result<Vec<Summand>>,
    ) -> Result<Learned> {
        let pass = self.forward(ids, documents, &stand_in)?;
        self.back(pass, stand_in, loss)
    }

    /// `ids [B, T]` up to the final norm.
    pub fn forward<'s>(
        &mut self,
        ids: &Tensor,
        documents: &Documents,
        stand_in: impl Fn(usize) -> Option<&'s Layer> + Sync,
    ) -> Result<Pass> {
        let laps = Laps::new();
        let count = self.lm.layers.len();
        let (rows, len) = ids.dims2()?;
        let checkpointing = self.is_short(Windows { rows, len });
        let apart = self.at_once.is_some();
        let together = if checkpointing || apart { 1 } else { count };
        let (lm, plain) = (&self.lm, &self.plain);
        let embedded = self.params.is_trained(EMBEDDING);
        let mut x = plain.embed(ids)?;
        let mut segments: Vec<Segment> = Vec::new();
        for first in (0..count).step_by(together) {
            let layers = first..first + together;
            // Nothing before the first learns.
            let learned = embedded || !segments.is_empty();
            // Whatever memory is free, the same.
            let groups = match apart {
                true => vec![Group::whole(rows, Some(documents))],
                false => self.params.groups(&x, documents)?,
            };
            let strands = each(groups, |group| -> Result<_> {
                let rows = group.rows_of(&x)?;
                let input = match learned {
                    true => Var::from_tensor(&rows)?.into_inner(),
                    false => rows,
                };
                let own = |lm| of(lm, &stand_in, layers.clone());
                let output = match checkpointing {
                    true => None,
                    false => Some(group.through(own(lm), input.clone())?),
                };
                let given = match &output {
                    Some(output) => output.detach(),
                    None => group.through(own(plain), input.detach())?,
                };
                let rows = group;
                Ok((
                    Strand {
                        rows,
                        input,
                        output,
                    },
                    given,
                ))
            })?;
            let (strands, given): (Vec<_>, Vec<_>) = strands.into_iter().unzip();
            x = Tensor::cat(&given, 0)?;
            segments.push(Segment { layers, strands });
        }
        let last = Var::from_tensor(&x)?.into_inner();
        Ok(Pass {
            ids: ids.flatten_all()?,
            segments,
            normed: lm.normed(&last)?,
            last,
            laps,
        })
    }

    /// Whether activations of a pass are to be computed anew. Asked of the system only for more tokens than ever: what a pass has
    /// freed the allocator keeps for the next.
    fn is_short(&mut self, windows: Windows) -> bool {
        if let Some(asked) = self.checkpointing {
            return asked;
        }
        if windows.tokens() > self.fitting {
            let params = &self.params;
            let learner = Learner {
                config: &self.lm.config,
                trained: &|name| params.is_trained(name),
            };
            if free_memory().is_some_and(|free| learner.is_short(windows, free)) {
                return true;
            }
            self.fitting = windows.tokens();
        }
        false
    }

    /// The logits of a pass, some rows of `B·T` at a time, in their order.
    pub fn look(
        &self,
        pass: &Pass,
        mut at: impl FnMut(Range<usize>, &Tensor) -> Result<()>,
    ) -> Result<()> {
        let x = rows(&pass.normed.detach())?;
        for range in pieces(x.dim(0)?, self.lm.config.vocab_size, self.logits) {
            let logits = self.plain.logits(&x, &range)?;
            at(range, &logits)?;
        }
        Ok(())
    }

    /// The way back of a pass, which `stand_in` was the same for.
    pub fn back<'s>(
        &mut self,
        pass: Pass,
        stand_in: impl Fn(usize) -> Option<&'s Layer> + Sync,
        loss: impl Fn(Range<usize>, &Tensor) -> Result<Vec<Summand>>,
    ) -> Result<Learned> {
        let Pass {
            ids,
            mut segments,
            last,
            normed,
            mut laps,
        } = pass;
        let mut learned = Learned::default();
        let (dnormed, embedding) = self.through_head(&rows(&normed)?, loss, &mut learned)?;
        learned
            .phases
            .push(("student forward and loss", laps.lap()));
        let (lm, params, at_once) = (&self.lm, &mut self.params, &mut self.at_once);
        // What each gives its input, if it learns.
        let mut add = |walked: Vec<Walked>| -> Result<Option<Tensor>> {
            let mut dinputs = Vec::new();
            for (grads, dinput) in walked {
                params.add(&grads)?;
                dinputs.extend(dinput);
            }
            if let Some(step) = at_once.as_mut() {
                step.apply(0, params)?;
            }
            Ok(match dinputs.is_empty() {
                true => None,
                false => Some(Tensor::cat(&dinputs, 0)?),
            })
        };
        let dnormed = dnormed.reshape(normed.shape())?;
        let mut dx = add(vec![walk(normed, &dnormed, &last)?])?;
        drop(last);
        while let (Some(dout), Some(Segment { layers, strands })) = (&dx, segments.pop()) {
            let walked = each(strands, |strand| {
                let Strand {
                    rows,
                    input,
                    output,
                } = strand;
                let output = match output {
                    Some(output) => output,
                    None => rows.through(of(lm, &stand_in, layers.clone()), input.clone())?,
                };
                walk(output, &rows.rows_of(dout)?, &input)
            })?;
            dx = add(walked)?;
        }
        if let (true, Some(dx)) = (params.is_trained(EMBEDDING), dx) {
            let mut gradient = match embedding {
                Some(gradient) => gradient,
                None => params.gradient(EMBEDDING)?,
            };
            let dx = (dx * self.plain.config.embedding_multiplier)?;
            gradient.add_rows(&ids, &rows(&dx)?)?;
            params.add_to(EMBEDDING, gradient.finish()?)?;
            if let Some(step) = at_once.as_mut() {
                step.apply(0, params)?;
            }
        }
        learned.phases.push(("backward", laps.lap()));
        Ok(learned)
    }

    /// The loss of the logits of `x [M, D]`, some rows at a time: its gradient by `x`. That of the head is added, or given too
    /// where the head is the embedding.
    fn through_head(
        &mut self,
        x: &Tensor,
        loss: impl Fn(Range<usize>, &Tensor) -> Result<Vec<Summand>>,
        learned: &mut Learned,
    ) -> Result<(Tensor, Option<WeightGradient>)> {
        let (plain, params) = (&self.plain, &mut self.params);
        let tied = plain.config.tie_word_embeddings;
        let name = if tied { EMBEDDING } else { HEAD };
        let head = plain.head_matrix();
        let mut gradient = match params.is_trained(name) {
            true => Some(params.gradient(name)?),
            false => None,
        };
        let x = x.detach();
        let mut dx = Vec::new();
        for range in pieces(x.dim(0)?, plain.config.vocab_size, self.logits) {
            let x = x.narrow(0, range.start, range.len())?;
            let logits = Var::from_tensor(&plain.head(&x)?)?;
            let mut total: Option<Tensor> = None;
            for summand in loss(range, logits.as_tensor())? {
                let value = scalar(&summand.value)?;
                learned.loss += summand.weight * value;
                match learned.named.iter_mut().find(|n| n.0 == summand.name) {
                    Some((_, sum)) => *sum += value,
                    None => learned.named.push((summand.name.to_owned(), value)),
                }
                let weighted = (summand.value * summand.weight)?;
                total = Some(match total {
                    Some(total) => (total + weighted)?,
                    None => weighted,
                });
            }
            let grads = total.map(|total| total.backward()).transpose()?;
            let dlogits = match grads.and_then(|mut grads| grads.remove(&logits)) {
                Some(dlogits) => dlogits.detach(),
                None => logits.zeros_like()?,
            };
            drop(logits);
            let dlogits = dlogits.to_dtype(head.dtype())?;
            if let Some(gradient) = &mut gradient {
                gradient.add_product(0, &dlogits, &x.to_dtype(head.dtype())?)?;
            }
            dx.push(back(&dlogits, head)?.to_dtype(x.dtype())?);
        }
        if let Some(step) = &mut self.at_once {
            step.judge(learned.loss)?;
        }
        let dx = Tensor::cat(&dx, 0)?;
        match (gradient, tied) {
            (Some(gradient), false) => {
                params.add_to(name, gradient.finish()?)?;
                Ok((dx, None))
            }
            (gradient, _) => Ok((dx, gradient)),
        }
    }

    pub fn write(&self, out: &Path, tokenizer: &Path, record: &Provenance) -> Result<()> {
        self.write_as(Format::Zebroid, out, tokenizer, record)
    }

    pub fn write_as(
        &self,
        format: Format,
        out: &Path,
        tokenizer: &Path,
        record: &Provenance,
    ) -> Result<()> {
        let (config, weights) = (&self.lm.config, &self.weights);
        let source = Some(tokenizer);
        checkpoint::save(out, format, config, weights, source, record, false)
    }

    /// A fingerprint of config and weights.
    pub fn hash(&self) -> Result<String> {
        Parts::new(self.lm.config.clone(), &self.weights).hash()
    }
}

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// Gradients, that of the input apart.
type Walked = (GradStore, Option<Tensor>);

/// The way back from `output`, whose gradient is `dout`, to `input`.
fn walk(output: Tensor, dout: &Tensor, input: &Tensor) -> Result<Walked> {
    let mut grads = (output * dout)?.sum_all()?.backward()?;
    // Off the CPU candle's gradients have graphs of their own.
    let dinput = grads.remove(input).map(|dinput| dinput.detach());
    Ok((grads, dinput))
}

/// Layers `layers` of `lm`, or what stands in for them.
fn of<'l, 's: 'l>(
    lm: &'l Lm,
    stand_in: &impl Fn(usize) -> Option<&'s Layer>,
    layers: Range<usize>,
) -> impl Iterator<Item = &'l Layer> {
    layers.map(|i| stand_in(i).unwrap_or(&lm.layers[i]))
}
