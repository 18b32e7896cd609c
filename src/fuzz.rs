//! Parsers of outside input, each from bytes: an error or not, never a panic, nothing larger than the input asks for. `fuzz/` runs them
//! under libFuzzer, `tests/fuzz.rs` on mutations of whole files. An input takes the place of one file of a small checkpoint.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::OnceLock;

use candle_core::{Device, Tensor};

use crate::checkpoint::{Checkpoint, Format, Provenance, read_tensors, save, write_atomic};
use crate::data::{Lengths, Preferences, Records, Tokenizer, texts};
use crate::generate::{Engine, EngineOptions, Request, SamplingParams, Scheduler, Session};
use crate::mixer::{AttentionConfig, Mamba2Config, MixerConfig, MlaConfig, RopeConfig};
use crate::model::{FORMAT_VERSION, ModelConfig, Parts};
use crate::pipeline::Recipe;
use crate::serve;
use crate::weights::{Place, Weights};
use crate::{Error, Result};

/// A parser.
pub struct Target {
    pub name: &'static str,
    pub parse: fn(&[u8]) -> Result<()>,
}

pub const TARGETS: [Target; 9] = [
    Target {
        name: "safetensors",
        parse: safetensors,
    },
    Target {
        name: "gguf",
        parse: gguf,
    },
    Target {
        name: "config",
        parse: config,
    },
    Target {
        name: "hybrid_config",
        parse: hybrid_config,
    },
    Target {
        name: "recipe",
        parse: recipe,
    },
    Target {
        name: "records",
        parse: records,
    },
    Target {
        name: "tokenizer",
        parse: tokenizer,
    },
    Target {
        name: "session",
        parse: session,
    },
    Target {
        name: "request",
        parse: request,
    },
];

/// `model.safetensors`.
pub fn safetensors(bytes: &[u8]) -> Result<()> {
    const FILE: &str = "model.safetensors";
    beside(Format::Zebroid, FILE, bytes, |folder| {
        let tensors = read_tensors(&folder.join(FILE)).map(drop);
        let opened = Checkpoint::open(folder).and_then(|c| c.parts());
        tensors.and(opened?.lm(&Place::cpu()).map(drop))
    })
}

/// A whole model, with its tokenizer and chat template.
pub fn gguf(bytes: &[u8]) -> Result<()> {
    beside(Format::Gguf, MODEL, bytes, |folder| {
        let path = folder.join(MODEL);
        let weights = Checkpoint::open(&path).and_then(|c| c.parts());
        let tokenizer = Tokenizer::open(&path)?;
        tokenizer.chat_template()?;
        speak(&tokenizer)?;
        weights?.lm(&Place::cpu()).map(drop)
    })
}

/// `config.json` of any family, or our own.
pub fn config(bytes: &[u8]) -> Result<()> {
    const FILE: &str = "config.json";
    alone(FILE, bytes, |folder| sizes(&folder.join(FILE)))
}

/// AMD's `hybrid_config.json`, beside a `config.json` that is right.
pub fn hybrid_config(bytes: &[u8]) -> Result<()> {
    beside(Format::Amd, "hybrid_config.json", bytes, sizes)
}

fn sizes(path: &Path) -> Result<()> {
    let (config, _) = Checkpoint::config_only(path)?;
    let cost = config.cost(config.max_position_embeddings);
    let params = config.params().into_iter();
    let counted: usize = params
        .map(|(_, shape)| shape.iter().product::<usize>())
        .sum();
    assert_eq!(cost.params, counted);
    Ok(())
}

/// The body of a request to the server.
pub fn request(bytes: &[u8]) -> Result<()> {
    serve::check_body(bytes)
}

/// A recipe, with its sweep, for the small model.
pub fn recipe(bytes: &[u8]) -> Result<()> {
    const FILE: &str = "recipe.toml";
    alone(FILE, bytes, |folder| {
        let config = model(Format::Llama).config;
        for variant in Recipe::load_all(&folder.join(FILE), &[])? {
            variant.recipe.check(&config)?;
        }
        Ok(())
    })
}

