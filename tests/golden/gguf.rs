//! GGUF files that we write, as llama.cpp reads them (`gguf/make.py` recorded it), and as we do.

use std::path::Path;

use candle_core::{Device, Tensor};
use zebroid::checkpoint::{Checkpoint, read_tensors};
use zebroid::data::Tokenizer;
use zebroid::eval::parity::max_difference;
use zebroid::weights::Place;

use crate::program::{fails, succeeds};

const TEACHER: &str = "assets/teacher";

fn record() -> serde_json::Value {
    let text = std::fs::read_to_string("tests/golden/gguf/cases.json").unwrap();
    serde_json::from_str(&text).unwrap()
}

/// The teacher with this scaling, as a folder in `root`.
fn teacher(root: &Path, name: &str, scaling: &serde_json::Value) -> String {
    let folder = root.join(name);
    std::fs::create_dir(&folder).unwrap();
    for entry in std::fs::read_dir(TEACHER).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
    }
    let config = folder.join("config.json");
    let mut json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    json["rope_scaling"] = scaling.clone();
    std::fs::write(&config, json.to_string()).unwrap();
    folder.to_str().unwrap().to_owned()
}

/// Root mean square.
fn rms(x: &Tensor) -> f32 {
    let squares = x.sqr().unwrap().mean_all().unwrap();
    squares.to_scalar::<f32>().unwrap().sqrt()
}

#[test]
fn llama_cpp_computes_what_we_do() {
    let (record, root) = (record(), tempfile::tempdir().unwrap());
    let ids: Vec<u32> = serde_json::from_value(record["ids"].clone()).unwrap();
    let ids = Tensor::new(&ids[..], &Device::Cpu).unwrap();
    let expected = read_tensors(Path::new("tests/golden/gguf/expected.safetensors")).unwrap();
    let cases = record["files"].as_object().unwrap();
    assert_eq!(cases.len(), expected.len());
    for (name, case) in cases {
        let folder = teacher(root.path(), name, &case["rope_scaling"]);
        let file = root.path().join(format!("{name}.gguf"));
        let file = file.to_str().unwrap();
        match case["type"].as_str() {
            Some(kind) => succeeds(&["quantize", &folder, file, "--type", kind]),
            None => succeeds(&["export", &folder, file, "--format", "gguf"]),
        };
        let model = |path: &str| {
            let checkpoint = Checkpoint::open(Path::new(path)).unwrap();
            let lm = checkpoint.model(&Place::cpu()).unwrap();
            let logits = lm.forward(&ids.unsqueeze(0).unwrap(), None).unwrap();
            logits.squeeze(0).unwrap()
        };
        let found = model(file);
        // llama.cpp rounds what blocks are multiplied with to 8 bits, however many rows there are; its cache is f16.
        match case["type"].is_null() {
            true => {
                let far = max_difference(&found, &expected[name]).unwrap();
                assert!(far < 0.02, "{name}: {far}");
            }
            false => {
                let share = rms(&(&found - &expected[name]).unwrap()) / rms(&found);
                assert!(share < 0.03, "{name}: {share} of the logits");
            }
        }
        if case["type"].is_null() {
            let same = max_difference(&found, &model(&folder)).unwrap();
            assert!(same < 1e-5, "{name}: {same} through the file");
        }
    }
}

/// There and back: config, weights and tokenizer; a hybrid under our own keys.
#[test]
fn a_gguf_is_the_checkpoint_that_it_was_made_of() {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name).to_str().unwrap().to_owned();
    succeeds(&[
        "compose",
        TEACHER,
        &at("hybrid"),
        "--mla",
        "1,2",
        "--kv-rank",
        "16",
        "--rope-dim",
        "8",
        "--init",
        "published",
    ]);
    for (source, name, format) in [
        (TEACHER.to_owned(), "llama", "llama"),
        (at("hybrid"), "own", "zebroid"),
    ] {
        let (file, back) = (at(&format!("{name}.gguf")), at(&format!("{name}-back")));
        succeeds(&["export", &source, &file, "--format", "gguf"]);
        succeeds(&["export", &file, &back, "--format", format]);
        let open = |path: &str| {
            let checkpoint = Checkpoint::open(Path::new(path)).unwrap();
            (
                checkpoint.config.clone(),
                checkpoint.parts().unwrap().hash().unwrap(),
            )
        };
        assert_eq!(open(&source), open(&file), "{name}");
        assert_eq!(open(&source), open(&back), "{name}, and back");
        let text = "Tom had a red ball. He";
        let ids = |path: &str| {
            Tokenizer::open(Path::new(path))
                .unwrap()
                .encode(text)
                .unwrap()
        };
        assert_eq!(ids(&source), ids(&file));
        assert_eq!(ids(&source), ids(&back));
        let told =
            |path: &str| succeeds(&["generate", path, "--prompt", text, "--max-tokens", "8"]);
        assert_eq!(told(&source), told(&file), "{name}");
    }
    let out = at("llama.gguf");
    assert!(fails(2, &["export", TEACHER, &out, "--format", "gguf"]).contains("already exists"));
    succeeds(&["export", TEACHER, &out, "--format", "gguf", "--force"]);
    let said = fails(2, &["quantize", TEACHER, &at("k.gguf"), "--type", "q4_k"]);
    assert!(
        said.contains("no matrix has rows of whole q4_k blocks"),
        "{said}"
    );
    let said = fails(2, &["quantize", TEACHER, &at("folder"), "--type", "q8_0"]);
    assert!(said.contains("ends in .gguf"), "{said}");
}

/// A file that is damaged, or of a model that we do not know, is refused by name.
#[test]
fn damaged_ggufs_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    let whole = at("whole.gguf");
    succeeds(&[
        "export",
        TEACHER,
        whole.to_str().unwrap(),
        "--format",
        "gguf",
    ]);
    let bytes = std::fs::read(&whole).unwrap();
    let replaced = |from: &[u8], to: &[u8]| {
        let place = bytes.windows(from.len()).position(|w| w == from).unwrap();
        let mut bytes = bytes.clone();
        bytes[place..place + to.len()].copy_from_slice(to);
        bytes
    };
    let nan = {
        let mut bytes = bytes.clone();
        let end = bytes.len();
        bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
        bytes
    };
    for (name, bytes, part) in [
        ("magic", replaced(b"GGUF", b"GGUX"), "not a GGUF file"),
        ("cut", bytes[..bytes.len() - 100].to_vec(), "cut off"),
        (
            "architecture",
            replaced(b"llama", b"mamba"),
            "architecture mamba is not supported",
        ),
        (
            "key",
            replaced(b"llama.block_count", b"llama.block_xount"),
            "llama.block_count is missing",
        ),
        (
            "tensor",
            replaced(b"blk.1.attn_q", b"blk.1.attn_x"),
            "unexpected blk.1.attn_x.weight",
        ),
        ("nan", nan, "NaN or infinite"),
    ] {
        let path = at(&format!("{name}.gguf"));
        std::fs::write(&path, bytes).unwrap();
        let said = fails(
            2,
            &["generate", path.to_str().unwrap(), "--max-tokens", "1"],
        );
        assert!(
            said.contains(part) && said.contains(&format!("{name}.gguf")),
            "{name}: {said}"
        );
    }
}
