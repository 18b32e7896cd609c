//! Requests are scored right however they are batched; samples, files and results are those of the harness.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use serde_json::json;

use super::Opened;
use super::data::{Dataset, Source};
use crate::checkpoint::Checkpoint;
use crate::data::Tokenizer;
use crate::eval::task::{TASKS, find};
use crate::generate::score::{Tokens, log_likelihoods, survives, tokens};
use crate::hash::Hash;
use crate::hub::Hub;
use crate::hub::fake_tests::{COMMIT, FakeHub};
use crate::mixer::MixerOptions;
use crate::model::{Lm, ModelConfig};
use crate::watch::Quiet;
use crate::weights::Place;

fn teacher() -> (Lm, Tokenizer) {
    let folder = Path::new("assets/teacher");
    let lm = Checkpoint::open(folder).unwrap().model(&Place::cpu());
    (lm.unwrap(), Tokenizer::open(folder).unwrap())
}

/// Alone, by the whole forward pass.
fn plainly(lm: &Lm, request: &Tokens) -> (f64, bool) {
    let whole = [request.context.as_slice(), &request.continuation].concat();
    let ids = Tensor::from_slice(&whole, (1, whole.len()), &Device::Cpu).unwrap();
    let logits = lm.forward(&ids, None).unwrap().squeeze(0).unwrap();
    let rows = logits.to_vec2::<f32>().unwrap();
    let (mut sum, mut greedy) = (0.0, true);
    for (i, token) in request.continuation.iter().enumerate() {
        let row = &rows[request.context.len() + i - 1];
        let log_sum = row.iter().map(|x| f64::from(*x).exp()).sum::<f64>().ln();
        sum += f64::from(row[*token as usize]) - log_sum;
        greedy &= row.iter().all(|x| *x <= row[*token as usize]);
    }
    (sum, greedy)
}

/// Sharing, sorting and batching change nothing, for a Llama and for a hybrid.
#[test]
fn shared_contexts_score_as_each_request_alone() {
    let (lm, tokenizer) = teacher();
    let mut config: ModelConfig = lm.config.clone();
    let plan = crate::convert::PlanOptions {
        mla: vec![1],
        sizes: MixerOptions {
            qk_rope_head_dim: Some(8),
            ..Default::default()
        },
        ..Default::default()
    };
    config = crate::convert::plan(&config, &plan).unwrap();
    let checkpoint = Checkpoint::open(Path::new("assets/teacher")).unwrap();
    let parts = checkpoint.parts().unwrap();
    let init = crate::convert::Init::Published { seed: 1 };
    let composed = crate::convert::compose(&parts, &config, &init, &Quiet::default()).unwrap();
    let hybrid = composed.lm(&Place::cpu()).unwrap();
    let texts = [
        (
            "One day Tom and Mia walked to the",
            [" park.", " river. Tom had a red ball.", " x"],
        ),
        (
            "Tom had a blue kite. Mia had a",
            [" drum.", " red drum and a", " green"],
        ),
        ("", ["Tom", " Tom had a red ball.", "A"]),
    ];
    let requests: Vec<Tokens> = texts
        .iter()
        .flat_map(|(context, all)| all.map(|c| tokens(&tokenizer, context, c, 256).unwrap()))
        .collect();
    for lm in [&lm, &hybrid] {
        for batch_tokens in [1, 24, 4096] {
            let found =
                log_likelihoods(lm, &requests, batch_tokens, "", &Quiet::default()).unwrap();
            for (request, (sum, greedy)) in requests.iter().zip(found) {
                let (true_sum, true_greedy) = plainly(lm, request);
                assert!((sum - true_sum).abs() < 2e-4, "{sum} for {true_sum}");
                assert_eq!(greedy, true_greedy);
            }
        }
    }
}

#[test]
fn requests_split_and_truncate_as_the_harness_does() {
    let (_, tokenizer) = teacher();
    let split = |context: &str, continuation: &str, max: usize| {
        tokens(&tokenizer, context, continuation, max).unwrap()
    };
    // Spaces move over.
    assert_eq!(split("Tom had ", "a", 99), split("Tom had", " a", 99));
    let whole = split("Tom had a red", " ball. Mia had a", 99);
    let short = split("Tom had a red", " ball. Mia had a", 5);
    let all = [whole.context.as_slice(), &whole.continuation].concat();
    let kept = [short.context.as_slice(), &short.continuation].concat();
    assert_eq!(kept, all[all.len() - 6..]);
    assert_eq!(short.continuation, whole.continuation);
    let error = tokens(&tokenizer, "Tom", " had a red ball. Mia had a", 3).unwrap_err();
    assert!(
        error.to_string().contains("the model's context 3"),
        "{error}"
    );
}

#[test]
fn texts_that_the_tokenizer_cannot_say_are_noticed() {
    let words = json!({
        "version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null, "decoder": null,
        "pre_tokenizer": { "type": "Whitespace" },
        "model": { "type": "WordLevel", "vocab": { "<unk>": 0, "Tom": 1, "had": 2 }, "unk_token": "<unk>" },
    });
    let words = Tokenizer::from_json(words.to_string().as_bytes()).unwrap();
    assert!(survives(&words, " Tom  had").unwrap());
    assert!(!survives(&words, "Tom saw").unwrap());
    let (_, bytes) = teacher();
    assert!(survives(&bytes, "Zoë? 42 “ж”").unwrap());
}

fn folder() -> Source {
    Source::Folder("tests/golden/harness/data".into())
}

