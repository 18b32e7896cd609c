//! llama.cpp's Llama: its names, its metadata, and the order of its queries' and keys' rows.

use std::collections::BTreeMap;

use crate::checkpoint::family::Traits;
use crate::gguf::{Info, Value};
use crate::mixer::sizes::{MAX_LAYERS, bounded};
use crate::mixer::{AttentionConfig, MixerConfig, RopeConfig, RopeScaling};
use crate::model::{FORMAT_VERSION, ModelConfig};
use crate::{Error, Result};

pub(super) const ARCHITECTURE: &str = "llama";

/// Divisors of rotary frequencies, one a pair.
pub(super) const ROPE_FREQS: &str = "rope_freqs.weight";

/// Names outside the layers, and then inside one: ours and llama.cpp's.
const WHOLE: [(&str, &str); 3] = [
    ("model.embed_tokens.weight", "token_embd.weight"),
    ("model.norm.weight", "output_norm.weight"),
    ("lm_head.weight", "output.weight"),
];
const LAYER: [(&str, &str); 9] = [
    ("input_layernorm.weight", "attn_norm.weight"),
    (QUERIES, "attn_q.weight"),
    (KEYS, "attn_k.weight"),
    ("self_attn.v_proj.weight", "attn_v.weight"),
    ("self_attn.o_proj.weight", "attn_output.weight"),
    ("post_attention_layernorm.weight", "ffn_norm.weight"),
    ("mlp.gate_proj.weight", "ffn_gate.weight"),
    ("mlp.up_proj.weight", "ffn_up.weight"),
    ("mlp.down_proj.weight", "ffn_down.weight"),
];
const QUERIES: &str = "self_attn.q_proj.weight";
const KEYS: &str = "self_attn.k_proj.weight";

/// What llama.cpp calls our tensor.
pub(super) fn name(ours: &str) -> Option<String> {
    if let Some((_, theirs)) = WHOLE.iter().find(|(known, _)| *known == ours) {
        return Some((*theirs).to_owned());
    }
    let (layer, rest) = ours.strip_prefix("model.layers.")?.split_once('.')?;
    let (_, theirs) = LAYER.iter().find(|(known, _)| *known == rest)?;
    Some(format!("blk.{layer}.{theirs}"))
}

/// Where row `i` of our tensor stands in llama.cpp's, where the order differs: of a head's pairs it has both halves side by
/// side, we one half after the other.
pub(super) fn row_order(ours: &str, head_dim: usize) -> Option<impl Fn(usize) -> usize + use<>> {
    let turned = ours.ends_with(QUERIES) || ours.ends_with(KEYS);
    turned.then_some(move |row: usize| {
        let (head, at) = (row / head_dim, row % head_dim);
        let (half, pair) = (at / (head_dim / 2), at % (head_dim / 2));
        head * head_dim + 2 * pair + half
    })
}

/// Metadata by key, with errors that name it.
struct Keys<'a>(&'a BTreeMap<String, Value>);

impl<'a> Keys<'a> {
    fn given(&self, key: &str) -> Option<&'a Value> {
        self.0.get(&format!("{ARCHITECTURE}.{key}"))
    }

    fn wrong(&self, key: &str, wanted: &str) -> Error {
        match self.given(key) {
            Some(found) => Error::invalid(format!(
                "{ARCHITECTURE}.{key} must be {wanted}, not {found:?}"
            )),
            None => Error::invalid(format!("{ARCHITECTURE}.{key} is missing")),
        }
    }

    fn size(&self, key: &str) -> Result<usize> {
        let size = match self.given(key) {
            Some(Value::Unsigned(n)) => u32::try_from(*n).ok(),
            Some(Value::Signed(n)) => u32::try_from(*n).ok(),
            _ => None,
        };
        let size = size.ok_or_else(|| self.wrong(key, "a whole number below 2^32"))?;
        Ok(size as usize)
    }

    fn size_or(&self, key: &str, default: usize) -> Result<usize> {
        match self.given(key) {
            Some(_) => self.size(key),
            None => Ok(default),
        }
    }

    fn number(&self, key: &str) -> Result<f64> {
        match self.given(key) {
            Some(Value::Float(x)) => Ok(*x),
            _ => Err(self.wrong(key, "a number")),
        }
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>> {
        match self.given(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(_) => Err(self.wrong(key, "a text")),
        }
    }
}

