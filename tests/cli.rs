//! The program as a person meets it: exit codes and messages for bad input.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::program::{TEACHER, fails, succeeds, text, zebroid};

/// A copy of the embedded teacher, to be damaged.
fn copy(folder: &Path) -> PathBuf {
    let to = folder.join("teacher");
    std::fs::create_dir_all(&to).unwrap();
    for entry in std::fs::read_dir(TEACHER).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
    to
}

#[test]
fn help_has_examples_for_every_command() {
    for command in [
        &["demo"][..],
        &["run"],
        &["plan"],
        &["calibrate"],
        &["compose"],
        &["train", "ild"],
        &["train", "kd"],
        &["train", "dpo"],
        &["teach"],
        &["pretrain"],
        &["eval", "harness"],
        &["eval", "ppl"],
        &["eval", "probe"],
        &["eval", "retention"],
        &["eval", "kl"],
        &["eval", "recall"],
        &["plot"],
        &["runs"],
        &["runs", "show"],
        &["runs", "compare"],
        &["runs", "prune"],
        &["parity"],
        &["generate"],
        &["export"],
        &["select"],
        &["stories"],
        &["bench", "train"],
        &["info"],
        &["doctor"],
        &["completions"],
        &["man"],
    ] {
        let help = succeeds(&[command, &["--help"]].concat());
        assert!(help.contains("Example"), "{command:?} has no example");
        assert!(
            help.contains(&format!("zebroid {}", command.join(" "))),
            "{command:?}"
        );
    }
}

#[test]
fn plans_from_a_config_alone() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("config.json");
    std::fs::copy(Path::new(TEACHER).join("config.json"), &config).unwrap();
    let json = succeeds(&[
        "plan",
        text(&config),
        "--mla",
        "1",
        "--kv-rank",
        "32",
        "--rope-dim",
        "8",
        "--json",
    ]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["kv_ratio"], 40.0 / 1024.0);
    assert_eq!(json["layers"].as_array().unwrap().len(), 4);
    let table = succeeds(&[
        "plan",
        text(&config),
        "--mla",
        "1",
        "--kv-rank",
        "32",
        "--rope-dim",
        "8",
    ]);
    assert!(table.contains("KV ratio 3.91 %"), "{table}");
}

/// The shipped recipes show what they would do without a weight or a text, and what they lack to do it.
#[test]
fn recipes_plan_without_data() {
    let recipe = "recipes/zebra-llama/3b-6mla-22m2.toml";
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let output = zebroid(&["run", recipe, "--plan", "--out", text(&out)]);
    let shown = String::from_utf8_lossy(&output.stdout);
    for part in [
        "3B, 6 MLA and 22 Mamba2",
        "dpo (1 epochs, adamw, lr 5e-7)",
        "KV ratio 2.01 %",
    ] {
        assert!(shown.contains(part), "{shown}");
    }
    assert_eq!(output.status.code(), Some(2));
    assert!(!out.exists());
    // Carried out, it asks for the same; before that it may say that memory will not do.
    let said = fails(2, &["run", recipe, "--out", text(&out)]);
    assert!(
        said.ends_with(&*String::from_utf8_lossy(&output.stderr)),
        "{said}"
    );
    assert!(
        said.contains("llama-3.2-3b") && said.contains("safetensors"),
        "{said}"
    );
    let said = succeeds(&[
        "run",
        "recipes/demo.toml",
        "--plan",
        "--set",
        "kd.train.mixer_lr=1e-3",
        "--out",
        text(&folder.path().join("demo")),
    ]);
    assert!(
        said.contains("KV ratio 7.81 %")
            && said.contains("(mixers 1e-3)")
            && !folder.path().join("demo").exists(),
        "{said}"
    );
    let broken = folder.path().join("broken.toml");
    std::fs::write(&broken, "teacher = \"embedded\"\n[data]\ntrian = \"x\"\n").unwrap();
    let said = fails(2, &["run", text(&broken), "--plan"]);
    assert!(
        said.contains("broken.toml") && said.contains("trian"),
        "{said}"
    );
}

/// Results of programs with the same figures may be exchanged.
#[test]
fn the_version_tells_what_is_computed() {
    let said = succeeds(&["--version"]);
    let figures = zebroid::numerics::fingerprint();
    let expected = format!("zebroid {} (numerics {figures})", env!("CARGO_PKG_VERSION"));
    assert_eq!(said.trim_end(), expected);
}

