//! A model's sizes: zebroid's own `config.json`, which all other formats are read into.

use serde::{Deserialize, Serialize};

use crate::mixer::sizes::{MAX_LAYERS, MAX_POSITIONS, MAX_VOCAB, MAX_WIDTH, bounded};
use crate::mixer::{AttentionConfig, Cost, MixerConfig, Pass, Windows};
use crate::{Error, Result};

/// Of our checkpoint format; a reader refuses what it does not know.
pub const FORMAT_VERSION: u32 = 1;

/// Everything that decides which tensors a model has and what it computes from them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// `"zebroid"`
    pub model_type: String,
    pub format_version: u32,
    /// `D`
    pub hidden_size: usize,
    pub intermediate_size: usize,
    /// `V`
    pub vocab_size: usize,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub tie_word_embeddings: bool,
    /// What embeddings are multiplied by (Granite's name, as the two below).
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub embedding_multiplier: f64,
    /// What a mixer and an MLP give is multiplied by where it joins the residual stream.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub residual_multiplier: f64,
    /// What logits are divided by.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub logits_scaling: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bos_token_id: Option<u32>,
    #[serde(default)]
    pub eos_token_id: Vec<u32>,
    /// One mixer a layer, first to last.
    pub layers: Vec<MixerConfig>,
    /// Layers whose mixer stands in the place of a teacher's; not said: those that are not attention.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub converted: Option<Vec<usize>>,
}

fn one() -> f64 {
    1.0
}

fn is_one(x: &f64) -> bool {
    *x == 1.0
}

/// The layer that a weight stands in, by its name.
pub fn layer_of(name: &str) -> Option<usize> {
    let rest = name.strip_prefix("model.layers.")?;
    rest.split('.').next()?.parse().ok()
}

impl ModelConfig {
    pub const MODEL_TYPE: &str = "zebroid";

    /// # Errors
    /// Names the field (and layer) whose value cannot work.
    pub fn validate(&self) -> Result<()> {
        let positions = self.max_position_embeddings;
        bounded("hidden_size", self.hidden_size, MAX_WIDTH)?;
        bounded("intermediate_size", self.intermediate_size, MAX_WIDTH)?;
        bounded("vocab_size", self.vocab_size, MAX_VOCAB)?;
        bounded("max_position_embeddings", positions, MAX_POSITIONS)?;
        bounded("number of layers", self.layers.len(), MAX_LAYERS)?;
        // In f32 less than that is 0, and a row of zeros would be divided by it.
        if !(1e-30..1.0).contains(&self.rms_norm_eps) {
            let eps = self.rms_norm_eps;
            return Err(Error::invalid(format!(
                "rms_norm_eps {eps:e} must be at least 1e-30 and below 1"
            )));
        }
        for (name, value) in self.multipliers() {
            if !(1e-6..1e6).contains(&value) {
                return Err(Error::invalid(format!(
                    "{name} {value} must be between 1e-6 and 1e6"
                )));
            }
        }
        let bos = self.bos_token_id.iter().map(|id| ("bos_token_id", id));
        let eos = self.eos_token_id.iter().map(|id| ("eos_token_id", id));
        for (name, id) in bos.chain(eos) {
            if *id as usize >= self.vocab_size {
                return Err(Error::invalid(format!(
                    "{name} {id} is outside the vocabulary: vocab_size is {}",
                    self.vocab_size
                )));
            }
        }
        let layers = self.layers.len();
        if let Some(i) = self.converted.iter().flatten().find(|i| **i >= layers) {
            return Err(Error::invalid(format!(
                "converted names layer {i}, of {layers} layers"
            )));
        }
        for (i, layer) in self.layers.iter().enumerate() {
            layer
                .validate()
                .map_err(|e| Error::invalid(format!("layer {i} ({}): {e}", layer.name())))?;
        }
        Ok(())
    }

