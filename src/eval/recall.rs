//! Whether a model remembers what a story told it.

use candle_core::{D, DType, Tensor};
use serde::Serialize;

use crate::Result;
use crate::data::Tokenizer;
use crate::data::stories::Story;
use crate::model::Lm;
use crate::watch::Watch;

#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct RecallReport {
    /// Share of answers that are the likeliest token, given the story before them.
    pub accuracy: f64,
    /// Answers asked for.
    pub answers: usize,
}

/// Reads every story once and looks at each of its answers.
///
/// # Errors
/// A tokenizer that cannot say the stories, or [`crate::Error::Interrupted`].
pub fn recall(
    lm: &Lm,
    tokenizer: &Tokenizer,
    stories: &[Story],
    watch: &dyn Watch,
) -> Result<RecallReport> {
    let (mut right, mut answers) = (0, 0);
    watch.start("recall", stories.len());
    for (done, story) in stories.iter().enumerate() {
        let (ids, asked) = story.encode(tokenizer)?;
        let input = Tensor::from_slice(&ids, (1, ids.len()), lm.device())?;
        let logits = lm.forward(&input, None)?.squeeze(0)?;
        let likeliest = logits
            .argmax(D::Minus1)?
            .to_dtype(DType::U32)?
            .to_vec1::<u32>()?;
        right += asked
            .iter()
            .filter(|at| likeliest[**at - 1] == ids[**at])
            .count();
        answers += asked.len();
        watch.reached(done + 1, stories.len(), "stories")?;
    }
    Ok(RecallReport {
        accuracy: right as f64 / (answers as f64).max(1.0),
        answers,
    })
}
