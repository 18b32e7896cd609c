//! Every way a folder can be wrong gets a message that names what is wrong; no file makes a panic.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};

use super::save::write_sharded;
use super::*;
use crate::mixer::{AttentionConfig, MixerConfig, RopeConfig, RopeScaling};
use crate::op::linear::Matrix;

pub(super) fn config(tied: bool) -> ModelConfig {
    let attention = AttentionConfig::new(2, 1, 4, Some(RopeConfig::new(10_000.0)));
    ModelConfig {
        model_type: ModelConfig::MODEL_TYPE.into(),
        format_version: FORMAT_VERSION,
        hidden_size: 8,
        intermediate_size: 6,
        vocab_size: 10,
        max_position_embeddings: 32,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: tied,
        embedding_multiplier: 1.0,
        residual_multiplier: 1.0,
        logits_scaling: 1.0,
        bos_token_id: Some(1),
        eos_token_id: vec![2, 3],
        layers: vec![MixerConfig::Attention(attention); 2],
        converted: None,
    }
}

pub(super) fn tensors(config: &ModelConfig) -> BTreeMap<String, Tensor> {
    let make = |(i, (name, shape)): (usize, (String, Vec<usize>))| {
        let n: usize = shape.iter().product();
        let data: Vec<f32> = (0..n).map(|j| ((i * 31 + j) as f32).sin()).collect();
        (name, Tensor::from_vec(data, shape, &Device::Cpu).unwrap())
    };
    config.params().into_iter().enumerate().map(make).collect()
}

/// A folder that nothing is known of.
pub(super) fn write(
    out: &Path,
    format: Format,
    config: &ModelConfig,
    weights: impl Into<Weights>,
    force: bool,
) -> Result<()> {
    let record = Provenance::default();
    save(out, format, config, weights, None, &record, force)
}

pub(super) struct Folder {
    _root: tempfile::TempDir,
    pub path: PathBuf,
}

impl Folder {
    fn new(config: &ModelConfig, tensors: &BTreeMap<String, Tensor>) -> Self {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("model");
        write(&path, Format::Llama, config, tensors, false).unwrap();
        Self { _root: root, path }
    }

    pub fn whole() -> Self {
        Self::new(&config(true), &tensors(&config(true)))
    }

    pub fn weights(&self) -> PathBuf {
        self.path.join("model.safetensors")
    }

    /// Rewrites the weights without any check.
    fn store(&self, tensors: &BTreeMap<String, Tensor>) {
        write_tensors(&self.weights(), tensors, Default::default()).unwrap();
    }

    /// Changes a field of config.json.
    pub fn set(&self, field: &str, value: serde_json::Value) {
        let path = self.path.join("config.json");
        let mut json = read_json(&path).unwrap();
        json[field] = value;
        fs::write(path, json.to_string()).unwrap();
    }

    /// What opening and loading says.
    pub fn error(&self) -> String {
        let loaded = Checkpoint::open(&self.path).and_then(|c| c.parts());
        loaded.expect_err("this folder is wrong").to_string()
    }
}

pub(super) fn bits(t: &Tensor) -> Vec<u32> {
    let values = t.to_dtype(DType::F32).unwrap().flatten_all().unwrap();
    values
        .to_vec1::<f32>()
        .unwrap()
        .into_iter()
        .map(f32::to_bits)
        .collect()
}

#[test]
fn formats_round_trip() {
    for tied in [true, false] {
        let (config, tensors) = (config(tied), tensors(&config(tied)));
        for format in [Format::Llama, Format::Zebroid] {
            let root = tempfile::tempdir().unwrap();
            let path = root.path().join("m");
            write(&path, format, &config, &tensors, false).unwrap();
            let read = Checkpoint::open(&path).unwrap();
            assert_eq!((read.config.clone(), read.format), (config.clone(), format));
            let raw = read.stored().unwrap();
            assert!((tensors.iter()).all(|(name, t)| bits(t) == bits(&raw.get(name).unwrap())));
        }
    }
}

