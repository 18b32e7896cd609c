//! `--init`, `--calibration`: how mixers are born.

use std::path::{Path, PathBuf};

use crate::convert::Init;
use crate::data::{Batch, Corpus, Packing, Tokenizer};
use crate::{Error, Result};

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum InitName {
    /// Fitted to the teacher's mixers on text.
    Refined,
    /// As published.
    Reference,
}

#[derive(Debug, Clone, clap::Args)]
pub struct InitArgs {
    /// How mixers are born from attention weights.
    #[arg(long, value_enum, default_value = "refined")]
    init: InitName,
    /// Text that the refined initialisation is fitted to: JSON lines [train: --data].
    #[arg(long)]
    calibration: Option<PathBuf>,
    /// Tokens of it.
    #[arg(long, default_value_t = 32_768)]
    calibration_tokens: usize,
}

/// Tokens of a calibration window.
const WINDOW: usize = 256;

impl InitArgs {
    /// Reads the text, if the initialisation needs one; `fallback` is used where none is named.
    ///
    /// # Errors
    /// A refined initialisation without text.
    pub fn text(&self, teacher: &Path, fallback: Option<&Path>) -> Result<Option<Batch>> {
        if self.init == InitName::Reference {
            return Ok(None);
        }
        let Some(path) = self.calibration.as_deref().or(fallback) else {
            return Err(Error::invalid(
                "--init refined is fitted to text: name it with --calibration FILE.jsonl, or use --init reference",
            ));
        };
        let corpus = Corpus::load(path, &Tokenizer::open(teacher)?, Packing::Documents)?;
        calibration_batch(&corpus, self.calibration_tokens).map(Some)
    }
}

/// The first windows of a corpus.
pub fn calibration_batch(corpus: &Corpus, tokens: usize) -> Result<Batch> {
    corpus.ordered(0, (tokens / WINDOW).max(1), WINDOW)
}

/// The initialisation with its text or seed; `own_inputs` as in [`Init::Refined`].
pub fn init(text: &Option<Batch>, own_inputs: bool, seed: u64) -> Init<'_> {
    match text {
        Some(text) => Init::Refined { text, own_inputs },
        None => Init::Reference { seed },
    }
}
