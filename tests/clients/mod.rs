//! `zebroid serve` as other people's clients meet it: OpenAI's own, lm-evaluation-harness, curl, Vercel's AI SDK (`install.sh` fetches them).
//! Where one is not here, its test says so; what OpenAI's client sent, and how it was answered, is replayed without it (`exchanges.json`).

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Map, Value, json};

use crate::program::{TEACHER, succeeds, text};
use crate::serve::Served;

/// Made by `openai_client.py --record`.
const EXCHANGES: &str = "tests/clients/exchanges.json";
/// Where `install.sh` puts clients.
const INSTALLED: &str = "target/clients";

/// The embedded teacher behind HTTP, twice; with the first key it is asked as often as one likes, with the second twice a minute.
struct Site {
    served: Served,
    keys: [String; 2],
    folder: tempfile::TempDir,
}

/// What was said, one after the other, behind the names of tools, whose calls are written as Hermes does: `<tool_call>`.
const TEMPLATE: &str = "{{ bos_token }}{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}\
    {% for m in messages %}{% if m.role == 'user' and not loop.first %} {% endif %}{{ m.content or '' }}\
    {% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}{% endfor %}";

impl Site {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (file, template) = (folder.path().join("keys"), folder.path().join("template"));
        std::fs::write(&template, TEMPLATE).unwrap();
        let keys = ["own", "limited"].map(|name| {
            let key = succeeds(&["serve", "--make-key", name, "--api-key-file", text(&file)]);
            key.trim().to_owned()
        });
        let known = std::fs::read_to_string(&file).unwrap();
        std::fs::write(&file, known + "requests_per_minute = 2\n").unwrap();
        // Caches in full, as tasks are scored in.
        let args = ["--cache-type", "f32", "--chat-template", text(&template)];
        let other = format!("other={TEACHER}");
        let more = ["--api-key-file", text(&file), "--model", &other];
        Self {
            served: Served::start(&[args, more].concat()),
            keys,
            folder,
        }
    }

    /// A client that finds the server as OpenAI's does.
    fn client(&self, program: impl AsRef<OsStr>) -> Command {
        let mut client = Command::new(program);
        client
            .env("OPENAI_BASE_URL", format!("{}/v1", self.served.url))
            .env("OPENAI_API_KEY", &self.keys[0])
            .env("LIMITED_API_KEY", &self.keys[1]);
        client
    }
}

