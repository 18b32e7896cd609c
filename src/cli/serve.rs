//! `zebroid serve`: models behind HTTP.

use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::arg::chat::ChatArg;
use super::arg::engine::EngineArg;
use super::arg::hub::Model;
use super::arg::memory::size;
use super::positive;
use super::show::{note, print};
use crate::generate::EngineOptions;
use crate::serve::{self, About, Keys, Limits, Models, Options};
use crate::{Error, Result};

/// Serve models over HTTP: OpenAI's interface, and a page to talk with them.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    zebroid serve ./hybrid                                 (then open http://127.0.0.1:8080)\n  \
    zebroid serve ./hybrid --model teacher=./teacher       (two models, side by side in the page)\n  \
    zebroid serve model.gguf --draft ngram --cache-memory 4GiB\n  \
    zebroid serve --make-key ann --api-key-file keys.toml  (prints the key once, keeps its hash)\n  \
    zebroid serve ./hybrid --host 0.0.0.0 --api-key-file keys.toml --tls-cert cert.pem --tls-key key.pem\n\n\
    curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' \\\n    \
    -d '{\"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}], \"stream\": true}'\n\n\
    A key of its own: $ZEBROID_API_KEY. In the key file a [[key]] may have requests_per_minute, tokens_per_minute and concurrent.\n\
    Paths: /v1/models, /v1/chat/completions, /v1/completions, /v1/responses, /v1/sessions, /health, /ready, /metrics.")]
pub struct Args {
    /// Checkpoint folder of any format, with its tokenizer, .gguf file, or Hugging Face id; its name is the folder's, or the id.
    #[arg(required_unless_present_any = ["model", "make_key"])]
    checkpoint: Option<Model>,
    /// One more model, loaded when it is first asked for (several times: several).
    #[arg(long, value_name = "NAME=PATH")]
    model: Vec<String>,
    /// Address to listen on; other than this machine's own it needs a key.
    #[arg(long, default_value = "127.0.0.1")]
    host: IpAddr,
    /// Port to listen on; 0: any that is free.
    #[arg(long, default_value_t = 8080)]
    port: u16,
    #[command(flatten)]
    chat: ChatArg,
    /// A file of API keys (their hashes, with limits).
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Make a key of this name in the key file, print it, and end.
    #[arg(long, value_name = "NAME", requires = "api_key_file")]
    make_key: Option<String>,
    /// Listen to other machines without a key.
    #[arg(long)]
    allow_unauthenticated: bool,
    /// Certificates of this server (PEM).
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Their private key (PEM).
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// A site whose pages may ask this server (CORS), or * (several times: several).
    #[arg(long, value_name = "ORIGIN")]
    cors_origin: Vec<String>,
    /// A name by which this server may be asked where it has no keys, beside its addresses and localhost.
    #[arg(long, value_name = "NAME")]
    allow_host: Vec<String>,
    /// A folder in which conversations are kept that name a session.
    #[arg(long, value_name = "FOLDER")]
    sessions: Option<PathBuf>,
    /// A folder of training runs, to show at /runs.
    #[arg(long, value_name = "FOLDER")]
    runs: Option<PathBuf>,
    /// Memory for weights and caches of all models, as 16GiB: those not asked for for longest make room [default: no limit].
    #[arg(long, value_parser = size)]
    memory: Option<usize>,
    /// Answers that a model continues together.
    #[arg(long, value_parser = positive, default_value_t = EngineOptions::default().max_batch)]
    max_batch: usize,
    /// Answers of a model that may wait beyond those; more are told to come later (429).
    #[arg(long, default_value_t = Limits::default().queue)]
    max_queue: usize,
    /// Most tokens of an answer, whatever is asked for [default: what the context leaves].
    #[arg(long, value_parser = positive)]
    max_answer_tokens: Option<usize>,
    /// Largest body of a request.
    #[arg(long, value_parser = size, default_value = "8MiB")]
    max_body: usize,
    /// Connections at once.
    #[arg(long, value_parser = positive, default_value_t = Limits::default().connections)]
    max_connections: usize,
    /// Seconds for a request's headers, and between two requests of a connection.
    #[arg(long, default_value_t = 15.0)]
    header_timeout: f64,
    /// Seconds that answers under way are given when the server is told to end (Ctrl-C, SIGTERM).
    #[arg(long, default_value_t = 30.0)]
    grace: f64,
    /// Do not keep what was read for prompts that begin in the same way.
    #[arg(long)]
    no_prefix_cache: bool,
    /// What is written down of every request, on standard error, as JSON.
    #[arg(long)]
    pub log_json: bool,
    #[command(flatten)]
    engine: EngineArg,
}

