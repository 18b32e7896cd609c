//! The language model: embedding, layers (norm, mixer, norm, SwiGLU MLP), final norm, head.
//!
//! A Llama is the model whose layers all have the `attention` mixer, so teachers and hybrids are one
//! type. `x ← x + mixer(norm(x))`, `x ← x + mlp(norm(x))` (Llama, arXiv 2302.13971).

use std::ops::Range;

use candle_core::{DType, Device, Tensor};

use crate::Result;
use crate::mixer::{Mixer, Windows};
use crate::op::Documents;
use crate::op::linear::{Matrix, linear, wide};
use crate::op::rms_norm::rms_norm;
use crate::op::runtime::{each, pooled};
use crate::op::swiglu::swiglu_of;
use crate::weights::Weights;

mod config;
mod cuda;
mod decoder;
mod parts;
pub use config::{FORMAT_VERSION, ModelConfig, layer_of};
pub use cuda::cache_room;
pub use decoder::{Ask, Decoder, Reading, Row};
pub use parts::Parts;

#[derive(Debug)]
pub struct Mlp {
    gate_proj: Matrix,
    up_proj: Matrix,
    down_proj: Matrix,
}

impl Mlp {
    fn new(weights: &Weights) -> Result<Self> {
        Ok(Self {
            gate_proj: weights.matrix("gate_proj.weight")?,
            up_proj: weights.matrix("up_proj.weight")?,
            down_proj: weights.matrix("down_proj.weight")?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let inner = swiglu_of(x, &self.gate_proj, &self.up_proj)?;
        Ok(linear(&inner, &self.down_proj)?)
    }
}

/// What a layer gives, `[B, T, D]` each, in the type of the residual stream.
#[derive(Debug)]
pub struct LayerOutput {
    /// The residual stream after it.
    pub hidden: Tensor,
    /// Its mixer's output, before the residual addition.
    pub mixed: Tensor,
}

impl LayerOutput {
    /// What the groups of a batch gave, in their order.
    pub fn join(parts: &[Self]) -> Result<Self> {
        let whole = |of: fn(&Self) -> &Tensor| {
            let all: Vec<&Tensor> = parts.iter().map(of).collect();
            Tensor::cat(&all, 0)
        };
        Ok(Self {
            hidden: whole(|part| &part.hidden)?,
            mixed: whole(|part| &part.mixed)?,
        })
    }
}

/// Rows of a batch that go through layers beside others.
#[derive(Debug)]
pub struct Group {
    pub rows: Range<usize>,
    pub documents: Option<Documents>,
}

impl Group {
    /// All rows of a batch.
    pub fn whole(rows: usize, documents: Option<&Documents>) -> Self {
        Self {
            rows: 0..rows,
            documents: documents.cloned(),
        }
    }

    /// [`Windows::groups`] of a batch `x [B, T, ..]`; a GPU's threads need none.
    pub fn of(x: &Tensor, documents: Option<&Documents>) -> Result<Vec<Self>> {
        let (rows, len) = (x.dim(0)?, x.dim(1)?);
        if !x.device().is_cpu() {
            return Ok(vec![Self::whole(rows, documents)]);
        }
        let groups = Windows { rows, len }.groups().map(|rows| Self {
            documents: documents.map(|documents| documents.rows(rows.clone())),
            rows,
        });
        Ok(groups.collect())
    }

    /// Its rows of `x [B, ..]`.
    pub fn rows_of(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.narrow(0, self.rows.start, self.rows.len())?)
    }

    /// The residual stream `x [B, T, D]` of its rows after `layers`.
    pub fn through<'l>(
        &self,
        layers: impl IntoIterator<Item = &'l Layer>,
        x: Tensor,
    ) -> Result<Tensor> {
        let documents = self.documents.as_ref();
        let mut layers = layers.into_iter();
        layers.try_fold(x, |x, layer| Ok(layer.forward(&x, documents)?.hidden))
    }
}

/// The residual stream `x [B, T, D]` after `layers`.
pub fn through<'l>(
    layers: impl IntoIterator<Item = &'l Layer> + Clone + Send + Sync,
    x: Tensor,
    documents: Option<&Documents>,
) -> Result<Tensor> {
    pooled(|| {
        let outputs = each(Group::of(&x, documents)?, |group| {
            group.through(layers.clone(), group.rows_of(&x)?)
        })?;
        Ok(Tensor::cat(&outputs, 0)?)
    })
}

