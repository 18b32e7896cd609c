//! Text from a model: requests in, tokens out. A [`Scheduler`] reads prompts and continues sequences, all that are under way in one
//! pass over the weights; [`score`] says how likely a text is.

use std::sync::OnceLock;

use crate::data::Tokenizer;
use crate::mixer::{CacheType, Pool};
use crate::model::{Decoder, Lm};
use crate::{Error, Result};

mod constraint;
#[cfg(test)]
mod device_tests;
mod prefix;
mod sampler;
mod scheduler;
pub mod score;
mod session;
mod speculation;
#[cfg(test)]
mod tests;
pub use constraint::Format;
use constraint::{Constraint, Constraints};
use llguidance::toktrie::TokTrie;
pub use prefix::PrefixCache;
pub use sampler::{Logprob, MAX_TOKENS, Sampler, SamplingParams};
pub use scheduler::{Event, Finish, Request, Scheduler, Statistics};
pub use session::{Session, StoredSession};
pub use speculation::Drafter;

/// How an engine uses the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineOptions {
    pub cache_type: CacheType,
    /// Bytes for the caches and states of all sequences; none: half of the free memory where the model decodes.
    pub cache_memory: Option<usize>,
    /// Tokens of prompts that are read in one pass, at most, beside the sequences that are being continued.
    pub prefill_chunk: usize,
    /// Sequences that are continued together.
    pub max_batch: usize,
    /// Keep what was read, for prompts that begin in the same way.
    pub prefix_cache: bool,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            cache_type: CacheType::default(),
            cache_memory: None,
            prefill_chunk: 512,
            max_batch: 64,
            prefix_cache: false,
        }
    }
}

/// A model with its tokenizer, and memory for its sequences.
pub struct Engine {
    pub decoder: Decoder,
    pub tokenizer: Tokenizer,
    pub pool: Pool,
    pub options: EngineOptions,
    /// Who guesses at the next tokens.
    pub drafter: Option<Drafter>,
    constraints: OnceLock<Constraints>,
    /// The bytes of every token, or why they are not known.
    words: OnceLock<Result<Vec<Vec<u8>>, String>>,
}

/// How a generation went.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Generation {
    pub text: String,
    pub prompt_tokens: usize,
    /// Of those the ones that were read before, for another request.
    pub cached_tokens: usize,
    pub completion_tokens: usize,
    /// `stop` (an end-of-sequence token or a stop string), `length` or `cancelled`.
    pub finish_reason: &'static str,
    /// Time to first token, seconds.
    pub ttft_s: f64,
    /// Decoded tokens a second after the first.
    pub decode_tokens_per_s: f64,
    /// Of caches and states, when it ended.
    pub cache_bytes: usize,
    /// Tokens that a drafter guessed, and those of them that were right.
    pub drafted_tokens: usize,
    pub accepted_tokens: usize,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub logprobs: Vec<Logprob>,
    /// Of the prompt's tokens but the first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub prompt_logprobs: Vec<Logprob>,
}

/// Told of every piece of text as soon as it is certain, and of which prompt; false ends that sequence.
pub type Emit<'a> = &'a mut dyn FnMut(usize, &str) -> bool;

impl Engine {
    /// With default options.
    ///
    /// # Errors
    /// As [`Engine::with`].
    pub fn new(lm: &Lm, tokenizer: Tokenizer) -> Result<Self> {
        Self::with(lm, tokenizer, EngineOptions::default())
    }

