//! What the program says of a checkpoint, of the machine, and of itself.

use std::path::Path;

use clap::CommandFactory;
use serde_json::Value;

use crate::program::{TEACHER, fails, succeeds, text, zebroid};

fn json(args: &[&str]) -> Value {
    serde_json::from_str(&succeeds(args)).unwrap()
}

/// One hybrid in every format, and its teacher, whose cache is what they are compared with.
#[test]
fn info_is_the_same_of_every_format() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| text(&folder.path().join(name)).to_owned();
    let (own, amd, gguf) = (at("own"), at("amd"), at("hybrid.gguf"));
    let sizes = [
        "--mla",
        "1",
        "--kv-rank",
        "16",
        "--rope-dim",
        "8",
        "--init",
        "published",
    ];
    succeeds(&[&["compose", TEACHER, &own], &sizes[..]].concat());
    succeeds(&["export", &own, &amd, "--format", "amd"]);
    succeeds(&["quantize", &own, &gguf, "--type", "q8_0"]);
    let contexts = ["--contexts", "100,256", "--json"];
    let info = |model: &str| json(&[&["info", model], &contexts[..]].concat());
    let teacher = info(TEACHER);
    let cache = &teacher["memory"][0]["cache_bytes"];
    // Keys and values of 4 heads of 32 in 4 layers, 100 tokens, 2 bytes.
    assert_eq!(cache, 2 * 4 * 32 * 4 * 100 * 2);
    assert_eq!(&teacher["memory"][0]["full_cache_bytes"], cache);
    for (model, format) in [(&own, "zebroid"), (&amd, "amd"), (&gguf, "gguf")] {
        let found = info(model);
        assert_eq!(found["format"], format);
        let kinds = found["parameters_by_kind"].as_object().unwrap();
        let sum: u64 = kinds.values().map(|n| n.as_u64().unwrap()).sum();
        assert_eq!(found["parameters"], sum, "{kinds:?}");
        let stored = found["on_disk"].as_object().unwrap().values();
        let stored: u64 = stored.map(|of| of["entries"].as_u64().unwrap()).sum();
        assert_eq!(stored, sum);
        let memory = &found["memory"][0];
        assert_eq!(memory["cache_bytes"], (16 + 8) * 100 * 2);
        assert_eq!(&memory["full_cache_bytes"], cache, "{format}");
        assert_eq!(memory["state_bytes"], found["memory"][1]["state_bytes"]);
        assert_eq!(found["tokenizer"]["tokens"], 431);
        assert_eq!(found["tokenizer"]["eos"], serde_json::json!([1]));
        let said = succeeds(&["info", model]);
        assert!(
            said.contains("2-3    mamba2") && said.contains("2.34 %"),
            "{said}"
        );
    }
    assert_eq!(info(&own)["full_cache_of"], "teacher");
    assert_eq!(info(&own)["provenance"]["steps"][0]["stage"], "compose");
    assert_eq!(info(&gguf)["on_disk"]["q8_0"]["tensors"], 19);
}

/// A config alone says as much as it can, in a folder without weights too.
#[test]
fn info_needs_no_weights() {
    let folder = "recipes/teachers/llama-3.2-1b";
    for path in [folder, &format!("{folder}/config.json")] {
        let found = json(&["info", path, "--json"]);
        assert_eq!(found["parameters"], 1_235_814_400u64);
        assert_eq!(found["on_disk"], Value::Null);
        let tokens = found["memory"].as_array().unwrap().iter();
        let tokens: Vec<_> = tokens.map(|m| m["tokens"].as_u64().unwrap()).collect();
        assert_eq!(tokens, [2048, 8192, 32_768, 131_072]);
        let why = found["tokenizer"]["error"].as_str().unwrap();
        assert!(why.contains("copy tokenizer.json"), "{why}");
    }
    let said = fails(2, &["info", TEACHER, "--contexts", "8,0"]);
    assert!(said.contains("must not be 0"), "{said}");
}

