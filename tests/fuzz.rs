//! Parsers of outside input on whole files and mutations of them: errors, never a panic, in bounded time and memory. The same functions
//! run under libFuzzer (`fuzz/`). `ZEBROID_FUZZ_INPUTS` says how many inputs a parser gets, `ZEBROID_FUZZ_CORPUS` names a folder for the
//! whole files, where libFuzzer begins.

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use zebroid::checkpoint::Format;
use zebroid::data::chat::Message;
use zebroid::fuzz::{NAMES, TARGETS, engine, files};
use zebroid::generate::{Event, Request, SamplingParams, Scheduler, Session};
use zebroid::op::runtime::peak_memory;

/// Of one input, on a machine that others use too.
const MOST_TIME: Duration = Duration::from_secs(10);
/// What all inputs of a parser may add to the highest memory.
const MOST_MEMORY: usize = 1 << 30;
/// Of an input.
const MOST_BYTES: usize = 1 << 16;

/// Files of this kind that are whole.
fn seeds(target: &str) -> Vec<Vec<u8>> {
    let read = |paths: Vec<PathBuf>| paths.iter().map(|p| std::fs::read(p).unwrap()).collect();
    let own = |format: Format, name: &str| files(format)[name].clone();
    match target {
        "safetensors" => vec![own(Format::Zebroid, "model.safetensors")],
        "gguf" => vec![own(Format::Gguf, "model.gguf"), gguf_of_a_hybrid()],
        "config" => {
            let mut all: Vec<_> = read(found("tests/golden/transformers", "config.json"));
            let formats = [Format::Zebroid, Format::Llama];
            all.extend(formats.map(|format| own(format, "config.json")));
            all
        }
        "hybrid_config" => vec![own(Format::Amd, "hybrid_config.json")],
        "recipe" => [RECIPE, SWEEP].map(|text| text.as_bytes().to_vec()).into(),
        "records" => texts_in_every_form(),
        "tokenizer" => vec![
            own(Format::Zebroid, "tokenizer.json"),
            BYTES.as_bytes().to_vec(),
            UNIGRAM.as_bytes().to_vec(),
        ],
        "session" => vec![saved_session()],
        "request" => REQUESTS.map(|text| text.as_bytes().to_vec()).into(),
        other => panic!("no seeds for {other}"),
    }
}

const REQUESTS: [&str; 3] = [
    r#"{"model": "a", "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "tools": [{"type": "function",
        "function": {"name": "f", "parameters": {"type": "object"}}}], "tool_choice": {"type": "function", "function": {"name": "f"}},
        "logprobs": true, "top_logprobs": 3, "stream": true, "stream_options": {"include_usage": true}, "max_completion_tokens": 9}"#,
    r#"{"prompt": [[1, 2], [3]], "max_tokens": 4, "temperature": 0.5, "top_p": 0.9, "top_k": -1, "seed": -1, "n": 2, "stop": ["a", "b"],
        "logit_bias": {"5": -100}, "echo": true, "logprobs": 2, "presence_penalty": 0.1, "frequency_penalty": -0.1}"#,
    r#"{"input": [{"role": "user", "content": "Hi"}], "instructions": "Be brief", "max_output_tokens": 9, "text": {"format": {"type":
        "json_schema", "name": "a", "schema": {"type": "object"}}}, "response_format": {"type": "regex", "regex": "a+"}}"#,
];

/// Files of a name below a folder, in order.
fn found(folder: &str, name: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut paths: Vec<PathBuf> = entries.map(|e| e.unwrap().path().join(name)).collect();
    paths.retain(|path| path.exists());
    paths.sort();
    paths
}

/// With our own architecture, whose config and tensors are those of a folder.
fn gguf_of_a_hybrid() -> Vec<u8> {
    let root = tempfile::tempdir().unwrap();
    for (name, bytes) in files(Format::Zebroid) {
        std::fs::write(root.path().join(name), bytes).unwrap();
    }
    let out = root.path().join("x.gguf");
    let from = crate::program::text(root.path());
    crate::program::succeeds(&[
        "export",
        from,
        crate::program::text(&out),
        "--format",
        "gguf",
    ]);
    std::fs::read(out).unwrap()
}

const RECIPE: &str = r#"
about = "a small one"
teacher = "embedded"
seed = 3
init = "published"
[data]
train = "stories:1:20"
validation = "stories:3:10"
[plan]
kv_lora_rank = 2
qk_rope_head_dim = 2
[ild]
candidates = ["mla", "mamba2"]
train = { tokens = 1000, lr = 1e-3, seq_len = 16, batch_size = 2 }
[select]
method = "smart"
count = 1
[[kd]]
train = { steps = 1, seq_len = 16, batch_size = 1, optimizer = "muon", lr_scheduler = "wsd" }
[eval]
seq_len = 16
batch_size = 1
"#;

const SWEEP: &str = r#"
teacher = "embedded"
init = "published"
sweep = [[{ seed = 0 }, { seed = 1, name = "one" }], [{ plan.kv_lora_rank = 4 }, { plan.use_lora_layer_norm = true }]]
[data]
train = "stories:1:20"
validation = "stories:3:10"
[plan]
layers = ["mla:2", "mamba2"]
qk_rope_head_dim = 2
[eval]
seq_len = 16
"#;

