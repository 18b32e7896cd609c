//! The server as a process: what reaches it through sockets, and how it ends.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::program::{TEACHER, command, fails, succeeds, text};

/// A server that is stopped when the test is over.
pub struct Served {
    pub child: Child,
    pub url: String,
    /// What it says besides.
    log: std::thread::JoinHandle<String>,
}

impl Served {
    pub fn start(args: &[&str]) -> Self {
        let mut command = command();
        command.args(["serve", TEACHER, "--port", "0"]).args(args);
        Self::of(command)
    }

    fn of(mut command: Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut before = String::new();
        let url = loop {
            let line = lines
                .next()
                .unwrap_or_else(|| panic!("it ended: {before}"))
                .unwrap();
            match line.split_once(" serves ") {
                Some((url, _)) => break url.to_owned(),
                None => before += &line,
            }
        };
        let log =
            std::thread::spawn(move || lines.map_while(Result::ok).collect::<Vec<_>>().join("\n"));
        Self { child, url, log }
    }

    fn connect(&self) -> TcpStream {
        let address = self.url.split_once("://").unwrap().1;
        let stream = TcpStream::connect(address).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        stream
    }

    fn get(&self, path: &str) -> Value {
        let mut found = ureq::get(format!("{}{path}", self.url)).call().unwrap();
        serde_json::from_str(&found.body_mut().read_to_string().unwrap()).unwrap()
    }

    pub fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let config = ureq::Agent::config_builder().http_status_as_error(false);
        let agent: ureq::Agent = config.build().into();
        let asked = agent
            .post(format!("{}{path}", self.url))
            .send(body.to_string());
        let mut found = asked.unwrap();
        let text = found.body_mut().read_to_string().unwrap();
        (
            found.status().as_u16(),
            serde_json::from_str(&text).unwrap(),
        )
    }

    fn signal(&self, name: &str) {
        let sent = Command::new("kill")
            .args([name, &self.child.id().to_string()])
            .status();
        assert!(sent.unwrap().success());
    }

    /// How it ended by itself, and what it had said.
    fn ended(mut self) -> (Option<i32>, String) {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                let log = std::mem::replace(&mut self.log, std::thread::spawn(String::new));
                return (status.code(), log.join().unwrap());
            }
            assert!(begun.elapsed() < Duration::from_secs(20), "it goes on");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An answer that goes on for as long as the context allows.
fn long_request() -> String {
    let body = json!({"prompt": "Tom", "max_tokens": 240, "stream": true, "temperature": 0, "logit_bias": {"2": -100}}).to_string();
    let length = body.len();
    format!(
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    )
}

