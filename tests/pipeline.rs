//! The main job, end to end, with the program itself: small enough for every test run.

use std::path::Path;

use crate::program::{command, fails, succeeds, zebroid};

const TEACHER: &str = "assets/teacher";

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap()
}

#[test]
fn stories_to_bank_to_hybrid_to_distilled() {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name).to_str().unwrap().to_owned();
    succeeds(&["stories", &at("stories"), "--count", "400", "--seed", "7"]);
    let data = at("stories/stories.jsonl");
    let sizes = ["--kv-rank", "32", "--rope-dim", "8", "--q-rank", "96"];
    let small = ["--seq-len", "128", "--batch-size", "4", "--tokens", "16384"];
    let bank = at("bank");
    let ild = [
        "train",
        "ild",
        "--teacher",
        TEACHER,
        "--data",
        &data,
        &bank,
        "--lr",
        "5e-3",
    ];
    succeeds(&[&ild[..], &sizes, &small].concat());
    let [published, refined, hybrid, distilled] =
        ["published", "refined", "hybrid", "distilled"].map(at);
    let page = at("compose.html");
    for (out, more) in [
        (&published, &["--init", "reference"][..]),
        (
            &refined,
            &["--calibration", &data, "--report", &page, "--json"],
        ),
        (&hybrid, &["--bank", &bank]),
    ] {
        let compose = ["compose", TEACHER, out, "--mla", "1,2"];
        let said = succeeds(&[&compose[..], &sizes, more].concat());
        if out == &refined {
            let found = &json(&said)["fidelity"];
            for i in 0..4 {
                let error = found["layers"][i]["held_out"].as_f64().unwrap();
                assert!(error > 0.0 && error < 1.0, "layer {i}: {found}");
            }
            assert!(found["whole"]["kl"].as_f64().unwrap() > 0.0);
            assert!(std::fs::read_to_string(&page).unwrap().contains("<svg"));
        }
    }
    let kd = [
        "train",
        "kd",
        "--teacher",
        TEACHER,
        "--student",
        &hybrid,
        "--data",
        &data,
        &distilled,
    ];
    let steps = succeeds(&[&kd[..], &["--lr", "2e-3", "--json"], &small].concat());
    let step = json(steps.lines().last().unwrap());
    assert_eq!(step["tokens"], 16384);
    let kl = |student: &str| {
        let eval = [
            "eval",
            "kl",
            "--teacher",
            TEACHER,
            "--student",
            student,
            "--data",
            &data,
        ];
        json(&succeeds(
            &[&eval[..], &["--seq-len", "128", "--json"]].concat(),
        ))
    };
    let of = |report: &serde_json::Value| report["kl"].as_f64().unwrap();
    let (published, refined) = (of(&kl(&published)), of(&kl(&refined)));
    assert!(
        refined < 0.35 * published,
        "refined {refined}, published {published}"
    );
    let (banked, last) = (of(&kl(&hybrid)), kl(&distilled));
    assert!(of(&last) < banked, "KD helps: {last} after {banked}");
    for name in ["kl", "ce_teacher", "ce_student", "agreement", "tokens"] {
        assert!(last[name].is_number(), "{name}");
    }
    let text = succeeds(&[
        "generate",
        &distilled,
        "--prompt",
        "One day Tom and Mia",
        "--max-tokens",
        "10",
    ]);
    assert!(text.starts_with("One day Tom and Mia"), "{text}");
    // SMART's scores, saved and used again.
    let (bank, scores) = (at("bank"), at("scores.json"));
    let select = [
        "select",
        "--teacher",
        TEACHER,
        "--bank",
        &bank,
        "--data",
        &data,
        "--count",
        "2",
    ];
    let more = ["--tokens", "2048", "--save-scores", &scores, "--json"];
    let first = json(&succeeds(&[&select[..], &more].concat()));
    let again = json(&succeeds(&[
        "select", "--scores", &scores, "--count", "2", "--json",
    ]));
    assert_eq!(first, again);
    assert_eq!(first["chosen"].as_array().unwrap().len(), 2);
    let gain = |i: usize| first["sensitivity"]["layers"][i]["score"].as_f64().unwrap();
    assert!(
        (0..4).any(|i| gain(i) > 0.0),
        "no layer gains from its MLA: {first}"
    );
    // A budget of cache and state over mixers and ranks.
    let budget = [
        "select",
        "--method",
        "budget",
        "--teacher",
        TEACHER,
        "--data",
        &data,
        "--calibration",
        &data,
        "--kv-bytes",
        "96",
        "--candidates",
        "mamba2,mla:16,mla:32",
        "--rope-dim",
        "8",
        "--tokens",
        "2048",
        "--json",
    ];
    let found = json(&succeeds(&budget));
    assert!(
        found["kv_bytes"].as_u64() <= Some(96 * found["length"].as_u64().unwrap()),
        "{found}"
    );
    let kinds: Vec<&str> = found["layers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|k| k.as_str().unwrap())
        .collect();
    let (listed, planned) = (kinds.join(","), at("planned"));
    let compose = [
        "compose",
        TEACHER,
        &planned,
        "--layers",
        &listed,
        "--rope-dim",
        "8",
    ];
    succeeds(&[&compose[..], &["--calibration", &data]].concat());
    // Preferences: the true answer over another, of four pairs, again and again.
    let (pairs, preferring) = (at("pairs.jsonl"), at("preferring"));
    let all = std::fs::read_to_string(at("stories/preferences.jsonl")).unwrap();
    let four: Vec<&str> = all.lines().take(4).collect();
    std::fs::write(&pairs, four.join("\n")).unwrap();
    let dpo = [
        "train",
        "dpo",
        "--student",
        &distilled,
        "--data",
        &pairs,
        &preferring,
        "--beta",
        "0.1",
        "--lr",
        "3e-4",
        "--steps",
        "12",
        "--batch-size",
        "4",
        "--json",
    ];
    let steps = succeeds(&dpo);
    let step = |line: Option<&str>| json(line.unwrap());
    let (first, last) = (step(steps.lines().next()), step(steps.lines().last()));
    assert_eq!(first["margin"], 0.0);
    assert!(last["margin"].as_f64().unwrap() > 0.1, "{last}");
    // AMD's format and back, where no layer turns by frequencies of its own.
    let (amd, ours) = (at("amd"), at("ours"));
    succeeds(&["export", &at("published"), &amd, "--format", "amd"]);
    succeeds(&["export", &amd, &ours, "--format", "zebroid"]);
    let weights =
        |folder: &str| std::fs::read(Path::new(folder).join("model.safetensors")).unwrap();
    assert_eq!(weights(&ours), weights(&at("published")));
}