/// What a client said that has done its work.
fn done(mut client: Command) -> String {
    let output = client.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{client:?}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

fn works(command: &mut Command) -> bool {
    let ended = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
    ended.is_ok_and(|status| status.success())
}

/// A Python that has the module, if there is one: `ZEBROID_PYTHON`, the installed one, the system's.
fn python(module: &str) -> Option<PathBuf> {
    let all = [
        std::env::var("ZEBROID_PYTHON").unwrap_or_default(),
        format!("{INSTALLED}/bin/python"),
        "python3".to_owned(),
    ];
    let has =
        |python: &String| works(Command::new(python).args(["-c", &format!("import {module}")]));
    let found = all.into_iter().find(has).map(PathBuf::from);
    if found.is_none() {
        eprintln!("no Python here has {module} (tests/clients/install.sh): not tested");
    }
    found
}

/// What an answer is made of: kinds of values where they are the model's, values where they are the protocol's. A list says what
/// kinds of entries it has, however many.
fn form(value: &Value) -> Value {
    const WORDS: [&str; 8] = [
        "object",
        "type",
        "role",
        "status",
        "finish_reason",
        "code",
        "param",
        "reason",
    ];
    match value {
        Value::Null => Value::Null,
        Value::Bool(_) => "boolean".into(),
        Value::Number(number) if number.is_f64() => "number".into(),
        Value::Number(_) => "integer".into(),
        Value::String(_) => "text".into(),
        Value::Array(all) => {
            let mut kinds: Vec<Value> = all.iter().map(form).collect();
            kinds.sort_by_key(Value::to_string);
            kinds.dedup();
            kinds.into()
        }
        Value::Object(fields) => {
            let mut forms = Map::new();
            for (name, value) in fields {
                let of = match (name.as_str(), value) {
                    (name, Value::String(_)) if WORDS.contains(&name) => value.clone(),
                    // Of completions: by the tokens' texts.
                    ("top_logprobs", Value::Array(all))
                        if !all.iter().any(|one| one["token"].is_string()) =>
                    {
                        let values = |one: &Value| {
                            Some(one.as_object()?.values().cloned().collect::<Value>())
                        };
                        form(&all.iter().map(values).collect())
                    }
                    _ => form(value),
                };
                forms.insert(name.clone(), of);
            }
            forms.into()
        }
    }
}

/// An answer's head, and its form or the events of its stream: those of each choice in their order, of alike ones in turn the first.
fn told(told: &Value) -> Value {
    let mut choices: BTreeMap<u64, Vec<Value>> = BTreeMap::new();
    for event in told["events"].as_array().into_iter().flatten() {
        let choice = event[1]["choices"][0]["index"].as_u64().unwrap_or(0);
        let all = choices.entry(choice).or_default();
        // Its name, and the end of all, are the protocol's.
        let kind = match event[1].is_object() {
            true => json!([event[0], form(&event[1])]),
            false => event.clone(),
        };
        if all.last() != Some(&kind) {
            all.push(kind);
        }
    }
    let events: Vec<Vec<Value>> = choices.into_values().collect();
    json!([
        told["status"],
        told["type"],
        told["retry"],
        form(&told["body"]),
        events
    ])
}

/// Asks once more, as a recorded client did.
fn ask(site: &Site, asked: &Value) -> Value {
    let key = match asked["key"].as_str().unwrap() {
        "own" => &site.keys[0],
        "limited" => &site.keys[1],
        other => other,
    };
    let agent = ureq::Agent::config_builder().http_status_as_error(false);
    let agent: ureq::Agent = agent.build().into();
    let request = ureq::http::Request::builder()
        .method(asked["method"].as_str().unwrap())
        .uri(format!(
            "{}{}",
            site.served.url,
            asked["path"].as_str().unwrap()
        ))
        .header("authorization", format!("Bearer {key}"))
        .header("content-type", "application/json");
    let mut found = match asked.get("body") {
        Some(body) => agent.run(request.body(body.to_string()).unwrap()),
        None => agent.run(request.body(()).unwrap()),
    }
    .unwrap();
    let kind = found.headers()["content-type"].to_str().unwrap().to_owned();
    let retry = found.headers().contains_key("retry-after");
    let status = found.status().as_u16();
    let body = found.body_mut().read_to_string().unwrap();
    let mut told = json!({"status": status, "type": kind, "retry": retry});
    match kind.as_str() {
        "text/event-stream" => told["events"] = body.trim().split("\n\n").map(event).collect(),
        _ => told["body"] = serde_json::from_str(&body).unwrap(),
    }
    told
}

/// Name and data of a server-sent event.
fn event(block: &str) -> Value {
    let field = |name: &str| {
        block
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    };
    let data = field("data").unwrap();
    json!([
        field("event"),
        serde_json::from_str(data).unwrap_or_else(|_| Value::from(data))
    ])
}

#[test]
fn openais_client_is_answered_as_it_was() {
    let text = std::fs::read_to_string(EXCHANGES).unwrap();
    let exchanges: Vec<Value> = serde_json::from_str(&text).unwrap();
    assert!(exchanges.len() > 50, "{}", exchanges.len());
    let site = Site::new();
    for exchange in &exchanges {
        let now = ask(&site, &exchange["asked"]);
        assert_eq!(told(&now), told(&exchange["told"]), "{}", exchange["asked"]);
    }
}

#[test]
fn openais_client_works() {
    let Some(python) = python("openai, httpx2") else {
        return;
    };
    let site = Site::new();
    let mut client = site.client(python);
    client.arg("tests/clients/openai_client.py");
    assert!(done(client).ends_with("asynchronous\n"));
}

#[test]
fn vercels_client_works() {
    let folder = std::env::var("ZEBROID_NODE").unwrap_or(INSTALLED.to_owned());
    let mut has = Command::new("node");
    has.args(["-e", "require('ai')"]);
    if !Path::new(&folder).is_dir() || !works(has.current_dir(&folder)) {
        eprintln!(
            "node does not find the package ai in {folder} (tests/clients/install.sh): not tested"
        );
        return;
    }
    let site = Site::new();
    let mut client = site.client("node");
    client.arg(std::path::absolute("tests/clients/ai_sdk.mjs").unwrap());
    client.current_dir(folder);
    done(client);
}

#[test]
fn curl_reads_the_text_of_generate() {
    if !works(Command::new("curl").arg("--version")) {
        eprintln!("curl is not here: not tested");
        return;
    }
    let site = Site::new();
    let curl = |path: &str, body: Value| {
        let mut client = site.client("curl");
        client.args([
            "-sSN",
            "--fail-with-body",
            "-H",
            "Content-Type: application/json",
        ]);
        client.args(["-H", &format!("Authorization: Bearer {}", site.keys[0])]);
        client.args([
            "-d",
            &body.to_string(),
            &format!("{}{path}", site.served.url),
        ]);
        done(client)
    };
    let generated = [
        "generate",
        TEACHER,
        "--prompt",
        "Tom had",
        "--max-tokens",
        "20",
        "--cache-type",
        "f32",
        "--json",
    ];
    let generated: Value = serde_json::from_str(&succeeds(&generated)).unwrap();
    let mut body = json!({"prompt": "Tom had", "max_tokens": 20, "temperature": 0});
    let whole: Value = serde_json::from_str(&curl("/v1/completions", body.clone())).unwrap();
    assert_eq!(whole["choices"][0]["text"], generated["text"]);
    body["stream"] = true.into();
    let streamed = curl("/v1/completions", body);
    let events: Vec<Value> = streamed.trim().split("\n\n").map(event).collect();
    let pieces = events
        .iter()
        .filter_map(|event| event[1]["choices"][0]["text"].as_str());
    assert_eq!(pieces.collect::<String>(), generated["text"]);
    assert_eq!(events.last().unwrap()[1], "[DONE]");
    let said = json!({"messages": [{"role": "user", "content": "Tom had"}], "max_tokens": 20, "temperature": 0});
    let said: Value = serde_json::from_str(&curl("/v1/chat/completions", said)).unwrap();
    assert_eq!(said["choices"][0]["message"]["content"], generated["text"]);
}

/// Of three tasks, what the harness asks the server comes to the scores of `eval harness`, item by item.
#[test]
fn lm_evaluation_harness_scores_as_eval_harness() {
    // The first has answers of one part, the second of many, the third one answer a document and a perplexity.
    const TASKS: [(&str, &str, &str); 3] = [
        ("arc_easy", "arc/arc_easy", "test"),
        ("hellaswag", "hellaswag/hellaswag", "validation"),
        ("lambada_openai", "lambada/lambada_openai", "test"),
    ];
    const DATA: &str = "tests/golden/harness/data";
    let Some(python) = python("lm_eval, transformers, aiohttp, tenacity") else {
        return;
    };
    let site = Site::new();
    let folder = site.folder.path();
    let mut place = Command::new(&python);
    let find =
        "import importlib.util as u; print(u.find_spec('lm_eval').submodule_search_locations[0])";
    let package = done({
        place.args(["-c", find]);
        place
    });
    let data = std::path::absolute(DATA).unwrap();
    for (name, file, split) in TASKS {
        // The harness's own task, on a file.
        let own = json!({
            "include": format!("{}/tasks/{file}.yaml", package.trim()), "task": format!("own_{name}"),
            "dataset_path": "json", "dataset_name": null, "training_split": null, "validation_split": null, "test_split": null,
            "dataset_kwargs": {"data_files": {split: data.join(format!("{name}_{split}.jsonl"))}},
        });
        let mut own = own.as_object().unwrap().clone();
        own.insert(format!("{split}_split"), split.into());
        // JSON is YAML.
        std::fs::write(
            folder.join(format!("{name}.yaml")),
            Value::Object(own).to_string(),
        )
        .unwrap();
    }
    let mut harness = site.client(&python);
    let tokenizer = std::path::absolute(TEACHER).unwrap();
    let model = format!(
        "model=teacher,base_url={}/v1/completions,tokenizer={},max_length=256,num_concurrent=4,add_bos_token=True",
        site.served.url,
        text(&tokenizer),
    );
    harness
        .env("HF_HUB_OFFLINE", "1")
        .env("HF_HOME", folder.join("hub"));
    harness.args([
        "-m",
        "lm_eval",
        "run",
        "--model",
        "local-completions",
        "--model_args",
        &model,
    ]);
    harness.args([
        "--tasks",
        &TASKS.map(|(name, _, _)| format!("own_{name}")).join(","),
    ]);
    harness.args([
        "--include_path",
        text(folder),
        "--output_path",
        text(&folder.join("theirs")),
        "--log_samples",
    ]);
    done(harness);
    let ours = folder.join("ours.json");
    let tasks = TASKS.map(|(name, _, _)| name).join(",");
    let args = [
        "eval",
        "harness",
        TEACHER,
        "--tasks",
        &tasks,
        "--data-dir",
        DATA,
        "--log-samples",
        "--json",
        text(&ours),
    ];
    succeeds(&args);
    let ours: Value = serde_json::from_str(&std::fs::read_to_string(ours).unwrap()).unwrap();
    let files = std::fs::read_dir(folder.join("theirs").join("teacher")).unwrap();
    let files: Vec<PathBuf> = files.map(|file| file.unwrap().path()).collect();
    let file = |begin: &str| {
        let found = files.iter().find(|path| {
            path.file_name()
                .unwrap()
                .to_str()
                .unwrap()
                .starts_with(begin)
        });
        std::fs::read_to_string(found.unwrap()).unwrap()
    };
    let scores: Value = serde_json::from_str(&file("results_")).unwrap();
    for (name, _, _) in TASKS {
        let theirs = scores["results"][format!("own_{name}")]
            .as_object()
            .unwrap();
        for metric in ["acc,none", "acc_norm,none", "perplexity,none"] {
            let (Some(theirs), ours) = (theirs.get(metric), &ours["results"][name][metric]) else {
                continue;
            };
            let gap = (theirs.as_f64().unwrap() - ours.as_f64().unwrap()).abs();
            assert!(gap < 1e-5, "{name} {metric}: {ours} for {theirs}");
        }
        let theirs = file(&format!("samples_own_{name}_"));
        let theirs = theirs
            .lines()
            .map(|line| serde_json::from_str(line).unwrap());
        let mut theirs: Vec<Value> = theirs.collect();
        theirs.sort_by_key(|sample| sample["doc_id"].as_u64());
        let ours = ours["samples"][name].as_array().unwrap();
        assert_eq!(ours.len(), theirs.len(), "{name}");
        for (ours, theirs) in ours.iter().zip(&theirs) {
            let (ours, theirs) = (&ours["filtered_resps"], &theirs["filtered_resps"]);
            let pairs = ours
                .as_array()
                .unwrap()
                .iter()
                .zip(theirs.as_array().unwrap());
            for (ours, theirs) in pairs {
                // A text and Python's word there.
                let likely: f64 = theirs[0].as_str().unwrap().parse().unwrap();
                assert!(
                    (ours[0].as_f64().unwrap() - likely).abs() < 1e-4,
                    "{name}: {ours} for {theirs}"
                );
                let greedy = theirs[1].as_str().unwrap() == "True";
                assert_eq!(
                    ours[1].as_bool(),
                    Some(greedy),
                    "{name}: {ours} for {theirs}"
                );
            }
        }
    }
}
