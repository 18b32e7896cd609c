//! AMD's released hybrids: the base's Llama `config.json` beside `hybrid_config.json`, whose
//! fields hold for all MLA layers and all Mamba2 layers alike.

use std::path::Path;

use serde_json::{Value, json};

use super::Fields;
use super::family::llama;
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
    llama::supported(&f)?;
    let attention = config.attention(0)?.clone();
    let agrees = [
        ("hidden_size", config.hidden_size),
        ("d_model", config.hidden_size),
        ("intermediate_size", config.intermediate_size),
        ("n_layer", config.layers.len()),
        ("num_attention_heads", attention.num_attention_heads),
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
    let full = f.flag("use_full_kv_head")?;
    let (all, base) = (attention.num_attention_heads, attention.num_key_value_heads);
    let found = f.size("num_key_value_heads")?;
    // AMD's says as many as query heads then; zebroid 0.1 wrote the base's.
    if found != base && !(full && found == all) {
        return Err(Error::file(
            path,
            format!(
                "num_key_value_heads is {found} and use_full_kv_head {full}; config.json has {base}, of {all} heads"
            ),
        ));
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
    let scaling = match f.object("rope_scaling")? {
        Some(scaling) => llama::read_scaling(path, scaling)?,
        None => None,
    };
    Ok(MlaConfig {
        num_attention_heads: attention.num_attention_heads,
        num_key_value_heads: attention.num_key_value_heads,
        use_full_kv_head: f.flag("use_full_kv_head")?,
        q_lora_rank: f.size("q_lora_rank")?,
        kv_lora_rank: f.size("kv_lora_rank")?,
        qk_nope_head_dim: f.size("qk_nope_head_dim")?,
        qk_rope_head_dim: f.size("qk_rope_head_dim")?,
        v_head_dim: f.size("v_head_dim")?,
        use_lora_layer_norm: f.flag("use_lora_layer_norm")?,
        attention_bias: false,
        rope: RopeConfig {
            theta: f.number("rope_theta", 10_000.0)?,
            scaling,
            inv_freq: None,
        },
    })
}

fn mamba2(path: &Path, f: &Fields) -> Result<Mamba2Config> {
    let Some(ssm) = f.object("ssm_cfg")? else {
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
    if let Some((name, value)) = config.multipliers().iter().find(|(_, value)| *value != 1.0) {
        return Err(Error::invalid(format!(
            "{name} is {value}: AMD's format cannot say it, use --format zebroid"
        )));
    }
    for (i, layer) in config.layers.iter().enumerate() {
        let odd = match layer {
            MixerConfig::Mla(c) if c.rope.inv_freq.is_some() => {
                return refuse(i, "has frequencies of its own");
            }
            MixerConfig::Mla(c) if c.attention_bias => return refuse(i, "has biases"),
            MixerConfig::Mla(c) => mla != Some(c),
            MixerConfig::Mamba2(c) if c.d_conv != D_CONV => {
                return refuse(i, "has another d_conv than 4");
            }
            MixerConfig::Mamba2(c) => mamba2 != Some(c),
            _ => return refuse(i, "is neither mla nor mamba2"),
        };
        if odd {
            return refuse(i, "has other sizes than the first of its kind");
        }
    }
    // Where one kind is absent, its fields follow from the other's heads: those of the base.
    let (heads, kv_heads, head_dim) = match (mamba2, mla) {
        (Some(c), _) => (c.num_heads, c.num_kv_heads, c.head_dim),
        (None, Some(c)) => (c.num_attention_heads, c.num_key_value_heads, c.v_head_dim),
        (None, None) => unreachable!("a model has layers, and each is one of the two"),
    };
    // zebroid 0.1 kept no `use_full_kv_head`: its `num_key_value_heads` were the query heads.
    let full = mla.is_some_and(|c| c.use_full_kv_head || c.num_key_value_heads != kv_heads);
    let mla_kv_heads = if full { heads } else { kv_heads };
    if let Some(c) = mla
        && (c.num_attention_heads, c.kv_heads()) != (heads, mla_kv_heads)
    {
        return Err(Error::invalid(format!(
            "mla layers have {} query and {} key/value heads, mamba2 layers {heads} and {kv_heads}: AMD's format \
             cannot say it, use --format zebroid",
            c.num_attention_heads,
            c.kv_heads()
        )));
    }
    let attention = AttentionConfig::new(heads, kv_heads, head_dim, None);
    let standard = MlaConfig {
        num_attention_heads: heads,
        num_key_value_heads: kv_heads,
        use_full_kv_head: false,
        q_lora_rank: config.hidden_size,
        kv_lora_rank: head_dim,
        qk_nope_head_dim: head_dim / 2,
        qk_rope_head_dim: head_dim - head_dim / 2,
        v_head_dim: head_dim,
        use_lora_layer_norm: false,
        attention_bias: false,
        rope: RopeConfig::new(10_000.0),
    };
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
        "num_key_value_heads": mla_kv_heads,
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use candle_core::{DType, Device, Tensor};

    use super::*;
    use crate::checkpoint::{Checkpoint, Format, Provenance, read_json, save};

    /// What AMD's trainer writes for a base of 4 query and 2 key/value heads of 8 dims.
    fn release(mla_layers: &[usize], full: bool, norm: bool) -> (Value, Value) {
        let base = json!({
            "model_type": "llama", "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 24,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
            "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
            "tie_word_embeddings": true, "vocab_size": 20, "bos_token_id": 1, "eos_token_id": [2, 3],
        });
        let hybrid = json!({
            "hidden_size": 32, "intermediate_size": 24, "hidden_act": "silu", "n_layer": 3,
            "mla_layers": mla_layers, "rms_norm_eps": 1e-5, "num_attention_heads": 4,
            "num_key_value_heads": if full { 4 } else { 2 }, "kv_lora_rank": 16, "q_lora_rank": 24,
            "use_lora_layer_norm": norm, "use_full_kv_head": full, "qk_rope_head_dim": 4,
            "v_head_dim": 8, "qk_nope_head_dim": 4, "qkv_rank_divisor": 8, "max_position_embeddings": 64,
            "rope_theta": 500000.0,
            "rope_scaling": {"factor": 32.0, "original_max_position_embeddings": 64, "rope_type": "yarn"},
            "attention_bias": false, "attention_dropout": 0.0, "rope_type": "yarn", "d_model": 32,
            "ssm_cfg": {"expand": 1, "ngroups": 4, "d_state": 8, "repeat_kv_before_conv": false},
            "d_inner": 32, "d_xb": 16,
        });
        (base, hybrid)
    }

    /// Its tensors, shape by shape.
    fn shapes(mla_layers: &[usize], full: bool, norm: bool) -> BTreeMap<String, Vec<usize>> {
        let mut all = BTreeMap::from([
            ("model.embed_tokens.weight".to_owned(), vec![20, 32]),
            ("model.norm.weight".to_owned(), vec![32]),
        ]);
        for i in 0..3 {
            let mut add = |name: &str, shape: &[usize]| {
                all.insert(format!("model.layers.{i}.{name}"), shape.to_vec());
            };
            add("input_layernorm.weight", &[32]);
            add("post_attention_layernorm.weight", &[32]);
            add("mlp.gate_proj.weight", &[24, 32]);
            add("mlp.up_proj.weight", &[24, 32]);
            add("mlp.down_proj.weight", &[32, 24]);
            if mla_layers.contains(&i) {
                let kv_heads = if full { 4 } else { 2 };
                add("mla.q_a_proj.weight", &[24, 32]);
                add("mla.q_b_proj.weight", &[32, 24]);
                add("mla.kv_a_proj_with_mqa.weight", &[20, 32]);
                add("mla.kv_b_proj.weight", &[kv_heads * 12, 16]);
                add("mla.out_proj.weight", &[32, 32]);
                if norm {
                    add("mla.q_a_layernorm.weight", &[24]);
                    add("mla.kv_a_layernorm.weight", &[16]);
                }
            } else {
                add("mamba.in_proj.weight", &[2 * 32 + 2 * 16 + 4, 32]);
                add("mamba.conv1d.weight", &[64, 1, 4]);
                add("mamba.conv1d.bias", &[64]);
                add("mamba.dt_bias", &[4]);
                add("mamba.A_log", &[4]);
                add("mamba.D", &[4]);
                add("mamba.norm.weight", &[32]);
                add("mamba.out_proj.weight", &[32, 32]);
            }
        }
        all
    }

    const PLACES: [&[usize]; 3] = [&[0, 2], &[0, 1, 2], &[]];

    fn each(check: impl Fn(&[usize], bool, bool)) {
        for place in PLACES {
            for (full, norm) in [(false, false), (false, true), (true, false), (true, true)] {
                // Without an MLA layer nothing tells how it would be.
                if !place.is_empty() || (full, norm) == (false, false) {
                    check(place, full, norm);
                }
            }
        }
    }

    #[test]
    fn releases_are_read_and_written_as_they_are() {
        each(|place, full, norm| {
            let (base, hybrid) = release(place, full, norm);
            let path = Path::new("hybrid_config.json");
            let config = read(Path::new("config.json"), &base, path, &hybrid).unwrap();
            let own: BTreeMap<_, _> = config.params().into_iter().collect();
            let case = format!("mla {place:?}, full {full}, norm {norm}");
            assert_eq!(own, shapes(place, full, norm), "{case}");
            let (base_again, hybrid_again) = write(&config).unwrap();
            if place.is_empty() {
                assert_eq!(hybrid_again["d_xb"], hybrid["d_xb"]);
                return;
            }
            assert_eq!(hybrid_again, hybrid, "{case}");
            for (field, value) in base.as_object().unwrap() {
                assert_eq!(&base_again[field], value, "{case}: {field}");
            }
        });
    }

    #[test]
    fn folders_go_from_amd_to_ours_and_back() {
        each(|place, full, norm| {
            let root = tempfile::tempdir().unwrap();
            let [amd, ours, again] = ["amd", "ours", "again"].map(|name| root.path().join(name));
            let (base, hybrid) = release(place, full, norm);
            std::fs::create_dir(&amd).unwrap();
            std::fs::write(amd.join("config.json"), base.to_string()).unwrap();
            std::fs::write(amd.join("hybrid_config.json"), hybrid.to_string()).unwrap();
            let tensors = shapes(place, full, norm).into_iter().map(|(name, shape)| {
                (name, Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap())
            });
            let file = amd.join("model.safetensors");
            crate::checkpoint::write_tensors(&file, &tensors.collect(), Default::default())
                .unwrap();
            let step = |from: &Path, to: &Path, format: Format| {
                let read = Checkpoint::open(from).unwrap();
                save(
                    to,
                    format,
                    &read.config,
                    read.stored().unwrap(),
                    None,
                    &Provenance::default(),
                    false,
                )
                .unwrap();
                read.config
            };
            let config = step(&amd, &ours, Format::Zebroid);
            assert_eq!(step(&ours, &again, Format::Amd), config);
            assert_eq!(Checkpoint::open(&again).unwrap().config, config);
            if !place.is_empty() {
                assert_eq!(
                    read_json(&again.join("hybrid_config.json")).unwrap(),
                    hybrid
                );
            }
        });
    }

    /// Hybrids of zebroid 0.1: full key/value heads were told by `num_key_value_heads` alone.
    #[test]
    fn older_hybrids_of_full_heads_are_read_and_written() {
        let path = Path::new("hybrid_config.json");
        let (base, mut hybrid) = release(&[0, 2], true, false);
        let now = read(Path::new("config.json"), &base, path, &hybrid).unwrap();
        hybrid["num_key_value_heads"] = json!(2);
        assert_eq!(
            read(Path::new("config.json"), &base, path, &hybrid).unwrap(),
            now
        );
        let mut before = now.clone();
        for layer in &mut before.layers {
            if let MixerConfig::Mla(c) = layer {
                (c.num_key_value_heads, c.use_full_kv_head) = (4, false);
            }
        }
        assert_eq!(before.params(), now.params());
        assert_eq!(write(&before).unwrap(), write(&now).unwrap());
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let path = Path::new("hybrid_config.json");
        let say = |field: &str, value: Value| {
            let (base, mut hybrid) = release(&[0], true, false);
            hybrid[field] = value;
            let read = read(Path::new("config.json"), &base, path, &hybrid);
            read.unwrap_err().to_string()
        };
        for (field, value, part) in [
            ("num_key_value_heads", json!(3), "num_key_value_heads is 3"),
            ("use_full_kv_head", json!(false), "num_key_value_heads is 4"),
            ("hidden_act", json!("gelu"), "hidden_act"),
            ("rope_scaling", json!(3), "rope_scaling"),
        ] {
            let message = say(field, value);
            assert!(
                message.contains(part) && message.contains("hybrid_config.json"),
                "{message}"
            );
        }
        let (base, hybrid) = release(&[0], false, false);
        let mut odd = read(Path::new("config.json"), &base, path, &hybrid).unwrap();
        if let MixerConfig::Mla(c) = &mut odd.layers[0] {
            c.num_attention_heads = 2;
        }
        assert!(write(&odd).unwrap_err().to_string().contains("2 query"));
    }
}
