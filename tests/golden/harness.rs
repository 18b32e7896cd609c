//! `eval harness` against what lm-evaluation-harness recorded (`harness/make.py`): every log-likelihood of
//! every document, every choice, every score.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device};
use zebroid::checkpoint::Checkpoint;
use zebroid::data::Tokenizer;
use zebroid::eval::harness::{HarnessConfig, Source, run_task, to_json};
use zebroid::eval::task::find;

const FOLDER: &str = "tests/golden/harness";

#[derive(serde::Deserialize)]
struct Recorded {
    results: BTreeMap<String, serde_json::Value>,
    samples: Vec<Vec<(f64, bool)>>,
}

/// Runs what `recorded` holds and compares item by item.
fn compare(recorded: &str, checkpoint: &Path, data: &Path, limit: Option<usize>) {
    let path = format!("{FOLDER}/recorded/{recorded}.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let recorded: BTreeMap<String, Recorded> = serde_json::from_str(&text).unwrap();
    let tokenizer = Tokenizer::open(checkpoint).unwrap();
    let lm = Checkpoint::open(checkpoint).unwrap();
    let lm = lm.model(&Device::Cpu, DType::F32).unwrap();
    let cache = tempfile::tempdir().unwrap();
    let config = HarnessConfig {
        data: Source::Folder(data.to_owned()),
        limit,
        batch_tokens: 2048,
        lossy: true,
        max_length: lm.config.max_position_embeddings,
        fresh: false,
        cache: cache.path().to_owned(),
        model: String::new(),
    };
    let mut tasks: Vec<(&str, usize)> = Vec::new();
    for key in recorded.keys() {
        let (part, shots) = key.split_once('@').unwrap();
        let group = ["mmlu", "blimp"].into_iter().find(|g| part.starts_with(g));
        let wanted = (group.unwrap_or(part), shots.parse().unwrap());
        if !tasks.contains(&wanted) {
            tasks.push(wanted);
        }
    }
    let mut compared = 0;
    for (name, shots) in tasks {
        let task = find(name).unwrap();
        let result = run_task(&lm, &tokenizer, task, shots, &config, &mut |_, _, _| true).unwrap();
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
            for (metric, theirs) in &theirs.results {
                // A standard error of perplexity is drawn at random there.
                let Some(theirs) = theirs.as_f64() else {
                    continue;
                };
                let ours = &json["results"][&part.name][metric];
                let gap = (ours.as_f64().unwrap() - theirs).abs() / theirs.abs().max(1.0);
                assert!(gap < 1e-3, "{} {metric}: {ours} for {theirs}", part.name);
            }
        }
    }
    assert!(compared > 100, "{compared}");
}

#[test]
fn every_task_equals_lm_evaluation_harness() {
    let data = Path::new(FOLDER).join("data");
    compare("embedded", Path::new("assets/teacher"), &data, None);
}

#[test]
fn a_hybrid_equals_lm_evaluation_harness() {
    let folder = tempfile::tempdir().unwrap();
    let hybrid = folder.path().join("hybrid");
    let place = hybrid.to_str().unwrap();
    let plan = "--init reference --seed 1 --mla 1 --kv-rank 16 --rope-dim 8";
    let args = ["compose", "assets/teacher", place].into_iter();
    crate::cli::succeeds(&args.chain(plan.split(' ')).collect::<Vec<_>>());
    let data = Path::new(FOLDER).join("data");
    compare("embedded-hybrid", &hybrid, &data, None);
}

/// Real documents, a real teacher and a hybrid of the reference implementation.
#[test]
#[cfg_attr(not(shared), ignore = "no reference material: set ZEBROID_SHARED")]
fn real_documents_equal_lm_evaluation_harness() {
    let shared = crate::shared();
    let data = shared.join("data/eval");
    compare(
        "shared-stories260K",
        &shared.join("teachers/stories260K"),
        &data,
        Some(3),
    );
    compare(
        "shared-zebra-2mla3m2",
        &shared.join("golden/zebra-2mla3m2"),
        &data,
        Some(3),
    );
}
