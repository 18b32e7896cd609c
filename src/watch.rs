//! What long work tells while it goes on, and asks: how far it is, what is worth a line, whether to stop.

use std::cell::Cell;

use crate::{Error, Result};

/// Whoever watches long work. The library tells it; the command line shows it and hears Ctrl-C.
pub trait Watch {
    /// A stage of `all` steps begins (0: as yet unknown), and the one before has ended.
    fn start(&self, stage: &str, all: usize);
    /// `done` steps of the stage are done. `note` says what they are, or how it goes.
    fn at(&self, done: usize, note: &str);
    /// A line that stays.
    fn note(&self, line: &str);
    /// Whether to stop at the next point where nothing is lost, or nothing can be kept. Asked after every step.
    fn stop(&self) -> bool;

    /// [`Watch::at`] of a stage that keeps nothing before its end. `steps` is what they are: `windows`.
    ///
    /// # Errors
    /// [`Error::Interrupted`] when it shall stop and is not through.
    fn reached(&self, done: usize, all: usize, steps: &str) -> Result<()> {
        self.at(done, steps);
        match self.stop() && done < all {
            true => Err(Error::Interrupted(format!(
                "{done} of {all} {steps} were done and are not kept; run the same command again"
            ))),
            false => Ok(()),
        }
    }
}

/// Shows nothing. Never stops, or (in tests) after some steps.
#[derive(Debug, Default)]
pub struct Quiet {
    steps: Cell<usize>,
    stop_after: Option<usize>,
}

impl Quiet {
    /// Asks to stop as soon as `steps` steps were told.
    pub fn stop_after(steps: usize) -> Self {
        Self {
            steps: Cell::new(0),
            stop_after: Some(steps),
        }
    }

    /// Steps told so far, over all stages.
    pub fn steps(&self) -> usize {
        self.steps.get()
    }
}

impl Watch for Quiet {
    fn start(&self, _: &str, _: usize) {}

    fn at(&self, _: usize, _: &str) {
        self.steps.set(self.steps() + 1);
    }

    fn note(&self, _: &str) {}

    fn stop(&self) -> bool {
        self.stop_after.is_some_and(|limit| self.steps() >= limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_interrupted_before_its_end_only() {
        let watch = Quiet::stop_after(2);
        watch.reached(1, 3, "windows").unwrap();
        let stopped = watch.reached(2, 3, "windows").unwrap_err();
        assert_eq!(stopped.exit_code(), 130);
        let said = stopped.to_string();
        assert!(
            said.contains("2 of 3 windows were done and are not kept; run the same command"),
            "{said}"
        );
        watch.reached(3, 3, "windows").unwrap();
        assert_eq!(watch.steps(), 3);
        assert!(!Quiet::default().stop());
    }
}
