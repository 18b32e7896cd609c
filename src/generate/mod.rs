//! Text from a model: prefill the prompt, then decode a token at a time.

use std::time::{Duration, Instant};

use candle_core::{DType, Tensor};

use crate::data::Tokenizer;
use crate::model::Lm;
use crate::{Error, Result};

mod sampler;
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

    /// Continues `prompt`; `emit` gets every piece of text as soon as it is certain, and stops the
    /// generation by returning false.
    ///
    /// # Errors
    /// Settings out of range, or a prompt that fills the model's context.
    pub fn generate(
        &self,
        prompt: &str,
        params: &SamplingParams,
        emit: &mut dyn FnMut(&str) -> bool,
    ) -> Result<Generation> {
        params.validate()?;
        let ids = self.prompt(prompt)?;
        let most = self.most(ids.len(), params.max_tokens)?;
        let started = Instant::now();
        let mut state = self.lm.state(1)?;
        let mut sampler = Sampler::new(params);
        let mut stream = self.tokenizer.decode_stream(&ids);
        let mut text = String::new();
        let mut completion_tokens = 0;
        let mut finish_reason = "length";
        let mut first = Duration::ZERO;
        let mut next = ids.clone();
        while completion_tokens < most {
            let input = Tensor::from_slice(&next, (1, next.len()), self.lm.device())?;
            let hidden = self.lm.resume(&input, &mut state)?;
            let last = hidden.narrow(1, next.len() - 1, 1)?;
            let logits = self.lm.head(&last)?.flatten_all()?.to_dtype(DType::F32)?;
            let token = sampler.sample(&logits.to_vec1::<f32>()?)?;
            if completion_tokens == 0 {
                first = started.elapsed();
            }
            completion_tokens += 1;
            if self.is_eos(token) {
                finish_reason = "stop";
                break;
            }
            let piece = stream.push(token)?;
            text.push_str(&piece);
            if !piece.is_empty() && !emit(&piece) {
                break;
            }
            next = vec![token];
        }
        let rest = stream.finish()?;
        if !rest.is_empty() {
            text.push_str(&rest);
            emit(&rest);
        }
        let decoding = (started.elapsed() - first).as_secs_f64();
        Ok(Generation {
            text,
            prompt_tokens: ids.len(),
            completion_tokens,
            finish_reason,
            ttft_s: first.as_secs_f64(),
            decode_tokens_per_s: completion_tokens.saturating_sub(1) as f64 / decoding.max(1e-9),
        })
    }

    fn is_eos(&self, token: u32) -> bool {
        self.lm.config.eos_token_id.contains(&token) || self.tokenizer.eos().contains(&token)
    }
}
