use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::{HeaderMap, Method, Request};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tower::ServiceExt;

use super::worker::Status;
use super::*;
use crate::checkpoint::Checkpoint;
use crate::data::Tokenizer;
use crate::data::chat::ChatTemplate;
use crate::generate::{Engine, EngineOptions, SamplingParams};
use crate::weights::Place;

const TEACHER: &str = "assets/teacher";
/// The embedded teacher knows stories only.
const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' and not loop.first %} {% endif %}{{ m.content }}{% endfor %}";

fn engine(path: &Path) -> crate::Result<Engine> {
    let lm = Checkpoint::open(path)?.model(&Place::cpu())?;
    let options = EngineOptions {
        prefix_cache: true,
        max_batch: 4,
        cache_memory: Some(4 << 20),
        ..EngineOptions::default()
    };
    Engine::with(&lm, Tokenizer::open(path)?, options)
}

fn options() -> Options {
    Options {
        address: ([127, 0, 0, 1], 0).into(),
        keys: Keys::default(),
        limits: Limits {
            queue: 8,
            ..Limits::default()
        },
        tls: None,
        origins: Vec::new(),
        hosts: Vec::new(),
        sessions: None,
        runs: None,
    }
}

/// Two models, of which the second has no template.
fn models(budget: Option<u64>) -> Models {
    let template = ChatTemplate::new(TEMPLATE, vec![("bos_token".into(), "<s>".into())]).unwrap();
    let about = |name: &str, template| About::open(name.into(), TEACHER.into(), template).unwrap();
    let all = vec![about("talk", Some(template)), about("plain", None)];
    Models::new(all, Box::new(engine), budget, 4 << 20, 8).unwrap()
}

/// What a server answers: in this process, as if by HTTP.
struct Asked {
    status: u16,
    headers: HeaderMap,
    text: String,
}

impl Asked {
    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("{e}: {}", self.text))
    }

    /// The events of a stream, but the end.
    fn events(&self) -> Vec<Value> {
        let lines = self
            .text
            .lines()
            .filter_map(|line| line.strip_prefix("data: "));
        let lines: Vec<&str> = lines.collect();
        let (end, events) = lines.split_last().unwrap();
        assert_eq!(*end, "[DONE]");
        events
            .iter()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }
}

struct Site {
    server: Arc<Server>,
    router: Router,
    runtime: tokio::runtime::Runtime,
}

impl Site {
    fn new(models: Models, options: Options) -> Self {
        let server = Arc::new(Server::new(models, options).unwrap());
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.worker_threads(2).enable_all().build();
        Self {
            router: router(server.clone()),
            runtime: runtime.unwrap(),
            server,
        }
    }

    fn plain() -> Self {
        Self::new(models(None), options())
    }

    fn ask(&self, request: Request<Body>) -> Asked {
        let router = self.router.clone();
        self.runtime.block_on(async {
            let response = router.oneshot(request).await.unwrap();
            let (status, headers) = (response.status().as_u16(), response.headers().clone());
            let bytes = axum::body::to_bytes(response.into_body(), usize::MAX)
                .await
                .unwrap();
            let text = String::from_utf8(bytes.to_vec()).unwrap();
            Asked {
                status,
                headers,
                text,
            }
        })
    }

    fn post(&self, path: &str, body: Value) -> Asked {
        self.ask(post(path, body.to_string().into()))
    }

    fn get(&self, path: &str) -> Asked {
        self.ask(Request::get(path).body(Body::empty()).unwrap())
    }

    /// The text of a greedy answer.
    fn text(&self, prompt: &str, tokens: usize) -> String {
        let body = json!({"prompt": prompt, "max_tokens": tokens, "temperature": 0});
        let found = self.post("/v1/completions", body).json();
        found["choices"][0]["text"]
            .as_str()
            .unwrap_or_else(|| panic!("{found}"))
            .to_owned()
    }

