//! Threads that share one piece of work at a time. A token is decoded in a hundred pieces of some tens of microseconds: a queue that
//! wakes its threads for each costs as much as a piece. Here a thread that has nothing to do looks for the next piece a little
//! while before it sleeps, and whoever hands out work takes part in it. Every thread has a share of the tasks, the same in every
//! piece of as many (if there are enough), so that it finds in its cache what the last token left there; who is done with its own takes from others.

use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock, TryLockError};
use std::thread::Thread;

/// Looks for work before a thread sleeps: some tens of microseconds.
const LOOKS: usize = 8_000;

/// The piece that is worked on.
struct Board {
    /// One a thread, the first that of the one who handed it out.
    shares: Vec<Share>,
    left: Left,
}

/// What every task changes: away from what idle threads look at.
#[repr(align(128))]
struct Left {
    /// Tasks that are not done.
    tasks: AtomicUsize,
    panicked: AtomicBool,
}

/// Some tasks in a row. Two lines of the cache, as processors fetch them: all that its thread has to know comes at once.
#[repr(align(128))]
#[derive(Default)]
struct Share {
    /// The number of the piece (the high half) and how many of the tasks nobody has taken yet (the low half).
    open: AtomicU64,
    /// The task behind the last.
    end: AtomicUsize,
    /// A task's function, called once for every number below that of all tasks; `call` knows its type. The one who handed it out keeps it
    /// alive until all its tasks are done.
    work: AtomicPtr<()>,
    call: AtomicPtr<()>,
}

impl Share {
    fn piece(&self) -> u32 {
        (self.open.load(Ordering::Acquire) >> 32) as u32
    }
}

type Call = unsafe fn(*const (), usize);

/// # Safety
/// `work` points to an `F`.
#[allow(unsafe_code)]
unsafe fn call<F: Fn(usize)>(work: *const (), task: usize) {
    // SAFETY: the caller's promise.
    unsafe { (*work.cast::<F>())(task) }
}

struct Worker {
    /// The number of its share.
    share: usize,
    thread: Thread,
    asleep: Arc<AtomicBool>,
}

/// The threads beside the one that hands out work.
pub struct Team {
    board: Arc<Board>,
    workers: Vec<Worker>,
    /// One piece at a time: the number of the last.
    turn: Mutex<u32>,
}

/// As many threads as rayon has, the caller's among them.
pub fn team() -> &'static Team {
    static TEAM: OnceLock<Team> = OnceLock::new();
    TEAM.get_or_init(|| Team::new(rayon::current_num_threads()))
}

