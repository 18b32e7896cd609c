//! The pages of `zebroid serve` in headless Chromium, by WebDriver.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::program::{TEACHER, command, succeeds, text};

const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}";
const KEY: &str = "zb-page";

/// A process that ends with the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Where a server listens that was started with these words.
fn serve(words: &[&str], key: Option<&str>) -> (Process, String) {
    let mut command = command();
    command.arg("serve").args(words).stderr(Stdio::piped());
    command.envs(key.map(|key| ("ZEBROID_API_KEY", key)));
    let mut process = Process(command.spawn().unwrap());
    let mut lines = BufReader::new(process.0.stderr.take().unwrap()).lines();
    let line = lines.find_map(|line| line.ok().filter(|line| line.contains(" serves ")));
    let line = line.expect("a server says where it is");
    // Whoever writes to nobody would end.
    std::thread::spawn(move || lines.for_each(drop));
    (process, line.split(" serves ").next().unwrap().to_owned())
}

fn http(request: ureq::http::Request<String>) -> (u16, String) {
    let agent = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .timeout_global(Some(Duration::from_secs(60)))
        .build()
        .new_agent();
    let mut response = agent.run(request).unwrap();
    let text = response.body_mut().read_to_string().unwrap();
    (response.status().as_u16(), text)
}

fn get(url: &str) -> (u16, String) {
    http(ureq::http::Request::get(url).body(String::new()).unwrap())
}

struct Browser {
    /// Of the session.
    url: String,
    _driver: Process,
    _profile: TempDir,
}

impl Browser {
    /// None where there is no browser.
    fn open() -> Option<Self> {
        let driver = Command::new("chromedriver")
            .arg("--port=0")
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        let Ok(driver) = driver else {
            eprintln!(
                "chromedriver is not here (Debian's chromium and chromium-driver): not tested"
            );
            return None;
        };
        let mut driver = Process(driver);
        let mut lines = BufReader::new(driver.0.stdout.take().unwrap()).lines();
        let port = lines.find_map(|line| {
            let line = line.ok()?;
            let (_, port) = line.split_once("successfully on port ")?;
            Some(port.trim_end_matches('.').to_owned())
        });
        std::thread::spawn(move || lines.for_each(drop));
        let profile = tempfile::tempdir().unwrap();
        let folder = format!("--user-data-dir={}", text(profile.path()));
        let arguments = [
            "--headless",
            "--window-size=1280,900",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            &folder,
        ];
        let url = format!("http://127.0.0.1:{}/session", port?);
        let asked = json!({"capabilities": {"alwaysMatch": {
            "goog:chromeOptions": {"args": arguments}, "goog:loggingPrefs": {"browser": "ALL"},
        }}});
        let session = call("POST", &url, asked);
        Some(Self {
            url: format!("{url}/{}", session["sessionId"].as_str().unwrap()),
            _driver: driver,
            _profile: profile,
        })
    }

    fn post(&self, path: &str, body: Value) -> Value {
        call("POST", &format!("{}{path}", self.url), body)
    }

    fn go(&self, url: &str) {
        self.post("/url", json!({ "url": url }));
    }

    fn run(&self, script: &str) -> Value {
        self.post("/execute/sync", json!({"script": script, "args": []}))
    }

