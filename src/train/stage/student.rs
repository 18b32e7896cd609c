//! A model whose weights are (partly) trained, and how they get their gradients: the logits of a batch are never whole, and where
//! memory is short a layer's activations are computed anew on the way back (Chen et al. 2016, arXiv 1604.06174).

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use candle_core::{Tensor, Var};

use super::{Laps, rows, scalar};
use crate::Result;
use crate::checkpoint::{self, Format};
use crate::model::{Layer, Lm, ModelConfig, Parts, through};
use crate::op::Documents;
use crate::op::linear::{WeightGradient, back, linear};
use crate::op::runtime::free_memory;
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
    /// Of a model, there at once.
    pub(in crate::train) logits: usize,
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

/// Enough of them to be worth the threads.
const LOGITS: usize = 1 << 24;

/// Layers on the way back.
struct Segment {
    layers: Range<usize>,
    input: Tensor,
    /// What they made of the input, with its graph; none: made again.
    output: Option<Tensor>,
}

impl Student {
    /// `trained`: which weights, by name.
    pub fn new(parts: &Parts, trained: impl Fn(&str) -> bool, place: &Place) -> Result<Self> {
        let config = &parts.config;
        let mut stacked = BTreeMap::new();
        for (i, mixer) in config.layers.iter().enumerate() {
            for (name, rows) in mixer.stacked() {
                stacked.insert(format!("model.layers.{i}.{}.{name}", mixer.prefix()), rows);
            }
        }
        let (params, weights) = ParamGroup::new(&parts.weights, trained, &stacked, place)?;
        Ok(Self {
            lm: Lm::new(config, &weights)?,
            plain: Lm::new(config, &weights.detach())?,
            params,
            weights,
            checkpointing: None,
            logits: LOGITS,
        })
    }

    /// The same weights (shared, as they are now) without gradients, for evaluation.
    pub fn snapshot(&self) -> &Lm {
        &self.plain
    }

