//! `eval harness` against what lm-evaluation-harness recorded (`harness/make.py`): every log-likelihood of
//! every document, every choice, every score.

use std::collections::BTreeMap;
use std::path::Path;

use zebroid::checkpoint::Checkpoint;
use zebroid::data::Tokenizer;
use zebroid::eval::harness::{HarnessConfig, Source, run_task, to_json};
use zebroid::eval::task::find;
use zebroid::watch::Quiet;
use zebroid::weights::Place;

pub const FOLDER: &str = "tests/golden/harness";

#[derive(serde::Deserialize)]
struct Recorded {
    results: BTreeMap<String, serde_json::Value>,
    /// Groups have none.
    #[serde(default)]
    samples: Vec<Vec<(f64, bool)>>,
}

/// Few-shot prompts are read whole, past the model's context.
const LONG: usize = 8192;
/// Tasks and numbers of examples that a recording holds.
pub fn recorded_tasks<T>(recorded: &BTreeMap<String, T>) -> Vec<(&str, usize)> {
    let mut tasks: Vec<(&str, usize)> = Vec::new();
    for key in recorded.keys() {
        let (part, shots) = key.split_once('@').unwrap();
        let group = ["mmlu", "blimp"].into_iter().find(|g| part.starts_with(g));
        let wanted = (group.unwrap_or(part), shots.parse().unwrap());
        if !tasks.contains(&wanted) {
            tasks.push(wanted);
        }
    }
    tasks
}

pub fn config(data: &Path, limit: Option<usize>, cache: &Path, max_length: usize) -> HarnessConfig {
    HarnessConfig {
        data: Source::Folder(data.to_owned()),
        limit,
        batch_tokens: 2048,
        lossy: true,
        max_length,
        fresh: false,
        cache: cache.to_owned(),
        model: String::new(),
    }
}

/// Runs what `recorded` holds and compares item by item.
fn compare(
    recorded: &str,
    checkpoint: &Path,
    data: &Path,
    limit: Option<usize>,
    max_length: Option<usize>,
) {
    let path = format!("{FOLDER}/recorded/{recorded}.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let recorded: BTreeMap<String, Recorded> = serde_json::from_str(&text).unwrap();
    let tokenizer = Tokenizer::open(checkpoint).unwrap();
    let lm = Checkpoint::open(checkpoint).unwrap();
    let lm = lm.model(&Place::cpu()).unwrap();
    let cache = tempfile::tempdir().unwrap();
    let length = max_length.unwrap_or(lm.config.max_position_embeddings);
    let config = config(data, limit, cache.path(), length);
    let tasks = recorded_tasks(&recorded);
    let mut compared = 0;
    for (name, shots) in tasks {
        let task = find(name).unwrap();
        let result = run_task(&lm, &tokenizer, task, shots, &config, &Quiet::default()).unwrap();
        let json = to_json(
            std::slice::from_ref(&result),
            "m",
            serde_json::json!({}),
            true,
        );
        for part in &result.parts {
            let theirs = &recorded[&format!("{}@{shots}", part.name)];
            assert_eq!(part.samples.len(), theirs.samples.len(), "{}", part.name);
            for (ours, theirs) in part.samples.iter().zip(&theirs.samples) {
                let what = format!("{} document {}, {shots} examples", part.name, ours.doc_id);
                assert_eq!(ours.found.len(), theirs.len(), "{what}");
                for ((a, greedy_a), (b, greedy_b)) in ours.found.iter().zip(theirs) {
                    assert!((a - b).abs() < 1e-3, "{what}: {a} for {b}");
                    assert_eq!(greedy_a, greedy_b, "{what}");
                    compared += 1;
                }
            }
        }
        let parts = result.parts.iter().map(|p| p.name.as_str());
        for name in parts.chain([name]) {
            let theirs = &recorded[&format!("{name}@{shots}")];
            for (metric, theirs) in &theirs.results {
                // A standard error of perplexity is drawn at random there.
                let Some(theirs) = theirs.as_f64() else {
                    continue;
                };
                let ours = &json["results"][name][metric];
                let gap = (ours.as_f64().unwrap() - theirs).abs() / theirs.abs().max(1.0);
                assert!(gap < 1e-3, "{name} {metric}: {ours} for {theirs}");
            }
        }
    }
    assert!(compared > 100, "{compared}");
}

#[test]
fn every_task_equals_lm_evaluation_harness() {
    let data = Path::new(FOLDER).join("data");
    let teacher = Path::new("assets/teacher");
    compare("embedded", teacher, &data, None, None);
    compare("embedded-fewshot", teacher, &data, None, Some(LONG));
}

#[test]
fn a_hybrid_equals_lm_evaluation_harness() {
    let folder = tempfile::tempdir().unwrap();
    let hybrid = folder.path().join("hybrid");
    let place = hybrid.to_str().unwrap();
    let plan = "--init published --seed 1 --mla 1 --kv-rank 16 --rope-dim 8";
    let args = ["compose", "assets/teacher", place].into_iter();
    crate::program::succeeds(&args.chain(plan.split(' ')).collect::<Vec<_>>());
    let data = Path::new(FOLDER).join("data");
    compare("embedded-hybrid", &hybrid, &data, None, None);
    compare("embedded-hybrid-fewshot", &hybrid, &data, None, Some(LONG));
}

/// Real documents, a real teacher and a hybrid of the reference implementation.
#[test]
#[cfg_attr(not(shared), ignore = "no reference material: set ZEBROID_SHARED")]
fn real_documents_equal_lm_evaluation_harness() {
    let shared = crate::shared();
    let data = shared.join("data/eval");
    for (name, folder) in [
        ("stories260K", "teachers/stories260K"),
        ("zebra-2mla3m2", "golden/zebra-2mla3m2"),
    ] {
        let lm = shared.join(folder);
        compare(&format!("shared-{name}"), &lm, &data, Some(3), None);
        let fewshot = format!("shared-{name}-fewshot");
        compare(&fewshot, &lm, &data, Some(1), Some(LONG));
    }
}
