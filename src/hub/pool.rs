//! Several requests at once. A [`Watch`] is of one thread: the others tell that one what they have to say, and hear from it when to stop.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use super::http::Failure;
use crate::watch::Watch;

/// Requests that are under way together.
const AT_ONCE: usize = 4;
/// Between two looks at whether to stop.
const LOOK: Duration = Duration::from_millis(50);

enum Told<R> {
    Line(String),
    Done(usize, Result<R, Failure>),
}

/// The watch of one of the threads.
struct Worker<'a, R> {
    stops: &'a AtomicBool,
    tell: Sender<Told<R>>,
}

impl<R> Watch for Worker<'_, R> {
    fn start(&self, _: &str, _: usize) {}

    fn at(&self, _: usize, _: &str) {}

    fn note(&self, line: &str) {
        // Who no longer hears has no use for it.
        let _ = self.tell.send(Told::Line(line.to_owned()));
    }

    fn stop(&self) -> bool {
        self.stops.load(Relaxed)
    }
}

/// `work` on every item, begun in their order, with what came of each. `look` is called on this thread all the while.
///
/// # Errors
/// The first failure, and whose it was; the others are stopped where they are.
pub(super) fn each<T: Sync, R: Send>(
    items: &[T],
    work: impl Fn(&T, &dyn Watch) -> Result<R, Failure> + Sync,
    mut look: impl FnMut(),
    watch: &dyn Watch,
) -> Result<Vec<R>, (usize, Failure)> {
    let (next, stops) = (AtomicUsize::new(0), AtomicBool::new(false));
    let (tell, told) = channel();
    thread::scope(|scope| {
        for _ in 0..AT_ONCE.min(items.len()) {
            let worker = Worker {
                stops: &stops,
                tell: tell.clone(),
            };
            let (next, work) = (&next, &work);
            scope.spawn(move || {
                while !worker.stop() {
                    let i = next.fetch_add(1, Relaxed);
                    let Some(item) = items.get(i) else { break };
                    let done = work(item, &worker);
                    let _ = worker.tell.send(Told::Done(i, done));
                }
            });
        }
        drop(tell);
        let mut found: Vec<Option<R>> = items.iter().map(|_| None).collect();
        let mut failed = None;
        loop {
            match told.recv_timeout(LOOK) {
                Ok(Told::Line(line)) => watch.note(&line),
                Ok(Told::Done(i, Ok(done))) => found[i] = Some(done),
                Ok(Told::Done(i, Err(failure))) => {
                    stops.store(true, Relaxed);
                    failed.get_or_insert((i, failure));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            look();
            if watch.stop() {
                stops.store(true, Relaxed);
            }
        }
        let done = found.iter().flatten().count();
        match failed {
            Some(failed) => Err(failed),
            // Stopped between two items.
            None if done < items.len() => Err((done, Failure::Interrupted)),
            None => Ok(found.into_iter().flatten().collect()),
        }
    })
}
