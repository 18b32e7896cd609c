//! Models and texts by the hub's names, from a cache as Hugging Face's own tools leave it.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::program::{TEACHER, command, fails, text};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Puts files into a cache: blobs, and a commit with links to them.
fn lay(cache: &Path, repo: &str, files: &[PathBuf]) {
    let repo = cache.join(repo);
    let snapshot = repo.join("snapshots").join(COMMIT);
    for folder in [&snapshot, &repo.join("blobs"), &repo.join("refs")] {
        std::fs::create_dir_all(folder).unwrap();
    }
    for (i, file) in files.iter().enumerate() {
        let name = snapshot.join(file.file_name().unwrap());
        #[cfg(unix)]
        {
            let blob = format!("etag{i}");
            std::fs::copy(file, repo.join("blobs").join(&blob)).unwrap();
            std::os::unix::fs::symlink(Path::new("../../blobs").join(blob), name).unwrap();
        }
        #[cfg(not(unix))]
        std::fs::copy(file, name).map(|_| i).unwrap();
    }
    std::fs::write(repo.join("refs/main"), COMMIT).unwrap();
}

/// A command that sees this cache and no hub.
fn offline(cache: &Path) -> Command {
    let mut command = command();
    command
        .env("HF_HUB_CACHE", cache)
        .env("HF_HUB_OFFLINE", "1");
    command
}

/// What it prints, and what it says, with its exit code.
fn run(cache: &Path, line: &str) -> (String, String, i32) {
    let output = offline(cache)
        .args(line.split_whitespace())
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    let code = output.status.code().unwrap();
    (text(output.stdout), text(output.stderr), code)
}

/// A cache with the embedded teacher and a text, and the file of the text.
fn cache(root: &Path) -> PathBuf {
    let cache = root.join("hub");
    let teacher = std::fs::read_dir(TEACHER).unwrap();
    let teacher: Vec<PathBuf> = teacher.map(|entry| entry.unwrap().path()).collect();
    lay(&cache, "models--org--teacher", &teacher);
    let data = root.join("held-out.jsonl");
    std::fs::write(
        &data,
        "{\"text\": \"One day Tom and Mia walked to the park. Tom had a red ball.\"}\n",
    )
    .unwrap();
    lay(&cache, "datasets--org--texts", &[data]);
    cache
}

#[test]
fn commands_take_ids_of_models_and_texts() {
    let root = tempfile::tempdir().unwrap();
    let (cache, out) = (cache(root.path()), root.path().join("exported"));
    let done = |line: &str| {
        let (printed, said, code) = run(&cache, line);
        assert_eq!(code, 0, "{line}: {said}");
        assert!(!said.contains("download"), "{line}: {said}");
        printed
    };
    let text = "hf://datasets/org/texts/held-out.jsonl";
    let by_id = done("generate org/teacher --prompt Tom --max-tokens 5");
    let by_path = done(&format!("generate {TEACHER} --prompt Tom --max-tokens 5"));
    assert_eq!(by_id, by_path);
    done("plan hf://org/teacher@main --mla 1 --kv-rank 16 --rope-dim 8");
    done(&format!(
        "data {text}#1/1 --tokenizer org/teacher --seq-len 8"
    ));
    done(&format!("eval ppl org/teacher --data {text} --window 16"));
    done(&format!(
        "eval kl --teacher org/teacher --student {TEACHER} --data {text} --seq-len 16"
    ));
    // The record says what it is made of.
    done(&format!(
        "export org/teacher@{COMMIT} {} --format zebroid",
        out.display()
    ));
    let record = std::fs::read_to_string(out.join("provenance.json")).unwrap();
    let record: Value = serde_json::from_str(&record).unwrap();
    assert_eq!(record["base"]["name"], "org/teacher");
    assert_eq!(record["base"]["revision"], COMMIT);
    let card = std::fs::read_to_string(out.join("README.md")).unwrap();
    assert!(card.contains(&format!("org/teacher@{COMMIT}")), "{card}");
}

#[test]
fn recipes_take_ids() {
    let root = tempfile::tempdir().unwrap();
    let cache = cache(root.path());
    let recipe = root.path().join("recipe.toml");
    let demo = std::fs::read_to_string("recipes/demo.toml").unwrap();
    let demo = demo.replace("\"embedded\"", "\"org/teacher\"").replace(
        "\"stories:3:400\"",
        "\"hf://datasets/org/texts/held-out.jsonl#tokens=16\"",
    );
    std::fs::write(&recipe, demo).unwrap();
    for line in [
        "run RECIPE --plan --set eval.seq_len=8",
        "plan --train RECIPE",
    ] {
        let (printed, said, code) = run(&cache, &line.replace("RECIPE", text(&recipe)));
        assert_eq!(code, 0, "{line}: {said}");
        assert!(printed.contains("kd"), "{printed}");
    }
    let (_, said, code) = run(
        &cache,
        &format!("run {} --plan --teacher org/other", text(&recipe)),
    );
    assert!(
        code == 1 && said.contains("model org/other is not in"),
        "{said}"
    );
}

#[test]
fn what_is_neither_a_path_nor_an_id_is_named_as_both() {
    let root = tempfile::tempdir().unwrap();
    let cache = cache(root.path());
    let (_, said, code) = run(&cache, "generate org/nothing");
    assert!(
        code == 1
            && said.contains("model org/nothing is not in")
            && said.contains("HF_HUB_OFFLINE"),
        "{said}"
    );
    for line in ["generate nowhere", "plan nowhere", "eval recall ./no/where"] {
        let said = fails(2, &line.split(' ').collect::<Vec<_>>());
        assert!(
            said.contains("where: no ") && said.contains("org/name"),
            "{line}: {said}"
        );
    }
    let said = fails(2, &["generate", "hf://nothing"]);
    assert!(said.contains("give hf://org/name"), "{said}");
    let said = fails(
        2,
        &["eval", "ppl", TEACHER, "--data", "hf://org/texts/a.jsonl"],
    );
    assert!(said.contains("give hf://datasets/org/name"), "{said}");
}
