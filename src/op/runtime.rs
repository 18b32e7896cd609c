//! What the kernels ask of the process.

/// Index of `mi_option_purge_delay` in mimalloc's `mi_option_e`.
const PURGE_DELAY: i32 = 15;

/// Freed pages go back to the system after this many milliseconds. A training step frees and takes the
/// same hundreds of megabytes again: given back at once (the default is 10 ms), the kernel would clear
/// them anew each time, a fifth of a step.
const KEEP_FREED_MS: i64 = 10_000;

/// Turns a waiting candle thread spins before it sleeps. Candle's pool takes turns with rayon's on the
/// same cores; at its default (25,000) it starves the kernels.
const CANDLE_SPINS: &str = "100";

/// To be called first in `main`, before any tensor and any thread.
pub fn prepare() {
    // SAFETY: no other thread runs yet, so nobody reads the environment meanwhile.
    #[allow(unsafe_code)]
    unsafe {
        std::env::set_var("CANDLE_BARRIER_POOL_SPIN_LIMIT", CANDLE_SPINS);
    }
    // SAFETY: sets one number inside the allocator that this binary links.
    #[allow(unsafe_code)]
    unsafe {
        libmimalloc_sys::mi_option_set(PURGE_DELAY, KEEP_FREED_MS);
    }
}
