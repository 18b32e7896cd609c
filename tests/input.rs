//! Input that a person must change: exit code 2 (which `fails` checks) and words that say what to do.

use std::path::Path;

use crate::program::{TEACHER, command, fails, succeeds, text};

/// Files that no command can use, and what is said of each.
fn furnish(folder: &Path) -> [(String, &'static str); 6] {
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.join(name);
        std::fs::write(&path, bytes).unwrap();
        text(&path).to_owned()
    };
    let chat = br#"{"messages": [{"role": "user", "content": "Hello"}]}"#;
    [
        (
            text(&folder.join("nowhere.jsonl")).to_owned(),
            "No such file",
        ),
        (text(folder).to_owned(), "directory"),
        (write("latin.jsonl", b"{\"text\": \"\xe9\"}\n"), "not UTF-8"),
        (write("empty.jsonl", b""), "the file is empty"),
        (write("chat.jsonl", chat), "no chat template"),
        (write("list.jsonl", b"[1, 2]\n"), "not a JSON object"),
    ]
}

#[test]
fn data_that_cannot_be_read_is_bad_input_for_every_command() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    for (data, part) in furnish(folder.path()) {
        for line in [
            "eval kl --teacher TEACHER --student TEACHER --data DATA",
            "calibrate TEACHER DATA",
            "compose TEACHER OUT --mla 1 --kv-rank 16 --rope-dim 8 --calibration DATA",
            "train ild --teacher TEACHER --data DATA OUT",
            "pretrain OUT --data DATA --tokenizer TEACHER",
            "select --method budget --teacher TEACHER --data DATA --calibration DATA --kv-bytes 64",
            "run recipes/demo.toml --out OUT-run --train DATA",
        ] {
            let words = line.split(' ').map(|word| match word {
                "TEACHER" => TEACHER.to_owned(),
                "DATA" => data.clone(),
                _ => word.replace("OUT", text(&out)),
            });
            let words: Vec<String> = words.collect();
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            let said = fails(2, &words);
            assert!(
                said.contains(part) && said.contains(&data),
                "{line}: {said}"
            );
            assert!(!out.exists(), "{line}");
        }
    }
}

#[test]
fn other_files_that_cannot_be_read_are_bad_input() {
    let folder = tempfile::tempdir().unwrap();
    let [nowhere, directory, latin, empty, ..] = furnish(folder.path()).map(|(path, _)| path);
    for line in [
        "eval ppl TEACHER --data FILE",
        "eval retention --base FILE --student FILE",
        "select --scores FILE --count 1",
        "run FILE --plan",
        "plan FILE --mla 1",
        "parity TEACHER FILE",
        "plot PLACE/x.svg FILE",
        "train dpo --student TEACHER --data FILE PLACE/out",
        "generate FILE",
        "eval harness TEACHER --tasks piqa --data-dir FILE",
    ] {
        for file in [&nowhere, &directory, &latin, &empty] {
            let line = line.replace("TEACHER", TEACHER).replace("FILE", file);
            let line = line.replace("PLACE", text(folder.path()));
            fails(2, &line.split(' ').collect::<Vec<_>>());
        }
    }
}

#[test]
fn a_folder_that_is_no_checkpoint_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let nowhere = folder.path().join("nowhere");
    let (empty, nowhere) = (text(folder.path()), text(&nowhere));
    for line in [
        "generate FOLDER",
        "eval recall FOLDER",
        "eval probe FOLDER",
        "plan FOLDER",
        "export FOLDER OUT --format amd",
    ] {
        for (folder, part) in [(nowhere, "nowhere: no"), (empty, "no checkpoint here")] {
            let line = line
                .replace("FOLDER", folder)
                .replace("OUT", &format!("{nowhere}-out"));
            let said = fails(2, &line.split(' ').collect::<Vec<_>>());
            assert!(
                said.contains(part) && said.contains("folder"),
                "{line}: {said}"
            );
        }
    }
    let bank = [
        "select",
        "--teacher",
        TEACHER,
        "--data",
        "x",
        "--count",
        "1",
        "--bank",
        empty,
    ];
    assert!(fails(2, &bank).contains("not a bank"));
}

/// Numbers: a minus sign is a value's and no flag, and what is said has no endless digits.
#[test]
fn numbers_that_cannot_work_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let stories = folder.path().join("stories");
    succeeds(&["stories", text(&stories), "--count", "4"]);
    let (data, out) = (stories.join("stories.jsonl"), folder.path().join("out"));
    let (data, out) = (text(&data), text(&out));
    let kd = format!("train kd --teacher {TEACHER} --student {TEACHER} --data {data} {out}");
    let kl = format!("eval kl --teacher {TEACHER} --student {TEACHER} --data {data}");
    let bench = format!("bench train {TEACHER} --mla 1 --kv-rank 16 --rope-dim 8");
    for (line, part) in [
        (format!("{kd} --lr nan"), "lr NaN must be between 0 and 1\n"),
        (format!("{kd} --lr -1"), "lr -1 must be between 0 and 1\n"),
        (
            format!("{kd} --warmup -0.5"),
            "warmup -0.5 must be between 0 and 1\n",
        ),
        (format!("{kd} --steps -3"), "'-3' for '--steps"),
        (format!("{kd} --seq-len 1000000"), "windows of 1000000"),
        (format!("{kl} --seq-len 1000000"), "windows of 1000000"),
        (format!("{kl} --seq-len 0"), "must not be 0"),
        (format!("{kl} --batch-size 0"), "must not be 0"),
        (format!("{bench} --seq-len 0"), "must not be 0"),
        (format!("{bench} --batch-size 0"), "must not be 0"),
        (
            format!("{bench} --batch-size 99999999999"),
            "at most 16777216 tokens a step",
        ),
        (
            format!("{kd} --accumulation 99999999999"),
            "at most 16777216 tokens a step",
        ),
        (
            format!("calibrate {TEACHER} {data} --fit-tokens 0"),
            "fit_tokens must not be 0",
        ),
        (format!("eval probe {TEACHER} --count 0"), "must not be 0"),
        (
            format!("eval recall {TEACHER} --count -2"),
            "'-2' for '--count",
        ),
        (format!("generate {TEACHER} --seed -1"), "'-1' for '--seed"),
    ] {
        let said = fails(2, &line.split(' ').collect::<Vec<_>>());
        assert!(said.contains(part), "{line}: {said}");
    }
}

