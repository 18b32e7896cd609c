//! A run that is killed anywhere ends as the run that was not; shipped recipes fit their teachers.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use super::stage::select::Budget;
use super::*;
use crate::checkpoint::{self, Checkpoint, Format, Provenance};
use crate::convert::Init;
use crate::mixer::MixerConfig;
use crate::watch::{Quiet, Watch};
use crate::weights::Place;
use crate::{Error, Result};

/// Every stage there is, small enough for a test.
const SMALL: &str = r#"
teacher = "embedded"
[data]
train = "stories:2:150"
validation = "stories:3:20"
preferences = "stories:4:12"
[calibration]
tokens = 2048
fit_tokens = 1024
held_out_tokens = 256
seq_len = 64
[plan]
kv_lora_rank = 16
q_lora_rank = 64
qk_rope_head_dim = 8
[ild]
train = { steps = 4, seq_len = 64, batch_size = 2, lr = 3e-3 }
[select]
count = 1
tokens = 256
[[kd]]
train = { steps = 4, seq_len = 64, batch_size = 2, lr = 1e-3 }
[dpo]
objective = { beta = 0.1, max_length = 96 }
train = { steps = 3, batch_size = 2, lr = 1e-4 }
[eval]
seq_len = 64
batch_size = 4
"#;

/// Keeps the names of the stages, and asks to stop after some steps (0: never).
struct Recorder {
    stages: RefCell<Vec<String>>,
    steps: Cell<usize>,
    stop_after: usize,
}

impl Watch for Recorder {
    fn start(&self, stage: &str, _: usize) {
        self.stages.borrow_mut().push(stage.to_owned());
    }

    fn at(&self, _: usize, _: &str) {
        self.steps.set(self.steps.get() + 1);
    }

    fn note(&self, _: &str) {}

    fn stop(&self) -> bool {
        self.stop_after > 0 && self.steps.get() >= self.stop_after
    }
}

fn carry_out(recipe: &Recipe, out: &Path, stop_after: usize) -> (Result<Outcome>, Vec<String>) {
    let watch = Recorder {
        stages: RefCell::default(),
        steps: Cell::new(0),
        stop_after,
    };
    let surroundings = Surroundings {
        out,
        place: Place::cpu(),
        save_every: 100,
        cache: out,
        watch: &watch,
    };
    let outcome = run(recipe, &surroundings);
    (outcome, watch.stages.into_inner())
}

/// A hash of every file of tensors or records inside.
fn contents(folder: &Path) -> BTreeMap<PathBuf, u64> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = PathBuf::from(path.file_name().unwrap());
        if path.is_dir() {
            let inner = contents(&path).into_iter();
            found.extend(inner.map(|(inside, hash)| (name.join(inside), hash)));
        } else if path
            .extension()
            .is_some_and(|e| e != "jsonl" && e != "zebroid")
        {
            let mut hasher = DefaultHasher::new();
            std::fs::read(&path).unwrap().hash(&mut hasher);
            found.insert(name, hasher.finish());
        }
    }
    found
}

