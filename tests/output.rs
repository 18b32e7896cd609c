//! Standard output that is closed or full, under every command: a reader that leaves (`| head`) ends a command
//! quietly, as in ripgrep, and a full disk is a failure that is said.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::Path;
use std::process::Stdio;

use clap::CommandFactory;

use crate::program::{command, succeeds};

const RECIPE: &str = r#"
teacher = "embedded"
init = "published"
[data]
train = "stories:1:20"
validation = "stories:3:10"
[plan]
mla = [1]
kv_lora_rank = 16
qk_rope_head_dim = 8
[[kd]]
train = { steps = 1, seq_len = 64, batch_size = 1 }
[eval]
seq_len = 64
batch_size = 1
"#;

/// Every command that prints, small; OUT stands for a name that is new each time. `demo` is in `pipeline.rs`.
const COMMANDS: &str = "
    run recipe.toml --out run
    run recipe.toml --out run --json
    run recipe.toml --plan
    run recipe.toml --plan --json
    plan teacher --mla 1 --kv-rank 16 --rope-dim 8
    plan teacher --mla 1 --kv-rank 16 --rope-dim 8 --json
    plan --train recipe.toml
    plan --train recipe.toml --memory 10MiB --json
    compose teacher OUT --mla 1 --kv-rank 16 --rope-dim 8 --init published
    compose teacher OUT --mla 1 --kv-rank 16 --rope-dim 8 --init published --json
    calibrate teacher stories/stories.jsonl --calibration-tokens 256 --calibration-seq-len 64
    calibrate teacher stories/stories.jsonl --calibration-tokens 256 --calibration-seq-len 64 --json
    train ild --teacher teacher --data stories/stories.jsonl OUT --init published --kv-rank 16 --steps 1 --seq-len 64 --batch-size 1 --json
    train dpo --student hybrid --data stories/preferences.jsonl OUT --steps 1 --seq-len 128 --batch-size 1 --json
    train kd --teacher teacher --student hybrid --data stories/stories.jsonl OUT --steps 1 --seq-len 64 --batch-size 1 --json
    teach teacher OUT --data stories/stories.jsonl --seq-len 64 --plan
    pretrain OUT --data stories/stories.jsonl --tokenizer stories --num-layers 1 --hidden-size 16 --intermediate-size 16 \
        --num-heads 2 --num-kv-heads 1 --seq-len 64 --batch-size 1 --steps 1 --json
    select --scores places.json --count 1
    select --scores places.json --count 1 --json
    select --scores damages.json --method budget --kv-bytes 64
    select --scores damages.json --method budget --kv-bytes 64 --json
    stories OUT --count 2
    data stories/stories.jsonl --tokenizer teacher --seq-len 64
    data stories:1:9#weight=2 stories:2:9#weight=1#tokens=400 --tokenizer teacher --seq-len 64 --decontaminate lambada_openai --data-dir data --json
    eval kl --teacher teacher --student hybrid --data stories/stories.jsonl --seq-len 64 --batch-size 4
    eval kl --teacher teacher --student hybrid --data stories/stories.jsonl --seq-len 64 --batch-size 4 --json
    eval recall teacher --count 2
    eval recall teacher --count 2 --json
    eval ppl teacher --data stories/stories.jsonl
    eval ppl teacher --data stories/stories.jsonl --json
    eval probe teacher --probes needle --lengths 96 --depths 1 --count 1
    eval probe teacher --probes needle --lengths 96 --depths 1 --count 1 --json
    eval harness teacher --tasks winogrande --limit 2 --data-dir data
    eval retention --base scores.json --student scores.json
    eval retention --base scores.json --student scores.json --json
    parity golden golden/expected.safetensors
    parity golden golden/expected.safetensors --json
    plot OUT.svg curve
    runs
    runs --json
    runs show curve
    runs show hybrid --json
    runs compare curve hybrid
    runs compare curve curve --plot OUT.svg --json
    runs prune --keep 99
    runs prune --partial --json
    generate teacher --max-tokens 4
    generate teacher --max-tokens 4 --json
    export hybrid OUT --format zebroid
    serve --make-key ann --api-key-file OUT
    quantize teacher OUT.gguf --type q8_0
    quantize teacher OUT.gguf --type q4_0 --validation stories/stories.jsonl --seq-len 64 --json
    bench train teacher --mla 1 --kv-rank 16 --rope-dim 8 --batch-size 1 --seq-len 32 --steps 1 --warmup 0
    bench train teacher --mla 1 --kv-rank 16 --rope-dim 8 --batch-size 1 --seq-len 32 --steps 1 --warmup 0 --json
    bench data stories/stories.jsonl --tokenizer teacher --seq-len 64 --batches 3
    bench data stories/stories.jsonl --tokenizer teacher --seq-len 64 --batches 3 --json
    bench decode teacher --depths 0,40 --tokens 2 --repeat 1
    bench prefill teacher --lengths 40 --repeat 1 --json
    bench batch teacher --batches 1,3 --tokens 2 --repeat 1 --cache-type int8
    info teacher
    info hybrid --contexts 8,16 --json
    doctor
    doctor hybrid --json
    completions bash
    man OUT
    --version
    --help
    plan --help
