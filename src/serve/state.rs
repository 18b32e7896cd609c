//! What all requests share.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rand::TryRng;
use rand::rngs::SysRng;
use tokio::sync::OwnedSemaphorePermit;

use super::keys::{Key, Keys};
use super::metrics::Metrics;
use super::models::Models;
use super::sessions::Sessions;
use super::worker::Status;
use crate::Result;

/// What a client may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of a request's body.
    pub body: usize,
    /// Answers of a model that wait, beyond those under way.
    pub queue: usize,
    /// Tokens of one answer.
    pub tokens: Option<usize>,
    pub connections: usize,
    /// For headers, and between requests of a connection.
    pub header_timeout: Duration,
    /// For the whole body.
    pub body_timeout: Duration,
    /// For answers under way, when the server is told to end.
    pub grace: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body: 8 << 20,
            queue: 256,
            tokens: None,
            connections: 2048,
            header_timeout: Duration::from_secs(15),
            body_timeout: Duration::from_secs(30),
            grace: Duration::from_secs(30),
        }
    }
}

/// What a server is told at its start.
pub struct Options {
    pub address: SocketAddr,
    pub keys: Keys,
    pub limits: Limits,
    /// PEM files: certificates and key.
    pub tls: Option<(PathBuf, PathBuf)>,
    /// Other sites whose pages may ask.
    pub origins: Vec<String>,
    /// Names by which this machine is asked, beside its addresses and localhost.
    pub hosts: Vec<String>,
    /// A folder for conversations that name a session.
    pub sessions: Option<PathBuf>,
    /// A folder of training runs.
    pub runs: Option<PathBuf>,
}

pub struct Server {
    pub models: Arc<Models>,
    pub metrics: Metrics,
    pub keys: Keys,
    pub limits: Limits,
    /// Other sites whose pages may ask.
    pub origins: Vec<String>,
    /// Names by which this machine is asked, beside its addresses and localhost; `None`: any.
    pub hosts: Option<Vec<String>>,
    pub sessions: Option<Sessions>,
    /// A folder of training runs to show.
    pub runs: Option<PathBuf>,
    pub closing: AtomicBool,
    /// A random number of this process, and requests so far: their names.
    process: u64,
    count: AtomicU64,
}

impl Server {
    /// # Errors
    /// A folder for sessions that cannot be made.
    pub fn new(models: Models, options: Options) -> Result<Self> {
        let models = Arc::new(models);
        // A name that points here only by a trick has no key to show.
        let closed = options.keys.is_empty();
        Ok(Self {
            metrics: Metrics::new(models.clone()),
            models,
            keys: options.keys,
            limits: options.limits,
            origins: options.origins,
            hosts: closed.then_some(options.hosts),
            sessions: options.sessions.map(Sessions::new).transpose()?,
            runs: options.runs,
            closing: AtomicBool::new(false),
            process: SysRng.try_next_u64().unwrap_or_default(),
            count: AtomicU64::new(0),
        })
    }

    /// A name that no other request has.
    pub fn name(&self, prefix: &str) -> String {
        let count = self.count.fetch_add(1, Ordering::Relaxed);
        format!("{prefix}{:016x}{count:08x}", self.process)
    }

    /// Nine letters and digits, as Mistral's templates want the ids of calls.
    pub fn call_id(&self) -> String {
        let count = self.count.fetch_add(1, Ordering::Relaxed);
        format!("{:09x}", self.process.wrapping_add(count) & 0xF_FFFF_FFFF)
    }

    pub fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Relaxed)
    }

    /// How the models that are loaded are doing, by name.
    pub fn status(&self) -> BTreeMap<&str, Option<Status>> {
        let all = self.models.all();
        let all = all.map(|(about, model)| (about.name.as_str(), model.map(|m| m.worker.status())));
        all.collect()
    }
}

/// Who asks, for as long as it is answered.
#[derive(Clone)]
pub struct Client {
    pub key: Option<Arc<Key>>,
    /// Its place among the requests that its key may have at once.
    pub place: Option<Arc<OwnedSemaphorePermit>>,
    /// The request's name.
    pub request: String,
    pub begun: Instant,
}