#[test]
fn killed_anywhere_a_run_ends_the_same() {
    let recipe = Recipe::parse(SMALL).unwrap();
    let root = tempfile::tempdir().unwrap();
    let (straight, broken) = (root.path().join("straight"), root.path().join("broken"));
    let (outcome, stages) = carry_out(&recipe, &straight, 0);
    let outcome = outcome.unwrap();
    assert_eq!(
        stages,
        [
            "calibrate",
            // MLA and Mamba2.
            "compose",
            "compose",
            "bank",
            "select",
            "eval",
            "kd 1",
            "eval",
            "dpo, frozen model",
            "dpo",
            "eval"
        ]
    );
    let names: Vec<&str> = outcome.stages.iter().map(|s| s.name.as_str()).collect();
    assert_eq!(names, ["ild", "compose", "kd 1", "dpo"]);
    assert_eq!(outcome.scores.unwrap().scores.layers.len(), 4);
    // After one forward pass or optimizer step, then after two, ..: some stages keep nothing before their end.
    let mut starts = 0;
    loop {
        starts += 1;
        match carry_out(&recipe, &broken, starts).0 {
            Ok(again) => {
                let kl = |o: &[StageResult]| o.iter().map(|s| s.kl).collect::<Vec<_>>();
                assert_eq!(kl(&again.stages), kl(&outcome.stages));
                break;
            }
            Err(Error::Interrupted(what)) => {
                assert!(starts < 40);
                assert!(what.contains("run the same command again"), "{what}");
                assert!(what.contains("finished stages are kept in"), "{what}");
            }
            Err(other) => panic!("{other}"),
        }
    }
    assert!(starts > 6, "{starts} starts");
    assert_eq!(contents(&straight), contents(&broken));
    // The card says all of the way.
    let card = std::fs::read_to_string(outcome.student.join("README.md")).unwrap();
    for part in [
        "base_model: \"teacher\"",
        "# teacher-",
        "KV cache is",
        "### 1. compose\n",
        "- calibration: `stories:2:150` (",
        "### 2. ild\n",
        "### 3. compose\n",
        "### 4. kd\n",
        "- trained: 4 steps, 512 tokens\n",
        "### 5. dpo\n",
        "- data: `stories:4:12` (",
        "- validation: `stories:3:20` (",
        "| kd | eval_kl | ",
        "| dpo | eval_kl | ",
        "\"name\":\"KL to the teacher (nats a token)\",\"value\":",
    ] {
        assert!(card.contains(part), "{part} is not in\n{card}");
    }
    // Nothing is made twice; a changed setting repeats what depends on it.
    assert!(carry_out(&recipe, &straight, 0).1.is_empty());
    let mut other = recipe.clone();
    other.kd[0].train.lr = 2e-3;
    let stages = carry_out(&other, &straight, 0).1;
    assert_eq!(stages, ["kd 1", "eval", "dpo, frozen model", "dpo", "eval"]);
}

/// Everything that a score depends on is part of its key.
#[test]
fn scores_of_other_windows_are_made_anew() {
    let mut recipe = Recipe::parse(SMALL).unwrap();
    (recipe.kd, recipe.dpo) = (Vec::new(), None);
    let root = tempfile::tempdir().unwrap();
    let first = carry_out(&recipe, root.path(), 0).0.unwrap();
    recipe.eval.seq_len = 32;
    let (second, stages) = carry_out(&recipe, root.path(), 0);
    assert!(stages.iter().any(|s| s == "select"), "{stages:?}");
    assert_ne!(first.scores, second.unwrap().scores);
}

/// What `select --method budget` chooses, from a recipe, and what it makes of it.
#[test]
fn a_budget_chooses_mixers_and_ranks() {
    let mut recipe = Recipe::parse(SMALL).unwrap();
    (recipe.ild, recipe.dpo) = (None, None);
    recipe.plan.sizes.kv_lora_rank = None;
    recipe.select = Some(
        toml::from_str("method = \"budget\"\nkv_bytes = 100\ncandidates = [\"mamba2\", \"mla:16\", \"mla:24\"]\ntokens = 256")
            .unwrap(),
    );
    let root = tempfile::tempdir().unwrap();
    let outcome = carry_out(&recipe, root.path(), 0).0.unwrap();
    let config = Checkpoint::open(&outcome.student).unwrap().config;
    let cached = config.cost(1).cached;
    assert!(2 * cached <= 100, "{cached}");
    // Chosen again from what was kept, as the command does.
    let damages = outcome.damages.unwrap();
    let budget = Budget {
        kv_bytes: Some(100),
        state_bytes: None,
    };
    let chosen = damages.choose(budget).unwrap();
    let options = recipe
        .plan
        .with_layers(chosen.iter().map(|c| c.kind).collect());
    let base = Base::open(&outcome.base, Place::cpu()).unwrap();
    assert_eq!(damages.options.len(), 3);
    let init = Init::Published { seed: 0 };
    let planned = base.plan(&options, &init).unwrap();
    let sizes = |c: &crate::model::ModelConfig| {
        c.layers
            .iter()
            .map(|l| l.params(c.hidden_size))
            .collect::<Vec<_>>()
    };
    assert_eq!(sizes(&planned), sizes(&config));
    // Another budget needs no new measurement.
    recipe.select.as_mut().unwrap().kv_bytes = Some(60);
    let stages = carry_out(&recipe, root.path(), 0).1;
    assert_eq!(stages, ["compose", "eval", "kd 1", "eval"]);
    recipe.select.as_mut().unwrap().state_bytes = Some(1);
    let error = carry_out(&recipe, root.path(), 0)
        .0
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("[select] no choice of mixers fits"),
        "{error}"
    );
}

