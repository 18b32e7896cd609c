//! Distillation from what was written down of a teacher.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::program::{TEACHER, command, fails, succeeds, text};
use crate::serve::Served;

fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

struct Setting {
    root: tempfile::TempDir,
}

impl Setting {
    fn new() -> Self {
        let set = Self {
            root: tempfile::tempdir().unwrap(),
        };
        set.succeeds("stories ROOT/stories --count 30");
        set.succeeds(&format!(
            "compose {TEACHER} ROOT/hybrid --mla 1 --kv-rank 16 --rope-dim 8 --init published"
        ));
        set
    }

    /// ROOT, DATA and KD stand for what every line has.
    fn line(&self, line: &str) -> String {
        let line = line.replace(
            "KD",
            "train kd --student ROOT/hybrid --batch-size 2 --steps 6 --lr 1e-3",
        );
        let line = line.replace("DATA", "ROOT/stories/stories.jsonl#tokens=1500");
        line.replace("ROOT", text(self.root.path()))
    }

    fn succeeds(&self, line: &str) -> String {
        succeeds(&words(&self.line(line)))
    }

    fn refused(&self, line: &str, part: &str) {
        let said = fails(2, &words(&self.line(line)));
        assert!(said.contains(part), "{line}: {said}");
    }

    fn losses(&self, run: &str) -> Vec<f64> {
        let lines = std::fs::read_to_string(self.root.path().join(run).join("metrics.jsonl"));
        let loss = |line: &str| serde_json::from_str::<Value>(line).unwrap()["loss"].as_f64();
        lines.unwrap().lines().filter_map(loss).collect()
    }

    fn shard(&self, logits: &str) -> PathBuf {
        self.root.path().join(logits).join("00000.logits")
    }
}

