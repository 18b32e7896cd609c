//! Ctrl-C asks long work to stop at the next safe point; a second one stops at once.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{note, screen};

static ASKED: AtomicBool = AtomicBool::new(false);
static INSTALLED: OnceLock<()> = OnceLock::new();

/// From here on Ctrl-C (and SIGTERM) is noted instead of ending the process.
pub fn install() {
    INSTALLED.get_or_init(|| {
        let installed = ctrlc::set_handler(|| {
            if ASKED.swap(true, Ordering::SeqCst) {
                screen::give_back();
                std::process::exit(130);
            }
            // Who has the whole screen says so there.
            if screen::is_taken() {
                return;
            }
            note("\nstopping at the next safe point; press Ctrl-C again to stop at once");
        });
        if let Err(error) = installed {
            tracing::warn!("Ctrl-C will not be caught: {error}");
        }
    });
}

/// Whether it was asked, which is forgotten then: of what can be stopped again and again.
pub fn taken() -> bool {
    ASKED.swap(false, Ordering::SeqCst)
}

pub fn asked() -> bool {
    ASKED.load(Ordering::SeqCst)
}
