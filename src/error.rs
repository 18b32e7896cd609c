//! The library's error: every variant names the file, field, tensor or value and, where there is one,
//! the next step. The command line prints the chain; scripts get the exit code from [`Error::exit_code`].

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file that could not be read or written.
    #[error("{action} {}: {source}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    /// A file whose content is not what it should be.
    #[error("{}: {message}", path.display())]
    File { path: PathBuf, message: String },
    /// A line of a data file that cannot be used (lines count from 1).
    #[error("{} line {line}: {message}", path.display())]
    Line {
        path: PathBuf,
        line: usize,
        message: String,
    },
    /// A checkpoint whose tensors do not fit its config: every problem, of which the first are printed.
    #[error("{}: {} tensor problem(s)\n  {}", path.display(), problems.len(), listed(problems))]
    Tensors {
        path: PathBuf,
        problems: Vec<String>,
    },
    /// A flag, field or combination that cannot work.
    #[error("{0}")]
    Invalid(String),
    /// A step of training whose loss, gradient or weights cannot be gone on with.
    #[error("{0}")]
    Diverged(String),
    /// A hub that cannot be asked, or shall not be: another time the same command may do.
    #[error("{0}")]
    Unreachable(String),
    /// Whoever read standard output has left: no failure.
    #[error("standard output is closed")]
    Closed,
    /// Ctrl-C: stopped at a safe point. Says what is kept, and what to run again.
    #[error("interrupted; {0}")]
    Interrupted(String),
    /// A failure inside the tensor library (a bug in zebroid if a user meets it, or a GPU's memory that is full).
    #[error("{}", in_tensors(.0))]
    Tensor(#[from] candle_core::Error),
}

fn in_tensors(error: &candle_core::Error) -> String {
    let said = error.to_string();
    match said.contains("CUDA_ERROR_OUT_OF_MEMORY") {
        true => format!(
            "the memory of the GPU is full ({said}). `zebroid plan --train` says what a step takes: less with a smaller --batch-size, \
             --gradient-checkpointing true or an optimizer in 8 bits; nvidia-smi says what other processes hold"
        ),
        false => format!("tensor library: {said}"),
    }
}

/// One a line, as far as a person reads.
fn listed(problems: &[String]) -> String {
    const SHOWN: usize = 40;
    let shown = problems[..problems.len().min(SHOWN)].join("\n  ");
    match problems.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown}\n  and {more} more"),
    }
}

impl Error {
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error + use<> {
        let path = path.to_owned();
        move |source| Error::Io {
            action,
            path,
            source,
        }
    }

    pub fn file(path: &Path, message: impl std::fmt::Display) -> Error {
        Error::File {
            path: path.to_owned(),
            message: message.to_string(),
        }
    }

    pub fn invalid(message: impl std::fmt::Display) -> Error {
        Error::Invalid(message.to_string())
    }

    /// 1 for a failure, 2 for input that a person must change, 130 after Ctrl-C, 0 when the reader has left.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Io { source, .. } if names_the_wrong(source.kind()) => 2,
            Error::Io { .. } | Error::Tensor(_) | Error::Unreachable(_) => 1,
            Error::Closed => 0,
            Error::Interrupted(_) => 130,
            _ => 2,
        }
    }
}

/// Whether another path would do: it is not there, a folder, not text, not ours; and not a disk that fails.
fn names_the_wrong(kind: ErrorKind) -> bool {
    use ErrorKind::*;
    matches!(
        kind,
        NotFound
            | PermissionDenied
            | AlreadyExists
            | IsADirectory
            | NotADirectory
            | InvalidData
            | InvalidInput
            | InvalidFilename
            | ReadOnlyFilesystem
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_gpu_is_no_bug() {
        let of = |said: &str| Error::from(candle_core::Error::msg(said)).to_string();
        let full = of("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")");
        assert!(full.contains("plan --train"), "{full}");
        assert!(of("shape mismatch").starts_with("tensor library: shape"));
    }
}