/// Sizes; `freqs`: what [`ROPE_FREQS`] holds. The ids that begin and end a text are the tokenizer's to say.
///
/// # Errors
/// Names the key that is missing, of a wrong type, or asks for what is not supported.
pub(super) fn read(
    metadata: &BTreeMap<String, Value>,
    tensors: &BTreeMap<String, Info>,
    freqs: Option<Vec<f32>>,
) -> Result<ModelConfig> {
    let keys = Keys(metadata);
    let layers = keys.size("block_count")?;
    bounded("llama.block_count", layers, MAX_LAYERS)?;
    let (hidden, heads) = (
        keys.size("embedding_length")?,
        keys.size("attention.head_count")?,
    );
    let default = hidden.checked_div(heads).unwrap_or(0);
    let head_dim = keys.size_or("attention.key_length", default)?;
    for (key, value) in [
        ("attention.value_length", head_dim),
        ("rope.dimension_count", head_dim),
    ] {
        if keys.size_or(key, value)? != value {
            return Err(keys.wrong(key, &format!("{value}, the dims of a head")));
        }
    }
    let experts = keys.size_or("expert_count", 0)?;
    if experts > 0 {
        return Err(Error::invalid(format!(
            "{experts} experts a layer are not supported, only dense models"
        )));
    }
    let vocab = tensors
        .get("token_embd.weight")
        .and_then(|t| t.shape.first());
    let theta = match keys.given("rope.freq_base") {
        Some(_) => keys.number("rope.freq_base")?,
        None => 10_000.0,
    };
    let scaling = scaling(&keys)?;
    let rope = match (&scaling, freqs) {
        (_, None) => RopeConfig {
            theta,
            scaling,
            inv_freq: None,
        },
        (None, Some(freqs)) => turned(theta, &freqs, head_dim)?,
        (Some(_), Some(_)) => {
            return Err(Error::invalid(format!(
                "{ROPE_FREQS} beside llama.rope.scaling is not supported"
            )));
        }
    };
    let attention = AttentionConfig::new(
        heads,
        keys.size_or("attention.head_count_kv", heads)?,
        head_dim,
        Some(rope),
    );
    Ok(ModelConfig {
        model_type: ModelConfig::MODEL_TYPE.into(),
        format_version: FORMAT_VERSION,
        hidden_size: hidden,
        intermediate_size: keys.size("feed_forward_length")?,
        vocab_size: vocab.copied().unwrap_or(0),
        max_position_embeddings: keys.size("context_length")?,
        rms_norm_eps: decimal(keys.number("attention.layer_norm_rms_epsilon")?),
        tie_word_embeddings: !tensors.contains_key("output.weight"),
        embedding_multiplier: 1.0,
        residual_multiplier: 1.0,
        logits_scaling: 1.0,
        bos_token_id: None,
        eos_token_id: Vec::new(),
        layers: vec![MixerConfig::Attention(attention); layers],
        converted: None,
    })
}

/// The shortest decimal number that is this one in f32: what the file's writer began with.
fn decimal(x: f64) -> f64 {
    (x as f32).to_string().parse().unwrap_or(x)
}

fn scaling(keys: &Keys) -> Result<Option<RopeScaling>> {
    let original = || keys.size("rope.scaling.original_context_length");
    Ok(match keys.text("rope.scaling.type")? {
        None | Some("none") => None,
        Some("linear") => Some(RopeScaling::Linear {
            factor: keys.number("rope.scaling.factor")?,
        }),
        Some("yarn") => Some(RopeScaling::Yarn {
            factor: keys.number("rope.scaling.factor")?,
            original_max_position_embeddings: original()?,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: None,
        }),
        Some(other) => {
            return Err(Error::invalid(format!(
                "llama.rope.scaling.type {other} is not supported: none, linear or yarn"
            )));
        }
    })
}

