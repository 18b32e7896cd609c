//! Long work as it is watched from outside: lines where there is no terminal, Ctrl-C, and one process at a
//! time on one output.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use zebroid::checkpoint::{Checkpoint, lock};
use zebroid::data::Tokenizer;
use zebroid::eval::harness::{HarnessConfig, Source, run_task};
use zebroid::eval::task::find;
use zebroid::watch::Quiet;

use crate::program::{fails, succeeds, zebroid};
use zebroid::weights::Place;

const TEACHER: &str = "assets/teacher";

/// Words of a command line.
fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

/// Runs a command in `folder`'s cache, presses Ctrl-C at the first line of `stage`, and returns all that it
/// said; it must end with 130.
#[cfg(unix)]
fn interrupted(folder: &Path, stage: &str, line: &str) -> String {
    let mut child = Command::new(env!("CARGO_BIN_EXE_zebroid"))
        .args(words(line))
        .env("ZEBROID_CACHE", folder.join("cache"))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    for line in BufReader::new(child.stderr.take().unwrap()).lines() {
        let line = line.unwrap();
        if line.starts_with(&format!("{stage}:")) && !said.contains(&format!("\n{stage}:")) {
            let pid = child.id().to_string();
            Command::new("kill").args(["-INT", &pid]).status().unwrap();
        }
        said += &format!("\n{line}");
    }
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(130), "{line}: {said}");
    said
}

/// In every command that takes long, at once, with a word on what is kept and what to run.
#[test]
#[cfg(unix)]
fn ctrl_c_is_seen_wherever_work_is_long() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().to_str().unwrap();
    succeeds(&words(&format!(
        "stories {path}/stories --count 3000 --seed 11"
    )));
    let data = format!("{path}/stories/stories.jsonl");
    succeeds(&words(&format!(
        "train ild --init published --teacher {TEACHER} --data {data} {path}/bank --kv-rank 32 --rope-dim 8 \
         --steps 1 --seq-len 64 --batch-size 1"
    )));
    let calibration = "--calibration-tokens 100000 --fit-tokens 100000 --held-out-tokens 1024";
    let said = interrupted(
        root.path(),
        "calibrate",
        &format!("calibrate {TEACHER} {data} {calibration}"),
    );
    assert!(said.contains("calibration windows are saved in"), "{said}");
    let cached = Command::new(env!("CARGO_BIN_EXE_zebroid"))
        .args(words(&format!("calibrate {TEACHER} {data} {calibration}")))
        .env("ZEBROID_CACHE", root.path().join("cache"))
        .output();
    assert!(cached.unwrap().status.success());
    let sizes = "--mla 1,2 --kv-rank 32 --rope-dim 8";
    for (stage, steps, line) in [
        (
            "select",
            "windows",
            format!(
                "select --teacher {TEACHER} --bank {path}/bank --data {data} --count 1 --tokens 400000"
            ),
        ),
        (
            "eval",
            "windows",
            format!("eval kl --teacher {TEACHER} --student {TEACHER} --data {data} --batch-size 1"),
        ),
        (
            "ppl",
            "windows",
            format!("eval ppl {TEACHER} --data {data} --batch-tokens 256"),
        ),
        (
            "recall",
            "stories",
            format!("eval recall {TEACHER} --count 20000"),
        ),
        (
            "needle of 256 tokens, cell 1 of 3",
            "requests",
            format!(
                "eval probe {TEACHER} --probes needle --lengths 256 --depths 3 --count 400 --batch-tokens 256"
            ),
        ),
        (
            "compose",
            "layers",
            format!("compose {TEACHER} {path}/hybrid {sizes} --calibration {data} {calibration}"),
        ),
        (
            "dpo, frozen model",
            "pairs",
            format!(
                "train dpo --student {TEACHER} --data {path}/stories/preferences.jsonl {path}/preferring"
            ),
        ),
    ] {
        let said = interrupted(root.path(), stage, &line);
        let kept = format!("{steps} were done and are not kept; run the same command again");
        assert!(said.contains(&kept), "{line}: {said}");
    }
    // Neither a part of the hybrid is left, nor a lock.
    let left = std::fs::read_dir(root.path()).unwrap();
    let mut left: Vec<_> = left.map(|e| e.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["bank", "cache", "stories"]);
}