#[test]
fn scalings_and_newer_spellings_are_read() {
    let folder = Folder::whole();
    let scaling = || match &Checkpoint::open(&folder.path).unwrap().config.layers[0] {
        MixerConfig::Attention(a) => a.rope.clone().unwrap(),
        _ => unreachable!(),
    };
    folder.set("rope_scaling", json_scaling("linear"));
    assert_eq!(scaling().scaling, Some(RopeScaling::Linear { factor: 4.0 }));
    folder.set(
        "rope_scaling",
        serde_json::json!({ "type": "linear", "factor": 4.0 }),
    );
    assert_eq!(scaling().scaling, Some(RopeScaling::Linear { factor: 4.0 }));
    folder.set("rope_scaling", json_scaling("dynamic"));
    assert!(folder.error().contains("dynamic"));
    folder.set("rope_scaling", serde_json::Value::Null);
    folder.set(
        "rope_parameters",
        serde_json::json!({ "rope_type": "default", "rope_theta": 77.0 }),
    );
    assert_eq!(scaling(), RopeConfig::new(77.0));
}

fn json_scaling(kind: &str) -> serde_json::Value {
    serde_json::json!({ "rope_type": kind, "factor": 4.0 })
}

#[test]
fn shards_equal_one_file() {
    let folder = Folder::whole();
    let all = tensors(&config(true));
    fs::remove_file(folder.weights()).unwrap();
    write_sharded(&folder.path, &all, 600).unwrap();
    let index = folder.path.join("model.safetensors.index.json");
    assert!(index.exists());
    let read = Checkpoint::open(&folder.path).unwrap().stored().unwrap();
    assert!((all.iter()).all(|(name, t)| bits(t) == bits(&read.get(name).unwrap())));
    // AMD's loader takes every file where no index is.
    fs::rename(&index, folder.path.join("aside")).unwrap();
    assert!(Checkpoint::open(&folder.path).is_ok());
    fs::rename(folder.path.join("aside"), &index).unwrap();
    let shard = fs::read_dir(&folder.path)
        .unwrap()
        .map(|e| e.unwrap().path());
    let shard = shard
        .filter(|p| p.extension().is_some_and(|e| e == "safetensors"))
        .max()
        .unwrap();
    fs::remove_file(&shard).unwrap();
    let name = shard.file_name().unwrap().to_str().unwrap();
    assert!(folder.error().contains(name), "{}", folder.error());
}

#[test]
fn half_precision_is_read() {
    for dtype in [DType::F16, DType::BF16] {
        let half = |t: &Tensor| t.to_dtype(dtype).unwrap();
        let halves: BTreeMap<_, _> = tensors(&config(true))
            .iter()
            .map(|(n, t)| (n.clone(), half(t)))
            .collect();
        let folder = Folder::new(&config(true), &halves);
        let read = Checkpoint::open(&folder.path).unwrap();
        let weights = read.parts().unwrap().weights;
        for (name, weight) in weights.iter() {
            assert_eq!(
                bits(&weight.to_tensor().unwrap()),
                bits(&halves[name]),
                "{name}"
            );
            // Matrices stay where they stand in the file.
            let is_matrix = halves[name].rank() == 2;
            assert_eq!(matches!(weight, Matrix::Stored(_)), is_matrix, "{name}");
        }
        // Written again, they are what they were.
        let again = folder.path.join("again");
        write(
            &again,
            Format::Llama,
            &read.config,
            read.stored().unwrap(),
            false,
        )
        .unwrap();
        let name = "model.safetensors";
        let [one, other] = [&folder.path, &again].map(|f| fs::read(f.join(name)).unwrap());
        assert!(one == other);
    }
}

