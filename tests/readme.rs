//! What `README.md` tells people to type.

#[cfg(unix)]
use std::path::Path;

/// The shell block that follows `line`.
fn block(line: &str) -> String {
    let readme = std::fs::read_to_string("README.md").unwrap();
    let (_, rest) = readme.split_once(line).unwrap();
    let (_, rest) = rest.split_once("```sh\n").unwrap();
    rest.split_once("```").unwrap().0.to_owned()
}

#[test]
fn start_has_the_demo_and_the_tests() {
    let start = block("## Start\n");
    let commands: Vec<&str> = start
        .lines()
        .filter_map(|l| l.split(" # ").next())
        .map(str::trim)
        .collect();
    assert_eq!(
        commands,
        ["cargo run --release -- demo", "cargo test --release"]
    );
}

const STAGES: &str = "Or stage by stage";

/// The place that `select` prints is the one that the next command composes.
#[test]
fn stages_follow_each_other() {
    let stages = block(STAGES);
    let (_, selected) = stages.split_once("prints ").unwrap();
    let (place, rest) = selected.split_once('\n').unwrap();
    let hybrid = rest.lines().next().unwrap();
    assert!(
        place.starts_with("--mla ") && hybrid.contains(&format!(" {place} ")),
        "{place}: {hybrid}"
    );
}

/// From the first line to the last, on the teacher and text that they name, with fewer tokens.
#[test]
#[cfg(unix)]
#[cfg_attr(not(shared), ignore = "no reference material: set ZEBROID_SHARED")]
fn stages_run_as_written() {
    let shared = std::fs::canonicalize(crate::shared()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    std::os::unix::fs::symlink(shared.join("teachers/stories260K"), at("teacher")).unwrap();
    let stories = |name: &str, count: usize| -> Vec<String> {
        let text = std::fs::read_to_string(shared.join("data/tinystories").join(name)).unwrap();
        text.lines().take(count).map(str::to_owned).collect()
    };
    let train = stories("train.jsonl", 80);
    std::fs::write(at("train.jsonl"), train.join("\n")).unwrap();
    std::fs::write(
        at("validation.jsonl"),
        stories("validation.jsonl", 30).join("\n"),
    )
    .unwrap();
    let pair = |lines: &[String]| {
        let text = |i: usize| -> String {
            let line: serde_json::Value = serde_json::from_str(&lines[i]).unwrap();
            line["text"].as_str().unwrap().chars().take(200).collect()
        };
        let pair = serde_json::json!({"prompt": "Once", "chosen": text(0), "rejected": text(1)});
        pair.to_string() + "\n"
    };
    std::fs::write(
        at("pairs.jsonl"),
        train.chunks_exact(2).map(pair).collect::<String>(),
    )
    .unwrap();
    let mut script = block(STAGES);
    for tokens in ["--tokens 400000", "--tokens 1600000"] {
        assert!(script.contains(tokens), "{tokens} is not in README.md");
        script = script.replace(tokens, "--tokens 8192");
    }
    let program = Path::new(env!("CARGO_BIN_EXE_zebroid"));
    let path = std::env::var("PATH").unwrap();
    let output = std::process::Command::new("sh")
        .args(["-exc", &script])
        .current_dir(folder.path())
        .env(
            "PATH",
            format!("{}:{path}", program.parent().unwrap().display()),
        )
        .env("ZEBROID_CACHE", at("cache"))
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    for made in [
        "compose.html",
        "preferred/model.safetensors",
        "curves.svg",
        "amd/hybrid_config.json",
    ] {
        assert!(at(made).exists(), "{made}");
    }
}
