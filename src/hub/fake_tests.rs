//! A hub for tests: it speaks the calls that the hub and its content network speak, and fails as they do when told to.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use serde_json::json;
use sha1::Sha1;
use sha2::{Digest, Sha256};

use super::Hub;

pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A repository with one revision.
pub(crate) struct Repo {
    /// `org/name`, of data sets `datasets/org/name`.
    pub path: String,
    pub revision: String,
    pub files: BTreeMap<String, Vec<u8>>,
    pub gated: bool,
}

/// What goes wrong.
#[derive(Default)]
pub(crate) struct Faults {
    /// The content network closes the connection after so many bytes.
    pub cut: Vec<usize>,
    /// It sends another byte than the first.
    pub damaged: usize,
    /// The hub answers 503 so many times.
    pub busy: usize,
    /// The content network answers nobody before so many have asked it at once, or 5 seconds are over.
    pub together: usize,
    /// It sends little at a time once a MiB has gone out.
    pub slow: bool,
    /// It has not this file any more, by its etag, and takes half a second to say so.
    pub gone: Option<String>,
}

/// A request as it came.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    /// `GET /path`.
    pub line: String,
    pub token: Option<String>,
    pub range: Option<String>,
}

#[derive(Default)]
struct State {
    repos: Vec<Repo>,
    faults: Faults,
    asked: Vec<Asked>,
    cdn: String,
    /// Questions to the content network without an answer, now and at most.
    open: usize,
    most_open: usize,
}

#[derive(Clone)]
pub(crate) struct FakeHub {
    pub endpoint: String,
    state: Arc<Mutex<State>>,
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// As git names a file's content.
pub(crate) fn git(bytes: &[u8]) -> String {
    let whole = [format!("blob {}\0", bytes.len()).as_bytes(), bytes].concat();
    hex(&Sha1::digest(whole))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Large files stand in the content network.
fn is_large(file: &str) -> bool {
    [".safetensors", ".gguf", ".parquet"]
        .iter()
        .any(|ending| file.ends_with(ending))
}

/// As the cache names its blob.
pub(crate) fn etag(file: &str, bytes: &[u8]) -> String {
    match is_large(file) {
        true => sha256(bytes),
        false => git(bytes),
    }
}

impl FakeHub {
    pub fn start() -> Self {
        let state = Arc::new(Mutex::new(State::default()));
        let serve = |answer: fn(&mut State, &Asked) -> Answer| {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = format!("http://{}", listener.local_addr().unwrap());
            let state = state.clone();
            thread::spawn(move || {
                for stream in listener.incoming() {
                    let state = state.clone();
                    thread::spawn(move || talk(&stream.unwrap(), &state, answer));
                }
            });
            address
        };
        let (endpoint, cdn) = (serve(hub), serve(content));
        state.lock().unwrap().cdn = cdn;
        Self { endpoint, state }
    }

    /// With one repository, at `main`.
    pub fn with(path: &str, files: &[(&str, &[u8])]) -> Self {
        let hub = Self::start();
        hub.add(path, "main", files);
        hub
    }

    pub fn add(&self, path: &str, revision: &str, files: &[(&str, &[u8])]) {
        let files = files
            .iter()
            .map(|(name, bytes)| ((*name).to_owned(), bytes.to_vec()));
        self.lock().repos.push(Repo {
            path: path.to_owned(),
            revision: revision.to_owned(),
            files: files.collect(),
            gated: false,
        });
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub fn gate(&self) {
        self.lock()
            .repos
            .iter_mut()
            .for_each(|repo| repo.gated = true);
    }

    pub fn fail(&self, faults: Faults) {
        self.lock().faults = faults;
    }

    /// Files that were asked of the content network at once.
    pub fn most_at_once(&self) -> usize {
        self.lock().most_open
    }

    /// What was asked since the last call.
    pub fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.lock().asked)
    }

    /// What was downloaded since the last call.
    pub fn downloads(&self) -> usize {
        let asked = self.asked();
        let whole =
            |asked: &&Asked| asked.line.starts_with("GET ") && !asked.line.contains("/api/");
        // A large file is asked for twice, of the hub and of the content network.
        asked
            .iter()
            .filter(whole)
            .filter(|a| !a.line.contains("/cdn/"))
            .count()
    }

    /// As a program sees it that keeps what it downloads in `cache`.
    pub fn hub(&self, cache: &std::path::Path) -> Hub {
        Hub {
            pause: Duration::from_millis(1),
            token: Some("secret".into()),
            ..Hub::new(&self.endpoint, cache.to_owned())
        }
    }
}

struct Answer {
    status: &'static str,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// Bytes of the body that are sent.
    sent: usize,
}

fn answer(status: &'static str, headers: &[(&'static str, String)], body: Vec<u8>) -> Answer {
    Answer {
        status,
        headers: headers.to_vec(),
        sent: body.len(),
        body,
    }
}

