//! Text from a model: prefill the prompts, then decode a token at a time ([`Batch`]); and how likely it is ([`score`]).

use crate::data::Tokenizer;
use crate::model::Lm;
use crate::{Error, Result};

mod batch;
mod sampler;
pub mod score;
#[cfg(test)]
mod tests;
pub use batch::{Batch, Emit};
pub use sampler::{MAX_TOKENS, Sampler, SamplingParams};

/// A model with its tokenizer.
pub struct Engine {
    pub lm: Lm,
    pub tokenizer: Tokenizer,
}

/// How a generation went.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Generation {
    pub text: String,
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
    /// `stop` (an end-of-sequence token) or `length`.
    pub finish_reason: &'static str,
    /// Time to first token, seconds.
    pub ttft_s: f64,
    /// Decoded tokens a second after the first.
    pub decode_tokens_per_s: f64,
}

impl Generation {
    /// Nothing yet, after a prompt of so many tokens.
    fn of(prompt_tokens: usize) -> Self {
        Self {
            text: String::new(),
            prompt_tokens,
            completion_tokens: 0,
            finish_reason: "length",
            ttft_s: 0.0,
            decode_tokens_per_s: 0.0,
        }
    }
}

impl Engine {
    /// # Errors
    /// When model and tokenizer do not belong together.
    pub fn new(lm: Lm, tokenizer: Tokenizer) -> Result<Self> {
        tokenizer.check(lm.config.vocab_size)?;
        Ok(Self { lm, tokenizer })
    }

    /// The prompt's tokens; an empty prompt is the bare BOS token.
    ///
    /// # Errors
    /// An empty prompt without a BOS token to start from.
    pub fn prompt(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = match text.is_empty() {
            true => Vec::new(),
            false => self.tokenizer.encode(text)?,
        };
        let bos = self.lm.config.bos_token_id.or(self.tokenizer.bos());
        if let Some(bos) = bos
            && ids.first() != Some(&bos)
        {
            ids.insert(0, bos);
        }
        match ids.is_empty() {
            true => Err(Error::invalid(
                "an empty prompt needs a BOS token, and this model names none",
            )),
            false => Ok(ids),
        }
    }

    /// How many tokens follow a prompt of `prompt` tokens: no more than the model's context has room for,
    /// which is said where more were asked for.
    ///
    /// # Errors
    /// A prompt that fills the context.
    fn most(&self, prompt: usize, asked: Option<usize>) -> Result<usize> {
        let context = self.lm.config.max_position_embeddings;
        let Some(room) = context.checked_sub(prompt).filter(|room| *room > 0) else {
            return Err(Error::invalid(format!(
                "the prompt has {prompt} tokens, the model's context {context} (max_position_embeddings): shorten the prompt"
            )));
        };
        match asked {
            Some(asked) if asked > room => {
                tracing::warn!(
                    "max_tokens {asked} is past the model's context of {context} tokens: behind a prompt of {prompt} \
                     the text ends after {room}"
                );
                Ok(room)
            }
            Some(asked) => Ok(asked),
            None => Ok(room.min(MAX_TOKENS)),
        }
    }

    /// Continues `prompts`, together; the answers come in their order. A text does not depend on what it is continued
    /// beside.
    ///
    /// # Errors
    /// As [`Batch::admit`].
    pub fn generate(
        &self,
        prompts: &[&str],
        params: &SamplingParams,
        emit: Emit,
    ) -> Result<Vec<Generation>> {
        let mut batch = Batch::admit(self, prompts, params)?;
        let mut found = Vec::new();
        while !batch.is_empty() {
            found.extend(batch.step(emit)?);
        }
        found.sort_by_key(|(index, _)| *index);
        Ok(found
            .into_iter()
            .map(|(_, generation)| generation)
            .collect())
    }

    fn is_eos(&self, token: u32) -> bool {
        self.lm.config.eos_token_id.contains(&token) || self.tokenizer.eos().contains(&token)
    }
}
