//! What all requests share.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::OwnedSemaphorePermit;

use super::keys::{Key, Keys};
use super::metrics::Metrics;
use super::models::Models;
use super::sessions::Sessions;

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
    pub started: u64,
    pub count: AtomicU64,
}

impl Server {
    /// A name that no other request has.
    pub fn name(&self, prefix: &str) -> String {
        let count = self.count.fetch_add(1, Ordering::Relaxed);
        format!("{prefix}{:016x}{count:08x}", self.started)
    }

    pub fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Relaxed)
    }

    /// How the models that are loaded are doing, by name.
    pub fn status(&self) -> BTreeMap<&str, Option<super::worker::Status>> {
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
}
