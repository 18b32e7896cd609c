//! The whole terminal of standard error, taken and given back.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};

static TAKEN: AtomicBool = AtomicBool::new(false);

// xterm's alternate screen, and its cursor hidden and shown.
const TAKE: &str = "\x1b[?1049h\x1b[?25l";
const GIVE_BACK: &str = "\x1b[?25h\x1b[?1049l";
/// Up to the first line; to the end of a line, or of the screen, all is blank.
const HOME: &str = "\x1b[H";
const BLANK_LINE: &str = "\x1b[K";
const BLANK_REST: &str = "\x1b[J";

/// # Errors
/// A terminal that cannot be written to.
pub fn take() -> io::Result<()> {
    io::stderr().write_all(TAKE.as_bytes())?;
    TAKEN.store(true, Ordering::SeqCst);
    Ok(())
}

/// As it was, if it was taken. Where it cannot be written to, nobody looks.
pub fn give_back() {
    if TAKEN.swap(false, Ordering::SeqCst) {
        let _ = io::stderr().write_all(GIVE_BACK.as_bytes());
    }
}

pub fn is_taken() -> bool {
    TAKEN.load(Ordering::SeqCst)
}

/// Shows these lines, and nothing else. A terminal that has gone does not end the work.
pub fn show(lines: &[String]) {
    let whole = lines.join(&format!("{BLANK_LINE}\r\n"));
    let _ = write!(io::stderr(), "{HOME}{whole}{BLANK_LINE}{BLANK_REST}");
}
