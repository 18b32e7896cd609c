//! What a result says of itself: model cards, records, and `zebroid runs` over them.

use std::path::Path;

use crate::program::{TEACHER, fails, succeeds, text};

fn json(words: &[&str]) -> serde_json::Value {
    serde_json::from_str(&succeeds(words)).unwrap()
}

fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

#[test]
fn results_say_how_they_were_made() {
    let folder = tempfile::tempdir().unwrap();
    let root = text(folder.path());
    let run = |line: &str| {
        succeeds(&words(
            &line.replace("ROOT", root).replace("TEACHER", TEACHER),
        ))
    };
    let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
    run("stories ROOT/stories --count 20");
    run("compose TEACHER ROOT/hybrid --mla 1 --kv-rank 16 --rope-dim 8 --init published --seed 3");
    let train = "--data ROOT/stories/stories.jsonl --steps 2 --seq-len 64 --batch-size 1";
    run(&format!(
        "train kd --teacher TEACHER --student ROOT/hybrid {train} --validation ROOT/stories/stories.jsonl ROOT/kd"
    ));
    run(&format!(
        "train kd --teacher TEACHER --student ROOT/hybrid {train} --lr 0.5 --dashboard ROOT/other"
    ));
    run("export ROOT/kd ROOT/amd --format amd --dtype bf16");
    // A chain keeps what its steps said.
    let card = read("amd/README.md");
    for part in [
        "library_name: zebroid\n",
        "base_model: \"teacher\"\n",
        "# teacher-3mamba2-1mla",
        "Its KV cache is 2.34 % of the base's",
        "### 1. compose\n",
        "\"seed\": 3,\n",
        "### 2. kd\n",
        "- data: `stories.jsonl` (",
        "- trained: 2 steps, 128 tokens\n",
        "### 3. export\n",
        "\"dtype\": \"bf16\"",
        "| kd | eval_kl | ",
    ] {
        assert!(card.contains(part), "{part} is not in\n{card}");
    }
    // Rounded weights were not measured.
    let measured = |name: &str| read(name).contains("model-index: [{");
    assert!(measured("kd/README.md") && !measured("amd/README.md"));
    assert!(!card.contains(root), "no folder of this machine is told");
    // A model card of somebody else is not ours to replace.
    let replace = format!("export {root}/kd {root}/amd --format amd --force");
    succeeds(&words(&replace));
    std::fs::remove_file(folder.path().join("amd/provenance.json")).unwrap();
    let said = fails(2, &words(&replace));
    assert!(said.contains("README.md: not written by zebroid"), "{said}");

    let runs = json(&["runs", root, "--json"]);
    let named = |name: &str| {
        let runs = runs.as_array().unwrap();
        runs.iter().find(|run| run["name"] == name).unwrap()
    };
    assert_eq!(named("hybrid")["stage"], "compose");
    let kd = named("kd");
    assert_eq!(
        (&kd["state"], &kd["stage"]),
        (&"finished".into(), &"kd".into())
    );
    assert_eq!((&kd["steps"], &kd["tokens"]), (&2.into(), &128.into()));
    assert!(kd["eval_kl"].is_f64() && named("other")["eval_kl"].is_null());

    let (a, b) = (format!("{root}/kd"), format!("{root}/other"));
    let svg = format!("{root}/loss.svg");
    let compared = json(&["runs", "compare", &a, &b, "--plot", &svg, "--json"]);
    let settings = compared["settings"].as_object().unwrap();
    assert_eq!(settings["kd.train.lr"], serde_json::json!(["0.001", "0.5"]));
    let names: Vec<&String> = settings.keys().collect();
    assert_eq!(names, ["kd.validation", "kd.train.lr"]);
    let figures = &compared["figures"];
    assert!(figures["loss"][1].is_f64() && figures["eval_kl"][1].is_null());
    assert_eq!(figures["kv_ratio"][0], figures["kv_ratio"][1]);
    assert!(Path::new(&svg).exists());
    let shown = succeeds(&["runs", "show", &a]);
    for part in ["kd.train.lr", "compose.plan.mla", "mamba2", "grad_norm/0"] {
        assert!(shown.contains(part), "{part} is not in\n{shown}");
    }

    // Nothing goes before it is asked for twice.
    let prune = ["runs", "prune", root, "--keep", "1"];
    let said = succeeds(&prune);
    assert!(said.contains("would remove 2 runs, ") && Path::new(&a).exists());
    let said = succeeds(&[&prune[..], &["--yes"]].concat());
    assert!(said.contains("removed 2 runs, "), "{said}");
    assert_eq!(json(&["runs", root, "--json"]).as_array().unwrap().len(), 1);
    assert!(succeeds(&prune).contains("nothing to remove"));
    let said = fails(2, &["runs", "show", root]);
    assert!(said.contains("no run: a folder with"), "{said}");
    let said = fails(2, &["runs", &format!("{root}/nowhere")]);
    assert!(said.contains("nowhere"), "{said}");
    assert!(fails(2, &["runs", "prune", root]).contains("--keep"));
}
