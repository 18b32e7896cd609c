//! The thread that a model computes in: jobs in, what they bring out. It has the model's only scheduler, so that all requests share every
//! pass over the weights.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex};
use std::{collections::BTreeMap, ops::Range, thread};

use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::UnboundedSender;

use crate::generate::{
    Engine, Event, Finish, Logprob, Request, SamplingParams, Scheduler, Statistics,
};
use crate::{Error, Result};

/// A prompt to be answered.
pub struct Job {
    pub prompt: Vec<u32>,
    pub params: SamplingParams,
    /// Numbers of its answers, which draw from `params.seed` and the seeds behind it.
    pub choices: Range<usize>,
    /// What has read the prompt's beginning: tokens, and a session's bytes of them.
    pub stored: Option<(usize, Vec<u8>)>,
    /// Whether what the model remembers is wanted at the end.
    pub keeps: bool,
    /// Of its choices in the queue: each is free when its choice is done.
    pub places: OwnedSemaphorePermit,
    pub tell: UnboundedSender<Told>,
}

/// What a job brings, in this order; the numbers are its choices.
pub enum Told {
    /// It waits for its turn: nothing is wrong with it.
    Accepted,
    Text(usize, String, Vec<Logprob>),
    Done(usize, Box<Finish>),
    Failed(Error),
}

enum Order {
    Begin(u64, Box<Job>),
    Cancel(Range<u64>),
    /// End what is under way with what it has.
    StopAll,
}

/// How the thread is doing.
#[derive(Debug, Clone, Copy, Default, serde::Serialize)]
pub struct Status {
    pub waiting: usize,
    pub running: usize,
    pub cache_bytes: usize,
    pub cache_limit_bytes: usize,
    #[serde(flatten)]
    pub statistics: Statistics,
}

/// Bytes, of which what is not used costs nothing.
const STACK: usize = 256 << 20;

#[derive(Clone)]
pub struct Worker {
    orders: Sender<Order>,
    next: Arc<AtomicU64>,
    status: Arc<Mutex<Status>>,
}

/// A job under way: it is cancelled, and all it had is free, when this is dropped.
pub struct Ticket {
    orders: Sender<Order>,
    ids: Range<u64>,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        // A thread that has ended has nothing to cancel.
        let _ = self.orders.send(Order::Cancel(self.ids.clone()));
    }
}

impl Worker {
    /// The thread ends when the last handle is dropped.
    pub fn start(name: &str, engine: Arc<Engine>) -> Result<Self> {
        let (orders, taken) = channel();
        let status = Arc::new(Mutex::new(Status {
            cache_limit_bytes: engine.pool.limit(),
            ..Status::default()
        }));
        let shown = status.clone();
        let work = move || {
            // A bug in one pass ends what was under way, not the service.
            while catch_unwind(AssertUnwindSafe(|| Thread::run(&engine, &taken, &shown))).is_err() {
                tracing::error!("a pass over the weights panicked: a bug in zebroid");
            }
        };
        let built = thread::Builder::new()
            .name(format!("model {name}"))
            // What was read before stands in a tree as deep as conversations are long.
            .stack_size(STACK)
            .spawn(work);
        built.map_err(|e| Error::invalid(format!("no thread for model {name}: {e}")))?;
        Ok(Self {
            orders,
            next: Arc::default(),
            status,
        })
    }

    pub fn submit(&self, job: Job) -> Ticket {
        let count = job.choices.len() as u64;
        let first = self.next.fetch_add(count, Ordering::Relaxed);
        // A thread that has ended drops the job, and its sender with it: the receiver sees the end.
        let _ = self.orders.send(Order::Begin(first, Box::new(job)));
        Ticket {
            orders: self.orders.clone(),
            ids: first..first + count,
        }
    }

    pub fn stop_all(&self) {
        let _ = self.orders.send(Order::StopAll);
    }