#[test]
fn a_connection_outlives_a_refusal() {
    let served = Served::start(&[]);
    for (asked, status) in [
        ("POST /nowhere HTTP/1.1\r\n", 404),
        (
            "POST /v1/completions HTTP/1.1\r\norigin: http://elsewhere\r\n",
            403,
        ),
    ] {
        let mut stream = served.connect();
        let head = format!("{asked}host: localhost\r\ncontent-length: 2\r\n\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        // The body comes when all is known that the answer needs.
        std::thread::sleep(Duration::from_millis(50));
        let rest = "{}GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
        stream.write_all(rest.as_bytes()).unwrap();
        let mut said = String::new();
        stream.read_to_string(&mut said).unwrap();
        assert!(said.starts_with(&format!("HTTP/1.1 {status}")), "{said}");
        assert!(said.contains("HTTP/1.1 200"), "{said}");
    }
}

#[test]
fn what_cannot_be_served_is_said_before_anything_is_loaded() {
    let said = fails(2, &["serve", TEACHER, "--host", "0.0.0.0"]);
    assert!(
        said.contains("--make-key") && said.contains("--allow-unauthenticated"),
        "{said}"
    );
    for (args, within) in [
        (&["serve", "nowhere"][..], "nowhere"),
        (&["serve", TEACHER, "--model", "teacher"], "NAME=PATH"),
        (
            &["serve", TEACHER, "--model", "teacher=assets/teacher"],
            "two models",
        ),
        (&["serve", TEACHER, "--memory", "1MiB"], "--memory"),
        (&["serve", TEACHER, "--grace", "-1"], "--grace"),
        (&["serve", TEACHER, "--api-key-file", "nowhere"], "nowhere"),
        (
            &[
                "serve",
                TEACHER,
                "--tls-cert",
                "Cargo.toml",
                "--tls-key",
                "Cargo.toml",
            ],
            "PEM",
        ),
        (&["serve"], "CHECKPOINT"),
    ] {
        let said = fails(2, args);
        assert!(said.contains(within), "{args:?}: {said}");
    }
    let served = Served::start(&[]);
    let port = served.url.rsplit_once(':').unwrap().1;
    let said = fails(2, &["serve", TEACHER, "--port", port]);
    assert!(said.contains("cannot listen"), "{said}");
}

#[test]
fn told_to_end_it_ends_streams_in_order() {
    // With time enough an answer comes to its own end; without, it is ended.
    for (grace, waits) in [("30", true), ("0", false)] {
        let served = Served::start(&["--grace", grace, "--log-json"]);
        let mut stream = served.connect();
        stream.write_all(long_request().as_bytes()).unwrap();
        let mut begun = [0; 400];
        stream.read_exact(&mut begun).unwrap();
        served.signal("-TERM");
        let mut rest = String::new();
        stream.read_to_string(&mut rest).unwrap();
        assert!(
            rest.contains("data: [DONE]") && rest.contains("\"finish_reason\":\"length\""),
            "{rest}"
        );
        let (code, log) = served.ended();
        assert_eq!(code, Some(0), "{log}");
        let answered = log
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let answered = answered
            .into_iter()
            .find(|line| line["message"] == "answered")
            .unwrap();
        let tokens = answered["completion_tokens"].as_u64().unwrap();
        assert!(
            if waits { tokens == 240 } else { tokens <= 240 },
            "{tokens}"
        );
    }
}

/// `ZEBROID_CONNECTIONS` come and go, or some.
#[test]
fn clients_that_dawdle_or_vanish_hold_nobody_up() {
    let served = Served::start(&["--header-timeout", "1", "--max-connections", "50"]);
    // One that sends a byte now and then is not waited for.
    let mut slow = served.connect();
    let begun = Instant::now();
    slow.set_read_timeout(Some(Duration::from_millis(50)))
        .unwrap();
    let request = b"GET /health HTTP/1.1\r\nhost: localhost\r\nx-padding: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    let ended = request.iter().any(|byte| {
        let mut answer = [0; 64];
        slow.write_all(&[*byte]).is_err() || slow.read(&mut answer).is_ok()
    });
    assert!(ended && begun.elapsed() < Duration::from_secs(10));
    let connections = std::env::var("ZEBROID_CONNECTIONS").map_or(500, |n| n.parse().unwrap());
    // One that never reads its answer, and many that come and go.

    let mut deaf = served.connect();
    deaf.write_all(long_request().as_bytes()).unwrap();
    for i in 0..connections {
        let mut stream = served.connect();
        match i % 3 {
            0 => {}
            1 => stream.write_all(b"GET /health HT").unwrap(),
            _ => stream.write_all(long_request().as_bytes()).unwrap(),
        }
    }
    assert_eq!(served.get("/health")["status"], "ok");
    for garbage in [
        "\0\0\0\0\r\n\r\n",
        "GET / HTTP/9.9\r\n\r\n",
        "POST /v1/completions HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
    ] {
        let mut stream = served.connect();
        stream.write_all(garbage.as_bytes()).unwrap();
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        assert!(answer.starts_with("HTTP/1.1 4"), "{garbage:?}: {answer}");
    }
    let begun = Instant::now();
    loop {
        let status = &served.get("/api/models")["models"]["teacher"];
        if status["running"] == 0 && status["waiting"] == 0 {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "{status}");
        std::thread::sleep(Duration::from_millis(20));
    }
    let (status, found) = served.post(
        "/v1/completions",
        &json!({"prompt": "Tom", "max_tokens": 2}),
    );
    assert_eq!(status, 200, "{found}");
}