#[derive(Debug)]
pub struct Layer {
    input_layernorm: Tensor,
    pub mixer: Mixer,
    post_attention_layernorm: Tensor,
    mlp: Mlp,
    eps: f64,
    residual_multiplier: f64,
}

impl Layer {
    /// Layer `index` of a model, `weights` seen from the model's root.
    pub fn new(config: &ModelConfig, index: usize, weights: &Weights) -> Result<Self> {
        let weights = weights.at(format!("model.layers.{index}"));
        let mixer = &config.layers[index];
        Ok(Self {
            input_layernorm: weights.get("input_layernorm.weight")?,
            mixer: Mixer::new(mixer, &weights.at(mixer.prefix()))?,
            post_attention_layernorm: weights.get("post_attention_layernorm.weight")?,
            mlp: Mlp::new(&weights.at("mlp"))?,
            eps: config.rms_norm_eps,
            residual_multiplier: config.residual_multiplier,
        })
    }

    /// What the mixer reads: `norm(x)`.
    pub fn mixer_input(&self, x: &Tensor) -> Result<Tensor> {
        self.normed(x, &self.input_layernorm)
    }

    /// In the type that is computed with.
    fn normed(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let normed = rms_norm(x, weight, self.eps)?;
        Ok(normed.to_dtype(self.mlp.gate_proj.dtype())?)
    }

    /// The residual stream `x` with what a part of the layer gave.
    pub fn joined(&self, x: &Tensor, given: &Tensor) -> Result<Tensor> {
        let given = scaled(given, self.residual_multiplier)?;
        Ok((x + given.to_dtype(x.dtype())?)?)
    }

    /// What would have to be given for the residual stream `x` to be `wanted`.
    pub fn missing(&self, wanted: &Tensor, x: &Tensor) -> Result<Tensor> {
        scaled(&(wanted - x)?, 1.0 / self.residual_multiplier)
    }

    /// What follows the mixer: both residual additions and the MLP.
    pub fn finish(&self, x: &Tensor, mixed: &Tensor) -> Result<Tensor> {
        let x = self.joined(x, mixed)?;
        let read = self.normed(&x, &self.post_attention_layernorm)?;
        self.joined(&x, &self.mlp.forward(&read)?)
    }

    /// `x [B, T, D]` → what the layer makes of it.
    pub fn forward(&self, x: &Tensor, documents: Option<&Documents>) -> Result<LayerOutput> {
        let mixed = self.mixer.forward(&self.mixer_input(x)?, documents)?;
        let mixed = mixed.to_dtype(x.dtype())?;
        let hidden = self.finish(x, &mixed)?;
        Ok(LayerOutput { hidden, mixed })
    }

    /// The same of a batch whose [`Group`]s go beside each other.
    pub fn forward_all(&self, x: &Tensor, documents: Option<&Documents>) -> Result<LayerOutput> {
        let groups = Group::of(x, documents)?;
        LayerOutput::join(&each(groups, |group| self.forward_rows(x, &group))?)
    }

    /// The same of a group's rows of a batch `x`.
    pub fn forward_rows(&self, x: &Tensor, group: &Group) -> Result<LayerOutput> {
        self.forward(&group.rows_of(x)?, group.documents.as_ref())
    }
}

/// `x` times `factor`; itself where that is 1.
fn scaled(x: &Tensor, factor: f64) -> Result<Tensor> {
    match factor == 1.0 {
        true => Ok(x.clone()),
        false => Ok((x * factor)?),
    }
}

/// Logits of a model that are there at once: enough to be worth the threads.
pub const LOGITS: usize = 1 << 24;

/// Rows `0..rows` in pieces of at most `logits` logits of `vocab` words.
pub fn pieces(rows: usize, vocab: usize, logits: usize) -> impl Iterator<Item = Range<usize>> {
    let most = (logits / vocab).max(1);
    (0..rows)
        .step_by(most)
        .map(move |from| from..rows.min(from + most))
}

/// A causal language model.
#[derive(Debug)]
pub struct Lm {
    pub config: ModelConfig,
    embed_tokens: Matrix,
    pub layers: Vec<Layer>,
    norm: Tensor,
    lm_head: Option<Matrix>,
    /// Where its decoder computes, if not where the weights are.
    decodes_on: Option<Device>,
}