#[test]
fn sizes_past_what_is_read_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("config.json");
    let own = std::fs::read_to_string(Path::new(TEACHER).join("config.json")).unwrap();
    let vast = own.replace("\"vocab_size\": 431", "\"vocab_size\": 4294967296");
    assert_ne!(own, vast);
    std::fs::write(&config, vast).unwrap();
    let said = fails(2, &["plan", text(&config), "--mla", "1"]);
    assert!(
        said.contains("vocab_size") && said.contains("2^32"),
        "{said}"
    );
}

/// The embedded teacher reads 256 tokens.
#[test]
fn a_text_past_the_context_is_said() {
    let sentence = "Tom has a red ball. ";
    let prompt = sentence.repeat(100);
    let said = fails(2, &["generate", TEACHER, "--prompt", &prompt]);
    assert!(said.contains("the model's context 256"), "{said}");
    let generate = |flags: &[&str]| {
        let prompt = sentence.repeat(25);
        let args = [
            "generate",
            TEACHER,
            "--prompt",
            &prompt,
            "--temperature",
            "3",
            "--json",
        ];
        let output = command().args(args).args(flags).output().unwrap();
        assert!(output.status.success());
        let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let tokens = |name: &str| found[name].as_u64().unwrap();
        let all = tokens("prompt_tokens") + tokens("completion_tokens");
        (all, String::from_utf8(output.stderr).unwrap())
    };
    let (all, said) = generate(&["--max-tokens", "1000"]);
    assert!(
        said.contains("max_tokens 1000 is past the model's context of 256"),
        "{said}"
    );
    assert!(all <= 256, "{all}");
    // Nobody asked for more than there is.
    let (all, said) = generate(&[]);
    assert!(all <= 256 && said.is_empty(), "{all} {said}");
}

/// Reports are for the end of long work: that they can be written is tried before it.
#[test]
fn outputs_are_tried_before_the_work() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| text(&folder.path().join(name)).to_owned();
    std::fs::write(at("file"), "").unwrap();
    let (inside, under, out) = (at("nodir/x"), at("file/x"), at("out"));
    for line in [
        "eval probe nowhere --report FILE",
        "eval retention --base nowhere --student nowhere --report FILE",
        "eval harness nowhere --tasks piqa --json FILE",
        "select --scores nowhere --count 1 --save-scores FILE",
        "plot FILE nowhere",
        "compose nowhere OUT --mla 1 --report FILE",
    ] {
        for (file, part) in [
            (&inside, "no such folder"),
            (&under, "no such folder"),
            (&at(""), "a folder"),
        ] {
            let line = line.replace("OUT", &out).replace("FILE", file);
            let said = fails(2, &line.split(' ').collect::<Vec<_>>());
            assert!(
                said.contains(part) && !said.contains("nowhere"),
                "{line}: {said}"
            );
        }
    }
    // A report without a text has the plan, and says what is missing.
    let page = at("page.html");
    let sizes = [
        "--mla",
        "1",
        "--kv-rank",
        "16",
        "--rope-dim",
        "8",
        "--init",
        "reference",
    ];
    succeeds(&[&["compose", TEACHER, &out, "--report", &page][..], &sizes].concat());
    let page = std::fs::read_to_string(page).unwrap();
    assert!(
        page.contains("not measured") && page.contains("KV ratio"),
        "{page}"
    );
}

#[test]
fn a_tokenizer_of_another_model_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let model = "tests/golden/transformers/plain";
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(Path::new(model).join(name), folder.path().join(name)).unwrap();
    }
    let tokenizer = Path::new(TEACHER).join("tokenizer.json");
    std::fs::copy(tokenizer, folder.path().join("tokenizer.json")).unwrap();
    let data = folder.path().join("data.jsonl");
    std::fs::write(&data, "{\"text\": \"Tom has a red ball.\"}\n").unwrap();
    let (model, data) = (text(folder.path()), text(&data));
    for line in [
        format!("eval kl --teacher {model} --student {model} --data {data}"),
        format!("eval ppl {model} --data {data}"),
        format!("eval recall {model}"),
        format!("eval probe {model}"),
        format!("eval harness {model} --tasks piqa --data-dir {model}"),
        format!("calibrate {model} {data}"),
        format!("generate {model}"),
        format!("train dpo --student {model} --data {data} {model}/out"),
    ] {
        let said = fails(2, &line.split(' ').collect::<Vec<_>>());
        assert!(said.contains("do not belong together"), "{line}: {said}");
    }
}