#[test]
fn impossible_plans_are_refused_before_anything_is_made() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    for (flags, part) in [
        (
            &["--mla", "9"][..],
            "layer 9 does not exist: the teacher has layers 0 to 3",
        ),
        (&["--mla", "1", "--kv-rank", "5000"], "kv_lora_rank 5000"),
        (&["--mla", "1", "--rope-dim", "7"], "even"),
        (&["--mla", "1", "--rope-dim", "64"], "head_dim 32"),
        (&["--mla", "1", "--chunk-size", "0"], "chunk_size"),
        (
            &["--layers", "mla,mamba2"],
            "names 2 layers, the teacher has 4",
        ),
    ] {
        let said = fails(2, &[&["compose", TEACHER, text(&out)], flags].concat());
        assert!(said.contains(part), "{said}");
        assert!(!out.exists());
    }
}

#[test]
fn damaged_checkpoints_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let teacher = copy(folder.path());
    let weights = teacher.join("model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &whole[..whole.len() / 2]).unwrap();
    let said = fails(2, &["generate", text(&teacher)]);
    assert!(
        said.contains("model.safetensors") && said.contains("safetensors file"),
        "{said}"
    );
    std::fs::write(&weights, &whole).unwrap();
    std::fs::remove_file(teacher.join("tokenizer.json")).unwrap();
    let said = fails(2, &["generate", text(&teacher)]);
    assert!(said.contains("tokenizer.json"), "{said}");
    let said = fails(2, &["generate", text(&folder.path().join("nowhere"))]);
    assert!(said.contains("nowhere"), "{said}");
}

#[test]
fn bad_data_lines_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data.jsonl");
    let out = folder.path().join("out");
    let train = [
        "train",
        "ild",
        "--teacher",
        TEACHER,
        "--data",
        text(&data),
        text(&out),
    ];
    let said = fails(2, &train);
    assert!(
        said.contains("data.jsonl") && said.contains("No such file"),
        "{said}"
    );
    for (content, part) in [
        (
            "{\"text\":\"a\"}\n\n{\"text\":\"b\"}\n",
            "line 2: an empty line",
        ),
        ("{\"text\":\"a\"}\n{\"text\":", "line 2: not a JSON object"),
        ("{\"body\":\"a\"}\n", "line 1"),
        ("{\"text\":\"too little\"}\n", "a batch needs 16"),
    ] {
        std::fs::write(&data, content).unwrap();
        let said = fails(2, &train);
        assert!(said.contains(part), "{said}");
        assert!(!out.exists());
    }
}

#[test]
fn flags_out_of_range_are_named() {
    for (args, part) in [
        (
            &["generate", TEACHER, "--temperature", "-1"][..],
            "temperature -1",
        ),
        (&["generate", TEACHER, "--top-p", "0"], "top_p 0"),
        (&["generate", TEACHER, "--device", "tpu"], "--device tpu"),
        (&["generate", TEACHER, "--device", "cuda:x"], "cuda:x"),
    ] {
        let said = fails(2, args);
        assert!(said.contains(part), "{said}");
    }
    if !cfg!(feature = "cuda") {
        let said = fails(2, &["generate", TEACHER, "--device", "cuda"]);
        assert!(said.contains("built without cuda"), "{said}");
    }
}

#[test]
fn existing_outputs_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("mine"), "").unwrap();
    let said = fails(2, &["compose", TEACHER, text(&out), "--mla", "1"]);
    assert!(
        said.contains("already exists") && said.contains("--force"),
        "{said}"
    );
    assert!(out.join("mine").exists());
    let compose = |teacher: &Path, out: &Path| {
        let flags = ["--mla", "1", "--init", "reference", "--force"];
        let args = ["compose", text(teacher), text(out)]
            .into_iter()
            .chain(flags);
        args.map(String::from).collect::<Vec<_>>()
    };
    fn borrowed(args: &[String]) -> Vec<&str> {
        args.iter().map(String::as_str).collect()
    }
    // What zebroid did not write is never removed.
    let said = fails(2, &borrowed(&compose(Path::new(TEACHER), &out)));
    assert!(said.contains("mine: not written by zebroid"), "{said}");
    let said = fails(
        2,
        &[
            "export",
            TEACHER,
            text(&out),
            "--format",
            "llama",
            "--force",
        ],
    );
    assert!(said.contains("mine: not written by zebroid"), "{said}");
    std::fs::remove_file(out.join("mine")).unwrap();
    succeeds(&borrowed(&compose(Path::new(TEACHER), &out)));
    succeeds(&borrowed(&compose(Path::new(TEACHER), &out)));
    assert!(out.join("config.json").exists());
    // A model does not replace what it is made from.
    let teacher = copy(folder.path());
    let said = fails(2, &borrowed(&compose(&teacher, &teacher)));
    assert!(said.contains("is read"), "{said}");
    assert!(teacher.join("model.safetensors").exists());
}

#[test]
fn an_unwritable_output_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let said = fails(
        2,
        &["compose", TEACHER, text(&file.join("out")), "--mla", "1"],
    );
    assert!(said.contains("file"), "{said}");
}