fn bytes(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

/// Largest relative difference of two runs' losses.
fn apart(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!((a.len(), b.len()), (6, 6));
    let each = a.iter().zip(b).map(|(a, b)| (a - b).abs() / a);
    each.fold(0.0, f64::max)
}

/// With all tokens stored a run is the teacher's own up to 16 bits, with some of them close; in any order of windows.
#[test]
fn a_run_from_stored_logits_is_that_of_the_teacher() {
    let set = Setting::new();
    let plan = set.line(&format!(
        "teach {TEACHER} ROOT/all --data DATA --seq-len 64 --top-k 431 --plan"
    ));
    let said = succeeds(&words(&plan));
    // 23 windows of 1,472 tokens; 9 bits an id.
    for part in [
        "1,472 tokens in 23 windows of 64 (28 left over)",
        "1349 bytes a token",
    ] {
        assert!(said.contains(part), "{said}");
    }
    assert!(!set.root.path().join("all").exists());
    for (out, k) in [("all", 431), ("some", 24)] {
        set.succeeds(&format!(
            "teach {TEACHER} ROOT/{out} --data DATA --seq-len 64 --top-k {k}"
        ));
    }
    for seed in [0, 7] {
        let kd = |out: &str, of: &str| {
            set.succeeds(&format!(
                "KD {of} ROOT/{out}-{seed} --seq-len 64 --seed {seed}"
            ))
        };
        kd("online", &format!("--teacher {TEACHER} --data DATA"));
        kd("from-all", "--teacher-logits ROOT/all --data DATA");
        kd(
            "from-some",
            "--teacher-logits ROOT/some --data manifest:ROOT/some/data.json",
        );
        let losses = |out: &str| set.losses(&format!("{out}-{seed}"));
        let online = losses("online");
        let (all, some) = (losses("from-all"), losses("from-some"));
        assert!(apart(&online, &all) < 1e-3, "{online:?} {all:?}");
        assert!(apart(&online, &some) < 0.05, "{online:?} {some:?}");
    }
    assert_ne!(set.losses("online-0"), set.losses("online-7"));
    let record = std::fs::read_to_string(set.root.path().join("from-all-0/provenance.json"));
    assert!(record.unwrap().contains("teacher logits"));
}

#[test]
fn stored_logits_of_something_else_are_refused() {
    let set = Setting::new();
    let teach = format!("teach {TEACHER} ROOT/logits --data DATA");
    set.succeeds(&format!("{teach} --seq-len 64 --top-k 24"));
    let kd = |flags: &str, part: &str| {
        set.refused(
            &format!("KD --teacher-logits ROOT/logits ROOT/out {flags}"),
            part,
        );
        assert!(!set.root.path().join("out").exists());
    };
    kd("--data DATA", "windows of 64 tokens, and seq_len is 256");
    let kd = |flags: &str, part: &str| kd(&format!("{flags} --seq-len 64"), part);
    kd(
        "--data DATA --packing stream",
        "packing was documents, now stream",
    );
    kd("--data DATA --eos always", "eos was auto, now always");
    kd("--data stories:1:40", "logits of another corpus");
    kd(
        "--data DATA --temperature 2",
        "temperature 2: of the tokens that are not stored",
    );
    kd(
        "--data DATA --top-k 30",
        "top_k 30: the stored logits are those of the 24 likeliest",
    );
    kd("--data DATA --schedule stepwise", "a stepwise schedule");
    kd("--data DATA --validation DATA", "name it with --teacher");
    set.refused(
        "KD --teacher-logits ROOT/stories --data DATA ROOT/out",
        "zebroid teach makes them",
    );
    set.refused("KD --data DATA ROOT/out", "--teacher");
    // Among the likeliest all can be done.
    for flags in [
        "--top-k 24 --temperature 2",
        "--divergence jsd",
        "--ce-weight 1 --labels teacher",
    ] {
        set.succeeds(&format!(
            "KD --teacher-logits ROOT/logits --data DATA ROOT/out --seq-len 64 {flags} --force"
        ));
    }
    set.refused(&format!("{teach} --seq-len 64"), "already exists");
    for (flags, part) in [
        (
            "--top-k 0",
            "top_k 0 must lie between 1 and the vocabulary's 431",
        ),
        ("--top-k 432", "top_k 432"),
        ("--seq-len 512", "above the teacher's context of 256"),
        (
            "--tokenizer ROOT/stories",
            "--tokenizer is for a served teacher",
        ),
    ] {
        set.refused(
            &format!("teach {TEACHER} ROOT/other --data DATA {flags}"),
            part,
        );
    }
    set.refused(
        "teach http://127.0.0.1:9/v1 ROOT/other --data DATA",
        "needs --tokenizer",
    );
    // Another student's tokens.
    let other = set.root.path().join("other");
    std::fs::create_dir(&other).unwrap();
    for entry in std::fs::read_dir(set.root.path().join("hybrid")).unwrap() {
        let from = entry.unwrap().path();
        std::fs::copy(&from, other.join(from.file_name().unwrap())).unwrap();
    }
    let file = other.join("tokenizer.json");
    let mut spelled: Value = serde_json::from_slice(&bytes(&file)).unwrap();
    let vocab = spelled["model"]["vocab"].as_object_mut().unwrap();
    // Two bytes that no text has.
    let (first, second) = (vocab["ł"].clone(), vocab["Ł"].clone());
    (vocab["ł"], vocab["Ł"]) = (second, first);
    std::fs::write(&file, spelled.to_string()).unwrap();
    let line =
        set.line("KD --teacher-logits ROOT/logits --data DATA ROOT/out --seq-len 64 --force");
    let said = fails(2, &words(&line.replace("/hybrid", "/other")));
    assert!(
        said.contains("the teacher's vocabulary is not the student's"),
        "{said}"
    );
}

/// What is there of an unfinished one is kept; another one's is not mixed in.
#[test]
fn an_unfinished_folder_is_gone_on_with() {
    let set = Setting::new();
    let teach =
        |flags: &str| format!("teach {TEACHER} ROOT/logits --data DATA --seq-len 64 {flags}");
    set.succeeds(&teach("--top-k 8"));
    let whole = bytes(&set.shard("logits"));
    let (out, partial) = (
        set.root.path().join("logits"),
        set.root.path().join("logits.partial"),
    );
    std::fs::rename(&out, &partial).unwrap();
    set.refused(&teach("--top-k 9"), "top_k was 8, now 9");
    // Not written anew.
    let before = std::fs::metadata(partial.join("00000.logits"))
        .unwrap()
        .modified()
        .unwrap();
    set.succeeds(&teach("--top-k 8"));
    let after = std::fs::metadata(set.shard("logits"))
        .unwrap()
        .modified()
        .unwrap();
    assert_eq!(before, after);
    std::fs::rename(&out, &partial).unwrap();
    std::fs::remove_file(partial.join("00000.logits")).unwrap();
    std::fs::write(partial.join(".zebroid-torn"), "").unwrap();
    set.succeeds(&teach("--top-k 8 --batch-size 3"));
    assert!(bytes(&set.shard("logits")) == whole);
    assert!(!out.join(".zebroid-torn").exists());
    set.succeeds(&teach("--top-k 9 --force"));
    assert!(bytes(&set.shard("logits")) != whole);
}

/// A served teacher says what one in memory says, up to how either computes.
#[test]
fn a_served_teacher_teaches_too() {
    let set = Setting::new();
    let served = Served::start(&["--cache-type", "f32"]);
    let url = format!("{}/v1", served.url);
    let of = "--data DATA --seq-len 64 --top-k 24";
    set.succeeds(&format!("teach {TEACHER} ROOT/own {of}"));
    set.succeeds(&format!(
        "teach {url} ROOT/served {of} --tokenizer ROOT/hybrid"
    ));
    let kd = |of: &str| {
        set.succeeds(&format!(
            "KD --teacher-logits ROOT/{of} --data DATA ROOT/from-{of} --seq-len 64"
        ))
    };
    kd("own");
    kd("served");
    let (own, other) = (set.losses("from-own"), set.losses("from-served"));
    assert!(apart(&own, &other) < 1e-3, "{own:?} {other:?}");
    // Another vocabulary, another name, another key.
    set.succeeds("stories ROOT/tokens --count 1");
    let file = set.root.path().join("tokens/tokenizer.json");
    let spelled = std::fs::read_to_string(&file).unwrap();
    let mut changed: Value = serde_json::from_str(&spelled).unwrap();
    let vocab = changed["model"]["vocab"].as_object_mut().unwrap();
    let moved: Vec<Value> = vocab.values().cloned().rev().collect();
    for (id, moved) in vocab.values_mut().zip(moved) {
        *id = moved;
    }
    std::fs::write(&file, changed.to_string()).unwrap();
    let teach = format!("teach {url} ROOT/other {of}");
    set.refused(
        &format!("{teach} --tokenizer ROOT/tokens"),
        "its vocabulary is not that of the tokenizer",
    );
    set.refused(
        &format!("{teach} --tokenizer ROOT/hybrid --model nobody"),
        "404",
    );
    let key = set.succeeds("serve --make-key ann --api-key-file ROOT/keys.toml");
    let keys = set.line("ROOT/keys.toml");
    let keyed = Served::start(&["--api-key-file", &keys]);
    let line = set.line(&format!(
        "teach {}/v1 ROOT/keyed {of} --tokenizer ROOT/hybrid",
        keyed.url
    ));
    let said = fails(2, &words(&line));
    assert!(said.contains("set OPENAI_API_KEY"), "{said}");
    let mut with_key = command();
    let done = with_key
        .args(words(&line))
        .env("OPENAI_API_KEY", key.trim())
        .output()
        .unwrap();
    assert!(done.status.success(), "{done:?}");
    assert!(bytes(&set.shard("keyed")) != bytes(&set.shard("own")));
}