/// What a forward pass went through.
#[derive(Debug)]
pub struct Trace {
    /// Every layer's input, then the final-normed output: `L + 1` of `[B, T, D]`.
    pub hidden: Vec<Tensor>,
    /// Every mixer's output before the residual addition: `L` of `[B, T, D]`.
    pub mixer_out: Vec<Tensor>,
}

impl Lm {
    /// # Errors
    /// An impossible config, or a tensor that is not there.
    pub fn new(config: &ModelConfig, weights: &Weights) -> Result<Self> {
        config.validate()?;
        let layers = (0..config.layers.len())
            .map(|i| Layer::new(config, i, weights))
            .collect::<Result<_>>()?;
        Ok(Self {
            embed_tokens: weights.matrix("model.embed_tokens.weight")?,
            norm: weights.get("model.norm.weight")?,
            lm_head: match config.tie_word_embeddings {
                true => None,
                false => Some(weights.matrix("lm_head.weight")?),
            },
            config: config.clone(),
            layers,
            decodes_on: None,
        })
    }

    /// `ids [B, T]` (u32) → the residual stream `[B, T, D]`: in f32 where products are in a half type.
    pub fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        let (b, t) = ids.dims2()?;
        let rows = self.embed_tokens.gather(&ids.flatten_all()?)?;
        let rows = rows.reshape((b, t, self.config.hidden_size))?;
        let rows = rows.to_dtype(wide(rows.dtype()))?;
        scaled(&rows, self.config.embedding_multiplier)
    }

    /// The final norm, over `logits_scaling`: what the head reads.
    pub fn normed(&self, x: &Tensor) -> Result<Tensor> {
        let normed = rms_norm(x, &self.norm, self.config.rms_norm_eps)?;
        scaled(&normed, 1.0 / self.config.logits_scaling)
    }

    /// `[V, D]`
    pub fn head_matrix(&self) -> &Matrix {
        self.lm_head.as_ref().unwrap_or(&self.embed_tokens)
    }

    /// The head over final-normed hidden states: `[.., D]` → `[.., V]`.
    pub fn head(&self, x: &Tensor) -> Result<Tensor> {
        let head = self.head_matrix();
        let logits = linear(&x.to_dtype(head.dtype())?, head)?;
        Ok(logits.to_dtype(x.dtype())?)
    }

    /// `ids [B, T]` → final-normed hidden states `[B·T, D]`.
    pub fn hidden(&self, ids: &Tensor, documents: Option<&Documents>) -> Result<Tensor> {
        let x = through(&self.layers, self.embed(ids)?, documents)?;
        Ok(self.normed(&x)?.flatten(0, 1)?)
    }

    /// Of rows `range` of hidden states `[M, D]`: logits `[rows, V]` in f32.
    pub fn logits(&self, hidden: &Tensor, range: &Range<usize>) -> Result<Tensor> {
        let rows = hidden.narrow(0, range.start, range.len())?;
        Ok(self.head(&rows)?.to_dtype(DType::F32)?)
    }

    /// `ids [B, T]` → logits `[B, T, V]`.
    pub fn forward(&self, ids: &Tensor, documents: Option<&Documents>) -> Result<Tensor> {
        let x = through(&self.layers, self.embed(ids)?, documents)?;
        self.head(&self.normed(&x)?)
    }

    /// The hidden states and mixer outputs of a forward pass.
    pub fn trace(&self, ids: &Tensor, documents: Option<&Documents>) -> Result<Trace> {
        let mut hidden = vec![self.embed(ids)?];
        let mut mixer_out = Vec::with_capacity(self.layers.len());
        for layer in &self.layers {
            let given = layer.forward(hidden.last().expect("starts with one"), documents)?;
            hidden.push(given.hidden);
            mixer_out.push(given.mixed);
        }
        let last = hidden.pop().expect("starts with one");
        hidden.push(self.normed(&last)?);
        Ok(Trace { hidden, mixer_out })
    }

    /// Of what is computed.
    pub fn dtype(&self) -> DType {
        self.embed_tokens.dtype()
    }

    pub fn device(&self) -> &Device {
        self.embed_tokens.device()
    }
}