/// Finished parts of a task are kept, and the others are what is left to do.
#[test]
fn an_interrupted_harness_goes_on() {
    let checkpoint = Checkpoint::open(Path::new(TEACHER)).unwrap();
    let lm = checkpoint.model(&Place::cpu()).unwrap();
    let tokenizer = Tokenizer::open(Path::new(TEACHER)).unwrap();
    let cache = tempfile::tempdir().unwrap();
    let config = HarnessConfig {
        data: Source::Folder("tests/golden/harness/data".into()),
        limit: None,
        batch_tokens: 1 << 20,
        lossy: true,
        max_length: lm.config.max_position_embeddings,
        fresh: false,
        cache: cache.path().to_owned(),
        model: String::new(),
    };
    let blimp = find("blimp").unwrap();
    let run = |watch: &Quiet| run_task(&lm, &tokenizer, blimp, 0, &config, watch);
    let stopped = run(&Quiet::stop_after(2)).err().unwrap();
    assert_eq!(stopped.exit_code(), 130, "{stopped}");
    let kept = || std::fs::read_dir(cache.path()).unwrap().count();
    let before = kept();
    let rest = Quiet::default();
    let parts = run(&rest).unwrap().parts.len();
    assert!(rest.steps() > 0 && before < parts, "{before} of {parts}");
    assert_eq!(kept(), parts);
    let nothing = Quiet::default();
    run(&nothing).unwrap();
    assert_eq!(nothing.steps(), 0);
}

/// Without a terminal a run says that it began and where its metrics are, `-v` or not.
#[test]
fn lines_stand_in_for_bars() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().to_str().unwrap();
    succeeds(&words(&format!("stories {path}/stories --count 60")));
    for (out, verbose) in [("a", ""), ("b", "-v")] {
        let line = format!(
            "pretrain {path}/{out} --data {path}/stories/stories.jsonl --tokenizer {path}/stories --num-layers 1 \
             --hidden-size 16 --intermediate-size 32 --num-heads 2 --num-kv-heads 1 --seq-len 32 --batch-size 2 \
             --steps 3 {verbose}"
        );
        let output = zebroid(&words(&line));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        let metrics = format!("metrics of every step in {path}/{out}.partial/metrics.jsonl");
        assert!(
            said.starts_with("pretrain: 0/3\n") && said.contains(&metrics),
            "{said}"
        );
    }
}

#[test]
fn an_output_in_use_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().to_str().unwrap();
    let out = root.path().join("out");
    let held = lock(&out).unwrap();
    let export = format!("export {TEACHER} {path}/out --format zebroid");
    for line in [
        format!("compose {TEACHER} {path}/out --mla 1 --init published"),
        export.clone(),
        format!("train ild --teacher {TEACHER} --data none.jsonl {path}/out"),
        format!("train dpo --student {TEACHER} --data none.jsonl {path}/out --force"),
        format!("pretrain {path}/out --data none.jsonl --tokenizer {TEACHER}"),
        format!("run recipes/demo.toml --out {path}/out"),
        format!("demo --out {path}/out --force"),
    ] {
        let said = fails(2, &words(&line));
        assert!(
            said.contains("out: another zebroid process"),
            "{line}: {said}"
        );
        assert!(said.contains("wait until it has ended"), "{line}: {said}");
    }
    assert!(!out.exists());
    drop(held);
    succeeds(&words(&export));
    let left = std::fs::read_dir(root.path()).unwrap();
    let left: Vec<_> = left.map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["out"]);
}