    pub fn status(&self) -> Status {
        *self.status.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// Who is told of a sequence.
struct Listener {
    /// As which it is told.
    choice: usize,
    keeps: bool,
    _place: Option<OwnedSemaphorePermit>,
    tell: UnboundedSender<Told>,
}

impl Listener {
    /// Its place is free before it is told, so that who is told finds it so.
    fn end(self, told: impl FnOnce(usize) -> Told) {
        let Self {
            choice,
            _place: place,
            tell,
            ..
        } = self;
        drop(place);
        let _ = tell.send(told(choice));
    }
}

struct Thread<'e> {
    scheduler: Scheduler<'e>,
    listeners: BTreeMap<u64, Listener>,
}

impl<'e> Thread<'e> {
    /// Until nobody can give orders any more.
    fn run(engine: &'e Engine, orders: &Receiver<Order>, status: &Mutex<Status>) {
        let mut thread = Self {
            scheduler: Scheduler::new(engine),
            listeners: BTreeMap::new(),
        };
        loop {
            if thread.scheduler.is_idle() {
                thread.show(engine, status);
                match orders.recv() {
                    Ok(order) => thread.obey(order),
                    Err(_) => return,
                }
            }
            loop {
                match orders.try_recv() {
                    Ok(order) => thread.obey(order),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return,
                }
            }
            let stepped = thread.scheduler.step();
            // Before anybody is told, so that who is told finds it so.
            thread.show(engine, status);
            match stepped {
                Ok(events) => events.into_iter().for_each(|event| thread.tell(event)),
                Err(error) => {
                    let said = error.to_string();
                    tracing::error!("a pass failed: {said}");
                    for listener in std::mem::take(&mut thread.listeners).into_values() {
                        listener.end(|_| Told::Failed(Error::invalid(&said)));
                    }
                    thread.scheduler = Scheduler::new(engine);
                }
            }
        }
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Begin(first, job) => {
                let Job {
                    choices,
                    params,
                    prompt,
                    stored,
                    keeps,
                    mut places,
                    tell,
                } = *job;
                let siblings =
                    (1..choices.len() as u64).map(|i| (first + i, params.seed.wrapping_add(i)));
                let request = Request {
                    stored,
                    siblings: siblings.collect(),
                    ..Request::new(first, prompt, params)
                };
                let told = match self.scheduler.submit(request) {
                    Ok(()) => {
                        let listeners = (first..).zip(choices).map(|(id, choice)| {
                            let listener = Listener {
                                choice,
                                keeps,
                                _place: places.split(1),
                                tell: tell.clone(),
                            };
                            (id, listener)
                        });
                        self.listeners.extend(listeners);
                        Told::Accepted
                    }
                    Err(error) => Told::Failed(error),
                };
                let _ = tell.send(told);
            }
            Order::Cancel(ids) => {
                for id in ids {
                    if self.listeners.remove(&id).is_some() {
                        self.scheduler.cancel(id);
                    }
                }
            }
            Order::StopAll => self
                .listeners
                .keys()
                .for_each(|id| self.scheduler.stop(*id)),
        }
    }

    /// Who has left is not told.
    fn tell(&mut self, event: Event) {
        match event {
            Event::Text { id, text, logprobs } => {
                if let Some(Listener { choice, tell, .. }) = self.listeners.get(&id) {
                    let _ = tell.send(Told::Text(*choice, text, logprobs));
                }
            }
            Event::Done { id, mut finish } => {
                if let Some(listener) = self.listeners.remove(&id) {
                    if !listener.keeps {
                        // A slow reader holds no cache.
                        finish.memory = self.scheduler.engine().pool.sequence();
                    }
                    listener.end(|choice| Told::Done(choice, finish));
                }
            }
            Event::Failed { id, error } => {
                if let Some(listener) = self.listeners.remove(&id) {
                    listener.end(|_| Told::Failed(error));
                }
            }
        }
    }

    fn show(&self, engine: &Engine, status: &Mutex<Status>) {
        let (waiting, running) = self.scheduler.load();
        *status.lock().unwrap_or_else(|e| e.into_inner()) = Status {
            waiting,
            running,
            cache_bytes: engine.pool.used(),
            cache_limit_bytes: engine.pool.limit(),
            statistics: self.scheduler.statistics(),
        };
    }
}