    /// # Errors
    /// A model and a tokenizer that do not belong together, a device that the model cannot decode on, or too little memory for one
    /// sequence.
    pub fn with(lm: &Lm, tokenizer: Tokenizer, options: EngineOptions) -> Result<Self> {
        tokenizer.check(lm.config.vocab_size)?;
        let decoder = lm.decoder()?;
        let limit = match options.cache_memory {
            Some(limit) => limit,
            None => decoder.cache_room()?,
        };
        Ok(Self {
            pool: decoder.pool(options.cache_type, limit)?,
            decoder,
            tokenizer,
            options,
            drafter: None,
            constraints: OnceLock::new(),
            words: OnceLock::new(),
        })
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
        let bos = self.decoder.config.bos_token_id.or(self.tokenizer.bos());
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

    /// The most tokens that may follow a prompt of `prompt` tokens: what the model's context and the cache have room for.
    pub fn room(&self, prompt: usize) -> usize {
        let context = self.decoder.config.max_position_embeddings;
        let fits = |more: &usize| self.pool.bytes(prompt + more) <= self.pool.limit();
        let (mut some, mut too_many) = (0, context.saturating_sub(prompt) + 1);
        while too_many - some > 1 {
            let half = some + (too_many - some) / 2;
            match fits(&half) {
                true => some = half,
                false => too_many = half,
            }
        }
        some
    }

    fn words(&self) -> &Result<Vec<Vec<u8>>, String> {
        self.words
            .get_or_init(|| constraint::words(&self.tokenizer))
    }

    /// What a token is made of, and whether it stands for something else than text.
    fn word(&self, id: u32) -> Option<(&[u8], bool)> {
        let word = self.words().as_ref().ok()?.get(id as usize)?;
        Some(match word.as_slice() {
            [TokTrie::SPECIAL_TOKEN_MARKER, rest @ ..] if !rest.is_empty() => (rest, true),
            word => (word, false),
        })
    }

    /// The bytes of a token; where the tokenizer does not tell, or the token stands for something else than text, how it is spelled.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        match self.word(id) {
            Some((word, _)) => word.to_vec(),
            None => self.tokenizer.token(id).unwrap_or_default().into_bytes(),
        }
    }

    /// Whether a token stands for something else than text: decoding leaves it out.
    pub fn is_special(&self, id: u32) -> bool {
        self.word(id).is_some_and(|(_, special)| special)
    }

    /// Whether a request can be answered; what takes long of it (a form to compile) is done and kept.
    ///
    /// # Errors
    /// As [`Scheduler::submit`].
    pub fn check(&self, prompt: usize, params: &SamplingParams) -> Result<()> {
        params.validate()?;
        self.most(prompt, params.max_tokens)?;
        self.constraint(params.format.as_ref()).map(|_| ())
    }

    /// How many tokens follow a prompt of `prompt` tokens: no more than the model's context has room for,
    /// which is said where more were asked for.
    ///
    /// # Errors
    /// A prompt that fills the context, or whose sequence is more than the cache has room for.
    fn most(&self, prompt: usize, asked: Option<usize>) -> Result<usize> {
        let context = self.decoder.config.max_position_embeddings;
        let Some(room) = context.checked_sub(prompt).filter(|room| *room > 0) else {
            return Err(Error::invalid(format!(
                "the prompt has {prompt} tokens, the model's context {context} (max_position_embeddings): shorten the prompt"
            )));
        };
        let most = match asked {
            Some(asked) if asked > room => {
                tracing::warn!(
                    "max_tokens {asked} is past the model's context of {context} tokens: behind a prompt of {prompt} \
                     the text ends after {room}"
                );
                room
            }
            Some(asked) => asked,
            None => room.min(MAX_TOKENS),
        };
        let (needed, limit) = (self.pool.bytes(prompt + most), self.pool.limit());
        match needed > limit {
            true => Err(Error::invalid(format!(
                "a prompt of {prompt} tokens and {most} more need {needed} bytes of cache, of which there are {limit}: \
                 raise --cache-memory, or ask for fewer tokens"
            ))),
            false => Ok(most),
        }
    }

    /// Continues `prompts`, together, `n` times each; the answers come in their order. A text does not depend on what it is
    /// continued beside.
    ///
    /// # Errors
    /// Settings out of range, or a prompt that there is no room for.
    pub fn generate(
        &self,
        prompts: &[&str],
        n: usize,
        params: &SamplingParams,
        emit: Emit,
    ) -> Result<Vec<Vec<Generation>>> {
        let mut scheduler = Scheduler::new(self);
        for (index, prompt) in prompts.iter().enumerate() {
            // Streams of their own, the first that of a prompt alone.
            let names = (index * n..(index + 1) * n).map(|i| i as u64);
            let mut names = names.map(|i| (i, params.seed.wrapping_add(i)));
            let Some((id, seed)) = names.next() else {
                continue;
            };
            let params = SamplingParams {
                seed,
                ..params.clone()
            };
            let request = Request::new(id, self.prompt(prompt)?, params);
            scheduler.submit(Request {
                siblings: names.collect(),
                ..request
            })?;
        }
        let mut found: Vec<(u64, Generation)> = Vec::new();
        while !scheduler.is_idle() {
            for event in scheduler.step()? {
                match event {
                    Event::Text { id, text, .. } => {
                        if !emit(id as usize, &text) {
                            scheduler.cancel(id);
                        }
                    }
                    Event::Done { id, finish } => found.push((id, finish.generation)),
                    Event::Failed { error, .. } => return Err(error),
                }
            }
        }
        found.sort_by_key(|(id, _)| *id);
        let found: Vec<Generation> = found.into_iter().map(|(_, found)| found).collect();
        Ok(found.chunks(n.max(1)).map(<[Generation]>::to_vec).collect())
    }

    /// # Errors
    /// A form that cannot be compiled, or a tokenizer whose tokens are not known by their bytes.
    fn constraint(&self, format: Option<&Format>) -> Result<Option<Constraint>> {
        let Some(format) = format else {
            return Ok(None);
        };
        let constraints = match self.constraints.get() {
            Some(constraints) => constraints,
            None => {
                let made = Constraints::new(&self.tokenizer, self.words())?;
                self.constraints.get_or_init(|| made)
            }
        };
        constraints.compile(format).map(Some)
    }

    fn is_eos(&self, token: u32) -> bool {
        let own = &self.decoder.config.eos_token_id;
        own.contains(&token) || self.tokenizer.eos().contains(&token)
    }
}
