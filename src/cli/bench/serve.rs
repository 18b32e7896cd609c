//! `zebroid bench serve`: a server under many clients at once.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use serde_json::{Value, json};

use super::quantile;
use crate::cli::positive;
use crate::cli::show::{bytes, interrupt, note, print, print_json, table, thousands};
use crate::data::stories::StoryGenerator;
use crate::op::runtime::resident_memory;
use crate::{Error, Result};

/// Clients that ask an OpenAI server (any, not only ours) for greedy completions: prompts and answers of mixed lengths, some of them
/// left in the middle, each answer compared with what the server says when it is asked alone.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    zebroid serve ./hybrid --port 8080 &\n  \
    zebroid bench serve http://127.0.0.1:8080 --clients 200 --seconds 600 --leave 0.2 --pid $!\n  \
    zebroid bench serve http://127.0.0.1:8080 --clients 8 --seconds 30 --json")]
pub struct Args {
    /// Where the server is.
    #[arg(default_value = "http://127.0.0.1:8080")]
    url: String,
    /// The model to ask for [default: the server's first].
    #[arg(long)]
    model: Option<String>,
    /// Clients at once.
    #[arg(long, value_parser = positive, default_value_t = 32)]
    clients: usize,
    /// Seconds to go on for.
    #[arg(long, default_value_t = 60.0)]
    seconds: f64,
    /// A file with a prompt on every line [default: beginnings of generated stories].
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Different prompts.
    #[arg(long, value_parser = positive, default_value_t = 64)]
    prompt_count: usize,
    /// Most tokens of an answer; each asks for some number up to it.
    #[arg(long, value_parser = positive, default_value_t = 64)]
    max_tokens: usize,
    /// The share of clients that leave in the middle of an answer.
    #[arg(long, default_value_t = 0.0)]
    leave: f64,
    /// The server's process, whose memory is looked at after a minute and at the end.
    #[arg(long)]
    pid: Option<u32>,
    /// Seed of lengths and of who leaves.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// One JSON object instead of the table.
    #[arg(long)]
    json: bool,
}

/// When memory is looked at first.
const SETTLED: Duration = Duration::from_secs(60);

#[derive(Debug, Serialize)]
struct Report {
    seconds: f64,
    clients: usize,
    /// Answers that came whole.
    answered: usize,
    left: usize,
    /// Told to come later (429, 503).
    refused: usize,
    failed: usize,
    /// Not what the server says alone.
    wrong: usize,
    first_failure: Option<String>,
    requests_per_s: f64,
    /// Of answers.
    tokens_per_s: f64,
    /// Seconds.
    ttft_p50: f64,
    ttft_p99: f64,
    time_per_token_p50: f64,
    time_per_token_p99: f64,
    rss_bytes_after_a_minute: Option<usize>,
    rss_bytes: Option<usize>,
}

/// What one request met.
enum Met {
    Whole(Answer),
    Left(Answer),
    Refused,
    Failed(String),
}

#[derive(Default)]
struct Answer {
    text: String,
    tokens: usize,
    ttft: f64,
    /// From the first token to the last.
    decoding: f64,
}

struct Target {
    agent: ureq::Agent,
    url: String,
    model: Option<String>,
}