/// Frequencies divided by `freqs`: Llama 3's scaling where it gives just these (as far as f32 tells), else one by one.
fn turned(theta: f64, freqs: &[f32], head_dim: usize) -> Result<RopeConfig> {
    if freqs.len() * 2 != head_dim || !freqs.iter().all(|f| *f > 0.0) {
        return Err(Error::invalid(format!(
            "{ROPE_FREQS} has {} divisors, {} above 0 are needed",
            freqs.len(),
            head_dim / 2
        )));
    }
    let plain = RopeConfig::new(theta);
    for factor in [8.0, 32.0] {
        let llama3 = RopeConfig {
            scaling: Some(RopeScaling::Llama3 {
                factor,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position_embeddings: 8192,
            }),
            ..plain.clone()
        };
        let found = divisors(&llama3, head_dim);
        let mut pairs = found.iter().zip(freqs);
        if pairs.all(|(a, b)| (a - b).abs() <= 1e-4 * b) {
            return Ok(llama3);
        }
    }
    let (base, _) = plain.frequencies(head_dim);
    let inv_freq = base.iter().zip(freqs).map(|(f, by)| f / f64::from(*by));
    Ok(RopeConfig {
        inv_freq: Some(inv_freq.collect()),
        ..plain
    })
}

fn divisors(rope: &RopeConfig, head_dim: usize) -> Vec<f32> {
    let (base, _) = RopeConfig::new(rope.theta).frequencies(head_dim);
    let (found, _) = rope.frequencies(head_dim);
    base.iter()
        .zip(found)
        .map(|(b, f)| (b / f) as f32)
        .collect()
}

/// Metadata, and what [`ROPE_FREQS`] must hold.
pub(super) struct Written {
    pub metadata: Vec<(String, Value)>,
    pub freqs: Option<Vec<f32>>,
    pub head_dim: usize,
}

/// What the architecture can say; of anything else nothing.
pub(super) fn write(config: &ModelConfig) -> Option<Written> {
    let MixerConfig::Attention(attention) = config.layers.first()? else {
        return None;
    };
    let rope = attention.rope.as_ref()?;
    if Traits::of(config) != Traits::NONE {
        return None;
    }
    if config.layers.iter().any(|layer| *layer != config.layers[0]) {
        return None;
    }
    let size = |n: usize| Value::Unsigned(n as u64);
    let mut pairs = vec![
        ("block_count", size(config.layers.len())),
        ("context_length", size(config.max_position_embeddings)),
        ("embedding_length", size(config.hidden_size)),
        ("feed_forward_length", size(config.intermediate_size)),
        ("attention.head_count", size(attention.num_attention_heads)),
        (
            "attention.head_count_kv",
            size(attention.num_key_value_heads),
        ),
        ("attention.key_length", size(attention.head_dim)),
        ("attention.value_length", size(attention.head_dim)),
        (
            "attention.layer_norm_rms_epsilon",
            Value::Float(config.rms_norm_eps),
        ),
        ("rope.dimension_count", size(attention.head_dim)),
        ("rope.freq_base", Value::Float(rope.theta)),
        ("vocab_size", size(config.vocab_size)),
    ];
    let mut freqs = None;
    match &rope.scaling {
        _ if rope.inv_freq.is_some() && rope.scaling.is_some() => return None,
        None if rope.inv_freq.is_some() => freqs = Some(divisors(rope, attention.head_dim)),
        None => {}
        Some(RopeScaling::Llama3 { .. }) => freqs = Some(divisors(rope, attention.head_dim)),
        Some(RopeScaling::Linear { factor }) => pairs.extend([
            ("rope.scaling.type", Value::Text("linear".into())),
            ("rope.scaling.factor", Value::Float(*factor)),
        ]),
        Some(RopeScaling::Yarn {
            factor,
            original_max_position_embeddings,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: None,
        }) => pairs.extend([
            ("rope.scaling.type", Value::Text("yarn".into())),
            ("rope.scaling.factor", Value::Float(*factor)),
            (
                "rope.scaling.original_context_length",
                size(*original_max_position_embeddings),
            ),
        ]),
        Some(RopeScaling::Yarn { .. }) => return None,
    }
    let metadata = pairs
        .into_iter()
        .map(|(key, value)| (format!("{ARCHITECTURE}.{key}"), value));
    Some(Written {
        metadata: metadata.collect(),
        freqs,
        head_dim: attention.head_dim,
    })
}