/// Ranks that depend on the weights are the same for a recipe as for `compose` with the same settings: where the published
/// initialisation is asked for, by the weights' own spectra.
#[test]
fn a_recipe_has_the_ranks_of_the_command() {
    let mut recipe = Recipe::parse(SMALL).unwrap();
    (recipe.ild, recipe.select, recipe.kd, recipe.dpo) = (None, None, Vec::new(), None);
    recipe.init = crate::convert::InitName::Published;
    recipe.plan.mla = vec![0, 2];
    recipe.plan.sizes.kv_lora_rank = Some("energy:0.8".parse().unwrap());
    let root = tempfile::tempdir().unwrap();
    let outcome = carry_out(&recipe, root.path(), 0).0.unwrap();
    let base = Base::open(&outcome.base, Place::cpu()).unwrap();
    let init = Init::Published { seed: 0 };
    let command = base.plan(&recipe.plan, &init).unwrap();
    let config = Checkpoint::open(&outcome.student).unwrap().config;
    assert_eq!(config.cost(1), command.cost(1));
    assert!(config.cost(1).cached > 0);
}

/// What variants have in common is made once.
#[test]
fn variants_of_a_sweep_share_their_stages() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("sweep.toml");
    let sweep = "sweep = [[{ kd.train.lr = 1e-3 }, { kd.train.lr = 2e-3 }]]\n";
    std::fs::write(&file, format!("{sweep}{SMALL}")).unwrap();
    let variants = Recipe::load_all(&file, &["dpo={}".into(), "kd.train.steps=2".into()]).unwrap();
    assert_eq!(variants.len(), 2);
    let error = Recipe::load(&file).unwrap_err().to_string();
    assert!(error.contains("a sweep"), "{error}");
    let out = root.path().join("out");
    let stages = variants.iter().map(|variant| {
        let mut recipe = variant.recipe.clone();
        recipe.dpo = None;
        assert_eq!(recipe.kd[0].train.steps, Some(2));
        carry_out(&recipe, &out, 0).1
    });
    let stages: Vec<_> = stages.collect();
    assert!(stages[0].contains(&"bank".to_owned()));
    assert_eq!(stages[1], ["kd 1", "eval"]);
}

/// A bank of three candidates; a budget, and then SMART for two of them, choose from it.
#[test]
fn a_bank_may_have_any_number_of_candidates() {
    let mut recipe = Recipe::parse(SMALL).unwrap();
    (recipe.kd, recipe.dpo) = (Vec::new(), None);
    let kinds = ["mla:8", "mamba2", "mla:16"].map(|kind| kind.parse().unwrap());
    recipe.ild.as_mut().unwrap().candidates = kinds.to_vec();
    recipe.select = Some(
        toml::from_str("method = \"budget\"\nkv_bytes = 64\nlength = 128\ntokens = 256").unwrap(),
    );
    let root = tempfile::tempdir().unwrap();
    let outcome = carry_out(&recipe, root.path(), 0).0.unwrap();
    let damages = outcome.damages.unwrap();
    let found = damages.options.iter().map(|option| option.kind);
    assert_eq!(
        (found.collect::<Vec<_>>(), damages.length),
        (kinds.to_vec(), 128)
    );
    let config = Checkpoint::open(&outcome.student).unwrap().config;
    let cached = config.cost(128).cached;
    assert!(2 * cached <= 64 * 128, "{cached}");
    recipe.select = Some(
        toml::from_str("count = 1\nplace = \"mla:16\"\nelsewhere = \"mla:8\"\ntokens = 256")
            .unwrap(),
    );
    let outcome = carry_out(&recipe, root.path(), 0).0.unwrap();
    let config = Checkpoint::open(&outcome.student).unwrap().config;
    let rope = recipe.plan.sizes.qk_rope_head_dim.unwrap();
    assert_eq!(config.cost(1).cached, 3 * 8 + 16 + 4 * rope);
    recipe.select.as_mut().unwrap().pair.place = None;
    let error = carry_out(&recipe, root.path(), 0)
        .0
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("[select] say which candidate is meant with place"),
        "{error}"
    );
}

