//! What `plan --train` says of a run's memory, beside what the run takes. A binary of its own, so that nothing runs beside it: the allocator
//! gives memory back by the clock, and a process that others hold up takes less.

// Tests of `main.rs` use the rest of it.
#[allow(dead_code)]
mod program;

use std::path::Path;
use std::process::Stdio;

use program::{command, fails, succeeds};

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap()
}

/// The largest resident size of a process that ends well, in bytes: the kernel keeps it, it is read until there is no more to read.
fn peak(args: &[&str]) -> f64 {
    let mut process = command();
    process
        .args(args)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut process = process.spawn().unwrap();
    let status = format!("/proc/{}/status", process.id());
    let mut most = 0.0f64;
    let ended = loop {
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with("VmHWM:"));
        let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok());
        most = most.max(1024.0 * kib.unwrap_or(0.0));
        if let Some(ended) = process.try_wait().unwrap() {
            break ended;
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
    };
    assert!(ended.success(), "{args:?}");
    most
}

const RECIPE: &str = r#"
init = "published"
[data]
train = "stories:1:300"
validation = "stories:3:40"
[plan]
mla = [0, 2]
kv_lora_rank = 16
qk_rope_head_dim = 8
"#;

/// A small model with all that it has, one with mixers alone and moments in 8 bits in portions, and one that is mostly weights, in f32 and
/// in bf16.
#[test]
#[cfg(target_os = "linux")]
fn runs_take_what_was_predicted() {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name).to_str().unwrap().to_owned();
    let (text, teacher) = (at("text"), at("teacher"));
    succeeds(&["stories", &text, "--count", "60"]);
    let sizes = "--num-layers 4 --hidden-size 512 --intermediate-size 2048 --num-heads 8 --num-kv-heads 4 --seq-len 256 --batch-size 1 --steps 1";
    let data = format!("{text}/stories.jsonl");
    let pretrain = ["pretrain", &teacher, "--data", &data, "--tokenizer", &text];
    let sizes: Vec<&str> = sizes.split(' ').collect();
    succeeds(&[&pretrain[..], &sizes].concat());
    for (name, teacher, stages) in [
        (
            "small",
            "embedded",
            "[[kd]]\ntrain = { steps = 2, batch_size = 16 }",
        ),
        (
            "mixers",
            "embedded",
            "[[kd]]\nobjective = { trained = \"mixers\" }\ntrain = { steps = 1, batch_size = 32, accumulation = 2, optimizer = \"adamw_8bit\" }",
        ),
        (
            "weights",
            teacher.as_str(),
            "[[kd]]\ntrain = { steps = 2, batch_size = 2 }",
        ),
        (
            "rounded",
            teacher.as_str(),
            "[[kd]]\ntrain = { steps = 2, batch_size = 2, weights = \"bf16\", optimizer = \"adamw_8bit\", clip_by = \"layer\" }",
        ),
    ] {
        let recipe = at(&format!("{name}.toml"));
        let text = format!("teacher = {teacher:?}\n{RECIPE}{stages}\n");
        std::fs::write(Path::new(&recipe), text).unwrap();
        let said = json(&succeeds(&["plan", "--train", &recipe, "--json"]));
        let predicted = said["forecast"]["peak"].as_f64().unwrap();
        let measured = peak(&["run", &recipe, "--out", &at(name)]);
        let ratio = predicted / measured;
        println!("{name}: predicted {predicted:.3e}, measured {measured:.3e}, {ratio:.3}");
        // What is mostly weights took 1.04 of it on a Zen 4, and on a Zen 3 a sixth less than predicted (docs/log.md): too much is said, never
        // too little.
        assert!(
            (0.9..1.25).contains(&ratio),
            "{name}: {predicted:.3e} predicted, {measured:.3e} measured"
        );
    }
}

/// Where a recipe does not fit, the changes that are named make it fit, as they are said.
#[test]
fn changes_do_what_they_say() {
    let root = tempfile::tempdir().unwrap();
    let recipe = root.path().join("recipe.toml");
    let stage = "[[kd]]\ntrain = { steps = 2, batch_size = 16 }\n[eval]\nbatch_size = 1";
    std::fs::write(
        &recipe,
        format!("teacher = \"embedded\"\n{RECIPE}{stage}\n"),
    )
    .unwrap();
    for memory in ["160MiB", "192MiB", "220MiB", "240MiB"] {
        let recipe = recipe.to_str().unwrap();
        let plan = ["plan", "--train", recipe, "--json", "--memory", memory];
        let found = json(&succeeds(&plan));
        assert_eq!(found["fits"], false, "{memory}");
        let changes = found["changes"].as_array().unwrap();
        let last = changes.last().unwrap();
        assert_eq!(last["fits"], true, "{memory}: {changes:?}");
        let settings = last["settings"].as_array().unwrap();
        let sets: Vec<&str> = (settings.iter())
            .flat_map(|setting| ["--set", setting.as_str().unwrap()])
            .collect();
        let changed = json(&succeeds(&[&plan[..], &sets].concat()));
        assert_eq!(changed["fits"], true, "{memory}");
        assert_eq!(changed["forecast"]["peak"], last["peak"], "{memory}");
        let tokens = |of: &serde_json::Value| of["forecast"]["stages"][1]["tokens"].clone();
        assert_eq!(tokens(&changed), tokens(&found), "{settings:?}");
    }
}

/// From configs alone: neither the teachers of this recipe nor its texts are here.
#[test]
fn published_recipes_are_forecast_without_their_teachers() {
    let recipe = "recipes/zebra-llama/8b-8mla-24m2.toml";
    let of = |device: &str| {
        json(&succeeds(&[
            "plan",
            "--train",
            recipe,
            "--device-spec",
            device,
            "--json",
        ]))
    };
    let kd = |found: &serde_json::Value| {
        let stages = found["forecast"]["stages"].as_array().unwrap().clone();
        stages
            .into_iter()
            .find(|stage| stage["name"] == "kd 1")
            .unwrap()
    };
    let (cpu, h200) = (of("cpu"), of("h200"));
    // A step of an 8B hybrid: 8.4 G weights, forward and back, recomputed, and its teacher forward.
    let of_kd = kd(&h200);
    let each = of_kd["operations"].as_f64().unwrap() / of_kd["tokens"].as_f64().unwrap();
    assert!((8.4e9 * 8.0..8.4e9 * 13.0).contains(&each), "{each:e}");
    assert!(of_kd["hours_bf16"].as_f64() < of_kd["hours"].as_f64());
    assert!(kd(&cpu)["hours"].as_f64() > of_kd["hours"].as_f64());
    // Weights, gradients and moments of 8.4 G are 134 GB before anything is computed.
    assert_eq!(h200["fits"], false);
    assert!(h200["forecast"]["peak"].as_f64().unwrap() > 134e9);
    let said = fails(2, &["plan", "--train", recipe, "--device-spec", "abacus"]);
    assert!(said.contains("abacus") && said.contains("mi300x"), "{said}");
    let said = fails(2, &["plan", "--train", recipe, "--mla", "1"]);
    assert!(said.contains("--set plan."), "{said}");
}
