//! What a run learned from is said beside it, and can be learned from again.

use crate::program::{fails, succeeds, text};

fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

#[test]
fn a_result_names_its_data_and_they_replay() {
    let root = tempfile::tempdir().unwrap();
    let path = text(root.path());
    succeeds(&words(&format!("stories {path}/stories --count 60")));
    let data = format!("{path}/stories/stories.jsonl");
    let reading = "--packing stream --eos always --decontaminate lambada_openai --data-dir tests/golden/harness/data";
    let train = |out: &str, flags: &str| {
        format!(
            "pretrain {path}/{out} --tokenizer {path}/stories --num-layers 1 --hidden-size 16 --intermediate-size 32 \
             --num-heads 2 --num-kv-heads 1 --seq-len 32 --batch-size 2 --steps 3 {flags}"
        )
    };
    let texts = format!("{data}#weight=3#tokens=2000 stories:5:30#weight=1");
    let flags = format!("--data {} {reading}", texts.replace(' ', " --data "));
    succeeds(&words(&train("first", &flags)));
    let manifest = format!("{path}/first/data.json");
    let said = succeeds(&words(&format!(
        "data {texts} --tokenizer {path}/stories {reading} --json"
    )));
    let read = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
    let kept = read(&std::fs::read_to_string(&manifest).unwrap());
    assert_eq!(read(&said), kept);
    let listed = &kept["data"][0];
    assert_eq!(listed["text"], data);
    let figures = ["tokens", "limit"].map(|name| listed[name].as_u64().unwrap());
    assert_eq!(figures, [2000, 2000]);
    // The manifest says how its texts are read.
    succeeds(&words(&train(
        "second",
        &format!("--data manifest:{manifest}"),
    )));
    let weights =
        |out: &str| std::fs::read(root.path().join(out).join("model.safetensors")).unwrap();
    assert!(weights("first") == weights("second"));
    let mut lines = std::fs::read_to_string(&data).unwrap();
    lines += "{\"text\": \"One more.\"}\n";
    std::fs::write(&data, lines).unwrap();
    let said = fails(
        2,
        &words(&train("third", &format!("--data manifest:{manifest}"))),
    );
    assert!(said.contains(&format!("{data} has changed")), "{said}");
    let said = fails(
        2,
        &words(&train(
            "third",
            &format!("--data {data} --data {data}#weight=1"),
        )),
    );
    assert!(said.contains("has no weight"), "{said}");
    let dpo = format!(
        "train dpo --student {path}/first --data {path}/stories/preferences.jsonl {path}/dpo"
    );
    for flags in ["--eos always", "--decontaminate winogrande"] {
        let said = fails(2, &words(&format!("{dpo} {flags}")));
        assert!(said.contains("pairs"), "{said}");
    }
}