impl Target {
    /// Asks for a greedy continuation, and leaves after so many pieces of it.
    fn ask(&self, prompt: &str, max_tokens: usize, leave: Option<usize>) -> Met {
        let mut body = json!({
            "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": true,
            "stream_options": {"include_usage": true},
        });
        if let Some(model) = &self.model {
            body["model"] = model.as_str().into();
        }
        let begun = Instant::now();
        let asked = self
            .agent
            .post(&self.url)
            .header("content-type", "application/json");
        let response = match asked.send(body.to_string()) {
            Ok(response) => response,
            Err(ureq::Error::StatusCode(429 | 503)) => return Met::Refused,
            Err(error) => return Met::Failed(error.to_string()),
        };
        let mut answer = Answer::default();
        let (mut pieces, mut last) = (0, 0.0);
        for line in BufReader::new(response.into_body().into_reader()).lines() {
            let line = match line {
                Ok(line) => line,
                Err(error) => return Met::Failed(format!("a stream broke: {error}")),
            };
            let Some(data) = line.strip_prefix("data: ") else {
                continue;
            };
            if data == "[DONE]" {
                answer.decoding = last - answer.ttft;
                // Where the server tells no usage, a piece is a token.
                answer.tokens = answer.tokens.max(pieces);
                return Met::Whole(answer);
            }
            let event: Value = match serde_json::from_str(data) {
                Ok(event) => event,
                Err(error) => return Met::Failed(format!("{error}: {data}")),
            };
            if event.get("error").is_some_and(|error| !error.is_null()) {
                return Met::Failed(data.to_owned());
            }
            if let Some(count) = event["usage"]["completion_tokens"].as_u64() {
                answer.tokens = count as usize;
            }
            let text = event["choices"][0]["text"].as_str().unwrap_or_default();
            if text.is_empty() {
                continue;
            }
            last = begun.elapsed().as_secs_f64();
            if pieces == 0 {
                answer.ttft = last;
            }
            pieces += 1;
            answer.text.push_str(text);
            if leave.is_some_and(|leave| pieces >= leave) {
                answer.tokens = pieces;
                return Met::Left(answer);
            }
        }
        Met::Failed("a stream ended without [DONE]".into())
    }
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let report = bench(&args)?;
    if args.json {
        print_json(&report)?;
        return Ok(());
    }
    let ms = |seconds: f64| format!("{:.1} ms", seconds * 1e3);
    let memory = |found: Option<usize>| found.map_or("unknown".into(), bytes);
    let rows = [
        ("answers", thousands(report.answered)),
        ("left in the middle", thousands(report.left)),
        ("told to come later", thousands(report.refused)),
        ("failed", thousands(report.failed)),
        ("not as alone", thousands(report.wrong)),
        ("requests/s", format!("{:.1}", report.requests_per_s)),
        ("tokens/s", thousands(report.tokens_per_s as usize)),
        ("TTFT p50", ms(report.ttft_p50)),
        ("TTFT p99", ms(report.ttft_p99)),
        ("time per token p50", ms(report.time_per_token_p50)),
        ("time per token p99", ms(report.time_per_token_p99)),
        (
            "memory after a minute",
            memory(report.rss_bytes_after_a_minute),
        ),
        ("memory at the end", memory(report.rss_bytes)),
    ];
    let rows = rows.map(|(name, value)| vec![name.to_owned(), value]);
    print(table(
        &[
            &format!("{} clients, {:.0} s", report.clients, report.seconds),
            "",
        ],
        &rows,
    ))?;
    if let Some(said) = &report.first_failure {
        note(format_args!("first failure: {said}"));
    }
    Ok(())
}

fn bench(args: &Args) -> Result<Report> {
    let prompts = prompts(args)?;
    let config = ureq::Agent::config_builder()
        .timeout_connect(Some(Duration::from_secs(10)))
        .timeout_recv_response(Some(Duration::from_secs(120)))
        .max_idle_connections(args.clients)
        .max_idle_connections_per_host(args.clients);
    let target = Target {
        agent: config.build().into(),
        url: format!("{}/v1/completions", args.url.trim_end_matches('/')),
        model: args.model.clone(),
    };
    interrupt::install();
    // What each prompt is answered with when nobody else asks.
    let mut alone = Vec::new();
    for prompt in &prompts {
        match target.ask(prompt, args.max_tokens, None) {
            Met::Whole(answer) => alone.push(answer),
            Met::Failed(said) => return Err(Error::invalid(format!("{}: {said}", target.url))),
            Met::Left(_) | Met::Refused => {
                return Err(Error::invalid(format!("{} is busy", target.url)));
            }
        }
    }
    let length = Duration::try_from_secs_f64(args.seconds);
    let length = length.map_err(|_| Error::invalid(format!("--seconds {}", args.seconds)))?;
    let begun = Instant::now();
    let all = Mutex::new(Vec::new());
    let wrong = AtomicUsize::new(0);
    let settled = Mutex::new(None);
    thread::scope(|scope| {
        for client in 0..args.clients {
            let (target, prompts, alone, all, wrong) = (&target, &prompts, &alone, &all, &wrong);
            scope.spawn(move || {
                let mut random = ChaCha8Rng::seed_from_u64(args.seed);
                random.set_stream(client as u64);
                while begun.elapsed() < length && !interrupt::asked() {
                    let which = random.random_range(0..prompts.len());
                    let tokens = random.random_range(1..=args.max_tokens);
                    let leaves = random.random_bool(args.leave.clamp(0.0, 1.0));
                    let leave = leaves.then(|| random.random_range(1..=tokens));
                    let met = target.ask(&prompts[which], tokens, leave);
                    match &met {
                        Met::Whole(answer) => {
                            let alone = &alone[which];
                            let right = alone.text.starts_with(&answer.text)
                                && answer.tokens == tokens.min(alone.tokens)
                                && (tokens < alone.tokens || answer.text == alone.text);
                            wrong.fetch_add(usize::from(!right), Ordering::Relaxed);
                        }
                        Met::Left(answer) => {
                            let right = alone[which].text.starts_with(&answer.text);
                            wrong.fetch_add(usize::from(!right), Ordering::Relaxed);
                        }
                        Met::Refused => thread::sleep(Duration::from_secs(1)),
                        Met::Failed(_) => thread::sleep(Duration::from_millis(100)),
                    }
                    all.lock().unwrap_or_else(|e| e.into_inner()).push(met);
                }
            });
        }
        if let Some(pid) = args.pid
            && length > SETTLED
        {
            let settled = &settled;
            scope.spawn(move || {
                while begun.elapsed() < SETTLED && !interrupt::asked() {
                    thread::sleep(Duration::from_millis(100));
                }
                *settled.lock().unwrap_or_else(|e| e.into_inner()) = resident_memory(pid);
            });
        }
    });
    let seconds = begun.elapsed().as_secs_f64();
    let rss = args.pid.and_then(resident_memory);
    let all = all.into_inner().unwrap_or_else(|e| e.into_inner());
    let settled = settled.into_inner().unwrap_or_else(|e| e.into_inner());
    Ok(Report {
        wrong: wrong.into_inner(),
        rss_bytes_after_a_minute: settled,
        rss_bytes: rss,
        ..summed(all, seconds, args.clients)
    })
}