#[test]
fn a_session_outlives_a_kill() {
    let folder = tempfile::tempdir().unwrap();
    let template = folder.path().join("template.jinja");
    std::fs::write(
        &template,
        "{% for m in messages %}{{ m.content }}{% endfor %}",
    )
    .unwrap();
    let sessions = folder.path().join("sessions");
    let args = [
        "--sessions",
        text(&sessions),
        "--chat-template",
        text(&template),
    ];
    let mut said = vec![json!({"role": "user", "content": "Tom had a red ball."})];
    let ask = |served: &Served, said: &[Value], session: Option<&str>| {
        let body = json!({"messages": said, "session": session, "max_tokens": 6, "temperature": 0});
        let (status, found) = served.post("/v1/chat/completions", &body);
        assert_eq!(status, 200, "{found}");
        found
    };
    let first = Served::start(&args);
    let answer = ask(&first, &said, Some("a"));
    // Killed in the middle of another answer.
    first
        .connect()
        .write_all(long_request().as_bytes())
        .unwrap();
    first.signal("-KILL");
    drop(first);
    let second = Served::start(&args);
    let kept = second.get("/v1/sessions/a");
    said.push(answer["choices"][0]["message"].clone());
    assert_eq!(kept["messages"][1]["content"], said[1]["content"]);
    said.push(json!({"role": "user", "content": " Mia had a blue kite."}));
    let gone_on = ask(&second, &said, Some("a"));
    assert!(
        gone_on["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64() > Some(5),
        "{gone_on}"
    );
    assert_eq!(gone_on["choices"], ask(&second, &said, None)["choices"]);
}

/// A file that ends where the disk does: what was kept before stays, and the server goes on.
#[test]
fn a_session_that_finds_no_room_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let sessions = folder.path().join("sessions");
    let zebroid = env!("CARGO_BIN_EXE_zebroid");
    // Blocks of 1024 bytes; with the signal ignored a write beyond them fails.
    let limited = format!("trap '' XFSZ; ulimit -f 60; exec {zebroid} \"$@\"");
    let mut shell = Command::new("bash");
    shell.args([
        "-c",
        &limited,
        "serve",
        "serve",
        TEACHER,
        "--port",
        "0",
        "--chat-template",
        "chatml",
    ]);
    shell.args(["--sessions", text(&sessions), "--cache-type", "f32"]);
    let served = Served::of(shell);
    let ask = |content: &str, session: Option<&str>| {
        let body = json!({"messages": [{"role": "user", "content": content}], "session": session, "max_tokens": 1});
        served.post("/v1/chat/completions", &body)
    };
    let (status, found) = ask(&"Tom had a ball. ".repeat(5), Some("a"));
    assert_eq!(status, 500);
    assert!(
        found["error"]["message"]
            .as_str()
            .unwrap()
            .contains("was not kept"),
        "{found}"
    );
    let left: Vec<_> = std::fs::read_dir(sessions.join("teacher"))
        .unwrap()
        .collect();
    assert!(left.is_empty(), "{left:?}");
    assert_eq!(ask("Tom", None).0, 200);
}

#[test]
fn keys_and_tls_work_together() {
    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("keys.toml");
    let key = succeeds(&["serve", "--make-key", "ann", "--api-key-file", text(&keys)]);
    let tls = Path::new("tests/golden/tls");
    let (cert, private) = (tls.join("cert.pem"), tls.join("key.pem"));
    let served = Served::start(&[
        "--api-key-file",
        text(&keys),
        "--tls-cert",
        text(&cert),
        "--tls-key",
        text(&private),
    ]);
    assert!(served.url.starts_with("https://"), "{}", served.url);
    let root = ureq::tls::Certificate::from_pem(&std::fs::read(&cert).unwrap()).unwrap();
    let config = ureq::tls::TlsConfig::builder()
        .root_certs(ureq::tls::RootCerts::Specific(Arc::new(vec![root])));
    let agent = ureq::Agent::config_builder()
        .tls_config(config.build())
        .http_status_as_error(false);
    let agent: ureq::Agent = agent.build().into();
    let ask = |key: Option<&str>| {
        let request = agent.get(format!("{}/v1/models", served.url));
        let request = match key {
            Some(key) => request.header("authorization", format!("Bearer {key}")),
            None => request,
        };
        request.call().unwrap().status().as_u16()
    };
    assert_eq!(
        (ask(None), ask(Some("zb-0")), ask(Some(key.trim()))),
        (401, 401, 200)
    );
    // In the clear nothing is told.
    let mut plain = served.connect();
    plain
        .write_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        .unwrap();
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer);
    assert!(!answer.starts_with(b"HTTP"));
}

#[test]
fn many_clients_are_each_told_their_own() {
    let served = Served::start(&["--max-batch", "8"]);
    let pid = served.child.id().to_string();
    let args = [
        "bench",
        "serve",
        &served.url,
        "--clients",
        "24",
        "--seconds",
        "3",
        "--leave",
        "0.2",
        "--max-tokens",
        "24",
    ];
    let report = succeeds(&[&args[..], &["--pid", &pid, "--json"]].concat());
    let report: Value = serde_json::from_str(&report).unwrap();
    for none in ["failed", "wrong", "refused"] {
        assert_eq!(report[none], 0, "{report}");
    }
    assert!(
        report["answered"].as_u64() > Some(20) && report["left"].as_u64() > Some(2),
        "{report}"
    );
    assert!(
        report["ttft_p99"].as_f64() > report["ttft_p50"].as_f64(),
        "{report}"
    );
    // Under load it is told who is answered.
    assert_eq!(served.get("/api/models")["models"]["teacher"]["running"], 0);
    fails(
        2,
        &["bench", "serve", "http://127.0.0.1:9", "--seconds", "1"],
    );
}
