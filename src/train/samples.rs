//! What the student writes while it learns: a look at it, beside its figures. `samples.jsonl` has a line for every save and the end.

use std::path::{Path, PathBuf};

use candle_core::{D, Tensor};
use serde::{Deserialize, Serialize};

use super::json_lines::{line, read_lines};
use crate::Result;
use crate::checkpoint;
use crate::data::{Batches, Tokenizer};
use crate::model::Lm;

/// Tokens of the training text that a sample begins with, and that the student goes on with.
const PROMPT: usize = 16;
const MORE: usize = 48;

/// One line of `samples.jsonl`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// Optimizer steps behind it.
    pub step: u64,
    /// From the training text, the same in every line.
    pub prompt: String,
    /// What the student takes for the most probable to follow.
    pub text: String,
}

/// The samples of a run, and how the next one is drawn.
pub(super) struct Samples {
    path: PathBuf,
    all: Vec<Sample>,
    /// None: the tokenizer that the result gets cannot be read.
    tokenizer: Option<Tokenizer>,
    prompt: Vec<u32>,
}

impl Samples {
    /// Those of a run in `folder` that is at `step`: later ones, which a resumed run draws again, are dropped.
    ///
    /// # Errors
    /// A file that cannot be read or written, data without a window.
    pub fn open(
        folder: &Path,
        step: u64,
        tokenizer: &Path,
        data: &dyn Batches,
        len: usize,
    ) -> Result<Self> {
        let path = folder.join(checkpoint::SAMPLES);
        let mut all = read_samples(&path)?;
        all.retain(|sample| sample.step <= step);
        let first = data.batch(0, 0, 1, len)?;
        let samples = Self {
            path,
            all,
            tokenizer: Tokenizer::open(tokenizer).ok(),
            prompt: first.input_ids[..PROMPT.min(first.len)].to_vec(),
        };
        samples.write(&samples.path)?;
        Ok(samples)
    }

    /// Adds what `student` writes after `step` steps.
    ///
    /// # Errors
    /// A disk that does not take it.
    pub fn draw(&mut self, student: &Lm, step: u64) -> Result<()> {
        let Some(tokenizer) = &self.tokenizer else {
            return Ok(());
        };
        let mut ids = self.prompt.clone();
        for _ in 0..MORE {
            let next = most_probable(student, &ids)?;
            ids.push(next);
            if student.config.eos_token_id.contains(&next) || tokenizer.eos().contains(&next) {
                break;
            }
        }
        let (whole, prompt) = (tokenizer.decode(&ids)?, tokenizer.decode(&self.prompt)?);
        let text = whole.strip_prefix(&prompt).unwrap_or(&whole).to_owned();
        self.all.push(Sample { step, prompt, text });
        self.write(&self.path)
    }

    /// All of them, whole.
    pub fn write(&self, path: &Path) -> Result<()> {
        let lines: String = self.all.iter().map(line).collect();
        match self.all.is_empty() {
            true => Ok(()),
            false => checkpoint::write_atomic(path, lines.as_bytes()),
        }
    }
}

/// The token that most probably follows `ids`, by the pass that is trained: few tokens, and no second copy of the weights.
fn most_probable(student: &Lm, ids: &[u32]) -> Result<u32> {
    let input = Tensor::from_slice(ids, (1, ids.len()), student.device())?;
    let hidden = student.hidden(&input, None)?;
    let last = ids.len() - 1;
    let logits = student.logits(&hidden, &(last..last + 1))?;
    Ok(logits.argmax(D::Minus1)?.squeeze(0)?.to_scalar()?)
}

/// The samples of a run; none where there is no such file.
///
/// # Errors
/// A file that cannot be read.
pub fn read_samples(path: &Path) -> Result<Vec<Sample>> {
    read_lines(path)
}