/// Byte-level, with all parts that such a file may have.
const BYTES: &str = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [
    {"id": 4, "content": "<s>", "single_word": false, "lstrip": true, "rstrip": true, "normalized": false, "special": true}],
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "},
    {"type": "Prepend", "prepend": "a"}, {"type": "Strip", "strip_left": true, "strip_right": true}]},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}|[^\\s]+|\\s+(?!\\S)"},
    "behavior": "Isolated", "invert": false}, {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]},
    "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
    {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [4], "tokens": ["<s>"]}}},
    "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
    {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
    "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
    "fuse_unk": false, "byte_fallback": true, "ignore_merges": true, "vocab": {"a": 0, "b": 1, "ab": 2, "<0x0A>": 3}, "merges": ["a b"]}}"#;

const UNIGRAM: &str = r#"{"version": "1.0", "added_tokens": [], "normalizer": {"type": "Lowercase"},
    "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
    "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
    "model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["▁", -1.0], ["a", -2.5], ["ab", -3.0]], "byte_fallback": false}}"#;

/// The same texts in every form.
fn texts_in_every_form() -> Vec<Vec<u8>> {
    let lines = concat!(
        "{\"text\": \"ab c\"}\n{\"prompt\": \"a\", \"completion\": \" b\"}\n",
        "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}\n",
        "{\"conversations\": [{\"from\": \"human\", \"value\": \"a\"}, {\"from\": \"gpt\", \"value\": \"b\"}]}\n",
    );
    let pairs = "{\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"c\"}\n";
    let list = format!("[{}]", lines.trim_end().replace('\n', ","));
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(lines.as_bytes()).unwrap();
    let zstd = zstd::encode_all(lines.as_bytes(), 1).unwrap();
    let parquet =
        std::fs::read("tests/golden/harness/hub/anaphor_number_agreement/train/0000.parquet");
    let columns = |name: &str| std::fs::read(format!("tests/golden/records/{name}")).unwrap();
    let all: [(&str, Vec<u8>); 17] = [
        ("x.jsonl", lines.into()),
        ("x.jsonl", pairs.into()),
        ("x.json", list.into()),
        ("x.txt", b"ab c".into()),
        ("x.jsonl.gz", gz.finish().unwrap()),
        ("x.jsonl.zst", zstd),
        ("x.parquet", parquet.unwrap()),
        ("x.parquet", columns("gzip.parquet")),
        ("x.parquet", columns("zstd.parquet")),
        ("x.parquet", columns("lz4.parquet")),
        ("x.arrow", columns("stream.arrow")),
        ("x.arrow", columns("file.arrow")),
        ("x.arrow", columns("deltas.arrow")),
        ("x.arrow", columns("views.arrow")),
        ("x.arrow", columns("other.arrow")),
        ("x.arrow", columns("lz4.feather")),
        ("x.arrow", columns("zstd.feather")),
    ];
    let all = all.map(|(name, bytes)| {
        let first = NAMES.iter().position(|known| *known == name).unwrap() as u8;
        [vec![first], bytes].concat()
    });
    all.into()
}

