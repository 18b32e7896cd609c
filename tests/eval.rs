//! The evaluation commands as a person meets them, on the embedded teacher.

use std::path::Path;

use serde_json::Value;

use crate::program::{fails, succeeds};

const TEACHER: &str = "assets/teacher";
const DATA: &str = "tests/golden/harness/data";

fn read(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// Scores go to a file that retention reads; a second run takes them from the cache.
#[test]
fn harness_and_retention() {
    let folder = tempfile::tempdir().unwrap();
    let (json, page) = (folder.path().join("r.json"), folder.path().join("r.html"));
    let path = json.to_str().unwrap();
    let common = ["eval", "harness", TEACHER, "--data-dir", DATA, "--tasks"];
    let asked = [
        &common[..],
        &["winogrande,blimp", "--json", path, "--log-samples"],
    ]
    .concat();
    let table = succeeds(&asked);
    assert!(
        table.contains("|winogrande") && table.contains("- blimp_anaphor_number_agreement"),
        "{table}"
    );
    let results = read(&json);
    assert_eq!(results["n-samples"]["blimp_wh_island"]["effective"], 4);
    assert_eq!(
        results["samples"]["winogrande"].as_array().unwrap().len(),
        6
    );
    let seconds = &results["configs"]["winogrande"]["seconds"];
    succeeds(&asked);
    assert_eq!(
        &read(&json)["configs"]["winogrande"]["seconds"],
        seconds,
        "from the cache"
    );
    let said = succeeds(&[
        "eval",
        "retention",
        "--base",
        path,
        "--student",
        path,
        "--report",
        page.to_str().unwrap(),
    ]);
    assert!(
        said.contains("100.00 %") && said.contains("tokens scored a second"),
        "{said}"
    );
    assert!(
        std::fs::read_to_string(&page)
            .unwrap()
            .contains("winogrande")
    );
}

#[test]
fn bad_input_for_the_harness_is_named() {
    let say = |data: &str, tasks: &str| {
        let common = ["eval", "harness", TEACHER, "--data-dir"];
        fails(2, &[&common[..], &[data, "--tasks", tasks]].concat())
    };
    assert!(say(DATA, "arc_easi").contains("near it: arc_easy"));
    assert!(say(DATA, "truthfulqa_mc1,nope").contains("nope"));
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().to_str().unwrap();
    assert!(say(data, "piqa").contains("piqa_validation.jsonl"));
    let file = folder.path().join("piqa_validation.jsonl");
    std::fs::write(&file, "{\"goal\": \"x\"}\n").unwrap();
    let said = say(data, "piqa");
    assert!(
        said.contains("piqa_validation.jsonl") && said.contains("sol1"),
        "{said}"
    );
}

#[test]
fn perplexity_and_probes() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("text.txt");
    std::fs::write(
        &text,
        "Tom had a red ball. Mia walked to the park.\n".repeat(20),
    )
    .unwrap();
    let said = succeeds(&[
        "eval",
        "ppl",
        TEACHER,
        "--data",
        text.to_str().unwrap(),
        "--json",
    ]);
    let found: Value = serde_json::from_str(&said).unwrap();
    assert!(found["perplexity"].as_f64().unwrap() > 1.0, "{said}");
    let page = folder.path().join("probes.html");
    let said = succeeds(&[
        "eval",
        "probe",
        TEACHER,
        "--probes",
        "needle,copying",
        "--lengths",
        "96,128",
        "--depths",
        "2",
        "--count",
        "2",
        "--json",
        "--report",
        page.to_str().unwrap(),
    ]);
    let cells: Vec<Value> = serde_json::from_str(&said).unwrap();
    assert_eq!(cells.len(), 2 * 2 + 2, "{said}");
    assert!(
        cells
            .iter()
            .all(|c| c["tokens"].as_f64() <= c["length"].as_f64())
    );
    assert!(
        std::fs::read_to_string(&page)
            .unwrap()
            .contains("needle (chance 0.0 %)")
    );
    let said = fails(2, &["eval", "probe", TEACHER, "--lengths", "100000"]);
    assert!(said.contains("100000"), "{said}");
}
