//! The released recipes at small width: the rope settings of each, its teacher's and its MLA layers', on the
//! teacher that the program carries.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::program::succeeds;

/// `(rope_scaling of the teacher, FACTOR,WINDOW of the MLA layers)` → the recipes that have them.
fn settings() -> BTreeMap<(String, String), Vec<String>> {
    let mut found: BTreeMap<_, Vec<String>> = BTreeMap::new();
    for entry in fs::read_dir("recipes/zebra-llama").unwrap() {
        let path = entry.unwrap().path();
        let recipe: toml::Table = fs::read_to_string(&path).unwrap().parse().unwrap();
        let teacher = Path::new("recipes/zebra-llama").join(recipe["teacher"].as_str().unwrap());
        let config = fs::read(teacher.join("config.json")).unwrap();
        let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
        let yarn = recipe["plan"]["yarn"].as_array().unwrap();
        let scaling = config["rope_scaling"].to_string();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let key = (scaling, format!("{},{}", yarn[0], yarn[1]));
        found.entry(key).or_default().push(name);
    }
    found
}

/// Held-out KL of the untrained hybrid: refined starts below published, and YaRN takes nothing away.
#[test]
fn refined_recipes_start_below_their_published_start() {
    let settings = settings();
    assert_eq!(settings.values().map(Vec::len).sum::<usize>(), 6);
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name).to_str().unwrap().to_owned();
    for (name, seed) in [("text", "1"), ("held-out", "2")] {
        succeeds(&["stories", &at(name), "--count", "60", "--seed", seed]);
    }
    let data = |name: &str| format!("{}/stories.jsonl", at(name));
    for (i, ((scaling, yarn), names)) in settings.into_iter().enumerate() {
        let teacher = at(&format!("teacher-{i}"));
        fs::create_dir(&teacher).unwrap();
        for entry in fs::read_dir("assets/teacher").unwrap() {
            let from = entry.unwrap().path();
            let to = Path::new(&teacher).join(from.file_name().unwrap());
            fs::copy(&from, to).unwrap();
        }
        let config = Path::new(&teacher).join("config.json");
        let mut json: serde_json::Value =
            serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
        json["rope_scaling"] = serde_json::from_str(&scaling).unwrap();
        fs::write(&config, json.to_string()).unwrap();
        let start = |name: &str, more: &[&str]| -> f64 {
            let out = at(&format!("{name}-{i}"));
            let compose = ["compose", &teacher, &out, "--mla", "0,1,2,3"];
            succeeds(&[&compose[..], more].concat());
            let eval = [
                "eval",
                "kl",
                "--teacher",
                &teacher,
                "--student",
                &out,
                "--seq-len",
                "256",
            ];
            let said = succeeds(&[&eval[..], &["--data", &data("held-out"), "--json"]].concat());
            let report: serde_json::Value = serde_json::from_str(&said).unwrap();
            report["kl"].as_f64().unwrap()
        };
        let text = data("text");
        let refined = ["--calibration", &text];
        let published = start("published", &["--init", "reference", "--yarn", &yarn]);
        let without = start("without", &refined);
        let with = start("with", &[&refined[..], &["--yarn", &yarn]].concat());
        let said =
            format!("{names:?}: published {published}, refined {with}, without YaRN {without}");
        println!("{said}");
        assert!(with < 0.3 * published, "{said}");
        assert!(with < 1.01 * without, "{said}");
    }
}
