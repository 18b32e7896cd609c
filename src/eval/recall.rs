//! Whether a model remembers what a story told it.

use candle_core::{D, DType, Tensor};
use serde::Serialize;

use crate::Result;
use crate::data::Tokenizer;
use crate::data::stories::Story;
use crate::model::Lm;

#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct RecallReport {
    /// Share of answers that are the likeliest token, given the story before them.
    pub accuracy: f64,
    /// Answers asked for.
    pub answers: usize,
}

/// Reads every story once and looks at each of its answers.
pub fn recall(lm: &Lm, tokenizer: &Tokenizer, stories: &[Story]) -> Result<RecallReport> {
    let (mut right, mut answers) = (0, 0);
    for story in stories {
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
    }
    Ok(RecallReport {
        accuracy: right as f64 / (answers as f64).max(1.0),
        answers,
    })
}
