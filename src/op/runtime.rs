//! What the kernels ask of the process.

use std::ffi::OsString;
use std::sync::Mutex;

use super::cgroup;
use super::matmul::{as_rough, is_rough};

/// Index of `mi_option_purge_delay` in mimalloc's `mi_option_e`.
const PURGE_DELAY: i32 = 15;

/// Freed pages go back to the system after this many milliseconds. A training step frees and takes the
/// same hundreds of megabytes again: given back at once (the default is 10 ms), the kernel would clear
/// them anew each time, a fifth of a step.
const KEEP_FREED_MS: i64 = 10_000;

/// Threads of candle's own operations, which it reads from the environment alone: the one that asks. What there is to share is shared before
/// they are asked ([`each`]), and threads of its own would wait for the same cores.
const CANDLE_THREADS: (&str, &str) = ("CANDLE_NUM_THREADS", "1");

/// Bytes of the stack of threads: what a main thread has, for a backward pass walks its graph in calls of itself, and runs in rayon's pool.
const STACK: (&str, &str) = ("RUST_MIN_STACK", "8388608");

/// Sets what the user has not set (`CANDLE_NUM_THREADS`, `RUST_MIN_STACK`, `MIMALLOC_PURGE_DELAY`).
///
/// # Safety
/// To be called first in `main`, before any tensor and any thread: it writes to the environment, which no
/// other thread may read meanwhile.
#[allow(unsafe_code)]
pub unsafe fn prepare() {
    for (name, ours) in [CANDLE_THREADS, STACK] {
        if let Some(value) = unless_set(std::env::var_os(name), ours) {
            // SAFETY: the caller's promise.
            unsafe { std::env::set_var(name, value) };
        }
    }
    keep_freed_pages();
}

/// `work` on a thread of rayon's pool: what it does with the others there need not be handed over first, and its own share is done where it
/// is. Always the same thread, for each keeps what was freed on it. It must not wait for a thread that waits for the pool.
pub fn pooled<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    if rayon::current_thread_index().is_some() {
        return work();
    }
    let (rough, work) = (is_rough(), Mutex::new(Some(work)));
    let found = rayon::broadcast(|thread| {
        let work = match thread.index() {
            0 => work.lock().ok()?.take()?,
            _ => return None,
        };
        Some(as_rough(rough, work))
    });
    let found = found.into_iter().flatten().next();
    found.expect("the first thread of the pool did it")
}

/// `work` on every one of `items`, beside each other on the threads of rayon's pool; what it makes of them, in their order. An item's thread is
/// the same every time, for each keeps what was freed on it.
///
/// # Errors
/// The first item's whose work failed.
pub fn each<T: Send, R: Send, E: Send>(
    items: Vec<T>,
    work: impl Fn(T) -> Result<R, E> + Sync,
) -> Result<Vec<R>, E> {
    if items.len() < 2 {
        return items.into_iter().map(work).collect();
    }
    let rough = is_rough();
    let items: Vec<_> = items
        .into_iter()
        .map(|item| Mutex::new(Some(item)))
        .collect();
    let of_threads = rayon::broadcast(|thread| {
        let own = (thread.index()..items.len()).step_by(thread.num_threads());
        let own = own.filter_map(|i| {
            let item = items[i].lock().ok()?.take()?;
            Some((i, as_rough(rough, || work(item))))
        });
        own.collect::<Vec<_>>()
    });
    let mut found: Vec<_> = of_threads.into_iter().flatten().collect();
    found.sort_unstable_by_key(|(i, _)| *i);
    found.into_iter().map(|(_, made)| made).collect()
}

fn unless_set(own: Option<OsString>, ours: &str) -> Option<&str> {
    own.is_none().then_some(ours)
}

#[allow(unsafe_code)]
fn keep_freed_pages() {
    // SAFETY: sets one number inside the allocator that this binary links, where no variable has set it.
    unsafe { libmimalloc_sys::mi_option_set_default(PURGE_DELAY, KEEP_FREED_MS) };
}

/// Memory in bytes that is free, on the machine and in this process's control groups, where the system tells it.
pub fn free_memory() -> Option<usize> {
    let machine = in_proc("/proc/meminfo", "MemAvailable:");
    let group = cgroup::memory().map(|group| group.left);
    machine.into_iter().chain(group).min()
}

/// Memory of the machine in bytes, where the system tells it.
pub fn total_memory() -> Option<usize> {
    in_proc("/proc/meminfo", "MemTotal:")
}

/// The highest resident size so far in bytes, where the system tells it.
pub fn peak_memory() -> Option<usize> {
    in_proc("/proc/self/status", "VmHWM:")
}

/// What another process has resident in bytes, where the system tells it.
pub fn resident_memory(pid: u32) -> Option<usize> {
    in_proc(&format!("/proc/{pid}/status"), "VmRSS:")
}

/// A line of a file in which Linux counts KiB.
fn in_proc(file: &str, name: &str) -> Option<usize> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find(|l| l.starts_with(name))?;
    let kib: usize = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

/// What a process has resident before it has computed anything that counts, in bytes.
pub struct Base {
    /// Threads, buffers of products, pages of sizes that each thread allocates for itself.
    pub own: usize,
    /// The program's file.
    pub file: usize,
}

/// Measured on two cores (docs/log.md).
pub const OWN: Base = Base {
    own: 90 << 20,
    file: 18 << 20,
};

/// What a thread that computes beside others keeps for itself of what it has freed: measured on two cores (docs/log.md).
pub const OF_A_THREAD: usize = 40 << 20;

/// Bytes that mimalloc hands out in one piece (`MI_ARENA_SLICE_SIZE` times the bits of a chunk): smaller blocks do not cross its border.
const CHUNK: usize = 32 << 20;

/// Whether a block shares its piece of memory with others.
pub fn shares_chunk(block: usize) -> bool {
    block < CHUNK
}

/// What stays resident between allocated blocks that share their pieces, `bytes` in all: blocks of other sizes that were freed there. A
/// share of them, measured by counting what is allocated beside what is resident (docs/log.md).
pub fn between(bytes: usize) -> usize {
    bytes / 7
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_user_has_set_stays() {
        assert_eq!(unless_set(None, "100"), Some("100"));
        assert_eq!(unless_set(Some("7".into()), "100"), None);
        // SAFETY: numbers inside the allocator; no other test looks at them.
        #[allow(unsafe_code)]
        unsafe {
            keep_freed_pages();
            assert_eq!(libmimalloc_sys::mi_option_get(PURGE_DELAY), KEEP_FREED_MS);
            libmimalloc_sys::mi_option_set(PURGE_DELAY, 3);
            keep_freed_pages();
            assert_eq!(libmimalloc_sys::mi_option_get(PURGE_DELAY), 3);
        }
    }
}