";

/// What the commands read.
fn furnish(folder: &Path) {
    let here = |path: &str| std::path::absolute(path).unwrap();
    for (from, name) in [
        ("assets/teacher", "teacher"),
        ("tests/golden/transformers/plain", "golden"),
        ("tests/golden/harness/data", "data"),
    ] {
        std::os::unix::fs::symlink(here(from), folder.join(name)).unwrap();
    }
    let write = |name: &str, text: &str| std::fs::write(folder.join(name), text).unwrap();
    write("recipe.toml", RECIPE);
    let score = r#"{"score": 0.5, "standard_error": 0.1}"#;
    let scores = [score; 4].join(", ");
    write(
        "places.json",
        &format!(r#"{{"kl": 1.0, "tokens": 64, "layers": [{scores}]}}"#),
    );
    let cost = r#"{"params": 1, "cached": 0, "state": 64}"#;
    let option = format!(
        r#"{{"kind": "mamba2", "costs": [{cost}, {cost}, {cost}, {cost}], "layers": [{scores}]}}"#
    );
    write(
        "damages.json",
        &format!(r#"{{"tokens": 64, "length": 64, "options": [{option}]}}"#),
    );
    std::fs::create_dir(folder.join("curve")).unwrap();
    write(
        "curve/metrics.jsonl",
        "{\"tokens\": 1, \"loss\": 2.0}\n{\"tokens\": 2, \"loss\": 1.0}\n",
    );
    for line in [
        "stories stories --count 20",
        "compose teacher hybrid --mla 1 --kv-rank 16 --rope-dim 8 --init published",
        "eval harness teacher --tasks winogrande --limit 2 --data-dir data --json scores.json",
    ] {
        let output = command()
            .current_dir(folder)
            .args(line.split(' '))
            .output()
            .unwrap();
        assert!(output.status.success(), "{line}: {output:?}");
    }
}

/// Exit code, and what was said on standard error.
fn run(folder: &Path, args: &[String], out: Stdio) -> (Option<i32>, String) {
    let mut command = command();
    let command = command.current_dir(folder).args(args).stdout(out);
    let output = command.stderr(Stdio::piped()).output().unwrap();
    (
        output.status.code(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

/// A pipe that nobody reads.
fn closed() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

fn full() -> Stdio {
    File::options()
        .write(true)
        .open("/dev/full")
        .unwrap()
        .into()
}

#[test]
#[cfg(target_os = "linux")]
fn a_closed_pipe_is_quiet_and_a_full_disk_is_said() {
    let folder = tempfile::tempdir().unwrap();
    furnish(folder.path());
    let lines = COMMANDS.replace("\\\n", " ");
    let lines: Vec<&str> = lines
        .lines()
        .map(str::trim)
        .filter(|l| !l.is_empty())
        .collect();
    for (i, line) in lines.iter().enumerate() {
        let args = |out: &str| -> Vec<String> {
            let words = line.split_whitespace();
            words
                .map(|word| word.replace("OUT", &format!("{out}-{i}")))
                .collect()
        };
        let (code, said) = run(folder.path(), &args("closed"), closed());
        let quiet = !said.contains("error") && !said.contains("panicked");
        assert!(code == Some(0) && quiet, "{line} | true: {code:?} {said}");
        let (code, said) = run(folder.path(), &args("full"), full());
        let told = said.contains("cannot write to standard output: No space left");
        assert!(
            code == Some(1) && told,
            "{line} > /dev/full: {code:?} {said}"
        );
    }
    // No command is left out.
    // `chat` prints what it is asked for only: see `chat.rs`; `bench serve` needs a server: `serve.rs`.
    let mut tried: BTreeSet<String> = ["demo", "help", "chat", "bench serve"]
        .map(str::to_owned)
        .into();
    for line in lines {
        let words: Vec<&str> = line.split_whitespace().take(2).collect();
        tried.extend([words[0].to_owned(), words.join(" ")]);
    }
    for command in zebroid::cli::Cli::command().get_subcommands() {
        let own: Vec<String> = match command.has_subcommands() {
            true => (command.get_subcommands())
                .map(|inner| format!("{} {}", command.get_name(), inner.get_name()))
                .collect(),
            false => vec![command.get_name().to_owned()],
        };
        for name in own {
            assert!(tried.contains(&name), "{name} is not tried");
        }
    }
}

/// The results that a command writes are not lost with its table, and a training run is saved.
#[test]
#[cfg(target_os = "linux")]
fn results_outlive_the_reader() {
    let folder = tempfile::tempdir().unwrap();
    furnish(folder.path());
    let words = |line: &str| -> Vec<String> { line.split(' ').map(str::to_owned).collect() };
    let harness =
        "eval harness teacher --tasks winogrande --limit 3 --data-dir data --json kept.json";
    run(folder.path(), &words(harness), closed());
    assert!(folder.path().join("kept.json").exists());
    let train = words(
        "train kd --teacher teacher --student hybrid --data stories/stories.jsonl kd --steps 3 --seq-len 64 \
         --batch-size 1 --json",
    );
    let (code, said) = run(folder.path(), &train, closed());
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("step 1 of 3 is saved in"), "{said}");
    let (code, said) = run(folder.path(), &train, full());
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("step 2 of 3 is saved in"), "{said}");
    let output = command()
        .current_dir(folder.path())
        .args(&train)
        .output()
        .unwrap();
    let steps = String::from_utf8(output.stdout).unwrap();
    assert!(steps.starts_with("{\"step\":3,"), "{steps}");
    assert!(folder.path().join("kd/model.safetensors").exists());
}

/// A check that fails says so, whoever reads its table.
#[test]
#[cfg(unix)]
fn a_departure_is_told_to_a_closed_pipe() {
    let golden = "tests/golden/transformers/plain";
    let args = [
        "parity",
        golden,
        &format!("{golden}/expected.safetensors"),
        "--tolerance",
        "1e-12",
    ];
    let (code, said) = run(Path::new("."), &args.map(str::to_owned), closed());
    assert_eq!(code, Some(1), "{said}");
}

/// Messages that nobody can read change nothing.
#[test]
#[cfg(target_os = "linux")]
fn standard_error_may_be_full() {
    for (args, code) in [
        (&["plan", "assets/teacher", "--mla", "1", "-v"][..], 0),
        (&["plan", "assets/teacher", "--mla", "9"], 2),
        (&["plan", "--no-such-flag"], 2),
        (
            &["generate", "assets/teacher", "--max-tokens", "2", "-v"],
            0,
        ),
    ] {
        let output = command().args(args).stderr(full()).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{args:?}");
    }
    succeeds(&["--version"]);
}