#[test]
fn the_demo_runs_resumes_and_reports() {
    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("demo");
    let folder = out.to_str().unwrap();
    let demo = [
        "demo",
        "--out",
        folder,
        "--ild-tokens",
        "16384",
        "--kd-tokens",
        "16384",
    ];
    let said = succeeds(&demo);
    for part in [
        "KV ratio",
        "perplexity retention",
        "recall accuracy",
        "any mentioned word of its kind",
        "tokens/s",
        "teacher:",
        "hybrid:",
    ] {
        assert!(said.contains(part), "{part} is missing: {said}");
    }
    let report = std::fs::read_to_string(out.join("report.html")).unwrap();
    assert!(report.contains("<svg") && report.contains("kd 1") && !report.contains("http"));
    assert!(report.contains("what followed the colour, else any"));
    assert!(report.contains("kd 1: gradient norm by layer"));
    // A finished demo is kept; one that lost its end goes on without training again.
    assert_eq!(zebroid(&demo).status.code(), Some(2));
    std::fs::remove_file(out.join("report.html")).unwrap();
    let again = succeeds(&demo);
    let figures = |said: &str| {
        said.lines()
            .filter(|l| l.contains('%'))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(figures(&said), figures(&again));
    // The page is written whatever becomes of the table.
    std::fs::remove_file(out.join("report.html")).unwrap();
    let full = std::fs::File::options().write(true).open("/dev/full");
    if let Ok(full) = full {
        let status = command().args(demo).stdout(full).status().unwrap();
        assert_eq!(status.code(), Some(1));
        assert!(out.join("report.html").exists());
    }
}

/// Ctrl-C in the middle: the step is finished and saved, and the same command goes on from there.
#[test]
#[cfg(unix)]
fn an_interrupted_training_goes_on() {
    use std::process::{Command, Stdio};
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name).to_str().unwrap().to_owned();
    succeeds(&["stories", &at("stories"), "--count", "300"]);
    let (data, stories) = (at("stories/stories.jsonl"), at("stories"));
    let train = |out: &str| -> Vec<String> {
        let line = format!(
            "pretrain {out} --data {data} --tokenizer {stories} --num-layers 2 --hidden-size 32 \
             --intermediate-size 64 --num-heads 2 --num-kv-heads 1 --seq-len 64 --batch-size 4 --tokens 76800"
        );
        line.split_whitespace().map(str::to_owned).collect()
    };
    let (straight, broken) = (at("straight"), at("broken"));
    let strs = |args: &[String]| succeeds(&args.iter().map(String::as_str).collect::<Vec<_>>());
    strs(&train(&straight));
    let mut child = Command::new(env!("CARGO_BIN_EXE_zebroid"))
        .args(train(&broken))
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let metrics = root.path().join("broken.partial/metrics.jsonl");
    while std::fs::read_to_string(&metrics).map_or(0, |t| t.lines().count()) < 5 {
        assert!(
            child.try_wait().unwrap().is_none(),
            "it ended before it could be interrupted"
        );
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status()
        .unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(said.contains("is saved in"), "{said}");
    assert!(said.contains(&train(&broken).join(" ")), "{said}");
    assert!(!Path::new(&broken).exists());
    strs(&train(&broken));
    let weights =
        |folder: &str| std::fs::read(Path::new(folder).join("model.safetensors")).unwrap();
    assert_eq!(weights(&straight), weights(&broken));
}

/// A model that was pretrained, and a hybrid, are trained on from where they are, and stay what they are.
#[test]
fn a_model_is_pretrained_further() {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name).to_str().unwrap().to_owned();
    succeeds(&["stories", &at("stories"), "--count", "60"]);
    let data = at("stories/exercises.jsonl");
    let train = |out: &str, line: String| -> f64 {
        let out = at(out);
        let shape = "--seq-len 64 --batch-size 4 --steps 24";
        let line = format!("pretrain {out} --data {data} {line} {shape}");
        succeeds(&line.split_whitespace().collect::<Vec<_>>());
        let metrics = std::fs::read_to_string(Path::new(&out).join("metrics.jsonl")).unwrap();
        let first: serde_json::Value =
            serde_json::from_str(metrics.lines().next().unwrap()).unwrap();
        first["loss"].as_f64().unwrap()
    };
    let sizes =
        "--num-layers 2 --hidden-size 32 --intermediate-size 64 --num-heads 2 --num-kv-heads 1";
    let fresh = train("fresh", format!("--tokenizer {} {sizes}", at("stories")));
    let further = train("further", format!("--from {}", at("fresh")));
    assert!(further < fresh - 0.3, "{fresh} {further}");
    let config = |folder: &str| std::fs::read_to_string(at(folder) + "/config.json").unwrap();
    assert_eq!(config("fresh"), config("further"));
    let compose = format!(
        "compose {} {} --mla 1 --kv-rank 16 --rope-dim 8 --init published",
        at("fresh"),
        at("hybrid")
    );
    succeeds(&compose.split_whitespace().collect::<Vec<_>>());
    train("hybrid-further", format!("--from {}", at("hybrid")));
    assert_eq!(config("hybrid"), config("hybrid-further"));
    let both = format!(
        "pretrain {} --data {data} --from {} --num-layers 3",
        at("no"),
        at("fresh")
    );
    let said = fails(2, &both.split_whitespace().collect::<Vec<_>>());
    assert!(
        said.contains("--from") && said.contains("--num-layers"),
        "{said}"
    );
}