/// A stored head beside tied embeddings: the same bytes are a copy, others untie the model.
#[test]
fn a_stored_head_is_a_copy_or_unties() {
    let mut all = tensors(&config(true));
    all.insert(
        "lm_head.weight".into(),
        all["model.embed_tokens.weight"].copy().unwrap(),
    );
    let folder = Folder::new(&config(true), &all);
    let read = Checkpoint::open(&folder.path).unwrap();
    assert!(read.config.tie_word_embeddings && read.stored().unwrap().contains("lm_head.weight"));
    all.insert(
        "lm_head.weight".into(),
        (&all["model.embed_tokens.weight"] * 2.0).unwrap(),
    );
    folder.store(&all);
    assert!(
        !Checkpoint::open(&folder.path)
            .unwrap()
            .config
            .tie_word_embeddings
    );
}

#[test]
fn wrong_tensors_are_all_named() {
    let folder = Folder::whole();
    let mut all = tensors(&config(true));
    all.remove("model.norm.weight");
    all.insert(
        "model.layers.0.self_attn.q_proj.bias".into(),
        Tensor::zeros(8, DType::F32, &Device::Cpu).unwrap(),
    );
    let up = "model.layers.1.mlp.up_proj.weight";
    all.insert(up.into(), all[up].t().unwrap().contiguous().unwrap());
    let gate = "model.layers.1.mlp.gate_proj.weight";
    all.insert(gate.into(), all[gate].to_dtype(DType::F64).unwrap());
    folder.store(&all);
    let message = folder.error();
    for part in [
        "4 tensor problem(s)",
        "missing model.norm.weight [8]",
        "unexpected model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.mlp.up_proj.weight has shape [8, 6], the config needs [6, 8]",
        "model.layers.1.mlp.gate_proj.weight has dtype F64",
        "model.safetensors",
    ] {
        assert!(message.contains(part), "{part} is not in: {message}");
    }
}

#[test]
fn values_that_are_no_numbers_are_named() {
    for (bad, dtype) in [
        (f32::NAN, DType::F32),
        (f32::INFINITY, DType::BF16),
        (f32::NAN, DType::F16),
    ] {
        let folder = Folder::whole();
        let mut all = tensors(&config(true));
        let name = "model.layers.0.mlp.down_proj.weight";
        let mut data: Vec<f32> = all[name].flatten_all().unwrap().to_vec1().unwrap();
        data[17] = bad;
        let t = Tensor::from_vec(data, (8, 6), &Device::Cpu)
            .unwrap()
            .to_dtype(dtype)
            .unwrap();
        all.insert(name.into(), t);
        folder.store(&all);
        assert!(
            folder.error().contains(name) && folder.error().contains("NaN"),
            "{}",
            folder.error()
        );
    }
}

