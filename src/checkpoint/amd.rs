//! AMD's released hybrids (spec 1.9): the base's Llama `config.json` beside `hybrid_config.json`, whose
//! fields hold for all MLA layers and all Mamba2 layers alike.

use std::path::Path;

use serde_json::{Value, json};

use super::{Fields, llama};
use crate::mixer::{AttentionConfig, Mamba2Config, MixerConfig, MlaConfig, RopeConfig};
use crate::model::ModelConfig;
use crate::{Error, Result};

/// Taps of the convolution and positions a chunk; neither is in the file.
const D_CONV: usize = 4;
const CHUNK: usize = 256;

/// # Errors
/// Names the field that is missing, wrong, or at odds with `config.json`.
pub(super) fn read(
    base_path: &Path,
    base: &Value,
    path: &Path,
    value: &Value,
) -> Result<ModelConfig> {
    let mut config = llama::read(base_path, base)?;
    let f = Fields {
        path,
        object: value,
    };
    let attention = config.attention(0)?.clone();
    let agrees = [
        ("hidden_size", config.hidden_size),
        ("d_model", config.hidden_size),
        ("intermediate_size", config.intermediate_size),
        ("n_layer", config.layers.len()),
        ("num_attention_heads", attention.num_attention_heads),
        ("num_key_value_heads", attention.num_key_value_heads),
    ];
    for (field, wanted) in agrees {
        let found = f.size(field)?;
        if found != wanted {
            return Err(Error::file(
                path,
                format!("{field} is {found}, config.json says {wanted}"),
            ));
        }
    }
    let mla = mla(path, &f, &attention)?;
    let mamba2 = mamba2(path, &f)?;
    let Some(mla_layers) = f.given("mla_layers").and_then(Value::as_array) else {
        return Err(f.wrong("mla_layers", "a list of layers"));
    };
    config.layers.fill(MixerConfig::Mamba2(mamba2));
    for layer in mla_layers {
        let index = layer.as_u64().map(|i| i as usize);
        let Some(slot) = index.and_then(|i| config.layers.get_mut(i)) else {
            return Err(Error::file(
                path,
                format!("mla_layers names layer {layer}, which does not exist"),
            ));
        };
        *slot = MixerConfig::Mla(mla.clone());
    }
    config.validate().map_err(|e| Error::file(path, e))?;
    Ok(config)
}

fn mla(path: &Path, f: &Fields, attention: &AttentionConfig) -> Result<MlaConfig> {
    let scaling = match f.given("rope_scaling") {
        Some(scaling) => llama::read_scaling(path, scaling)?,
        None => None,
    };
    Ok(MlaConfig {
        num_attention_heads: attention.num_attention_heads,
        num_key_value_heads: match f.flag("use_full_kv_head")? {
            true => attention.num_attention_heads,
            false => attention.num_key_value_heads,
        },
        q_lora_rank: f.size("q_lora_rank")?,
        kv_lora_rank: f.size("kv_lora_rank")?,
        qk_nope_head_dim: f.size("qk_nope_head_dim")?,
        qk_rope_head_dim: f.size("qk_rope_head_dim")?,
        v_head_dim: f.size("v_head_dim")?,
        use_lora_layer_norm: f.flag("use_lora_layer_norm")?,
        rope: RopeConfig {
            theta: f.number("rope_theta", 10_000.0)?,
            scaling,
            inv_freq: None,
        },
    })
}

fn mamba2(path: &Path, f: &Fields) -> Result<Mamba2Config> {
    let Some(ssm) = f.given("ssm_cfg").filter(|v| v.is_object()) else {
        return Err(f.wrong("ssm_cfg", "an object"));
    };
    let ssm = Fields { path, object: ssm };
    let (d_inner, d_xb) = (f.size("d_inner")?, f.size("d_xb")?);
    let (heads, d_state) = (ssm.size("ngroups")?, ssm.size("d_state")?);
    if heads == 0 || d_state == 0 || !d_inner.is_multiple_of(heads) || !d_xb.is_multiple_of(d_state)
    {
        return Err(Error::file(
            path,
            format!(
                "d_inner {d_inner} and d_xb {d_xb} do not divide into {heads} heads with d_state {d_state}"
            ),
        ));
    }
    Ok(Mamba2Config {
        num_heads: heads,
        num_kv_heads: d_xb / d_state,
        head_dim: d_inner / heads,
        d_state,
        d_conv: D_CONV,
        repeat_kv_before_conv: ssm.flag("repeat_kv_before_conv")?,
        chunk_size: CHUNK,
    })
}