/// Small texts, and a recipe that reads them.
fn small_recipe(root: &Path, stages: &str) -> String {
    let at = |name: &str| root.join(name).to_str().unwrap().to_owned();
    for (name, count, seed) in [("train", "150", "2"), ("held-out", "20", "3")] {
        succeeds(&["stories", &at(name), "--count", count, "--seed", seed]);
    }
    let recipe = format!(
        r#"
teacher = "embedded"
[data]
train = "train/stories.jsonl"
validation = "held-out/stories.jsonl"
preferences = "held-out/preferences.jsonl"
[calibration]
tokens = 4096
fit_tokens = 2048
held_out_tokens = 256
seq_len = 64
[eval]
seq_len = 64
batch_size = 4
{stages}"#
    );
    std::fs::write(root.join("recipe.toml"), recipe).unwrap();
    at("recipe.toml")
}

/// What a budget chooses from a recipe is what `select` chooses.
#[test]
fn a_recipe_fills_a_budget_as_select_does() {
    let root = tempfile::tempdir().unwrap();
    let recipe = small_recipe(
        root.path(),
        r#"
[plan]
qk_rope_head_dim = 8
[select]
method = "budget"
kv_bytes = 100
state_bytes = 50000
candidates = ["mamba2", "mla:16", "mla:24"]
tokens = 256
"#,
    );
    let at = |name: &str| root.path().join(name).to_str().unwrap().to_owned();
    let out = at("out");
    let carried = json(&succeeds(&["run", &recipe, "--out", &out, "--json"]));
    let (train, held_out) = (at("train/stories.jsonl"), at("held-out/stories.jsonl"));
    let line = format!(
        "select --method budget --teacher {TEACHER} --data {held_out} --calibration {train} --kv-bytes 100 \
         --state-bytes 50000 --candidates mamba2,mla:16,mla:24 --rope-dim 8 --tokens 256 --seq-len 64 --calibration-tokens 4096 \
         --fit-tokens 2048 --held-out-tokens 256 --calibration-seq-len 64 --json"
    );
    let found = json(&succeeds(&line.split_whitespace().collect::<Vec<_>>()));
    assert_eq!(carried["damages"], found["damages"]);
    let student = Path::new(carried["student"].as_str().unwrap()).join("config.json");
    let config = json(&std::fs::read_to_string(student).unwrap());
    let name = |layer: &serde_json::Value| layer["mixer"].as_str().unwrap_or_default().to_owned();
    let made: Vec<String> = config["layers"]
        .as_array()
        .unwrap()
        .iter()
        .map(name)
        .collect();
    let kind = |layer: &serde_json::Value| {
        layer
            .as_str()
            .unwrap()
            .split(':')
            .next()
            .unwrap()
            .to_owned()
    };
    let chosen: Vec<String> = found["layers"]
        .as_array()
        .unwrap()
        .iter()
        .map(kind)
        .collect();
    assert_eq!(made, chosen);
}