    /// Until nothing is under way.
    fn wait_idle(&self, model: &str) -> Status {
        let begun = Instant::now();
        loop {
            let status = self.server.status()[model].unwrap();
            if (status.waiting, status.running) == (0, 0) {
                return status;
            }
            assert!(begun.elapsed() < Duration::from_secs(20), "{status:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn post(path: &str, body: Body) -> Request<Body> {
    Request::post(path)
        .header("content-type", "application/json")
        .body(body)
        .unwrap()
}

const PROMPTS: [&str; 3] = ["Once upon a time", "Tom had a red ball.", "Mia"];

#[test]
fn completions_are_the_engines_texts() {
    let site = Site::plain();
    let engine = engine(Path::new(TEACHER)).unwrap();
    let params = SamplingParams {
        max_tokens: Some(12),
        ..SamplingParams::default()
    };
    let own = engine
        .generate(&PROMPTS, 1, &params, &mut |_, _| true)
        .unwrap();
    let body = json!({"prompt": PROMPTS, "max_tokens": 12, "temperature": 0, "model": "plain"});
    let found = site.post("/v1/completions", body).json();
    for (i, own) in own.iter().enumerate() {
        assert_eq!(found["choices"][i]["text"], own[0].text);
        assert_eq!(found["choices"][i]["finish_reason"], own[0].finish_reason);
    }
    let prompt: usize = own.iter().map(|own| own[0].prompt_tokens).sum();
    assert_eq!(found["usage"]["prompt_tokens"], prompt);
    let ids: Vec<Vec<u32>> = PROMPTS
        .iter()
        .map(|text| engine.prompt(text).unwrap())
        .collect();
    let body = json!({"prompt": ids, "max_tokens": 12, "temperature": 0});
    let by_ids = site.post("/v1/completions", body).json();
    assert_eq!(by_ids["choices"], found["choices"]);
    // What was read once is not read again.
    assert!(
        site.get("/api/models").json()["models"]["talk"]["prefix"]["snapshots"].as_u64() > Some(0)
    );
    let sampled = json!({"prompt": PROMPTS[0], "max_tokens": 12, "n": 3, "seed": 7});
    let [one, two] = [(); 2].map(|()| site.post("/v1/completions", sampled.clone()).json());
    assert_eq!(one["choices"], two["choices"], "a seed gives one text");
    assert_ne!(one["choices"][0]["text"], one["choices"][1]["text"]);
    assert_eq!(one["usage"]["completion_tokens"].as_u64().unwrap() / 12, 3);
}

#[test]
fn streams_say_what_whole_answers_say() {
    let site = Site::plain();
    for (path, mut body) in [
        (
            "/v1/completions",
            json!({"prompt": PROMPTS[0], "echo": true}),
        ),
        (
            "/v1/completions",
            json!({"prompt": PROMPTS[0], "logprobs": 1}),
        ),
        (
            "/v1/chat/completions",
            json!({"messages": [{"role": "user", "content": PROMPTS[1]}]}),
        ),
        (
            "/v1/chat/completions",
            json!({"messages": [{"role": "user", "content": PROMPTS[1]}], "logprobs": true, "top_logprobs": 2}),
        ),
    ] {
        for (field, value) in [
            ("n", json!(2)),
            ("seed", json!(3)),
            ("max_tokens", json!(9)),
            ("temperature", json!(0.9)),
        ] {
            body[field] = value;
        }
        let whole = site.post(path, body.clone()).json();
        body["stream"] = true.into();
        body["stream_options"] = json!({"include_usage": true});
        let asked = site.post(path, body.clone());
        assert_eq!(asked.headers["content-type"], "text/event-stream");
        let events = asked.events();
        let (last, pieces) = events.split_last().unwrap();
        let mut usage = (last["usage"].clone(), whole["usage"].clone());
        // The second time its beginning was read before.
        for usage in [&mut usage.0, &mut usage.1] {
            usage["prompt_tokens_details"].take();
        }
        assert_eq!(usage.0, usage.1);
        assert!(last["timings"]["cache_bytes"].as_u64() > Some(0));
        let mut found = vec![(String::new(), Vec::new(), Value::Null); 2];
        for piece in pieces {
            let choice = &piece["choices"][0];
            let (text, logprobs, reason) = &mut found[choice["index"].as_u64().unwrap() as usize];
            let said = choice["text"]
                .as_str()
                .or(choice["delta"]["content"].as_str());
            text.push_str(said.unwrap_or_default());
            let tokens = choice["logprobs"]["tokens"]
                .as_array()
                .or(choice["logprobs"]["content"].as_array());
            logprobs.extend(tokens.into_iter().flatten().cloned());
            assert_eq!(*reason, Value::Null, "nothing follows the end");
            *reason = choice["finish_reason"].clone();
        }
        for (i, (text, logprobs, reason)) in found.into_iter().enumerate() {
            let choice = &whole["choices"][i];
            let said = choice["text"]
                .as_str()
                .or(choice["message"]["content"].as_str());
            assert_eq!(Some(text.as_str()), said);
            assert_eq!(choice["finish_reason"], reason);
            let tokens = choice["logprobs"]["tokens"]
                .as_array()
                .or(choice["logprobs"]["content"].as_array());
            assert_eq!(tokens.cloned().unwrap_or_default(), logprobs);
        }
    }
}

#[test]
fn prompts_are_scored_token_by_token() {
    let site = Site::plain();
    let text = "Once upon a time Tom had a red ball.";
    let body =
        json!({"prompt": text, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": true});
    let [first, again] = [(); 2].map(|()| site.post("/v1/completions", body.clone()).json());
    assert_eq!(
        first["choices"], again["choices"],
        "what was read before is scored all the same"
    );
    let logprobs = &first["choices"][0]["logprobs"];
    let lm = Checkpoint::open(Path::new(TEACHER))
        .unwrap()
        .model(&Place::cpu())
        .unwrap();
    let engine = engine(Path::new(TEACHER)).unwrap();
    let tokens = engine.prompt(text).unwrap();
    let split = crate::generate::score::Tokens {
        context: tokens[..4].to_vec(),
        continuation: tokens[4..].to_vec(),
        cut: 0,
    };
    let watch = crate::watch::Quiet::default();
    let own = crate::generate::score::log_likelihoods(&lm, &[split], 64, "score", &watch).unwrap();
    let found = logprobs["token_logprobs"].as_array().unwrap();
    assert_eq!(found.len(), tokens.len() + 1);
    assert!(found[0].is_null());
    let sum: f64 = found[4..tokens.len()]
        .iter()
        .map(|one| one.as_f64().unwrap())
        .sum();
    assert!((sum - own[0].0).abs() < 1e-3, "{sum} {}", own[0].0);
    // Where the answer is the end at once, it has one all the same: lm_eval leaves the last one out.
    let eos = engine.tokenizer.eos()[0];
    let mut ended = body.clone();
    ended["logit_bias"] = json!({eos.to_string(): 100});
    let ended = site.post("/v1/completions", ended).json();
    let choice = &ended["choices"][0];
    assert_eq!(
        (&choice["text"], &choice["finish_reason"]),
        (&json!(text), &json!("stop"))
    );
    let scored = choice["logprobs"]["token_logprobs"].as_array().unwrap();
    assert_eq!(
        (scored.len(), &scored[..tokens.len()]),
        (found.len(), &found[..tokens.len()])
    );
    // Without an answer, and several at once.
    let body = json!({"prompt": [text, "Mia"], "max_tokens": 0, "logprobs": 0, "echo": true});
    let scored = site.post("/v1/completions", body).json();
    assert_eq!(
        scored["choices"][0]["logprobs"]["token_logprobs"],
        json!(found[..tokens.len()])
    );
    assert_eq!(scored["choices"][1]["text"], "Mia");
    // Tokens lie where the text has them, which lacks the first (BOS); of "é" the second byte lies behind its only character.
    let ids = [vec![0], engine.prompt("Mia é").unwrap()];
    let body = json!({"prompt": ids, "max_tokens": 0, "logprobs": 0, "echo": true});
    let scored = site.post("/v1/completions", body).json();
    let lists = |i: usize| &scored["choices"][i]["logprobs"];
    assert_eq!(lists(0)["tokens"], json!(["<s>"]));
    assert_eq!(
        lists(1)["tokens"],
        json!(["<s>", "Mia", " ", "bytes:\\xc3", "bytes:\\xa9"])
    );
    assert_eq!(lists(1)["text_offset"], json!([0, 0, 3, 4, 5]));
    assert_eq!(scored["usage"]["completion_tokens"], 0);
}

#[test]
fn answers_have_the_form_that_was_asked_for() {
    let site = Site::plain();
    let schema = json!({"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": false});
    let format = json!({"type": "json_schema", "json_schema": {"name": "one", "schema": schema}});
    let said = json!([{"role": "user", "content": "Tom"}]);
    let body = json!({"messages": said, "response_format": format, "max_tokens": 60});
    let found = site.post("/v1/chat/completions", body).json();
    let text = found["choices"][0]["message"]["content"].as_str().unwrap();
    let answer: Value = serde_json::from_str(text).unwrap();
    assert!(
        ["x", "y"].contains(&answer["a"].as_str().unwrap()),
        "{text}"
    );
    assert_eq!(found["choices"][0]["finish_reason"], "stop");
    let bad = json!({"messages": said, "response_format": {"type": "regex", "regex": "("}});
    assert_eq!(site.post("/v1/chat/completions", bad).status, 400);
    let response = json!({"input": "Tom", "text": {"format": {"type": "json_schema", "name": "one", "schema": schema}}, "max_output_tokens": 60});
    let found = site.post("/v1/responses", response).json();
    let text = found["output"][0]["content"][0]["text"].as_str().unwrap();
    assert!(serde_json::from_str::<Value>(text).is_ok(), "{text}");
}

#[test]
fn responses_are_told_event_by_event() {
    let site = Site::plain();
    let mut body = json!({"input": [{"role": "user", "content": [{"type": "input_text", "text": "Mia"}]}], "instructions": "Tom.",
        "max_output_tokens": 6, "temperature": 0});
    let whole = site.post("/v1/responses", body.clone()).json();
    assert_eq!(
        (&whole["status"], &whole["incomplete_details"]["reason"]),
        (&json!("incomplete"), &json!("max_output_tokens"))
    );
    body["stream"] = true.into();
    let asked = site.post("/v1/responses", body);
    let events = asked
        .text
        .lines()
        .filter_map(|line| line.strip_prefix("data: "));
    let events: Vec<Value> = events
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let text: String = events
        .iter()
        .filter_map(|event| event["delta"].as_str())
        .collect();
    assert_eq!(
        text,
        whole["output"][0]["content"][0]["text"].as_str().unwrap()
    );
    let kinds: Vec<&str> = events
        .iter()
        .map(|event| event["type"].as_str().unwrap())
        .collect();
    assert_eq!(
        (kinds[0], *kinds.last().unwrap()),
        ("response.created", "response.incomplete")
    );
    for (i, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], i);
    }
}

#[test]
fn what_cannot_be_answered_is_refused_in_openais_shape() {
    let site = Site::plain();
    let talk = "/v1/chat/completions";
    let said = json!([{"role": "user", "content": "Hi"}]);
    let long = "Tom had a ball. ".repeat(100);
    for (path, body, status, within) in [
        (
            talk,
            json!({"messages": said, "model": "none"}),
            404,
            "talk, plain",
        ),
        (
            talk,
            json!({"messages": said, "model": "plain"}),
            400,
            "chat template",
        ),
        (talk, json!({"messages": []}), 400, "no message"),
        (
            talk,
            json!({"messages": [{"content": "Hi"}]}),
            400,
            "no role",
        ),
        (talk, json!({}), 400, "messages"),
        (
            talk,
            json!({"messages": said, "max_tokens": 0}),
            400,
            "one token",
        ),
        (
            talk,
            json!({"messages": said, "top_logprobs": 3}),
            400,
            "logprobs: true",
        ),
        (
            talk,
            json!({"messages": said, "session": "a"}),
            400,
            "--sessions",
        ),
        (
            talk,
            json!({"messages": [{"role": "user", "content": long}]}),
            400,
            "no room",
        ),
        (
            "/v1/completions",
            json!({"prompt": long}),
            400,
            "shorten the prompt",
        ),
        (
            "/v1/completions",
            json!({"prompt": [70000]}),
            400,
            "token 70000",
        ),
        (
            "/v1/completions",
            json!({"prompt": "a", "repetition_penalty": 1e-300, "min_p": 0.1}),
            400,
            "between 0.01 and 100",
        ),
        (
            "/v1/completions",
            json!({"prompt": "a", "stop": "x".repeat(5000)}),
            400,
            "5000 bytes",
        ),
        (
            "/v1/completions",
            json!({"prompt": "a", "response_format": {"type": "regex", "regex": "x".repeat(200_000)}}),
            400,
            "200000 bytes",
        ),
        ("/v1/completions", json!({"prompt": []}), 400, "no token"),
        (
            "/v1/completions",
            json!({"prompt": vec!["a"; 100]}),
            400,
            "at most 12",
        ),
        (
            "/v1/completions",
            json!({"prompt": "a", "suffix": "b"}),
            400,
            "suffix",
        ),
        (
            "/v1/completions",
            json!({"prompt": "a", "best_of": 3}),
            400,
            "best_of",
        ),
        (
            "/v1/responses",
            json!({"input": "a", "previous_response_id": "x"}),
            400,
            "not kept",
        ),
        ("/v1/unknown", json!({}), 404, "no such path"),
        ("/v1/models", json!({}), 405, "other methods"),
    ] {
        let asked = site.post(path, body.clone());
        let error = &asked.json()["error"];
        assert_eq!(asked.status, status, "{body}: {error}");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(within), "{body}: {message}");
        assert_eq!(error["type"], "invalid_request_error");
    }
    let large = vec![b' '; (8 << 20) + 1];
    assert_eq!(site.ask(post(talk, large.into())).status, 413);
    assert_eq!(site.get("/v1/models/plain").json()["chat"], false);
    assert_eq!(site.get("/v1/models/none").status, 404);
}

#[test]
fn tools_are_called_where_the_template_teaches_them() {
    // Hermes' format, on a model that must be held to it.
    let source = "{{ bos_token }}{% for t in tools %}<tool_call> {{ t.function.name }} {% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}";
    let template = ChatTemplate::new(source, vec![("bos_token".into(), "<s>".into())]).unwrap();
    let about = About::open("tools".into(), TEACHER.into(), Some(template)).unwrap();
    let models = Models::new(vec![about], Box::new(engine), None, 4 << 20, 8).unwrap();
    let site = Site::new(models, options());
    let tool = |name: &str| {
        let parameters = json!({"type": "object", "properties": {"to": {"enum": ["Tom", "Mia"]}}, "required": ["to"], "additionalProperties": false});
        json!({"type": "function", "function": {"name": name, "parameters": parameters}})
    };
    let mut body = json!({"messages": [{"role": "user", "content": "Tom"}], "tools": [tool("wave"), tool("call")], "max_tokens": 120,
        "parallel_tool_calls": false, "seed": 1});
    for (choice, names) in [
        (json!("required"), vec!["wave", "call"]),
        (
            json!({"type": "function", "function": {"name": "call"}}),
            vec!["call"],
        ),
    ] {
        body["tool_choice"] = choice;
        body["stream"] = false.into();
        let found = site.post("/v1/chat/completions", body.clone()).json();
        let choice = &found["choices"][0];
        assert_eq!(
            (&choice["finish_reason"], &choice["message"]["content"]),
            (&json!("tool_calls"), &Value::Null),
            "{found}"
        );
        let call = &choice["message"]["tool_calls"][0]["function"];
        let id = choice["message"]["tool_calls"][0]["id"].as_str().unwrap();
        assert!(
            id.len() == 9 && id.bytes().all(|b| b.is_ascii_alphanumeric()),
            "{id}"
        );
        assert!(names.contains(&call["name"].as_str().unwrap()), "{call}");
        let arguments: Value = serde_json::from_str(call["arguments"].as_str().unwrap()).unwrap();
        assert!(["Tom", "Mia"].contains(&arguments["to"].as_str().unwrap()));
        // No blanks but those of templates: it has no more tokens than this has bytes, and the end.
        let spelled = format!(
            "<tool_call>\n{{\"name\": {}, \"arguments\": {{\"to\": {}}}}}\n</tool_call>",
            call["name"], arguments["to"]
        );
        let tokens = found["usage"]["completion_tokens"].as_u64().unwrap();
        assert!(tokens <= spelled.len() as u64 + 1, "{tokens}: {spelled}");
        body["stream"] = true.into();
        let events = site.post("/v1/chat/completions", body.clone()).events();
        let deltas = events
            .iter()
            .filter_map(|event| event["choices"][0]["delta"]["tool_calls"].get(0));
        let deltas: Vec<&Value> = deltas.collect();
        assert_eq!((deltas.len(), &deltas[0]["function"]), (1, call));
        assert_eq!(
            events.last().unwrap()["choices"][0]["finish_reason"],
            "tool_calls"
        );
        assert!(events.iter().all(|event| {
            event["choices"][0]["delta"]["content"]
                .as_str()
                .unwrap_or_default()
                .is_empty()
        }));
    }
    body["stream"] = false.into();
    body["tool_choice"] = json!({"type": "function", "function": {"name": "sing"}});
    assert_eq!(
        site.post("/v1/chat/completions", body.clone()).json()["error"]["param"],
        "tool_choice"
    );
    // Free to choose, it says what it says; forbidden, it is not told of them.
    for choice in ["auto", "none"] {
        body["tool_choice"] = choice.into();
        body["max_tokens"] = 5.into();
        let found = site.post("/v1/chat/completions", body.clone()).json();
        assert!(
            found["choices"][0]["message"]["content"].is_string(),
            "{found}"
        );
        assert_eq!(
            found["usage"]["prompt_tokens"].as_u64() > Some(4),
            choice == "auto"
        );
    }
    let body = json!({"messages": [{"role": "user", "content": "Tom"}], "tools": [tool("wave")]});
    let asked = Site::plain().post("/v1/chat/completions", body);
    assert!(
        asked.status == 400 && asked.text.contains("knows no tools"),
        "{}",
        asked.text
    );
}

#[test]
fn a_full_queue_says_when_to_come_again() {
    let site = Site::plain();
    let model = site.runtime.block_on(site.server.models.get(None)).unwrap();
    let places = model.places.clone().try_acquire_many_owned(12).unwrap();
    let asked = site.post("/v1/completions", json!({"prompt": "Tom"}));
    assert_eq!(
        (asked.status, &asked.headers["retry-after"]),
        (429, &HeaderValue::from(1))
    );
    assert_eq!(asked.json()["error"]["code"], "rate_limit_exceeded");
    drop(places);
    assert_eq!(
        site.post("/v1/completions", json!({"prompt": "Tom"}))
            .status,
        200
    );
    assert_eq!(model.places.available_permits(), 12, "places come back");
}

#[test]
fn who_leaves_frees_all_that_was_held() {
    let site = Site::plain();
    let model = site.runtime.block_on(site.server.models.get(None)).unwrap();
    let before = site.wait_idle("talk").cache_bytes;
    for stream in [true, false] {
        let body = json!({"prompt": "Once upon a time", "max_tokens": 240, "stream": stream, "logit_bias": {"2": -100}, "n": 3});
        let request = post("/v1/completions", body.to_string().into());
        let router = site.router.clone();
        site.runtime.block_on(async {
            let answering = async {
                let response = router.oneshot(request).await.unwrap();
                // The beginning of a stream is read.
                let mut body = response.into_body();
                let _ = http_body_util::BodyExt::frame(&mut body).await;
            };
            let patience = Duration::from_millis(if stream { 20_000 } else { 5 });
            let _ = tokio::time::timeout(patience, answering).await;
        });
        let status = site.wait_idle("talk");
        // The answers' own places come back when they hear of their end.
        let deadline = Instant::now() + Duration::from_secs(10);
        while model.places.available_permits() < 12 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(model.places.available_permits(), 12);
        assert!(
            status.statistics.passes < 360,
            "it went on for nobody: {status:?}"
        );
        // The prompt's beginning may be kept for others, no more.
        assert!(
            status.cache_bytes <= before + 2 * model.engine.pool.bytes(64),
            "{status:?}"
        );
    }
    // And is counted all the same.
    let text = site.get("/metrics").text;
    let line = "zebroid_answers_total{model=\"talk\",finish_reason=\"cancelled\"} ";
    let count = text.lines().find_map(|found| found.strip_prefix(line));
    let count: usize = count.map_or(0, |count| count.parse().unwrap());
    assert!(count >= 3, "{text}");
}

#[test]
fn keys_are_asked_for_and_their_limits_kept() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keys.toml");
    let key = Keys::make(&path, "ann").unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, format!("{text}requests_per_minute = 2\n")).unwrap();
    let options = Options {
        keys: Keys::open(&path).unwrap(),
        sessions: Some(folder.path().to_owned()),
        ..options()
    };
    let site = Site::new(models(None), options);
    let ask = |key: Option<&str>, method: Method, path: &str| {
        let mut request = Request::builder().method(method).uri(path);
        if let Some(key) = key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        site.ask(
            request
                .body(r#"{"prompt": "Tom", "max_tokens": 1}"#.into())
                .unwrap(),
        )
    };
    for wrong in [None, Some(""), Some("zb-00")] {
        for path in [
            "/v1/completions",
            "/v1/models",
            "/metrics",
            "/api/models",
            "/v1/sessions",
        ] {
            let asked = ask(
                wrong,
                if path == "/v1/completions" {
                    Method::POST
                } else {
                    Method::GET
                },
                path,
            );
            assert_eq!(asked.status, 401, "{path}");
        }
    }
    assert_eq!(ask(None, Method::GET, "/health").status, 200);
    // Each key has conversations of its own.
    let sessions = site.server.sessions.as_ref().unwrap();
    let paths = [None, site.server.keys.find(&key).map(|key| &**key)].map(|owner| {
        site.runtime
            .block_on(sessions.turn(owner, "talk", "a"))
            .unwrap()
    });
    assert!(paths.iter().all(|turn| !turn.exists()));
    std::fs::create_dir_all(folder.path().join("talk")).unwrap();
    std::fs::write(folder.path().join("talk/a.session"), "x").unwrap();
    assert_eq!(paths.map(|turn| turn.exists()), [true, false]);
    for expected in [200, 200, 429] {
        assert_eq!(
            ask(Some(&key), Method::POST, "/v1/completions").status,
            expected
        );
    }
    assert_eq!(
        ask(Some(&key), Method::GET, "/v1/models").status,
        200,
        "looking is free"
    );
}

#[test]
fn pages_of_other_sites_are_refused_unless_named() {
    let mut options = options();
    options.origins = vec!["https://known.example".into()];
    options.hosts = vec!["box.lan".into()];
    let site = Site::new(models(None), options);
    let ask = |host: &str, origin: Option<&str>| {
        let mut request = Request::get("/v1/models").header("host", host);
        if let Some(origin) = origin {
            request = request.header("origin", origin);
        }
        site.ask(request.body(Body::empty()).unwrap())
    };
    for (host, origin, status) in [
        ("127.0.0.1:8080", None, 200),
        ("[::1]:8080", None, 200),
        ("localhost:8080", Some("http://localhost:8080"), 200),
        ("box.lan", None, 200),
        ("evil.example:8080", None, 403),
        ("evil.example:8080", Some("http://evil.example:8080"), 403),
        ("localhost:8080", Some("https://evil.example"), 403),
        ("localhost:8080", Some("null"), 403),
        ("localhost:8080", Some("https://known.example"), 200),
    ] {
        assert_eq!(ask(host, origin).status, status, "{host} {origin:?}");
    }
    let known = ask("localhost", Some("https://known.example"));
    assert_eq!(
        known.headers["access-control-allow-origin"],
        "https://known.example"
    );
    assert!(
        !ask("localhost", None)
            .headers
            .contains_key("access-control-allow-origin")
    );
}

#[test]
fn sessions_go_on_where_they_were() {
    let folder = tempfile::tempdir().unwrap();
    let site = |folder: PathBuf| {
        Site::new(
            models(None),
            Options {
                sessions: Some(folder),
                ..options()
            },
        )
    };
    let first = site(folder.path().to_owned());
    let ask = |site: &Site, messages: &Value, session: Option<&str>| {
        let mut body = json!({"messages": messages, "max_tokens": 8, "temperature": 0});
        body["session"] = session.into();
        site.post("/v1/chat/completions", body)
    };
    let mut said = json!([{"role": "user", "content": "Tom had a red ball."}]);
    let answer = ask(&first, &said, Some("one")).json();
    let kept = first.get("/v1/sessions/one").json();
    assert_eq!(
        kept["messages"][1]["content"],
        answer["choices"][0]["message"]["content"]
    );
    drop(first);
    // Another process would find the same.
    let second = site(folder.path().to_owned());
    assert_eq!(second.get("/v1/sessions").json()["data"], json!(["one"]));
    said = kept["messages"].clone();
    said.as_array_mut()
        .unwrap()
        .push(json!({"role": "user", "content": "Mia had a blue kite."}));
    let gone_on = ask(&second, &said, Some("one")).json();
    let anew = ask(&second, &said, None).json();
    assert_eq!(gone_on["choices"], anew["choices"]);
    let cached = &gone_on["usage"]["prompt_tokens_details"]["cached_tokens"];
    assert!(cached.as_u64() > Some(10), "{gone_on}");
    for bad in ["", "../x", "a/b", "é"] {
        assert_eq!(ask(&second, &said, Some(bad)).status, 400, "{bad}");
    }
    assert_eq!(second.get("/v1/sessions/none").status, 404);
    // A damaged one is said, and can be removed.
    let path = folder.path().join("talk/one.session");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    assert_eq!(ask(&second, &said, Some("one")).status, 400);
    let remove = || {
        Request::delete("/v1/sessions/one")
            .body(Body::empty())
            .unwrap()
    };
    assert_eq!(second.ask(remove()).status, 200);
    assert_eq!(second.ask(remove()).status, 404);
    if cfg!(target_os = "linux") {
        // A place that takes nothing: the answer is not lost without a word.
        std::fs::remove_dir_all(folder.path().join("talk")).unwrap();
        std::fs::write(folder.path().join("talk"), "").unwrap();
        let asked = ask(&second, &said, Some("two"));
        assert_eq!(asked.status, 500);
        assert!(asked.text.contains("was not kept"), "{}", asked.text);
    }
}

#[test]
fn models_make_room_for_each_other() {
    let size = std::fs::metadata(Path::new(TEACHER).join("model.safetensors"))
        .unwrap()
        .len()
        + (4 << 20);
    let site = Site::new(models(Some(size + 1000)), options());
    let loaded = |name: &str| site.get("/api/models").json()["models"][name]["loaded"].clone();
    for name in ["talk", "plain", "talk"] {
        let body = json!({"prompt": "Tom", "max_tokens": 2, "model": name});
        assert_eq!(site.post("/v1/completions", body).status, 200);
        assert_eq!(
            (loaded("talk"), loaded("plain")),
            (json!(name == "talk"), json!(name == "plain"))
        );
    }
    assert_eq!(site.get("/ready").status, 200);
    // One that answers is not sent away.
    let held = site
        .runtime
        .block_on(site.server.models.get(Some("talk")))
        .unwrap();
    let asked = site.post(
        "/v1/completions",
        json!({"prompt": "Tom", "model": "plain"}),
    );
    assert_eq!(asked.status, 503, "{}", asked.text);
    drop(held);
    assert_eq!(
        site.post(
            "/v1/completions",
            json!({"prompt": "Tom", "model": "plain"})
        )
        .status,
        200
    );
    let about = About::open("a".into(), TEACHER.into(), None).unwrap();
    let said = Models::new(vec![about], Box::new(engine), Some(size - 1), 4 << 20, 1)
        .err()
        .unwrap();
    assert!(said.to_string().contains("--memory"), "{said}");
}

#[test]
fn what_is_under_way_is_counted() {
    let site = Site::plain();
    site.text(PROMPTS[0], 5);
    site.post("/v1/completions", json!({"prompt": 3}));
    let text = site.get("/metrics").text;
    for line in [
        "zebroid_http_requests_total{route=\"/v1/completions\",status=\"200\"} 1",
        "zebroid_http_requests_total{route=\"/v1/completions\",status=\"400\"} 1",
        "zebroid_answers_total{model=\"talk\",finish_reason=\"length\"} 1",
        "zebroid_completion_tokens_total{model=\"talk\"} 5",
        "zebroid_time_to_first_token_seconds_count{model=\"talk\"} 1",
        "zebroid_time_per_output_token_seconds_count{model=\"talk\"} 1",
        "# TYPE zebroid_prefix_hits counter",
        "zebroid_requests_running{model=\"talk\"} 0",
        "# EOF",
    ] {
        assert!(text.contains(line), "{line}:\n{text}");
    }
    let asked = site.ask(
        Request::get("/health")
            .header("x-request-id", "mine")
            .body(Body::empty())
            .unwrap(),
    );
    assert_eq!(asked.headers["x-request-id"], "mine");
}

/// Bodies of requests that say what they should, or nearly.
fn garbled(random: &mut ChaCha8Rng) -> (&'static str, Vec<u8>) {
    let (path, mut body) = match random.random_range(0..3) {
        0 => ("/v1/completions", json!({"prompt": "Tom had"})),
        1 => (
            "/v1/chat/completions",
            json!({"messages": [{"role": "user", "content": "Tom had"}]}),
        ),
        _ => ("/v1/responses", json!({"input": "Tom had"})),
    };
    const FIELDS: [&str; 30] = [
        "prompt",
        "messages",
        "input",
        "model",
        "stream",
        "stream_options",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "n",
        "stop",
        "max_tokens",
        "max_completion_tokens",
        "max_output_tokens",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "logit_bias",
        "logprobs",
        "top_logprobs",
        "echo",
        "response_format",
        "tools",
        "tool_choice",
        "session",
        "best_of",
        "text",
        "instructions",
    ];
    for _ in 0..random.random_range(0..4) {
        let value = value(random, 3);
        body[FIELDS[random.random_range(0..FIELDS.len())]] = value;
    }
    let mut bytes = body.to_string().into_bytes();
    if random.random_bool(0.3) {
        for _ in 0..random.random_range(1..4) {
            let at = random.random_range(0..bytes.len());
            match random.random_range(0..3) {
                0 => bytes[at] = random.random(),
                1 => bytes.truncate(at.max(1)),
                _ => bytes.insert(at, b"{}[]\",:0-e\\"[random.random_range(0..11)]),
            }
        }
    }
    (path, bytes)
}

fn value(random: &mut ChaCha8Rng, depth: usize) -> Value {
    const NUMBERS: [f64; 10] = [
        1e-300,
        0.0,
        -1.0,
        0.5,
        1.0,
        2.0,
        1e6,
        1e300,
        -1e300,
        4294967296.0,
    ];
    const TEXTS: [&str; 8] = [
        "",
        "a",
        "talk",
        "plain",
        "user",
        "\u{0}é😀",
        "{{ 1/0 }}",
        "json_object",
    ];
    match random.random_range(0..10) {
        0 => Value::Null,
        1 => random.random::<bool>().into(),
        2 => NUMBERS[random.random_range(0..NUMBERS.len())].into(),
        3 => random.random_range(-3..40i64).into(),
        4 => random.random::<i64>().into(),
        5 => TEXTS[random.random_range(0..TEXTS.len())].into(),
        6 => ["x".repeat(300), "ab ".repeat(50)][random.random_range(0..2)]
            .clone()
            .into(),
        7 => {
            json!({"type": TEXTS[random.random_range(0..8)], "json_schema": {"schema": value(random, depth.saturating_sub(1))}})
        }
        _ if depth == 0 => json!([]),
        8 => (0..random.random_range(0..4))
            .map(|_| value(random, depth - 1))
            .collect(),
        _ => {
            json!({TEXTS[random.random_range(0..8)]: value(random, depth - 1), "content": value(random, depth - 1), "role": "user"})
        }
    }
}

/// `ZEBROID_FUZZ` bodies, or some.
#[test]
fn no_body_is_the_servers_fault() {
    let count = std::env::var("ZEBROID_FUZZ").map_or(3000, |count| count.parse().unwrap());
    let limits = Limits {
        tokens: Some(2),
        ..options().limits
    };
    let site = Site::new(
        models(None),
        Options {
            limits,
            ..options()
        },
    );
    let mut random = ChaCha8Rng::seed_from_u64(5);
    let (mut answered, mut refused) = (0, 0);
    for _ in 0..count {
        let (path, bytes) = garbled(&mut random);
        let shown = String::from_utf8_lossy(&bytes).into_owned();
        let asked = site.ask(post(path, bytes.into()));
        match asked.status {
            200 => answered += 1,
            400 | 404 => refused += 1,
            other => panic!("{other} for {path} {shown}: {}", asked.text),
        }
        assert!(
            !asked.text.contains("server_error"),
            "{path} {shown}: {}",
            asked.text
        );
        let _ = random.next_u32();
    }
    assert!(
        answered > count / 20 && refused > count / 20,
        "{answered} {refused}"
    );
    // And it goes on.
    assert!(!site.text("Tom", 2).is_empty());
}