/// A disk that takes no more, as far as a shell can make one: files may not pass 256 KiB.
#[test]
#[cfg(unix)]
fn a_full_disk_is_said_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let program = env!("CARGO_BIN_EXE_zebroid");
    let script = format!(
        "trap '' XFSZ; ulimit -f 256; exec {program} compose {TEACHER} {} --mla 1 --init published",
        text(&out)
    );
    let output = Command::new("bash").args(["-c", &script]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("cannot write") && said.contains("model.safetensors"),
        "{said}"
    );
    assert_eq!(
        std::fs::read_dir(folder.path()).unwrap().count(),
        0,
        "something is left"
    );
}

#[test]
fn parity_names_the_first_layer_that_departs() {
    let folder = tempfile::tempdir().unwrap();
    let golden = "tests/golden/transformers/plain";
    let expected = format!("{golden}/expected.safetensors");
    let said = succeeds(&["parity", golden, &expected, "--json"]);
    assert_eq!(
        serde_json::from_str::<serde_json::Value>(&said).unwrap()["departs_at"],
        serde_json::Value::Null
    );
    let said = fails(1, &["parity", golden, &expected, "--tolerance", "1e-12"]);
    assert!(said.contains("departs at logits"), "{said}");
    let other = folder.path().join("empty.safetensors");
    std::fs::write(&other, b"\x02\0\0\0\0\0\0\0{}").unwrap();
    assert!(fails(2, &["parity", golden, text(&other)]).contains("input_ids"));
}

#[test]
fn generation_is_seeded_and_stops_at_max_tokens() {
    let tell = |seed: &str| {
        let json = succeeds(&[
            "generate",
            TEACHER,
            "--temperature",
            "1",
            "--max-tokens",
            "12",
            "--seed",
            seed,
            "--json",
        ]);
        serde_json::from_str::<serde_json::Value>(&json).unwrap()
    };
    let (one, again) = (tell("1"), tell("1"));
    assert_eq!(one["text"], again["text"]);
    assert!(one["completion_tokens"].as_u64().unwrap() <= 12);
    let streamed = succeeds(&[
        "generate",
        TEACHER,
        "--temperature",
        "1",
        "--max-tokens",
        "12",
        "--seed",
        "1",
    ]);
    assert_eq!(
        streamed.trim_end(),
        one["text"].as_str().unwrap().trim_end()
    );
}

#[test]
fn curves_of_runs_become_a_picture() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for (run, losses) in [("a", [3.0, 2.0]), ("b", [2.5, 1.0])] {
        std::fs::create_dir(at(run)).unwrap();
        let line = |i: usize| format!("{{\"tokens\":{},\"loss\":{}}}\n", 100 * (i + 1), losses[i]);
        std::fs::write(at(run).join("metrics.jsonl"), line(0) + &line(1)).unwrap();
    }
    let (a, b, svg) = (at("a"), at("b"), at("loss.svg"));
    let joined = format!("both={}+{}", text(&a), text(&b));
    succeeds(&["plot", text(&svg), &joined, text(&a), "--title", "Loss"]);
    let picture = std::fs::read_to_string(&svg).unwrap();
    assert!(picture.starts_with("<svg xmlns=") && picture.contains("both"));
    assert_eq!(picture.matches("<path").count(), 2, "a curve each");
    let said = fails(2, &["plot", text(&svg), text(&a), "--metric", "kl"]);
    assert!(
        said.contains("metrics.jsonl") && said.contains("kl"),
        "{said}"
    );
}

/// Said before memory is taken for them.
#[test]
fn more_layers_than_any_model_has_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let teacher = copy(root.path());
    let config = teacher.join("config.json");
    let whole = std::fs::read_to_string(&config).unwrap();
    for layers in ["2147483648", "2000000"] {
        let field = format!("\"num_hidden_layers\": {layers}");
        let changed = whole.replace("\"num_hidden_layers\": 4", &field);
        assert_ne!(changed, whole);
        std::fs::write(&config, changed).unwrap();
        let said = fails(2, &["plan", text(&teacher), "--mla", "1"]);
        let wanted = format!("num_hidden_layers {layers} is above 1024");
        assert!(said.contains(&wanted) && said.lines().count() < 4, "{said}");
    }
    let (out, data) = (root.path().join("out"), root.path().join("data.jsonl"));
    std::fs::write(&data, "{\"text\": \"One day.\"}\n").unwrap();
    let pretrain = [
        "pretrain",
        text(&out),
        "--data",
        text(&data),
        "--tokenizer",
        TEACHER,
    ];
    let said = fails(
        2,
        &[&pretrain[..], &["--num-layers", "1099511627776"]].concat(),
    );
    assert!(
        said.contains("--num-layers 1099511627776 is above 1024"),
        "{said}"
    );
}