/// `config.json` and `hybrid_config.json`.
///
/// # Errors
/// Names the first layer that this format cannot say.
pub(super) fn write(config: &ModelConfig) -> Result<(Value, Value)> {
    let first = |kind: &str| config.layers.iter().find(|l| l.name() == kind);
    let mla = match first("mla") {
        Some(MixerConfig::Mla(c)) => Some(c),
        _ => None,
    };
    let mamba2 = match first("mamba2") {
        Some(MixerConfig::Mamba2(c)) => Some(c),
        _ => None,
    };
    let refuse = |i: usize, why: &str| {
        Err(Error::invalid(format!(
            "layer {i} ({}) {why}: AMD's format cannot say it, use --format zebroid",
            config.layers[i].name()
        )))
    };
    for (i, layer) in config.layers.iter().enumerate() {
        let odd = match layer {
            MixerConfig::Attention(_) => return refuse(i, "is neither mla nor mamba2"),
            MixerConfig::Mla(c) if c.rope.inv_freq.is_some() => {
                return refuse(i, "has frequencies of its own");
            }
            MixerConfig::Mla(c) => mla != Some(c),
            MixerConfig::Mamba2(c) if c.d_conv != D_CONV => {
                return refuse(i, "has another d_conv than 4");
            }
            MixerConfig::Mamba2(c) => mamba2 != Some(c),
        };
        if odd {
            return refuse(i, "has other sizes than the first of its kind");
        }
    }
    // Where one kind is absent, its fields follow from the other's heads.
    let (heads, kv_heads, head_dim) = match (mamba2, mla) {
        (Some(c), _) => (c.num_heads, c.num_kv_heads, c.head_dim),
        (None, Some(c)) => (c.num_attention_heads, c.num_key_value_heads, c.v_head_dim),
        (None, None) => unreachable!("a model has layers, and each is one of the two"),
    };
    let attention = AttentionConfig {
        num_attention_heads: heads,
        num_key_value_heads: kv_heads,
        head_dim,
        rope: None,
    };
    let standard = MlaConfig {
        num_attention_heads: heads,
        num_key_value_heads: kv_heads,
        q_lora_rank: config.hidden_size,
        kv_lora_rank: head_dim,
        qk_nope_head_dim: head_dim / 2,
        qk_rope_head_dim: head_dim - head_dim / 2,
        v_head_dim: head_dim,
        use_lora_layer_norm: false,
        rope: RopeConfig::new(10_000.0),
    };
    let full = mla.is_some_and(|c| c.num_key_value_heads != kv_heads);
    let m = mla.unwrap_or(&standard);
    let layers: Vec<usize> = (0..config.layers.len())
        .filter(|i| config.layers[*i].name() == "mla")
        .collect();
    let hybrid = json!({
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "silu",
        "n_layer": config.layers.len(),
        "mla_layers": layers,
        "rms_norm_eps": config.rms_norm_eps,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "kv_lora_rank": m.kv_lora_rank,
        "q_lora_rank": m.q_lora_rank,
        "use_lora_layer_norm": m.use_lora_layer_norm,
        "use_full_kv_head": full,
        "qk_rope_head_dim": m.qk_rope_head_dim,
        "v_head_dim": m.v_head_dim,
        "qk_nope_head_dim": m.qk_nope_head_dim,
        "qkv_rank_divisor": 8,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": m.rope.theta,
        "rope_scaling": scaling(m),
        "attention_bias": false,
        "attention_dropout": 0.0,
        "rope_type": "yarn",
        "d_model": config.hidden_size,
        "ssm_cfg": {
            "expand": 1,
            "ngroups": heads,
            "d_state": mamba2.map_or(head_dim, |c| c.d_state),
            "repeat_kv_before_conv": mamba2.is_some_and(|c| c.repeat_kv_before_conv),
        },
        "d_inner": heads * head_dim,
        "d_xb": kv_heads * mamba2.map_or(head_dim, |c| c.d_state),
    });
    let base = llama::base(config, &attention, m.rope.theta, Value::Null);
    Ok((base, hybrid))
}

/// AMD's file leaves out what has its default.
fn scaling(mla: &MlaConfig) -> Value {
    let mut value = json!(mla.rope.scaling);
    if let Some(object) = value.as_object_mut() {
        for (field, default) in [("beta_fast", 32.0), ("beta_slow", 1.0)] {
            if object.get(field) == Some(&json!(default)) {
                object.remove(field);
            }
        }
    }
    value
}