#[test]
fn damaged_files_are_named() {
    let folder = Folder::whole();
    let whole = fs::read(folder.weights()).unwrap();
    let mut oversized = whole.clone();
    oversized[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    for bytes in [
        &whole[..whole.len() - 5],
        &whole[..4],
        &whole[..200],
        &oversized,
        b"",
    ] {
        fs::write(folder.weights(), bytes).unwrap();
        assert!(
            folder.error().contains("model.safetensors"),
            "{}",
            folder.error()
        );
    }
    fs::remove_file(folder.weights()).unwrap();
    assert!(
        folder.error().contains("no .safetensors file"),
        "{}",
        folder.error()
    );
}

/// Any byte changed, any tail lost: an error or a checkpoint, never a panic.
#[test]
fn damage_anywhere_never_panics() {
    use rand::{RngExt, SeedableRng};
    let folder = Folder::whole();
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(4);
    for name in ["model.safetensors", "config.json"] {
        let path = folder.path.join(name);
        let whole = fs::read(&path).unwrap();
        for _ in 0..200 {
            let mut bytes = whole.clone();
            match random.random_bool(0.3) {
                true => bytes.truncate(random.random_range(0..bytes.len())),
                false => {
                    // Mostly the header, where damage is most telling.
                    let at = random.random_range(0..bytes.len().min(1500));
                    bytes[at] = random.random();
                }
            }
            fs::write(&path, bytes).unwrap();
            let _ = Checkpoint::open(&folder.path).and_then(|c| c.model(&Place::cpu()));
        }
        fs::write(&path, &whole).unwrap();
    }
}

#[test]
fn a_mistral_is_a_llama_unless_its_attention_is_within_a_window() {
    let folder = Folder::whole();
    let llama = Checkpoint::open(&folder.path).unwrap().config;
    folder.set("model_type", serde_json::json!("mistral"));
    for window in [serde_json::Value::Null, serde_json::json!(32)] {
        folder.set("sliding_window", window);
        assert_eq!(Checkpoint::open(&folder.path).unwrap().config, llama);
    }
    folder.set("sliding_window", serde_json::json!(16));
    assert!(folder.error().contains("set sliding_window to null"));
}

#[test]
fn configs_that_cannot_work_are_named() {
    for (field, value, part) in [
        (
            "model_type",
            serde_json::json!("gpt2"),
            "gpt2 is not supported",
        ),
        (
            "hidden_size",
            serde_json::json!("8"),
            "hidden_size must be a whole number",
        ),
        (
            "vocab_size",
            serde_json::Value::Null,
            "vocab_size is missing",
        ),
        (
            "num_attention_heads",
            serde_json::json!(3),
            "multiple of num_key_value_heads",
        ),
        (
            "num_key_value_heads",
            serde_json::json!(0),
            "num_key_value_heads 0",
        ),
        ("attention_bias", serde_json::json!(true), "attention_bias"),
        ("hidden_act", serde_json::json!("gelu"), "gelu"),
        ("hidden_act", serde_json::json!(2), "hidden_act 2"),
        (
            "rope_scaling",
            serde_json::json!(3),
            "rope_scaling must be an object, not 3",
        ),
        (
            "rope_parameters",
            serde_json::json!([]),
            "rope_parameters must be an object",
        ),
        (
            "rope_scaling",
            serde_json::json!({"rope_type": 7, "factor": 2.0}),
            "rope_type must be a name, not 7",
        ),
        (
            "rope_scaling",
            serde_json::json!({"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}),
            "mscale 0.7 is not supported",
        ),
        (
            "rope_scaling",
            serde_json::json!({"factor": 2.0}),
            "rope_type is missing",
        ),
        ("num_hidden_layers", serde_json::json!(0), "layers"),
        ("rms_norm_eps", serde_json::json!(-1.0), "rms_norm_eps -1"),
        (
            "rms_norm_eps",
            serde_json::json!(1e308),
            "rms_norm_eps 1e308",
        ),
        (
            "bos_token_id",
            serde_json::json!(10),
            "bos_token_id 10 is outside the vocabulary: vocab_size is 10",
        ),
        (
            "eos_token_id",
            serde_json::json!([2, 4_000_000_000u32]),
            "eos_token_id 4000000000 is outside",
        ),
    ] {
        let folder = Folder::whole();
        folder.set(field, value);
        if field == "num_attention_heads" {
            folder.set("num_key_value_heads", serde_json::json!(2));
        }
        let message = folder.error();
        assert!(
            message.contains(part) && message.contains("config.json"),
            "{field}: {message}"
        );
    }
}

/// What a SmolLM3's config leaves out is what transformers take then.
#[test]
fn a_smollm3_without_ties_is_tied() {
    let folder = Folder::whole();
    folder.set("model_type", serde_json::json!("smollm3"));
    let path = folder.path.join("config.json");
    let mut json = read_json(&path).unwrap();
    let fields = json.as_object_mut().unwrap();
    fields.remove("tie_word_embeddings");
    fields.remove("rope_theta");
    fs::write(&path, json.to_string()).unwrap();
    let config = Checkpoint::config_only(&folder.path).unwrap().0;
    assert!(config.tie_word_embeddings);
    let theta = config.attention(0).unwrap().rope.as_ref().unwrap().theta;
    assert_eq!(theta, 2e6);
}

/// Of a family: what is set in its `config.json`, and what is said.
#[test]
fn what_a_family_has_that_no_layer_computes_is_named() {
    let cases = [
        ("gemma2", "use_cache", serde_json::json!(true), "soft caps"),
        ("qwen3_moe", "use_cache", serde_json::json!(true), "experts"),
        (
            "qwen2",
            "layer_types",
            serde_json::json!(["full_attention", "sliding_attention"]),
            "sliding_window 8 is below max_position_embeddings 32",
        ),
        (
            "qwen3",
            "use_sliding_window",
            serde_json::json!(true),
            "sliding_window 8 is below",
        ),
        (
            "smollm3",
            "no_rope_layers",
            serde_json::json!([1]),
            "no_rope_layers must be a list of 2 numbers, 0 or 1, not [1]",
        ),
        (
            "granite",
            "logits_scaling",
            serde_json::json!(0),
            "logits_scaling 0 must be between",
        ),
        (
            "granite",
            "attention_multiplier",
            serde_json::json!(-1),
            "attention_multiplier -1 must be above 0",
        ),
    ];
    for (family, field, value, part) in cases {
        let folder = Folder::whole();
        folder.set("model_type", serde_json::json!(family));
        folder.set("sliding_window", serde_json::json!(8));
        folder.set(field, value);
        let message = folder.error();
        assert!(
            message.contains(part) && message.contains("config.json"),
            "{family}: {message}"
        );
    }
}

/// The field, its value and the bound are said, at once and before memory is taken.
#[test]
fn sizes_beyond_reason_are_named() {
    for (field, most) in [
        ("num_hidden_layers", 1 << 10),
        ("num_attention_heads", 1 << 12),
        ("hidden_size", 1 << 20),
        ("intermediate_size", 1 << 20),
        ("head_dim", 1 << 20),
        ("vocab_size", 1 << 24),
        ("max_position_embeddings", 1 << 31),
    ] {
        for value in [most + 1, u32::MAX as usize] {
            let folder = Folder::whole();
            folder.set(field, serde_json::json!(value));
            let said = folder.error();
            let wanted = format!("{field} {value} is above {most}");
            assert!(
                said.contains(&wanted) && said.contains("config.json"),
                "{said}"
            );
        }
    }
    let folder = Folder::whole();
    folder.set("num_hidden_layers", serde_json::json!(1u64 << 40));
    assert!(
        folder
            .error()
            .contains("num_hidden_layers must be a whole number below 2^32")
    );
    // Each in its bounds, together too wide.
    let folder = Folder::whole();
    folder.set("num_attention_heads", serde_json::json!(1 << 12));
    folder.set("head_dim", serde_json::json!(1 << 10));
    assert!(
        folder
            .error()
            .contains("4096 heads of 1024 are wider than 1048576")
    );
}

/// Our own config says sizes layer by layer; sums of them wrap nowhere.
#[test]
fn sizes_beyond_reason_are_named_in_our_own_config() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("m");
    let (config, all) = (config(true), tensors(&config(true)));
    write(&path, Format::Zebroid, &config, &all, false).unwrap();
    let file = path.join("config.json");
    let mut json = read_json(&file).unwrap();
    json["layers"][1] = serde_json::json!({
        "mixer": "mla", "num_attention_heads": 2, "num_key_value_heads": 1, "q_lora_rank": 4,
        "kv_lora_rank": 4, "qk_nope_head_dim": 2, "qk_rope_head_dim": (1u64 << 63) - 2, "v_head_dim": 4,
        "rope": {"theta": 10000.0},
    });
    fs::write(&file, json.to_string()).unwrap();
    let said = Checkpoint::open(&path).unwrap_err().to_string();
    let wanted = "layer 1 (mla): qk_rope_head_dim 9223372036854775806 is above 1048576";
    assert!(
        said.contains(wanted) && said.contains("config.json"),
        "{said}"
    );
}

#[test]
fn newer_versions_and_unknown_fields_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("m");
    write(
        &path,
        Format::Zebroid,
        &config(true),
        &tensors(&config(true)),
        false,
    )
    .unwrap();
    let file = path.join("config.json");
    let whole = read_json(&file).unwrap();
    for (field, part) in [("format_version", "newer"), ("hiden_size", "hiden_size")] {
        let mut json = whole.clone();
        json[field] = 99.into();
        fs::write(&file, json.to_string()).unwrap();
        let message = Checkpoint::open(&path).unwrap_err().to_string();
        assert!(
            message.contains(part) && message.contains("config.json"),
            "{message}"
        );
    }
}

#[test]
fn an_existing_output_is_kept_unless_forced() {
    let folder = Folder::whole();
    let (config, all) = (config(true), tensors(&config(true)));
    let kept = folder.path.join("precious.txt");
    fs::write(&kept, "mine").unwrap();
    let message = write(&folder.path, Format::Llama, &config, &all, false)
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("already exists") && message.contains("--force"),
        "{message}"
    );
    assert!(kept.exists());
    // What zebroid did not write stays, whatever is asked.
    let force = || write(&folder.path, Format::Llama, &config, &all, true);
    let message = force().unwrap_err().to_string();
    assert!(
        message.contains("precious.txt: not written by zebroid"),
        "{message}"
    );
    assert_eq!(fs::read_to_string(&kept).unwrap(), "mine");
    fs::remove_file(&kept).unwrap();
    fs::create_dir(folder.path.join("photos")).unwrap();
    assert!(force().unwrap_err().to_string().contains("photos"));
    fs::remove_dir(folder.path.join("photos")).unwrap();
    force().unwrap();
    assert!(Checkpoint::open(&folder.path).is_ok());
    leaves_nothing_behind(folder.path.parent().unwrap(), 1);
}