    /// Adds the gradients of a loss of the logits that follow `ids [B, T]`. `stand_in`: another layer in the place of one of its own.
    /// `loss` gets some rows of `B·T`, in their order, with their logits `[rows, V]`; its weighted summands are the loss.
    pub fn learn<'l>(
        &'l mut self,
        ids: &Tensor,
        documents: &Documents,
        stand_in: impl Fn(usize) -> Option<&'l Layer>,
        loss: impl Fn(Range<usize>, &Tensor) -> Result<Vec<Summand>>,
    ) -> Result<Learned> {
        let mut laps = Laps::new();
        let count = self.lm.layers.len();
        let needed = activation_bytes(&self.lm.config, ids.elem_count());
        let short = || free_memory().is_some_and(|free| needed > free / 2);
        let checkpointing = *self.checkpointing.get_or_insert_with(short);
        let together = if checkpointing { 1 } else { count };
        let through = |lm: &'l Lm, layers: Range<usize>, x: &Tensor| {
            let own = layers.map(|i| stand_in(i).unwrap_or(&lm.layers[i]));
            through(own, x.clone(), Some(documents))
        };
        let (lm, plain, params) = (&self.lm, &self.plain, &mut self.params);
        let embedded = params.is_trained(EMBEDDING);
        let mut x = plain.embed(ids)?;
        let mut segments = Vec::new();
        for first in (0..count).step_by(together) {
            let layers = first..first + together;
            let input = match segments.is_empty() && !embedded {
                // Nothing before it learns.
                true => x.clone(),
                false => Var::from_tensor(&x)?.into_inner(),
            };
            let output = match checkpointing {
                true => None,
                false => Some(through(lm, layers.clone(), &input)?),
            };
            x = match &output {
                Some(output) => output.detach(),
                None => through(plain, layers.clone(), &x)?,
            };
            segments.push(Segment {
                layers,
                input,
                output,
            });
        }
        let last = Var::from_tensor(&x)?.into_inner();
        let normed = lm.normed(&last)?;
        let mut learned = Learned::default();
        let mut embedding = None;
        let dnormed = through_head(
            plain,
            params,
            self.logits,
            &rows(&normed)?,
            loss,
            &mut embedding,
            &mut learned,
        )?;
        learned
            .phases
            .push(("student forward and loss", laps.lap()));
        let mut down = |output: &Tensor, dout: &Tensor, input: &Tensor| -> Result<Option<Tensor>> {
            // Its gradient by the output is `dout`.
            let grads = (output * dout)?.sum_all()?.backward()?;
            params.add(&grads)?;
            Ok(grads.get(input).cloned())
        };
        let mut dx = down(&normed, &dnormed.reshape(normed.shape())?, &last)?;
        drop((normed, last, x));
        while let (Some(dout), Some(segment)) = (&dx, segments.pop()) {
            let Segment {
                layers,
                input,
                output,
            } = segment;
            let output = match output {
                Some(output) => output,
                None => through(lm, layers, &input)?,
            };
            dx = down(&output, dout, &input)?;
        }
        if let (true, Some(dx)) = (embedded, dx) {
            let mut gradient = match embedding {
                Some(gradient) => gradient,
                None => WeightGradient::new(params.value(EMBEDDING)?)?,
            };
            gradient.add_rows(&ids.flatten_all()?, &rows(&dx)?)?;
            params.add_to(EMBEDDING, gradient.finish()?)?;
        }
        learned.phases.push(("backward", laps.lap()));
        Ok(learned)
    }

    pub fn write(&self, out: &Path, tokenizer: &Path) -> Result<()> {
        self.write_as(Format::Zebroid, out, tokenizer)
    }

    pub fn write_as(&self, format: Format, out: &Path, tokenizer: &Path) -> Result<()> {
        let (config, weights) = (&self.lm.config, &self.weights);
        checkpoint::save(out, format, config, weights, Some(tokenizer), false)
    }

    /// A fingerprint of config and weights.
    pub fn hash(&self) -> Result<String> {
        Parts::new(self.lm.config.clone(), &self.weights).hash()
    }
}

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// The loss of the logits of `x [M, D]`, some rows at a time: its gradient by `x`. That of the head is added, or left in `embedding`
/// where it is the embedding.
fn through_head(
    plain: &Lm,
    params: &mut ParamGroup,
    logits: usize,
    x: &Tensor,
    loss: impl Fn(Range<usize>, &Tensor) -> Result<Vec<Summand>>,
    embedding: &mut Option<WeightGradient>,
    learned: &mut Learned,
) -> Result<Tensor> {
    let tied = plain.config.tie_word_embeddings;
    let name = if tied { EMBEDDING } else { HEAD };
    let head = plain.head_matrix();
    let mut gradient = match params.is_trained(name) {
        true => Some(WeightGradient::new(params.value(name)?)?),
        false => None,
    };
    let x = x.detach();
    let (m, _) = x.dims2()?;
    let most = (logits / plain.config.vocab_size).max(1);
    let mut dx = Vec::new();
    for from in (0..m).step_by(most) {
        let range = from..m.min(from + most);
        let x = x.narrow(0, from, range.len())?;
        let logits = Var::from_tensor(&linear(&x, head)?)?;
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
            Some(dlogits) => dlogits,
            None => logits.zeros_like()?,
        };
        drop(logits);
        if let Some(gradient) = &mut gradient {
            gradient.add_product(&dlogits, &x)?;
        }
        dx.push(back(&dlogits, head)?);
    }
    match (gradient, tied) {
        (Some(gradient), true) => *embedding = Some(gradient),
        (Some(gradient), false) => params.add_to(name, gradient.finish()?)?,
        (None, _) => {}
    }
    Ok(Tensor::cat(&dx, 0)?)
}

/// What the graph of a pass over so many tokens holds, about: the residual stream, norms, mixers and MLPs of all layers, in f32.
fn activation_bytes(config: &ModelConfig, tokens: usize) -> usize {
    let layer = 24 * config.hidden_size + 5 * config.intermediate_size;
    tokens
        .saturating_mul(config.layers.len() * layer)
        .saturating_mul(4)
}