/// A hub of the tasks' data sets, whose files are the golden ones.
fn hub() -> FakeHub {
    let hub = FakeHub::start();
    for (task, files) in [
        ("arc_easy", &["ARC-Easy/test", "ARC-Easy/train"][..]),
        ("mmlu", &["all/test"]),
        (
            "blimp",
            &["anaphor_number_agreement/train", "wh_island/train"],
        ),
    ] {
        let read = |name: &&str| {
            let name = format!("{name}/0000.parquet");
            let bytes = std::fs::read(format!("tests/golden/harness/hub/{name}")).unwrap();
            (name, bytes)
        };
        let files: Vec<(String, Vec<u8>)> = files.iter().map(read).collect();
        let files: Vec<_> = files
            .iter()
            .map(|(n, b)| (n.as_str(), b.as_slice()))
            .collect();
        let path = format!("datasets/{}", find(task).unwrap().dataset);
        hub.add(&path, "refs/convert/parquet", &files);
    }
    hub
}

/// Parquet from the hub holds the rows of the JSON lines; it is fetched once.
#[test]
fn the_hub_gives_the_same_rows_once() {
    let (fake, kept) = (hub(), tempfile::tempdir().unwrap());
    let mut hub = fake.hub(kept.path());
    let open = |hub: &Hub, name: &str, split: &str| {
        let source = Source::Hub(hub.clone());
        Dataset::open(&source, find(name).unwrap(), split, &Quiet::default())
    };
    for (name, split) in [
        ("arc_easy", "test"),
        ("arc_easy", "train"),
        ("mmlu", "test"),
        ("blimp", "train"),
        ("blimp", "train"),
    ] {
        let theirs = open(&hub, name, split).unwrap();
        let task = find(name).unwrap();
        let ours = Dataset::open(&folder(), task, split, &Quiet::default());
        assert_eq!(theirs.rows, ours.unwrap().rows);
        assert_eq!(theirs.revision.as_deref(), Some(COMMIT));
    }
    // Two of ARC, one of MMLU, two of BLiMP.
    assert_eq!(fake.downloads(), 5);
    let say = |hub: &Hub, name: &str, split: &str| open(hub, name, split).unwrap_err().to_string();
    let message = say(&hub, "arc_challenge", "test");
    assert!(
        message.contains("configuration ARC-Challenge, split test"),
        "{message}"
    );
    let message = say(&hub, "race", "test");
    assert!(
        message.contains("no data set EleutherAI/race") && message.contains("--data-dir"),
        "{message}"
    );
    // Without the hub: what is kept.
    hub.offline = true;
    assert_eq!(open(&hub, "arc_easy", "test").unwrap().rows.len(), 6);
    for (name, split) in [("race", "test"), ("mmlu", "dev")] {
        let message = say(&hub, name, split);
        assert!(message.contains("HF_HUB_OFFLINE"), "{message}");
    }
}

/// Description, examples, contexts and continuations of every document, letter by letter, are those that
/// lm-evaluation-harness's own task definitions rendered; the models of the recordings do not matter here.
#[test]
fn prompts_are_the_harnesss_own() {
    #[derive(serde::Deserialize)]
    struct Recorded {
        /// Of every document; groups have none.
        #[serde(default)]
        prompts: Vec<String>,
    }
    let mut compared = 0;
    for name in ["embedded", "embedded-fewshot"] {
        let path = format!("tests/golden/harness/recorded/{name}.json");
        let text = std::fs::read_to_string(path).unwrap();
        let recorded: BTreeMap<String, Recorded> = serde_json::from_str(&text).unwrap();
        for task in TASKS {
            for shots in [0, 1, 2, 3, 5, 10, 25] {
                let key = format!("{}@{shots}", task.name);
                if !recorded.contains_key(&key) {
                    continue;
                }
                for part in Opened::new(task, shots, &folder(), &Quiet::default())
                    .unwrap()
                    .parts()
                {
                    let theirs = &recorded[&format!("{}@{shots}", part.name)].prompts;
                    let ours = part.documents(None).unwrap();
                    assert_eq!(ours.len(), theirs.len(), "{}, {shots} examples", part.name);
                    for ((prefix, document), theirs) in ours.iter().zip(theirs) {
                        let found = document.requests.iter().fold(Hash::new(), |hash, (c, a)| {
                            hash.with(format!("{prefix}{c}\0{a}\0").as_bytes())
                        });
                        let requests = &document.requests;
                        assert_eq!(
                            found.to_string(),
                            *theirs,
                            "{}, {shots} examples:\n{prefix}{requests:?}",
                            part.name
                        );
                        compared += 1;
                    }
                }
            }
        }
    }
    assert!(compared > 150, "{compared}");
}

/// A document that is among its own examples several times is shown other ones, as many as asked for.
#[test]
fn doubles_of_a_document_are_no_examples_of_it() {
    let opened = Opened::new(find("winogrande").unwrap(), 5, &folder(), &Quiet::default()).unwrap();
    let part = opened.parts().next().unwrap();
    let documents = part.documents(None).unwrap();
    for (prefix, document) in &documents {
        assert_eq!(prefix.matches("\n\n").count(), 5);
        assert!(!prefix.contains(&document.example), "{prefix}");
    }
    // Eight rows, two of them the first document: six others are too few for seven.
    let opened = Opened::new(find("winogrande").unwrap(), 7, &folder(), &Quiet::default()).unwrap();
    let error = opened.parts().next().unwrap().documents(None).unwrap_err();
    assert!(
        error.to_string().contains("winogrande_train.jsonl has 6"),
        "{error}"
    );
}