/// The one key of a server without a file.
const KEY: &str = "ZEBROID_API_KEY";

fn seconds(flag: &str, value: f64) -> Result<Duration> {
    let found = Duration::try_from_secs_f64(value);
    found.map_err(|_| Error::invalid(format!("--{flag} {value} must be a number of seconds")))
}

/// What a model is called that nobody has named.
fn own_name(path: &Path) -> String {
    if !path.exists() {
        // The hub's.
        return path.to_string_lossy().into_owned();
    }
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let name = match path.extension().is_some_and(|e| e == "gguf") {
        true => path.file_stem(),
        false => path.file_name(),
    };
    name.map_or("model".into(), |name| name.to_string_lossy().into_owned())
}

impl Args {
    fn keys(&self) -> Result<Keys> {
        let mut keys = match &self.api_key_file {
            Some(path) => Keys::open(path)?,
            None => Keys::default(),
        };
        if let Ok(key) = std::env::var(KEY)
            && !key.is_empty()
        {
            keys = keys.with(KEY, &key);
        }
        let loopback = self.host.is_loopback();
        match keys.is_empty() && !loopback && !self.allow_unauthenticated {
            true => Err(Error::invalid(format!(
                "--host {}: whoever reaches this machine could use it; make a key with --make-key NAME --api-key-file FILE \
                 (or set {KEY}), or say --allow-unauthenticated",
                self.host
            ))),
            false => Ok(keys),
        }
    }

    fn all(&self) -> Result<Vec<About>> {
        let first = self
            .checkpoint
            .iter()
            .map(|model| Ok((own_name(model.named()), model.clone())));
        let named = self.model.iter().map(|model| match model.split_once('=') {
            Some((name, path)) if !name.is_empty() && !path.is_empty() => {
                Ok((name.to_owned(), Model::from(OsString::from(path))))
            }
            _ => Err(Error::invalid(format!("--model {model}: write NAME=PATH"))),
        });
        first
            .chain(named)
            .map(|found| {
                let (name, model) = found?;
                let path = model.fetch()?;
                let template = self.chat.asked(&path)?;
                About::open(name, path, template)
            })
            .collect()
    }
}

pub fn run(args: Args) -> anyhow::Result<()> {
    if let (Some(name), Some(path)) = (&args.make_key, &args.api_key_file) {
        print(format_args!("{}\n", Keys::make(path, name)?))?;
        return Ok(());
    }
    let keys = args.keys()?;
    let all = args.all()?;
    // Models share what is free, and leave room for weights where there is a budget.
    let largest = all.iter().map(|about| about.bytes as usize).max();
    let left = |budget: usize| budget.saturating_sub(largest.unwrap_or_default()) / 2;
    let free = args.engine.cache_room()? / all.len().max(1);
    let cache = args.memory.map(left).map_or(free, |left| left.min(free));
    let mut options = args.engine.options();
    options.max_batch = args.max_batch;
    options.prefix_cache = !args.no_prefix_cache;
    let cache = *options.cache_memory.get_or_insert(cache) as u64;
    let engine = args.engine.clone();
    let load = Box::new(move |path: &Path| engine.open_with(path, options.clone()));
    let limits = Limits {
        body: args.max_body,
        queue: args.max_queue,
        tokens: args.max_answer_tokens,
        connections: args.max_connections,
        header_timeout: seconds("header-timeout", args.header_timeout)?,
        grace: seconds("grace", args.grace)?,
        ..Limits::default()
    };
    let names: Vec<String> = all.iter().map(|about| about.name.clone()).collect();
    let models = Models::new(
        all,
        load,
        args.memory.map(|bytes| bytes as u64),
        cache,
        limits.queue,
    )?;
    let options = Options {
        address: SocketAddr::new(args.host, args.port),
        tls: args.tls_cert.zip(args.tls_key),
        keys,
        limits,
        origins: args.cors_origin,
        hosts: args.allow_host,
        sessions: args.sessions,
        runs: args.runs,
    };
    serve::run(models, options, |address| {
        note(format_args!(
            "{address} serves {}; Ctrl-C stops it",
            names.join(", ")
        ));
    })?;
    Ok(())
}