    /// Waits until this is true in the page.
    fn until(&self, what: &str) {
        let script = format!("return Boolean({what})");
        let begun = Instant::now();
        while self.run(&script) != true {
            if begun.elapsed() > Duration::from_secs(20) {
                panic!(
                    "not in 20 s: {what}\n{}\n{}",
                    self.run("return document.body.innerText"),
                    self.post("/se/log", json!({"type": "browser"}))
                );
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Keys into an element, as a person presses them.
    fn keys(&self, selector: &str, keys: &str) {
        let found = self.post(
            "/element",
            json!({"using": "css selector", "value": selector}),
        );
        let id = found.as_object().unwrap().values().next().unwrap();
        let path = format!("/element/{}/value", id.as_str().unwrap());
        self.post(&path, json!({ "text": keys }));
    }

    fn click(&self, selector: &str) {
        self.run(&format!("document.querySelector('{selector}').click()"));
    }

    fn text(&self, selector: &str) -> String {
        let script = format!("return document.querySelector('{selector}').textContent");
        self.run(&script).as_str().unwrap().to_owned()
    }

    fn most_tokens(&self, count: usize) {
        self.run(&format!(
            "const field = document.querySelector('[name=max_tokens]'); field.value = {count}; field.oninput()"
        ));
    }

    /// Nothing was refused by the page's own policy.
    fn check_policy(&self) {
        let log = self.post("/se/log", json!({"type": "browser"})).to_string();
        assert!(!log.contains("Security Policy"), "{log}");
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        call("DELETE", &self.url, Value::Null);
    }
}

fn call(method: &str, url: &str, body: Value) -> Value {
    let request = ureq::http::Request::builder().method(method).uri(url);
    let body = match body {
        Value::Null => String::new(),
        body => body.to_string(),
    };
    let (status, said) = http(request.body(body).unwrap());
    assert_eq!(status, 200, "{method} {url}: {said}");
    let mut said: Value = serde_json::from_str(&said).unwrap();
    said["value"].take()
}

const ENTER: &str = "\u{E007}";
const ESCAPE: &str = "\u{E00C}";
const DONE: &str =
    "document.getElementById('stop').hidden && !document.querySelector('[aria-busy=true]')";
const WRITING: &str = "document.querySelector('[aria-busy=true] .text')?.textContent.length > 5";

/// A model that takes its time, and knows nothing: what it says is long.
fn slow(folder: &Path) -> PathBuf {
    let (stories, slow) = (folder.join("stories"), folder.join("slow"));
    succeeds(&["stories", text(&stories), "--count", "2"]);
    let sizes = "--hidden-size 256 --intermediate-size 768 --num-layers 8 --seq-len 16 --batch-size 1 --steps 1";
    let data = stories.join("stories.jsonl");
    let words = [
        "pretrain",
        text(&slow),
        "--data",
        text(&data),
        "--tokenizer",
        TEACHER,
    ];
    succeeds(&[&words[..], &sizes.split(' ').collect::<Vec<_>>()].concat());
    let config = slow.join("config.json");
    let long = std::fs::read_to_string(&config).unwrap();
    let long = long.replace(
        "\"max_position_embeddings\": 16",
        "\"max_position_embeddings\": 4096",
    );
    std::fs::write(&config, long).unwrap();
    slow
}

#[test]
fn a_conversation_in_a_browser() {
    let Some(browser) = Browser::open() else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let slow = slow(folder.path());
    let template = folder.path().join("template.jinja");
    std::fs::write(&template, TEMPLATE).unwrap();
    let teacher = format!("teacher={TEACHER}");
    let words = ["--model", &teacher, "--chat-template", text(&template)];
    let (server, url) = serve(&[&[text(&slow), "--port", "0"], &words[..]].concat(), None);
    browser.go(&url);
    browser.until("document.getElementById('first').options.length === 2");

    // Greedy, so that an answer is the same again.
    browser.keys("[name=temperature]", "0");
    browser.keys("#prompt", &format!("Tom had a <b>red</b> ball.{ENTER}"));
    browser.until(WRITING);
    let begun = browser.text(".answer .text").len();
    browser.until(&format!(
        "document.querySelector('[aria-busy=true] .text').textContent.length > {begun}"
    ));
    browser.keys("#prompt", ESCAPE);
    browser.until("document.querySelector('.said')?.textContent === 'Stopped.'");
    let stopped = browser.text(".answer .text");
    // The server has stopped as well.
    browser.until("document.getElementById('live').textContent.includes('answering0')");
    browser.most_tokens(10);
    browser.click(".again");
    browser.until(&format!("{DONE} && !document.querySelector('.said')"));
    let whole = browser.text(".answer .text");
    let shorter = whole.len().min(stopped.len());
    assert_eq!(whole[..shorter], stopped[..shorter]);
    let figures = browser.text(".figures");
    for part in [
        "first token",
        "tokens/s",
        "10 tokens",
        "read before",
        "cache",
    ] {
        assert!(figures.contains(part), "{figures}");
    }
    // What is said is never markup.
    let markup = browser.run("return document.querySelector('#log b')");
    assert_eq!(markup, Value::Null);

    // Two models, the same prompt.
    browser.run("const second = document.getElementById('second'); second.value = 'teacher'; second.onchange()");
    browser.keys("#prompt", &format!("Mia had a blue kite.{ENTER}"));
    browser.until(&format!(
        "{DONE} && document.querySelectorAll('.two .answer .figures').length === 2"
    ));
    browser.until("document.querySelectorAll('#live dl').length === 2");

    // What follows a changed message is answered anew.
    browser.click(".edit");
    browser.keys(".you textarea", &format!(" It was big.{ENTER}"));
    browser.until(&format!(
        "{DONE} && document.querySelectorAll('.turn').length === 1 && document.querySelectorAll('.figures').length === 2"
    ));
    assert!(browser.text(".you .text").ends_with("It was big."));

    // Left in the middle of an answer.
    browser.click("#new");
    browser.most_tokens(4000);
    browser.keys("#prompt", &format!("Tom had a red ball.{ENTER}"));
    browser.until(WRITING);
    browser.run("location.reload()");
    browser.until("document.querySelector('.said')?.textContent.includes('was cut off')");
    assert!(browser.text(".answer .text").len() > 5);
    browser.until("document.querySelectorAll('#conversations li').length === 2");
    browser.until("document.getElementById('first').options.length === 2");
    browser.check_policy();

    // The server is killed, and comes back with a key and without a template.
    browser.click(".again");
    browser.until(WRITING);
    drop(server);
    browser.until(
        "!document.getElementById('away').hidden && document.querySelector('.said')?.textContent.includes('was lost')",
    );
    assert!(browser.text(".answer .text").len() > 5);
    let port = url.rsplit(':').next().unwrap();
    let (_server, _) = serve(&[TEACHER, "--port", port], Some(KEY));
    browser.until(
        "document.getElementById('away').hidden && !document.getElementById('ask-key').hidden",
    );
    browser.keys("#key", &format!("{KEY}{ENTER}"));
    browser.until("document.getElementById('ask-key').hidden && document.getElementById('send').textContent === 'Go on'");
    browser.most_tokens(10);
    browser.click(".again");
    browser.until(&format!("{DONE} && !document.querySelector('.said')"));
    assert_eq!(get(&format!("{url}/api/runs")).0, 401);
    assert_eq!(get(&url).0, 200);
}

/// Steps of a run, as `metrics.jsonl` has them.
fn steps(from: u64, to: u64) -> String {
    let steps = (from..=to).map(|step| {
        let loss = 1.0 / step as f64;
        json!({"step": step, "tokens": 64 * step, "loss": loss, "lr": 0.1, "grad_norm": [1.0, 2.0], "mla.0": loss, "mla.1": 2.0 * loss, "tokens_per_s": 9.0})
            .to_string()
            + "\n"
    });
    steps.collect()
}

fn append(path: &Path, text: &str) {
    let file = std::fs::File::options()
        .create(true)
        .append(true)
        .open(path);
    file.unwrap().write_all(text.as_bytes()).unwrap();
}

#[test]
fn runs_are_shown_while_they_train() {
    let folder = tempfile::tempdir().unwrap();
    let place = |name: &str| folder.path().join("runs").join(name);
    for run in ["deep/ild.partial", "other"] {
        std::fs::create_dir_all(place(run)).unwrap();
    }
    let metrics = place("deep/ild.partial/metrics.jsonl");
    append(&metrics, &steps(1, 3));
    // The next is just being written.
    append(&metrics, "{\"step\":4,\"tok");
    // A process works on it.
    let lock = std::fs::File::create(place("deep/.zebroid-ild.lock")).unwrap();
    lock.lock().unwrap();
    append(&place("other/metrics.jsonl"), &steps(1, 2));
    let config = Path::new(TEACHER).join("config.json");
    std::fs::copy(config, place("other/config.json")).unwrap();
    let sample = json!({ "step": 2, "prompt": "Once <b>", "text": " upon a time" });
    append(&place("other/samples.jsonl"), &format!("{sample}\n"));
    append(&folder.path().join("metrics.jsonl"), &steps(1, 1));
    let root = folder.path().join("runs");
    let (_server, url) = serve(&[TEACHER, "--port", "0", "--runs", text(&root)], None);

    let json = |path: &str| -> (u16, Value) {
        let (status, said) = get(&format!("{url}/api/runs{path}"));
        (status, serde_json::from_str(&said).unwrap())
    };
    let names: Vec<Value> = json("").1["runs"].as_array().unwrap().clone();
    let mut names: Vec<&str> = names
        .iter()
        .map(|run| run["folder"].as_str().unwrap())
        .collect();
    names.sort_unstable();
    assert_eq!(names, ["deep/ild.partial", "other"]);
    let (_, run) = json("/deep%2Fild.partial?since=1&metric=grad_norm%2F1");
    assert_eq!(run["points"], json!([[2, 128, 2.0], [3, 192, 2.0]]));
    assert_eq!(json("/other").1["layers"].as_array().unwrap().len(), 4);
    for out in ["/..%2F", "/deep%2F..%2F..", "/%2Fetc", "/nothing"] {
        let (status, said) = json(out);
        assert_eq!(
            (status, &said["error"]["param"]),
            (404, &Value::Null),
            "{out}: {said}"
        );
    }

    let Some(browser) = Browser::open() else {
        return;
    };
    browser.go(&format!("{url}/runs"));
    browser.until("document.querySelectorAll('#runs input').length === 2");
    assert!(browser.text("#runs").contains("running"));
    // One is drawn; now both are.
    browser.run("document.querySelectorAll('#runs input').forEach((box) => { if (!box.checked) box.click(); })");
    let points = "[...document.querySelectorAll('#chart .curve')].map((path) => path.getAttribute('d').split(/[ML]/).length - 1)";
    browser.until(&format!("{points}.sort().join() === '2,3'"));
    append(&metrics, "ens\":256,\"loss\":0.25}\n");
    append(&metrics, &steps(5, 5));
    browser.until(&format!("{points}.sort().join() === '2,5'"));
    let details = browser.text("#details");
    let sample = "document.querySelector('#details [aria-label=Samples]').textContent";
    browser.until(&format!("{sample}.includes('Once <b> upon a time')"));
    for part in ["mla: error", "attention", "tokens_per_s"] {
        assert!(details.contains(part), "{part} is not in {details}");
    }
    browser.run("const metric = document.getElementById('metric'); metric.value = 'mla.1'; metric.onchange()");
    browser.until(&format!("{points}.sort().join() === '2,4'"));
    // The result takes the run's place.
    std::fs::rename(place("deep/ild.partial"), place("deep/ild")).unwrap();
    browser.until(&format!(
        "document.querySelector('[value=\"deep/ild\"]')?.checked && {points}.sort().join() === '2,4'"
    ));
    browser.keys("#chart", "\u{E012}");
    browser.until("document.querySelector('.cursor') && document.getElementById('status').textContent.includes('deep/ild')");
    browser.check_policy();
}
