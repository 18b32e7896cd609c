//! What Prometheus is told.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use super::models::Models;
use super::worker::Status;
use crate::generate::Generation;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfRoute {
    route: String,
    status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfModel {
    model: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfAnswer {
    model: String,
    finish_reason: &'static str,
}

type Times = Family<OfModel, Histogram, fn() -> Histogram>;

pub struct Metrics {
    registry: Registry,
    requests: Family<OfRoute, Counter>,
    answers: Family<OfAnswer, Counter>,
    prompt_tokens: Family<OfModel, Counter>,
    cached_tokens: Family<OfModel, Counter>,
    completion_tokens: Family<OfModel, Counter>,
    time_to_first_token: Times,
    time_per_token: Times,
}

/// From a tenth of a millisecond to three minutes.
fn times() -> Histogram {
    Histogram::new(exponential_buckets(1e-4, 2.0, 21))
}

impl Metrics {
    pub fn new(models: Arc<Models>) -> Self {
        let mut registry = Registry::with_prefix("zebroid");
        let requests = Family::default();
        let said = "Requests, by route and status";
        registry.register("http_requests", said, requests.clone());
        let answers = Family::default();
        registry.register("answers", "Answers that ended, by reason", answers.clone());
        let mut tokens = |name: &str, help: &str| {
            let found = Family::default();
            registry.register(name, help, found.clone());
            found
        };
        let prompt_tokens = tokens("prompt_tokens", "Tokens of prompts");
        let cached_tokens = tokens("cached_prompt_tokens", "Those that were read before");
        let completion_tokens = tokens("completion_tokens", "Tokens of answers");
        let mut seconds = |name: &str, help: &str| {
            let found = Times::new_with_constructor(times);
            registry.register(name, help, found.clone());
            found
        };
        let time_to_first_token =
            seconds("time_to_first_token_seconds", "From request to first token");
        let time_per_token = seconds(
            "time_per_output_token_seconds",
            "Between tokens behind the first, mean of an answer",
        );
        registry.register_collector(Box::new(Engines(models)));
        Self {
            registry,
            requests,
            answers,
            prompt_tokens,
            cached_tokens,
            completion_tokens,
            time_to_first_token,
            time_per_token,
        }
    }

    pub fn request(&self, route: &str, status: u16) {
        let route = route.to_owned();
        self.requests
            .get_or_create(&OfRoute { route, status })
            .inc();
    }

    /// Answers that nobody waited for, with the tokens that were read and written for them.
    pub fn left(&self, model: &str, answers: usize, prompt: usize, completion: usize) {
        let labels = OfModel {
            model: model.to_owned(),
        };
        let answered = OfAnswer {
            model: model.to_owned(),
            finish_reason: "cancelled",
        };
        self.answers.get_or_create(&answered).inc_by(answers as u64);
        self.prompt_tokens
            .get_or_create(&labels)
            .inc_by(prompt as u64);
        self.completion_tokens
            .get_or_create(&labels)
            .inc_by(completion as u64);
    }

    /// An answer that ended, to a request that had `waited` seconds before the model had it; `first` of a prompt counts the prompt.
    pub fn answer(&self, model: &str, of: &Generation, waited: f64, first: bool) {
        let model = || model.to_owned();
        let finish_reason = of.finish_reason;
        let answers = OfAnswer {
            model: model(),
            finish_reason,
        };
        self.answers.get_or_create(&answers).inc();
        let labels = OfModel { model: model() };
        let count = |family: &Family<OfModel, Counter>, more: usize| {
            family.get_or_create(&labels).inc_by(more as u64);
        };
        if first {
            count(&self.prompt_tokens, of.prompt_tokens);
            count(&self.cached_tokens, of.cached_tokens);
        }
        count(&self.completion_tokens, of.completion_tokens);
        if of.completion_tokens > 0 {
            self.time_to_first_token
                .get_or_create(&labels)
                .observe(waited + of.ttft_s);
        }
        if of.completion_tokens > 1 {
            let seconds = 1.0 / of.decode_tokens_per_s;
            self.time_per_token.get_or_create(&labels).observe(seconds);
        }
    }

    /// In the text format.
    pub fn text(&self) -> String {
        let mut text = String::new();
        let written = encode(&mut text, &self.registry);
        written.expect("a string takes everything");
        text
    }
}

/// What the threads of the models say of themselves.
#[derive(Debug)]
struct Engines(Arc<Models>);

impl fmt::Debug for Models {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_struct("Models").finish_non_exhaustive()
    }
}

/// Name, help, whether it only grows, and where it stands.
type Row = (&'static str, &'static str, bool, fn(&Status) -> usize);

const ROWS: [Row; 12] = [
    (
        "requests_waiting",
        "Answers that wait for their turn",
        false,
        |s| s.waiting,
    ),
    ("requests_running", "Answers under way", false, |s| {
        s.running
    }),
    (
        "cache_bytes",
        "Memory of caches and states in use",
        false,
        |s| s.cache_bytes,
    ),
    (
        "cache_limit_bytes",
        "Memory that they may have",
        false,
        |s| s.cache_limit_bytes,
    ),
    ("passes", "Passes over the weights", true, |s| {
        s.statistics.passes
    }),
    ("read_tokens", "Tokens that they read", true, |s| {
        s.statistics.read_tokens
    }),
    (
        "preempted",
        "Answers that had to make room and were read again",
        true,
        |s| s.statistics.preempted,
    ),
    (
        "prefix_hits",
        "Prompts whose beginning was read before",
        true,
        |s| s.statistics.prefix.hits,
    ),
    (
        "prefix_misses",
        "Prompts whose beginning was not",
        true,
        |s| s.statistics.prefix.misses,
    ),
    (
        "prefix_evicted",
        "Beginnings that were let go of",
        true,
        |s| s.statistics.prefix.evicted,
    ),
    ("drafted_tokens", "Tokens that were guessed", true, |s| {
        s.statistics.drafted
    }),
    ("accepted_tokens", "Guesses that were right", true, |s| {
        s.statistics.accepted
    }),
];

impl Collector for Engines {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let loaded = self
            .0
            .all()
            .filter_map(|(about, model)| Some((about, model?)));
        let status: Vec<([(&str, String); 1], Status)> = loaded
            .map(|(about, model)| ([("model", about.name.clone())], model.worker.status()))
            .collect();
        for (name, help, grows, value) in ROWS {
            let metric_type = match grows {
                true => MetricType::Counter,
                false => MetricType::Gauge,
            };
            let mut of_all = encoder.encode_descriptor(name, help, None, metric_type)?;
            for (labels, status) in &status {
                let of_one = of_all.encode_family(labels)?;
                let value = value(status) as u64;
                match grows {
                    true => ConstCounter::new(value).encode(of_one)?,
                    false => ConstGauge::new(value as f64).encode(of_one)?,
                }
            }
        }
        Ok(())
    }
}