/// The fourth mixer goes the whole way as the others do: bank, SMART, KD, its own format; others refuse it by name.
#[test]
fn a_window_goes_through_bank_selection_and_training() {
    let mut recipe = Recipe::parse(SMALL).unwrap();
    recipe.dpo = None;
    let kinds = ["window:16:2", "mamba2"].map(|kind| kind.parse().unwrap());
    recipe.ild.as_mut().unwrap().candidates = kinds.to_vec();
    let root = tempfile::tempdir().unwrap();
    let outcome = carry_out(&recipe, root.path(), 0).0.unwrap();
    let scores = outcome.scores.unwrap();
    assert_eq!([scores.place, scores.elsewhere], kinds);
    let checkpoint = Checkpoint::open(&outcome.student).unwrap();
    let names = checkpoint.config.layers.iter().map(MixerConfig::name);
    assert_eq!(names.filter(|name| *name == "window").count(), 1);
    let per_token = |length: usize| checkpoint.config.cost(length).cached / length;
    assert!(per_token(18) > 0 && per_token(1800) * 99 <= per_token(18));
    let tensors = checkpoint.stored().unwrap();
    for (format, word) in [
        (Format::Amd, "(window) is neither"),
        (Format::Llama, "is not attention"),
    ] {
        let out = root.path().join("exported");
        let (config, record) = (&checkpoint.config, Provenance::default());
        let saved = checkpoint::save(&out, format, config, &tensors, None, &record, false);
        let message = saved.unwrap_err().to_string();
        assert!(
            message.contains(word) && message.contains("--format zebroid"),
            "{message}"
        );
    }
}