impl Team {
    fn new(threads: usize) -> Self {
        let board = Arc::new(Board {
            shares: (0..threads).map(|_| Share::default()).collect(),
            left: Left {
                tasks: AtomicUsize::new(0),
                panicked: AtomicBool::new(false),
            },
        });
        let start = |i: usize| {
            let asleep = Arc::new(AtomicBool::new(false));
            let (board, own) = (board.clone(), asleep.clone());
            let thread = std::thread::Builder::new().name(format!("team-{i}"));
            // Where the system gives no thread, the others do the work.
            let handle = thread.spawn(move || board.serve(i, &own)).ok()?;
            let thread = handle.thread().clone();
            Some(Worker {
                share: i,
                thread,
                asleep,
            })
        };
        Self {
            workers: (1..threads).filter_map(start).collect(),
            turn: Mutex::new(0),
            board: board.clone(),
        }
    }

    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `work` for every number below `tasks`, by all threads that have time. While another piece is worked on (or inside of
    /// one), by the caller alone.
    ///
    /// # Panics
    /// When `work` does.
    pub fn run(&self, tasks: usize, work: impl Fn(usize) + Sync) {
        let turn = match self.turn.try_lock() {
            _ if tasks < 2 || self.workers.is_empty() => None,
            Ok(turn) => Some(turn),
            Err(TryLockError::Poisoned(turn)) => Some(turn.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        };
        match turn {
            Some(mut piece) => {
                *piece = piece.wrapping_add(1);
                self.share(*piece, tasks, &work);
            }
            None => (0..tasks).for_each(work),
        }
    }

    fn share<F: Fn(usize) + Sync>(&self, piece: u32, tasks: usize, work: &F) {
        let board = &self.board;
        assert!(tasks <= u32::MAX as usize);
        board.left.tasks.store(tasks, Ordering::Relaxed);
        let threads = board.shares.len();
        // The first share has the first task: whoever hands out work is awake.
        let start_of = |i: usize| (i * tasks).div_ceil(threads);
        let call: Call = call::<F>;
        for (i, share) in board.shares.iter().enumerate().rev() {
            let [start, end] = [i, i + 1].map(start_of);
            share.end.store(end, Ordering::Relaxed);
            let work = std::ptr::from_ref(work).cast_mut().cast();
            share.work.store(work, Ordering::Relaxed);
            share.call.store(call as *mut (), Ordering::Relaxed);
            let open = u64::from(piece) << 32 | (end - start) as u64;
            share.open.store(open, Ordering::Release);
        }
        // A worker that is about to sleep sees its share open, or is seen asleep.
        fence(Ordering::SeqCst);
        for worker in &self.workers {
            let has_share = start_of(worker.share) < start_of(worker.share + 1);
            if has_share && worker.asleep.load(Ordering::Relaxed) {
                worker.thread.unpark();
            }
        }
        board.take_part(0);
        let mut looks = 0;
        while board.left.tasks.load(Ordering::Acquire) > 0 {
            looks += 1;
            match looks < LOOKS {
                true => std::hint::spin_loop(),
                // The one who has the last task may have no processor.
                false => std::thread::yield_now(),
            }
        }
        if board.left.panicked.swap(false, Ordering::Relaxed) {
            panic!("a task of a team panicked");
        }
    }

    /// Calls `work` for every `size` entries of `out` (the last may be fewer), with their number.
    pub fn fill<T: Send>(&self, out: &mut [T], size: usize, work: impl Fn(usize, &mut [T]) + Sync) {
        let len = out.len();
        let parts = Scatter::of(out);
        self.run(len.div_ceil(size), |i| {
            // SAFETY: tasks have different numbers, so their parts do not overlap.
            #[allow(unsafe_code)]
            let part = unsafe { parts.slice(i * size, size.min(len - i * size)) };
            work(i, part);
        });
    }
}

/// [`Team::fill`] by all threads, or by the caller alone where the work is not `worth` waking them.
pub fn fill<T: Send>(
    worth: bool,
    out: &mut [T],
    size: usize,
    work: impl Fn(usize, &mut [T]) + Sync,
) {
    match worth {
        true => team().fill(out, size, work),
        false => {
            let parts = out.chunks_mut(size).enumerate();
            parts.for_each(|(i, part)| work(i, part));
        }
    }
}

impl Board {
    /// Does tasks of the open piece until none is left to take, those of the thread's own share first.
    fn take_part(&self, thread: usize) {
        let (before, own) = self.shares.split_at(thread);
        own.iter()
            .chain(before)
            .for_each(|share| while self.take(share) {});
    }

    /// Does one task of a share; false when none is left to take.
    #[allow(unsafe_code)]
    fn take(&self, share: &Share) -> bool {
        let open = share.open.load(Ordering::Acquire);
        let untaken = open & u64::from(u32::MAX);
        if untaken == 0 {
            return false;
        }
        let taken =
            (share.open).compare_exchange(open, open - 1, Ordering::AcqRel, Ordering::Relaxed);
        if taken.is_err() {
            return true;
        }
        let [work, call] = [&share.work, &share.call].map(|of| of.load(Ordering::Relaxed));
        let task = share.end.load(Ordering::Relaxed) - untaken as usize;
        // SAFETY: the piece was open when the task was taken, and it is not done before this task is: both were written
        // before the share was opened, and stay; `call` is of the type of `work`.
        let done = catch_unwind(AssertUnwindSafe(|| unsafe {
            std::mem::transmute::<*mut (), Call>(call)(work, task);
        }));
        if let Err(payload) = done {
            // What drops it may panic too, while others still work.
            std::mem::forget(payload);
            self.left.panicked.store(true, Ordering::Relaxed);
        }
        self.left.tasks.fetch_sub(1, Ordering::Release);
        true
    }

    /// The life of a worker.
    fn serve(&self, thread: usize, asleep: &AtomicBool) {
        let (own, mut seen, mut looks) = (&self.shares[thread], 0, 0);
        loop {
            let piece = own.piece();
            if piece != seen {
                self.take_part(thread);
                (seen, looks) = (piece, 0);
                continue;
            }
            looks += 1;
            if looks < LOOKS {
                std::hint::spin_loop();
                continue;
            }
            asleep.store(true, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            if own.piece() == seen {
                std::thread::park();
            }
            asleep.store(false, Ordering::Relaxed);
            looks = 0;
        }
    }
}

/// Entries that several tasks write, each its own.
pub struct Scatter<'a, T> {
    start: *mut T,
    len: usize,
    entries: PhantomData<&'a mut [T]>,
}

// SAFETY: it gives out what a `&mut [T]` would, in parts that callers promise not to overlap.
#[allow(unsafe_code)]
unsafe impl<T: Send> Sync for Scatter<'_, T> {}

impl<'a, T> Scatter<'a, T> {
    pub fn of(entries: &'a mut [T]) -> Self {
        Self {
            start: entries.as_mut_ptr(),
            len: entries.len(),
            entries: PhantomData,
        }
    }

    /// # Safety
    /// While the slice lives no other slice of these entries may.
    ///
    /// # Panics
    /// Past the end.
    #[allow(unsafe_code, clippy::mut_from_ref)]
    #[inline(always)]
    pub unsafe fn slice(&self, from: usize, count: usize) -> &mut [T] {
        assert!(from <= self.len && count <= self.len - from);
        // SAFETY: inside of the entries, as just asserted; the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(from), count) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_is_done_once_by_any_number_of_threads() {
        for threads in [1, 2, 5] {
            let team = Team::new(threads);
            for round in 0..2_000 {
                let mut done = vec![0u32; round % 37];
                team.fill(&mut done, 1, |i, done| done[0] += i as u32 + 1);
                let expected: Vec<u32> = (1..=done.len() as u32).collect();
                assert_eq!(done, expected, "{threads} threads, round {round}");
                if round % 500 == 0 {
                    // Long enough for the others to sleep.
                    std::thread::sleep(std::time::Duration::from_millis(5));
                }
            }
        }
    }

    #[test]
    fn work_inside_of_work_and_beside_it_is_done_too() {
        let team = Team::new(3);
        let count = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        team.run(4, |_| {
                            team.run(3, |_| {
                                count.fetch_add(1, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(count.into_inner(), 3 * 200 * 12);
    }

    #[test]
    fn a_panic_is_the_callers() {
        let team = Team::new(2);
        for _ in 0..3 {
            let run = || team.run(8, |i| assert!(i != 5));
            assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
        }
        team.run(8, |_| ());
    }
}