/// A conversation that the small hybrid has read and gone on with.
fn saved_session() -> Vec<u8> {
    let mut scheduler = Scheduler::new(engine());
    let params = SamplingParams {
        max_tokens: Some(4),
        ..SamplingParams::default()
    };
    scheduler
        .submit(Request::new(0, vec![0, 2, 3], params))
        .unwrap();
    let mut session = Session::new(engine(), Vec::new());
    while !scheduler.is_idle() {
        for event in scheduler.step().unwrap() {
            if let Event::Done { finish, .. } = event {
                session.messages.push(Message {
                    role: "user".into(),
                    content: "a".into(),
                });
                session.text = finish.generation.text.clone();
                session.tokens = finish.tokens.clone();
                session.memory = finish.memory.clone();
            }
        }
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    session.save(engine(), file.path()).unwrap();
    std::fs::read(file.path()).unwrap()
}

/// What takes the place of numbers and words in texts.
const WORDS: [&str; 24] = [
    "0",
    "-1",
    "1",
    "3.5",
    "-0.0",
    "1e999",
    "1e-400",
    "255",
    "65536",
    "4294967295",
    "4294967296",
    "2147483648",
    "9223372036854775807",
    "18446744073709551615",
    "18446744073709551616",
    "null",
    "true",
    "\"\"",
    "\"x\"",
    "[]",
    "{}",
    "[[",
    "NaN",
    "\"\\ud800\"",
];

/// What takes the place of 8 bytes, little-endian.
const NUMBERS: [u64; 8] = [
    0,
    1,
    0xff,
    1 << 31,
    1 << 32,
    i64::MAX as u64,
    u64::MAX,
    u64::MAX - 7,
];

/// A whole file, changed in one to four places.
fn mutated(random: &mut ChaCha8Rng, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = seeds.choose(random).unwrap().clone();
    for _ in 0..random.random_range(1..5) {
        let len = bytes.len();
        if len == 0 {
            break;
        }
        // Headers are where parsers decide: half of the changes are in the first part.
        let within = if random.random() { len } else { len.min(512) };
        let at = random.random_range(0..within);
        let end = (at + random.random_range(1..64)).min(len);
        match random.random_range(0..10) {
            0 => bytes[at] ^= 1 << random.random_range(0..8),
            1 => bytes[at] = random.random(),
            2 => {
                let number = NUMBERS.choose(random).unwrap().to_le_bytes();
                let end = (at + number.len()).min(len);
                bytes[at..end].copy_from_slice(&number[..end - at]);
            }
            3 => drop(bytes.drain(at..end)),
            4 => {
                let part = bytes[at..end].to_vec();
                let to = random.random_range(0..len);
                let times = *[1, 1, 1, 400].choose(random).unwrap();
                bytes.splice(to..to, part.repeat(times));
            }
            5 => bytes.truncate(at),
            6 => {
                let other = seeds.choose(random).unwrap();
                let from = random.random_range(0..other.len());
                bytes.truncate(at);
                bytes.extend(&other[from..]);
            }
            // The word at or behind this place.
            _ => {
                let is_word = |b: &u8| b.is_ascii_alphanumeric() || b"._-\"".contains(b);
                if let Some(start) = bytes[at..].iter().position(is_word) {
                    let start = at + start;
                    let rest = bytes[start..].iter().position(|b| !is_word(b));
                    let end = rest.map_or(len, |rest| start + rest);
                    let word = WORDS.choose(random).unwrap();
                    bytes.splice(start..end, word.bytes());
                }
            }
        }
    }
    bytes.truncate(MOST_BYTES);
    bytes
}

/// In a process of its own, whose memory is its own.
fn run(name: &str) {
    const ALONE: &str = "ZEBROID_FUZZ_ALONE";
    if std::env::var_os(ALONE).is_none() {
        let test = format!("fuzz::{name}");
        let mut alone = Command::new(std::env::current_exe().unwrap());
        alone
            .args(["--exact", &test, "--nocapture"])
            .env(ALONE, "1");
        let output = alone.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        let counted = String::from_utf8_lossy(&output.stdout);
        assert!(counted.contains("1 passed"), "{counted}");
        return;
    }
    let target = TARGETS.iter().find(|target| target.name == name).unwrap();
    let seeds = seeds(name);
    for seed in &seeds {
        (target.parse)(seed).unwrap_or_else(|e| panic!("{name}: a whole file is refused: {e}"));
    }
    // What libFuzzer found; it may be refused.
    for found in std::fs::read_dir(format!("tests/golden/fuzz/{name}"))
        .into_iter()
        .flatten()
    {
        let _ = (target.parse)(&std::fs::read(found.unwrap().path()).unwrap());
    }
    if let Some(corpus) = std::env::var_os("ZEBROID_FUZZ_CORPUS") {
        let folder = Path::new(&corpus).join(name);
        std::fs::create_dir_all(&folder).unwrap();
        for (i, seed) in seeds.iter().enumerate() {
            std::fs::write(folder.join(format!("whole-{i}")), seed).unwrap();
        }
    }
    let count = std::env::var("ZEBROID_FUZZ_INPUTS").map_or(2000, |n| n.parse().unwrap());
    let mut random = ChaCha8Rng::seed_from_u64(0);
    let before = peak_memory();
    for _ in 0..count {
        let input = mutated(&mut random, &seeds);
        let started = Instant::now();
        let panicked = catch_unwind(AssertUnwindSafe(|| (target.parse)(&input))).is_err();
        let taken = started.elapsed();
        let memory = peak_memory()
            .zip(before)
            .map_or(0, |(now, then)| now.saturating_sub(then));
        if panicked || taken > MOST_TIME || memory > MOST_MEMORY {
            let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-{name}"));
            std::fs::write(&kept, &input).unwrap();
            panic!(
                "{name}: panicked {panicked}, {taken:?}, {memory} bytes more; the input is {}",
                kept.display()
            );
        }
    }
}

macro_rules! targets {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            run(stringify!($name));
        })*

        const TESTED: &[&str] = &[$(stringify!($name)),*];
    };
}

targets!(safetensors gguf config hybrid_config recipe records tokenizer session request);

/// Every parser is tested here and has a program in `fuzz/`.
#[test]
fn every_target_is_run() {
    let names = TARGETS.map(|target| target.name);
    assert_eq!(names, TESTED);
    // A published crate has no package inside of it.
    if Path::new("Cargo.toml.orig").exists() {
        return;
    }
    let manifest = std::fs::read_to_string("fuzz/Cargo.toml").unwrap();
    assert_eq!(manifest.matches("[[bin]]").count(), names.len());
    for name in names {
        let path = format!("fuzz_targets/{name}.rs");
        assert!(manifest.contains(&path), "{path} is not in fuzz/Cargo.toml");
        let program = std::fs::read_to_string(format!("fuzz/{path}")).unwrap();
        assert!(
            program.contains(&format!("zebroid::fuzz::{name}(")),
            "{path}"
        );
    }
}