fn talk(mut stream: &TcpStream, shared: &Mutex<State>, reply: fn(&mut State, &Asked) -> Answer) {
    let lines = BufReader::new(stream).lines().map_while(Result::ok);
    let head: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
    let Some(first) = head.first() else { return };
    let value = |name: &str| {
        let mut found = head.iter().filter_map(|line| line.split_once(": "));
        let found = found.find(|(key, _)| key.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.to_owned())
    };
    let asked = Asked {
        line: first.trim_end_matches(" HTTP/1.1").to_owned(),
        token: value("authorization"),
        range: value("range"),
    };
    let mut state = shared.lock().unwrap();
    let answer = reply(&mut state, &asked);
    state.asked.push(asked.clone());
    let slow = state.faults.slow;
    drop(state);
    if asked.line.contains("/cdn/") {
        wait_for_others(shared);
        if answer.status.starts_with("404") {
            thread::sleep(Duration::from_millis(500));
        }
    }
    let mut text = format!("HTTP/1.1 {}\r\nconnection: close\r\n", answer.status);
    for (name, value) in &answer.headers {
        text += &format!("{name}: {value}\r\n");
    }
    text += &format!("content-length: {}\r\n\r\n", answer.body.len());
    let _ = stream.write_all(text.as_bytes());
    if asked.line.starts_with("GET ") {
        let (first, rest) = answer.body[..answer.sent].split_at(answer.sent.min(1 << 20));
        let _ = stream.write_all(first);
        for piece in rest.chunks(1 << 12) {
            if slow {
                thread::sleep(Duration::from_millis(5));
            }
            if stream.write_all(piece).is_err() {
                return;
            }
        }
    }
}

fn wait_for_others(shared: &Mutex<State>) {
    let mut state = shared.lock().unwrap();
    state.open += 1;
    state.most_open = state.most_open.max(state.open);
    for _ in 0..500 {
        if state.most_open >= state.faults.together {
            break;
        }
        drop(state);
        thread::sleep(Duration::from_millis(10));
        state = shared.lock().unwrap();
    }
    state.open -= 1;
}

fn refused(status: &'static str, code: &str) -> Answer {
    answer(
        status,
        &[("x-error-code", code.to_owned())],
        b"refused".to_vec(),
    )
}

/// The part of a file that a request asks for.
fn part(asked: &Asked, bytes: &[u8], headers: &[(&'static str, String)]) -> Answer {
    let range = asked
        .range
        .as_ref()
        .map(|range| range.trim_start_matches("bytes="));
    let Some(from) = range.and_then(|range| range.trim_end_matches('-').parse::<usize>().ok())
    else {
        return answer("200 OK", headers, bytes.to_vec());
    };
    if from >= bytes.len() {
        return answer(
            "416 Range Not Satisfiable",
            headers,
            b"no such range".to_vec(),
        );
    }
    let (last, all) = (bytes.len() - 1, bytes.len());
    let range = [("content-range", format!("bytes {from}-{last}/{all}"))];
    answer(
        "206 Partial Content",
        &[headers, &range].concat(),
        bytes[from..].to_vec(),
    )
}

fn hub(state: &mut State, asked: &Asked) -> Answer {
    if state.faults.busy > 0 {
        state.faults.busy -= 1;
        return answer(
            "503 Service Unavailable",
            &[("retry-after", "0".into())],
            Vec::new(),
        );
    }
    let path = asked.line.split(' ').nth(1).unwrap().replace("%2F", "/");
    let listed = path.strip_prefix("/api/");
    let found = state.repos.iter().find(|repo| match listed {
        Some(path) => path
            .trim_start_matches("models/")
            .starts_with(&format!("{}/", repo.path)),
        None => path[1..].starts_with(&format!("{}/", repo.path)),
    });
    let Some(repo) = found else {
        return refused("401 Unauthorized", "RepoNotFound");
    };
    if listed.is_some() {
        if !path.ends_with(&format!("/revision/{}", repo.revision)) && !path.ends_with(COMMIT) {
            return refused("404 Not Found", "RevisionNotFound");
        }
        let siblings: Vec<_> = repo
            .files
            .keys()
            .map(|name| json!({ "rfilename": name }))
            .collect();
        let body = json!({ "sha": COMMIT, "siblings": siblings }).to_string();
        return answer("200 OK", &[], body.into_bytes());
    }
    if repo.gated {
        return refused("403 Forbidden", "GatedRepo");
    }
    let (_, rest) = path.split_once("/resolve/").unwrap();
    let file = [COMMIT, &repo.revision].iter().find_map(|revision| {
        let rest = rest.strip_prefix(*revision)?;
        rest.strip_prefix('/')
    });
    let Some(file) = file else {
        return refused("404 Not Found", "RevisionNotFound");
    };
    let Some(bytes) = repo.files.get(file) else {
        return refused("404 Not Found", "EntryNotFound");
    };
    let tag = etag(file, bytes);
    let commit = ("x-repo-commit", COMMIT.to_owned());
    match is_large(file) {
        true => {
            let headers = [
                commit,
                // Of the answer, and not of the file.
                ("etag", "\"other\"".to_owned()),
                ("x-linked-etag", format!("\"{tag}\"")),
                ("x-linked-size", bytes.len().to_string()),
                ("location", format!("{}/cdn/{tag}", state.cdn)),
            ];
            answer("302 Found", &headers, b"elsewhere".to_vec())
        }
        false => part(asked, bytes, &[commit, ("etag", format!("\"{tag}\""))]),
    }
}

fn content(state: &mut State, asked: &Asked) -> Answer {
    let (_, tag) = asked.line.split_once("/cdn/").unwrap();
    let mut files = state.repos.iter().flat_map(|repo| repo.files.values());
    let mut bytes = files.find(|bytes| sha256(bytes) == tag).unwrap().clone();
    if state.faults.damaged > 0 {
        state.faults.damaged -= 1;
        bytes[0] ^= 1;
    }
    if state.faults.gone.as_deref() == Some(tag) {
        return refused("404 Not Found", "");
    }
    let mut answer = part(asked, &bytes, &[]);
    if !state.faults.cut.is_empty() {
        answer.sent = answer.sent.min(state.faults.cut.remove(0));
    }
    answer
}
