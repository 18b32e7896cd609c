//! Panics of the crates `tokenizers`, `parquet` and `arrow-ipc` at files that they do not expect, as errors.

use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// What `work` gives; none where it panics, of which nothing is printed.
pub(super) fn guarded<T>(work: impl FnOnce() -> T) -> Option<T> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                before(info);
            }
        }));
    });
    QUIET.set(true);
    // What it worked on is dropped with it.
    let found = panic::catch_unwind(AssertUnwindSafe(work));
    QUIET.set(false);
    found.ok()
}