/// What a text file may be called. The first byte of an input chooses, the rest is in the file.
pub const NAMES: [&str; 7] = [
    "x.jsonl",
    "x.json",
    "x.txt",
    "x.jsonl.gz",
    "x.jsonl.zst",
    "x.parquet",
    "x.arrow",
];

/// Texts, and pairs for DPO.
pub fn records(bytes: &[u8]) -> Result<()> {
    let (first, bytes) = bytes.split_first().unwrap_or((&0, &[]));
    let name = NAMES[*first as usize % NAMES.len()];
    beside(Format::Zebroid, name, bytes, |folder| {
        let tokenizer = Tokenizer::open(folder)?;
        let path = folder.join(name);
        let lengths = Lengths {
            max_prompt: 16,
            max_length: 32,
        };
        let pairs = Preferences::load(&path, &tokenizer, lengths).map(drop);
        let all = texts(&path, &tokenizer)
            .and_then(|mut all| all.try_for_each(|text| text?.tokens(&tokenizer).map(drop)));
        let raw = Records::open(&path, "an object")
            .and_then(|mut all| all.try_for_each(|record| record.map(drop)));
        pairs.or(all).or(raw)
    })
}

/// `tokenizer.json`.
pub fn tokenizer(bytes: &[u8]) -> Result<()> {
    speak(&Tokenizer::from_json(bytes)?)
}

/// A text into tokens and back.
fn speak(tokenizer: &Tokenizer) -> Result<()> {
    let ids = tokenizer.encode("<s>ab  cab é\n世</s>")?;
    tokenizer.decode(&ids)?;
    let mut stream = tokenizer.decode_stream(&[]);
    for id in ids {
        stream.push(id)?;
    }
    stream.finish().map(drop)
}

/// A session of the small hybrid, which then goes on.
pub fn session(bytes: &[u8]) -> Result<()> {
    let engine = engine();
    alone("talk", bytes, |folder| {
        let session = Session::open(engine, &folder.join("talk"))?;
        if session.tokens.is_empty() {
            return Ok(());
        }
        let params = SamplingParams {
            max_tokens: Some(2),
            ..SamplingParams::default()
        };
        let mut scheduler = Scheduler::new(engine);
        scheduler.submit(Request {
            memory: Some(session.memory),
            ..Request::new(0, session.tokens, params)
        })?;
        while !scheduler.is_idle() {
            scheduler.step()?;
        }
        Ok(())
    })
}

/// The small hybrid, ready to write.
pub fn engine() -> &'static Engine {
    static ENGINE: OnceLock<Engine> = OnceLock::new();
    ENGINE.get_or_init(|| {
        let options = EngineOptions {
            cache_memory: Some(1 << 20),
            ..EngineOptions::default()
        };
        let lm = model(Format::Zebroid).lm(&Place::cpu());
        let tokenizer = Tokenizer::from_json(TOKENIZER.as_bytes());
        let engine = lm.and_then(|lm| Engine::with(&lm, tokenizer?, options));
        engine.expect("a fixed model")
    })
}

const MODEL: &str = "model.gguf";