    /// What a Llama has no name for: all 1 there.
    pub fn multipliers(&self) -> [(&'static str, f64); 3] {
        [
            ("embedding_multiplier", self.embedding_multiplier),
            ("residual_multiplier", self.residual_multiplier),
            ("logits_scaling", self.logits_scaling),
        ]
    }

    /// Every tensor of the model and its shape, in reading order.
    pub fn params(&self) -> Vec<(String, Vec<usize>)> {
        let (d, ff, v) = (self.hidden_size, self.intermediate_size, self.vocab_size);
        let mut params = vec![("model.embed_tokens.weight".to_owned(), vec![v, d])];
        for (i, layer) in self.layers.iter().enumerate() {
            let mut add = |name: &str, shape: Vec<usize>| {
                params.push((format!("model.layers.{i}.{name}"), shape));
            };
            add("input_layernorm.weight", vec![d]);
            for (name, shape) in layer.params(d) {
                add(&format!("{}.{name}", layer.prefix()), shape);
            }
            add("post_attention_layernorm.weight", vec![d]);
            add("mlp.gate_proj.weight", vec![ff, d]);
            add("mlp.up_proj.weight", vec![ff, d]);
            add("mlp.down_proj.weight", vec![d, ff]);
        }
        params.push(("model.norm.weight".to_owned(), vec![d]));
        if !self.tie_word_embeddings {
            params.push(("lm_head.weight".to_owned(), vec![v, d]));
        }
        params
    }

    /// A layer's cost at `length` tokens, its MLP and norms included.
    pub fn layer_cost(&self, index: usize, length: usize) -> Cost {
        let (d, ff) = (self.hidden_size, self.intermediate_size);
        let rest = Cost {
            params: 3 * d * ff + 2 * d,
            ..Cost::default()
        };
        self.layers[index].cost(d, length) + rest
    }

    /// The whole model's cost at `length` tokens (embedding, final norm and an untied head included).
    pub fn cost(&self, length: usize) -> Cost {
        let (d, v) = (self.hidden_size, self.vocab_size);
        let heads = if self.tie_word_embeddings { 1 } else { 2 };
        let ends = Cost {
            params: heads * v * d + d,
            ..Cost::default()
        };
        (0..self.layers.len()).fold(ends, |sum, i| sum + self.layer_cost(i, length))
    }

    /// What training `windows` through a layer takes, from its input (which is not counted) to its output; operations with its
    /// weights are [`ModelConfig::products`].
    pub fn layer_pass(&self, index: usize, windows: Windows) -> Pass {
        let (d, ff, n) = (self.hidden_size, self.intermediate_size, windows.tokens());
        let mixer = self.layers[index].pass(windows);
        // Of D: both norms' outputs, the mixer's, the stream between, the MLP's, the stream behind; of the MLP's width: gate, up,
        // their product. On the way back, at most (it is less where SwiGLU and its products are one operation): the product's gradient, those of
        // gate and up, and a sum with its zeros.
        Pass {
            kept: mixer.kept + n * (6 * d + 3 * ff),
            back: n * 4 * d + (mixer.back).max(n * 5 * ff) + n * 2 * d,
            flops: mixer.flops,
        }
    }

    /// Multiplications and additions of a token with the weights of these `params`: all but vectors.
    pub fn products<'p>(params: impl IntoIterator<Item = &'p [usize]>) -> f64 {
        let matrices = params.into_iter().filter(|shape| shape.len() > 1);
        matrices
            .map(|shape| 2.0 * shape.iter().product::<usize>() as f64)
            .sum()
    }

    /// Trained scalars by what they are: embedding, mixers by their names, MLP, norms, an untied head.
    pub fn parameters_by_kind(&self) -> Vec<(&'static str, usize)> {
        let (d, ff, v) = (self.hidden_size, self.intermediate_size, self.vocab_size);
        let layers = self.layers.len();
        let mut all = vec![("embedding", v * d)];
        for layer in &self.layers {
            let params = layer.cost(d, 0).params;
            match all.iter_mut().find(|(name, _)| *name == layer.name()) {
                Some((_, sum)) => *sum += params,
                None => all.push((layer.name(), params)),
            }
        }
        all.push(("MLP", layers * 3 * d * ff));
        all.push(("norms", (2 * layers + 1) * d));
        if !self.tie_word_embeddings {
            all.push(("head", v * d));
        }
        all
    }

    /// Scalars that a Transformer of these keys and values caches for `length` tokens: of a hybrid its teacher.
    pub fn full_cache(&self, length: usize) -> usize {
        let layers = self.layers.iter().map(MixerConfig::full_cache);
        length.saturating_mul(layers.sum())
    }

    /// Trained scalars.
    pub fn parameters(&self) -> usize {
        self.cost(0).params
    }

    /// Cached scalars over the teacher's at `length` tokens; recurrent states are not counted (Zebra-Llama, table 1).
    pub fn kv_ratio(&self, teacher: &ModelConfig, length: usize) -> f64 {
        self.cost(length).cached as f64 / teacher.cost(length).cached as f64
    }

    /// Whether the mixer of layer `index` stands in the place of a teacher's.
    pub fn is_converted(&self, index: usize) -> bool {
        match &self.converted {
            Some(converted) => converted.contains(&index),
            None => !matches!(self.layers[index], MixerConfig::Attention(_)),
        }
    }

    /// The layers of which [`ModelConfig::is_converted`] holds, first to last.
    pub fn converted(&self) -> Vec<usize> {
        let layers = 0..self.layers.len();
        layers.filter(|i| self.is_converted(*i)).collect()
    }

    /// What the names of the weights of layer `index`'s mixer begin with.
    pub fn mixer_prefix(&self, index: usize) -> String {
        format!("model.layers.{index}.{}.", self.layers[index].prefix())
    }

    /// The attention of layer `index`.
    ///
    /// # Errors
    /// When that layer has another mixer: only attention can be converted.
    pub fn attention(&self, index: usize) -> Result<&AttentionConfig> {
        match &self.layers[index] {
            MixerConfig::Attention(c) => Ok(c),
            other => Err(Error::invalid(format!(
                "layer {index} of the teacher is {}, not attention: compose from a Llama checkpoint",
                other.name()
            ))),
        }
    }
}