/// Every file of a finished run by its place inside. What was measured in seconds is left out, and files that a killed
/// process was writing (they have private names).
#[cfg(unix)]
fn finished_files(folder: &Path) -> std::collections::BTreeMap<std::path::PathBuf, Vec<u8>> {
    let mut found = std::collections::BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = std::path::PathBuf::from(path.file_name().unwrap());
        let private = name.to_string_lossy().starts_with(".zebroid-");
        // Every event has its time; `train/events.rs` says what else is in them.
        if private || name.ends_with(zebroid::checkpoint::EVENTS) {
            continue;
        }
        if path.is_dir() {
            let inside = finished_files(&path).into_iter();
            found.extend(inside.map(|(place, bytes)| (name.join(place), bytes)));
            continue;
        }
        let mut bytes = std::fs::read(&path).unwrap();
        if name.ends_with("metrics.jsonl") {
            let lines = String::from_utf8(bytes).unwrap();
            let steps = lines.lines().map(|line| {
                let mut step = json(line);
                step.as_object_mut().unwrap().remove("tokens_per_s");
                step.to_string() + "\n"
            });
            bytes = steps.collect::<String>().into_bytes();
        }
        found.insert(name, bytes);
    }
    found
}

/// Killed without a warning, again and again, at any moment: what it ends with is what an undisturbed run ends with.
#[test]
#[cfg(unix)]
fn a_run_survives_being_killed_at_any_moment() {
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    let root = tempfile::tempdir().unwrap();
    let recipe = small_recipe(
        root.path(),
        r#"
[plan]
kv_lora_rank = 16
q_lora_rank = 64
qk_rope_head_dim = 8
[ild]
layers_at_once = 2
train = { steps = 12, seq_len = 64, batch_size = 4, lr = 3e-3 }
[select]
count = 1
tokens = 512
[[kd]]
train = { steps = 16, seq_len = 64, batch_size = 4, lr = 1e-3 }
[dpo]
objective = { beta = 0.1, max_length = 96 }
train = { steps = 8, batch_size = 4, lr = 1e-4 }
"#,
    );
    let start = |out: &Path| {
        Command::new(env!("CARGO_BIN_EXE_zebroid"))
            .args(["run", &recipe, "--save-every", "2", "--out"])
            .arg(out)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    };
    let straight = root.path().join("straight");
    let began = Instant::now();
    assert!(start(&straight).wait().unwrap().success());
    let whole = began.elapsed();
    let straight = finished_files(&straight);
    let names = |files: &std::collections::BTreeMap<_, _>| {
        files.keys().cloned().collect::<Vec<std::path::PathBuf>>()
    };
    let wanted = std::env::var("ZEBROID_KILLS").map_or(20, |kills| kills.parse().unwrap());
    let mut random = ChaCha8Rng::seed_from_u64(7);
    let (mut kills, mut runs) = (0, 0);
    while kills < wanted {
        let broken = root.path().join(format!("broken{runs}"));
        runs += 1;
        loop {
            let mut child = start(&broken);
            if kills < wanted {
                let until = Instant::now() + whole.mul_f64(random.random_range(0.0..0.4));
                while Instant::now() < until && child.try_wait().unwrap().is_none() {
                    std::thread::sleep(Duration::from_millis(1));
                }
                if child.try_wait().unwrap().is_none() {
                    child.kill().unwrap();
                    child.wait().unwrap();
                    kills += 1;
                    continue;
                }
            }
            assert!(child.wait().unwrap().success());
            break;
        }
        let found = finished_files(&broken);
        assert_eq!(names(&straight), names(&found));
        for (name, bytes) in &straight {
            assert!(found[name] == *bytes, "{} differs", name.display());
        }
        std::fs::remove_dir_all(&broken).unwrap();
    }
    println!("{kills} kills of {runs} runs");
    assert!(straight.len() > 20, "{:?}", names(&straight));
}