const TOKENIZER: &str = r#"{"version": "1.0", "model": {"type": "BPE", "vocab": {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4,
    "▁": 5, "c": 6, "<unk>": 7}, "merges": [["a", "b"]], "unk_token": "<unk>"}, "added_tokens": [
    {"id": 0, "content": "<s>", "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false},
    {"id": 1, "content": "</s>", "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false}]}"#;

const TEMPLATE: &str = r#"{"bos_token": "<s>", "eos_token": "</s>",
    "chat_template": "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}"}"#;

/// A model of two or three layers, such as a format can say, with weights that mean nothing.
fn model(format: Format) -> Parts {
    let attention =
        || MixerConfig::Attention(AttentionConfig::new(2, 1, 4, Some(RopeConfig::new(1e4))));
    let mla = || {
        MixerConfig::Mla(MlaConfig {
            num_attention_heads: 2,
            num_key_value_heads: 1,
            use_full_kv_head: false,
            q_lora_rank: 4,
            kv_lora_rank: 4,
            qk_nope_head_dim: 2,
            qk_rope_head_dim: 2,
            v_head_dim: 4,
            use_lora_layer_norm: false,
            attention_bias: false,
            rope: RopeConfig::new(1e4),
        })
    };
    let mamba2 = || {
        MixerConfig::Mamba2(Mamba2Config {
            num_heads: 2,
            num_kv_heads: 1,
            head_dim: 4,
            d_state: 4,
            d_conv: 4,
            repeat_kv_before_conv: false,
            chunk_size: 256,
        })
    };
    let config = ModelConfig {
        model_type: ModelConfig::MODEL_TYPE.into(),
        format_version: FORMAT_VERSION,
        hidden_size: 8,
        intermediate_size: 8,
        vocab_size: 8,
        max_position_embeddings: 64,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: true,
        embedding_multiplier: 1.0,
        residual_multiplier: 1.0,
        logits_scaling: 1.0,
        bos_token_id: Some(0),
        eos_token_id: vec![1],
        layers: match format {
            Format::Zebroid => vec![attention(), mla(), mamba2()],
            Format::Amd => vec![mla(), mamba2()],
            Format::Llama | Format::Gguf => vec![attention(), attention()],
        },
        converted: None,
    };
    let weights = config.params().into_iter().map(|(name, shape)| {
        let values: Vec<f32> = (0..shape.iter().product())
            .map(|i: usize| (i * 7 % 13) as f32 / 16.0 - 0.375)
            .collect();
        let tensor = Tensor::from_vec(values, shape, &Device::Cpu);
        (name, tensor.expect("as many values as the shape has"))
    });
    let weights: BTreeMap<String, Tensor> = weights.collect();
    Parts::new(config, Weights::new(weights))
}

/// The small checkpoint in a format: its files by name.
pub fn files(format: Format) -> &'static BTreeMap<String, Vec<u8>> {
    static ALL: OnceLock<[BTreeMap<String, Vec<u8>>; 4]> = OnceLock::new();
    let all = ALL.get_or_init(|| {
        let formats = [Format::Zebroid, Format::Amd, Format::Llama, Format::Gguf];
        formats.map(|format| written(format).expect("a fixed checkpoint"))
    });
    &all[format as usize]
}

fn written(format: Format) -> Result<BTreeMap<String, Vec<u8>>> {
    let root = folder()?;
    let source = root.path().join("source");
    std::fs::create_dir(&source).map_err(Error::io("cannot make", &source))?;
    for (name, text) in [
        ("tokenizer.json", TOKENIZER),
        ("tokenizer_config.json", TEMPLATE),
    ] {
        write_atomic(&source.join(name), text.as_bytes())?;
    }
    let Parts { config, weights } = model(format);
    let (made, record) = (root.path().join("made"), Provenance::default());
    let mut out = made.clone();
    if format == Format::Gguf {
        std::fs::create_dir(&made).map_err(Error::io("cannot make", &made))?;
        out = made.join(MODEL);
    }
    save(
        &out,
        format,
        &config,
        weights,
        Some(&source),
        &record,
        false,
    )?;
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(&made).map_err(Error::io("cannot list", &made))? {
        let path = entry.map_err(Error::io("cannot list", &made))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let bytes = std::fs::read(&path).map_err(Error::io("cannot read", &path))?;
        files.insert(name.into_owned(), bytes);
    }
    Ok(files)
}

fn folder() -> Result<tempfile::TempDir> {
    let made = tempfile::Builder::new().prefix("zebroid-fuzz-").tempdir();
    made.map_err(Error::io("cannot make a folder in", &std::env::temp_dir()))
}

/// `work` in a folder with this file.
fn alone(name: &str, bytes: &[u8], work: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let folder = folder()?;
    put(&folder.path().join(name), bytes)?;
    work(folder.path())
}

/// `work` in the small checkpoint's folder with this file in the place of its own.
fn beside(
    format: Format,
    name: &str,
    bytes: &[u8],
    work: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    alone(name, bytes, |folder| {
        let others = files(format).iter().filter(|(other, _)| *other != name);
        for (other, bytes) in others {
            put(&folder.join(other), bytes)?;
        }
        work(folder)
    })
}

/// Not onto the disk at once, as what is kept is.
fn put(path: &Path, bytes: &[u8]) -> Result<()> {
    std::fs::write(path, bytes).map_err(Error::io("cannot write", path))
}