/// Whatever cannot work is found before the first stage, by `run` and by `run --plan` in the same words.
#[test]
fn nothing_is_made_of_a_recipe_that_must_fail() {
    let root = tempfile::tempdir().unwrap();
    let other = root.path().join("other");
    embedded::write_teacher(&other).unwrap();
    let config = std::fs::read_to_string(other.join("config.json")).unwrap();
    let hybrid = "[ild]\ntarget = \"hybrid\"";
    for (from, to, part) in [
        (
            "\"stories:2:150\"",
            "\"nowhere.jsonl\"",
            "[data] train nowhere.jsonl: No such file",
        ),
        (
            "\"stories:3:20\"",
            "\"nowhere.jsonl\"",
            "[data] validation nowhere.jsonl",
        ),
        (
            "\"stories:4:12\"",
            "\"nowhere.jsonl\"",
            "[data] preferences nowhere.jsonl",
        ),
        ("\"embedded\"", "\"nowhere\"", "nowhere: no such folder"),
        ("[[kd]]", "[[kd]]\nteacher = \"nowhere\"", "[kd 1] "),
        (
            "steps = 4, seq_len = 64",
            "steps = 4, seq_len = 0",
            "[ild] seq_len must not be 0",
        ),
        (
            "batch_size = 2, lr = 1e-3",
            "batch_size = 0, lr = 1e-3",
            "[kd 1] batch_size must not be 0",
        ),
        (
            "seq_len = 64, batch_size = 2, lr = 1e-3",
            "seq_len = 8192, lr = 1e-3",
            "[kd 1] seq_len 8192 is above",
        ),
        (
            "batch_size = 2, lr = 1e-3",
            "batch_size = 1000000, lr = 1e-3",
            "[kd 1] batch_size 1000000",
        ),
        (
            "batch_size = 2, lr = 1e-3",
            "batch_size = 5000, lr = 1e-3",
            "[kd 1] the data has",
        ),
        (
            "lr = 1e-3",
            "lr = 1e11",
            "[kd 1] lr 100000000000 must be between 0 and 1",
        ),
        (
            "steps = 3, batch_size = 2",
            "steps = 3, batch_size = 13",
            "[dpo] the data has 12 pairs",
        ),
        ("max_length = 96", "max_prompt = 0", "[dpo] max_prompt 0"),
        (
            "batch_size = 4",
            "batch_size = 0",
            "[eval] batch_size must not be 0",
        ),
        (
            "[eval]\nseq_len = 64",
            "[eval]\nseq_len = 0",
            "[eval] seq_len must not be 0",
        ),
        (
            "[eval]\nseq_len = 64",
            "[eval]\nseq_len = 512",
            "[eval] seq_len 512 is above the teacher's context",
        ),
        (
            "held_out_tokens = 256\nseq_len = 64",
            "seq_len = 0",
            "[calibration] ",
        ),
        (
            "kv_lora_rank = 16",
            "kv_lora_rank = \"budget:50%\"",
            "[ild] the rank budget:50% is for",
        ),
        (
            "kv_lora_rank = 16",
            "kv_lora_rank = 16\nattention = [3]",
            "[select] layer 3 keeps its attention",
        ),
        (
            "q_lora_rank = 64",
            "q_lora_rank = \"budget:50%\"",
            "[plan] the queries' rank",
        ),
        (
            "count = 1",
            "method = \"budget\"\ncandidates = [\"mamba2\"]",
            "[select] a budget chooses among the bank",
        ),
        (
            "count = 1",
            "count = 1\nkv_bytes = 9",
            "[select] kv_bytes, state_bytes, candidates and length",
        ),
        (
            "count = 1",
            "method = \"smart\"",
            "[select] count is missing",
        ),
        (
            "lr = 1e-3 }",
            "lr = 1e-3 }\nplan = { mla = [0, 1, 2, 3] }",
            "[kd 1] layer 0 is mamba2 already",
        ),
        ("[ild]", hybrid, "[select] places are chosen"),
    ] {
        let text = SMALL.replacen(from, to, 1);
        assert_ne!(text, SMALL, "{from} is in the recipe");
        let recipe = Recipe::parse(&text).unwrap();
        let out = root.path().join("out");
        let checked = check(&recipe, &out, &out, &Quiet::default())
            .expect_err(part)
            .to_string();
        assert!(checked.contains(part), "{checked:?} for {part:?}");
        assert!(!out.exists(), "{part}: --plan makes nothing");
        let (carried, stages) = carry_out(&recipe, &out, 0);
        // The embedded teacher lies elsewhere in a run.
        assert_eq!(carried.unwrap_err().to_string(), checked);
        assert!(stages.is_empty(), "{part}: {stages:?}");
        std::fs::remove_dir_all(&out).unwrap();
    }
    // A teacher of KD: its weights, its vocabulary, its context.
    let mut recipe = Recipe::parse(SMALL).unwrap();
    recipe.kd[0].teacher = Some(other.clone());
    let out = root.path().join("out");
    check(&recipe, &out, &out, &Quiet::default()).unwrap();
    std::fs::write(other.join("config.json"), config.replace("256", "32")).unwrap();
    let error = check(&recipe, &out, &out, &Quiet::default())
        .unwrap_err()
        .to_string();
    assert!(error.contains("[kd 1] "), "{error}");
    std::fs::write(&out, "a file").unwrap();
    let error = check(
        &Recipe::parse(SMALL).unwrap(),
        &out,
        &out,
        &Quiet::default(),
    )
    .unwrap_err();
    assert!(error.to_string().contains("is a file"), "{error}");
}

/// MambaInLLaMA's way: convert some layers, train, convert more.
#[test]
fn more_layers_can_be_converted_on_the_way() {
    let mut recipe = Recipe::parse(SMALL).unwrap();
    (recipe.ild, recipe.select, recipe.dpo) = (None, None, None);
    recipe.init = crate::convert::InitName::Published;
    recipe.plan.attention = vec![1, 2, 3];
    let mut more = recipe.kd[0].clone();
    let mut plan = recipe.plan.clone();
    plan.attention = vec![3];
    more.plan = Some(plan);
    more.objective.schedule = crate::train::stage::kd::Schedule::Stepwise;
    recipe.kd.push(more);
    let root = tempfile::tempdir().unwrap();
    let outcome = carry_out(&recipe, root.path(), 0).0.unwrap();
    let kinds = |folder: &Path| -> Vec<&'static str> {
        let config = Checkpoint::open(folder).unwrap().config;
        config.layers.iter().map(MixerConfig::name).collect()
    };
    let [_, first, _, second] = &outcome.stages[..] else {
        panic!("{:?}", outcome.stages)
    };
    assert_eq!(
        kinds(&first.folder),
        ["mamba2", "attention", "attention", "attention"]
    );
    assert_eq!(
        kinds(&second.folder),
        ["mamba2", "mamba2", "mamba2", "attention"]
    );
}