/// Every part that is damaged is a failure of its own, with what mends it.
#[test]
fn the_doctor_finds_what_is_damaged() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    std::fs::create_dir(&model).unwrap();
    for entry in std::fs::read_dir(TEACHER).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, model.join(path.file_name().unwrap())).unwrap();
    }
    let failures = || -> Vec<(String, String)> {
        let output = zebroid(&["doctor", text(&model), "--json"]);
        let checks: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
        let failed = checks.iter().filter(|c| c["state"] == "failure");
        let failed: Vec<_> = failed
            .map(|check| {
                let mend = check["mend"].as_str().unwrap();
                assert!(mend.ends_with('.'), "{mend}");
                let word = |name: &str| check[name].as_str().unwrap().to_owned();
                (word("name"), word("found"))
            })
            .collect();
        assert_eq!(output.status.code(), Some(i32::from(!failed.is_empty())));
        failed
    };
    assert_eq!(failures(), []);
    let damage = |name: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = std::fs::read(Path::new(TEACHER).join(name)).unwrap_or_default();
        change(&mut bytes);
        std::fs::write(model.join(name), bytes).unwrap();
    };
    let whole = |name: &str| damage(name, &|_| ());
    // A number that is none, in a file of nobody's checksum.
    damage("model.safetensors", &|bytes| {
        let end = bytes.len();
        bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    damage("tokenizer.json", &|bytes| bytes.truncate(100));
    let found = failures();
    let names: Vec<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["values", "tokenizer"], "{found:?}");
    damage("model.safetensors", &|bytes| {
        bytes.truncate(bytes.len() - 1)
    });
    whole("tokenizer.json");
    std::fs::write(model.join("chat_template.jinja"), "{% for %}").unwrap();
    std::fs::write(model.join("provenance.json"), "{").unwrap();
    let found = failures();
    let names: Vec<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["tensors", "chat template", "record"], "{found:?}");
    std::fs::remove_file(model.join("config.json")).unwrap();
    assert!(failures()[0].1.contains("no checkpoint here"));
    let said = zebroid(&["doctor", text(&model)]).stdout;
    let said = String::from_utf8(said).unwrap();
    assert!(
        said.contains("FAILURE  config") && said.contains("→ Name the folder"),
        "{said}"
    );
    assert!(said.contains("1 of "), "{said}");
}

/// Every command and its own, by the words that call it.
fn commands(command: &clap::Command, before: &str) -> Vec<String> {
    let inner = command
        .get_subcommands()
        .filter(|inner| inner.get_name() != "help");
    let named = inner.flat_map(|inner| {
        let name = format!("{before}-{}", inner.get_name());
        let deeper = commands(inner, &name);
        [name].into_iter().chain(deeper)
    });
    named.collect()
}

#[test]
fn every_command_is_completed_and_has_a_page() {
    let all = commands(&zebroid::cli::Cli::command(), "zebroid");
    assert!(all.contains(&"zebroid-train-kd".to_owned()), "{all:?}");
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let said = succeeds(&["completions", shell]);
        for name in &all {
            let last = name.rsplit('-').next().unwrap();
            assert!(said.contains(last), "{shell}: {name}");
        }
        assert!(
            said.contains("--kv-lora-rank") || shell == "fish",
            "{shell}"
        );
    }
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("man1");
    succeeds(&["man", text(&out)]);
    for name in all.iter().map(String::as_str).chain(["zebroid"]) {
        let page = std::fs::read_to_string(out.join(format!("{name}.1"))).unwrap();
        assert!(
            page.contains(".SH SYNOPSIS") && page.contains("\\-\\-help"),
            "{name}: {page}"
        );
    }
    let page = std::fs::read_to_string(out.join("zebroid-info.1")).unwrap();
    assert!(
        page.contains("\\-\\-contexts") && page.contains("Examples"),
        "{page}"
    );
}