fn summed(all: Vec<Met>, seconds: f64, clients: usize) -> Report {
    let (mut answered, mut left, mut refused, mut failed, mut tokens) = (0, 0, 0, 0, 0);
    let (mut ttft, mut per_token) = (Vec::new(), Vec::new());
    let mut first_failure = None;
    for met in all {
        let answer = match met {
            Met::Whole(answer) => {
                answered += 1;
                answer
            }
            Met::Left(answer) => {
                left += 1;
                answer
            }
            Met::Refused => {
                refused += 1;
                continue;
            }
            Met::Failed(said) => {
                failed += 1;
                first_failure.get_or_insert(said);
                continue;
            }
        };
        tokens += answer.tokens;
        if answer.ttft > 0.0 {
            ttft.push(answer.ttft);
        }
        if answer.tokens > 1 && answer.decoding > 0.0 {
            per_token.push(answer.decoding / (answer.tokens - 1) as f64);
        }
    }
    Report {
        seconds,
        clients,
        answered,
        left,
        refused,
        failed,
        wrong: 0,
        first_failure,
        requests_per_s: (answered + left) as f64 / seconds,
        tokens_per_s: tokens as f64 / seconds,
        ttft_p50: quantile(&mut ttft, 0.5),
        ttft_p99: quantile(&mut ttft, 0.99),
        time_per_token_p50: quantile(&mut per_token, 0.5),
        time_per_token_p99: quantile(&mut per_token, 0.99),
        rss_bytes_after_a_minute: None,
        rss_bytes: None,
    }
}

fn prompts(args: &Args) -> Result<Vec<String>> {
    if let Some(path) = &args.prompts {
        let text = std::fs::read_to_string(path).map_err(Error::io("cannot read", path))?;
        let lines = text.lines().filter(|line| !line.trim().is_empty());
        let lines: Vec<String> = lines.take(args.prompt_count).map(str::to_owned).collect();
        return match lines.is_empty() {
            true => Err(Error::file(
                path,
                "holds no prompt: write one on every line",
            )),
            false => Ok(lines),
        };
    }
    let mut random = ChaCha8Rng::seed_from_u64(args.seed);
    let stories = StoryGenerator::new(args.seed).take(args.prompt_count);
    let begun = stories.map(|story| {
        let words: Vec<&str> = story.text.split(' ').collect();
        let count = random.random_range(1..=words.len().max(1));
        words[..count.min(words.len())].join(" ")
    });
    Ok(begun.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_what_was_met() {
        let mut values: Vec<f64> = (0..100).rev().map(f64::from).collect();
        assert_eq!(
            (quantile(&mut values, 0.5), quantile(&mut values, 0.99)),
            (50.0, 99.0)
        );
        assert!(quantile(&mut [], 0.5).is_nan());
        let whole = |tokens| {
            let (ttft, decoding) = (0.1, 0.2);
            Met::Whole(Answer {
                tokens,
                ttft,
                decoding,
                ..Answer::default()
            })
        };
        let all = vec![whole(3), whole(1), Met::Refused, Met::Failed("x".into())];
        let report = summed(all, 2.0, 4);
        assert_eq!((report.answered, report.refused, report.failed), (2, 1, 1));
        assert_eq!((report.tokens_per_s, report.time_per_token_p50), (2.0, 0.1));
        assert_eq!(report.first_failure.as_deref(), Some("x"));
    }
}