#[test]
fn mistakes_in_recipes_are_named() {
    let teacher = Checkpoint::config_only(Path::new("assets/teacher"))
        .unwrap()
        .0;
    let say = |from: &str, to: &str| {
        let text = SMALL.replacen(from, to, 1);
        assert_ne!(text, SMALL, "{from} is in the recipe");
        let checked = Recipe::parse(&text).and_then(|r| r.check(&teacher).map(|_| ()));
        checked.unwrap_err().to_string()
    };
    for (from, to, part) in [
        ("kv_lora_rank", "kv_rank", "kv_rank"),
        (
            "kv_lora_rank = 16",
            "kv_lora_rank = 6000",
            "[plan] layer 2: kv_lora_rank 6000",
        ),
        ("lr = 1e-3", "lr = -1.0", "[kd 1] lr -1"),
        ("count = 1", "count = 9", "[select] 9 MLA layers"),
        ("beta = 0.1", "beta = 0.0", "[dpo] beta 0"),
        (
            "preferences = \"stories:4:12\"",
            "",
            "preferences are missing",
        ),
        ("stories:3:20", "stories:x", "stories:SEED:COUNT"),
        ("[ild]", "[ild]\ntarget = \"hybrid\"", "target must be bank"),
        (
            "kv_lora_rank",
            "mla = [1]\nkv_lora_rank",
            "names the MLA layers already",
        ),
    ] {
        let message = say(from, to);
        assert!(message.contains(part), "{message}");
    }
}

/// Every shipped recipe parses and fits its teacher; the released models keep the published share of the cache.
#[test]
fn shipped_recipes_plan() {
    let ratios = BTreeMap::from([
        ("demo", 7.81),
        ("convert", 3.91),
        ("1b-4mla-12m2", 3.91),
        ("1b-8mla-8m2", 7.81),
        ("3b-6mla-22m2", 2.01),
        ("3b-14mla-14m2", 4.69),
        ("8b-8mla-24m2", 2.73),
        ("8b-16mla-16m2", 5.47),
        ("1b-r64", 9.38),
        ("8b-50", 50.0),
        ("8b-25", 25.0),
        ("8b-12.5", 12.5),
        ("8b-0", 0.0),
    ]);
    let mut seen = Vec::new();
    for folder in [
        "recipes",
        "recipes/zebra-llama",
        "recipes/x-ecomla",
        "recipes/mamba-in-llama",
    ] {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_none_or(|e| e != "toml") {
                continue;
            }
            let recipe = Recipe::load(&path).unwrap();
            let folder = match &recipe.teacher {
                Teacher::Embedded => PathBuf::from("assets/teacher"),
                Teacher::Folder(folder) => folder.clone(),
            };
            let (teacher, _) = Checkpoint::config_only(&folder).unwrap();
            let students = recipe.check(&teacher).unwrap();
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            let ratio = 100.0 * students.last().unwrap().kv_ratio(&teacher, 4096);
            assert!(
                (ratio - ratios[name.as_str()]).abs() < 0.006,
                "{name}: {ratio}"
            );
            for kd in recipe.kd.iter().filter_map(|kd| kd.teacher.as_ref()) {
                Checkpoint::config_only(kd).unwrap();
            }
            seen.push(name);
        }
    }
    assert_eq!(seen.len(), ratios.len(), "{seen:?}");
}

/// The sweeps behind docs/results.md, whose teachers are named when they are run.
#[test]
fn shipped_sweeps_plan() {
    let (teacher, _) = Checkpoint::config_only(Path::new("assets/teacher")).unwrap();
    let mut variants = 0;
    for entry in std::fs::read_dir("recipes/tables").unwrap() {
        for variant in Recipe::load_all(&entry.unwrap().path(), &[]).unwrap() {
            let checked = variant.recipe.check(&teacher);
            checked.unwrap_or_else(|e| panic!("{}: {e}", variant.label));
            variants += 1;
        }
    }
    assert_eq!(variants, 6 + 6 + 3 * 12 + 18);
}