/// A bank is replaced, an input never.
#[test]
fn what_is_read_is_not_replaced() {
    let root = tempfile::tempdir().unwrap();
    let (config, all) = (config(true), tensors(&config(true)));
    let bank = root.path().join("bank");
    for name in ["mla", "mamba2"] {
        fs::create_dir_all(&bank).unwrap();
        write(&bank.join(name), Format::Llama, &config, &all, false).unwrap();
    }
    check_output(&bank, true, &[]).unwrap();
    for (out, input) in [
        (&bank, &bank),
        (&bank, &bank.join("mla")),
        (&bank.join("mla"), &bank),
    ] {
        let dotted = input.join("..").join(input.file_name().unwrap());
        let message = check_output(out, true, &[&dotted]).unwrap_err().to_string();
        assert!(message.contains("is read"), "{message}");
    }
    fs::write(bank.join("mla").join("notes.txt"), "").unwrap();
    let message = check_output(&bank, true, &[]).unwrap_err().to_string();
    assert!(message.contains("notes.txt"), "{message}");
}

#[test]
fn a_place_that_cannot_be_written_is_named() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("file");
    fs::write(&file, "").unwrap();
    let (config, all) = (config(true), tensors(&config(true)));
    let message = write(&file.join("m"), Format::Llama, &config, &all, false)
        .unwrap_err()
        .to_string();
    assert!(message.contains("file"), "{message}");
    // A config that the format cannot say leaves nothing either.
    let mut odd = config.clone();
    odd.layers[1] = match &odd.layers[1] {
        MixerConfig::Attention(a) => MixerConfig::Attention(AttentionConfig {
            head_dim: 6,
            ..a.clone()
        }),
        _ => unreachable!(),
    };
    let message = write(&root.path().join("m"), Format::Llama, &odd, &all, false)
        .unwrap_err()
        .to_string();
    assert!(message.contains("layer 1"), "{message}");
    leaves_nothing_behind(root.path(), 1);
}

fn leaves_nothing_behind(folder: &Path, entries: usize) {
    assert_eq!(
        fs::read_dir(folder).unwrap().count(),
        entries,
        "temporary files are left"
    );
}
