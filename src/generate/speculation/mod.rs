//! Speculative decoding (arXiv 2211.17192, 2302.01318): cheap guesses at the next tokens are read in one pass, and kept as far as they are
//! what would have been drawn. A guess is judged by drawing at its place with the sequence's own sampler: greedy text and sampled text
//! are bit for bit those without speculation. A recurrent state is never copied per token: after a wrong guess a sequence goes back to
//! where the pass began and reads what was right again, beside its next guesses (the replay of MambaInLLaMA, arXiv 2408.15237).

use super::Sampler;
use crate::data::Tokenizer;
use crate::mixer::{CacheType, Memory, Pool, Span};
use crate::model::{Decoder, Lm, Reading};
use crate::{Error, Result};

mod ngrams;
mod pace;
use ngrams::Ngrams;
pub(super) use pace::Pace;

/// Who guesses.
pub enum Drafter {
    /// What followed the last tokens where they stood before (prompt lookup).
    Ngrams,
    /// A smaller model of the same vocabulary.
    Model(Box<DraftModel>),
}

pub struct DraftModel {
    decoder: Decoder,
    pool: Pool,
}

impl Drafter {
    /// `cache_memory`: bytes for what it remembers of all sequences.
    ///
    /// # Errors
    /// A model of other tokens than `tokenizer` has, on a device that it cannot decode on, or too little memory for one sequence.
    pub fn model(
        lm: &Lm,
        own: &Tokenizer,
        tokenizer: &Tokenizer,
        cache_type: CacheType,
        cache_memory: usize,
    ) -> Result<Self> {
        if !own.same_tokens(tokenizer) {
            return Err(Error::invalid(
                "the draft model's tokens are not the model's: it must have the same vocabulary",
            ));
        }
        own.check(lm.config.vocab_size)?;
        let decoder = lm.decoder()?;
        let pool = decoder.pool(cache_type, cache_memory)?;
        Ok(Self::Model(Box::new(DraftModel { decoder, pool })))
    }

    /// For a sequence that begins.
    pub(super) fn draft(&self) -> Draft {
        Draft {
            tokens: Vec::new(),
            reach: FIRST,
            source: match self {
                Self::Ngrams => Source::Ngrams(Ngrams::default()),
                Self::Model(model) => Source::Model(model.pool.sequence()),
            },
        }
    }

    /// Guesses for all who want some, among the model's `vocab` words; none where there is no room. Whether the drafter had to catch up
    /// with a text, whose time tells nothing of what guesses cost.
    ///
    /// # Errors
    /// Those of [`Decoder::read`].
    pub(super) fn guess(
        &self,
        wants: Vec<Want>,
        vocab: usize,
        chunk: usize,
        reading: &mut Reading,
    ) -> Result<bool> {
        match self {
            Self::Ngrams => {
                for want in wants {
                    if let Source::Ngrams(ngrams) = &mut want.draft.source {
                        let most = want.most.min(want.draft.reach);
                        want.draft.tokens = ngrams.follow(want.tokens, most);
                    }
                }
                Ok(false)
            }
            Self::Model(model) => model.guess(wants, vocab, chunk, reading),
        }
    }
}

/// Guesses at first, until some were right.
const FIRST: usize = 4;
/// At most.
pub(super) const MOST: usize = 8;
/// Unread tokens that a drafter has at most, unless a text is new to it.
const CLOSE: usize = MOST + 1;

/// A sequence's guesses.
#[derive(Clone)]
pub(super) struct Draft {
    /// For the next pass.
    pub tokens: Vec<u32>,
    /// How many to make next time.
    reach: usize,
    source: Source,
}

#[derive(Clone)]
enum Source {
    Ngrams(Ngrams),
    /// The draft model's; it has read a beginning of the sequence, and never a guess.
    Model(Memory),
}

impl Draft {
    /// So many of the guesses were right; they are used up.
    pub fn judged(&mut self, right: usize) {
        self.reach = match right == self.tokens.len() {
            true => (2 * self.reach).min(MOST),
            false => right + 1,
        };
        self.tokens.clear();
    }

    /// No guesses for the next pass.
    pub fn clear(&mut self) {
        self.tokens.clear();
    }

    /// Lets go of what it remembers.
    pub fn forget(&mut self, drafter: &Drafter) {
        *self = drafter.draft();
    }
}

/// A sequence that wants guesses, at most so many.
pub(super) struct Want<'a> {
    pub tokens: &'a [u32],
    pub sampler: &'a Sampler,
    pub most: usize,
    pub draft: &'a mut Draft,
}

/// A sequence in the draft model: first its unread tokens, then the guesses one by one.
struct Guessing<'a> {
    sampler: Sampler,
    /// Of the sequence and the guesses read so far.
    memory: Memory,
    most: usize,
    /// Of the model that is guessed for.
    vocab: usize,
    draft: &'a mut Vec<u32>,
}

impl DraftModel {
    fn guess(
        &self,
        wants: Vec<Want>,
        vocab: usize,
        chunk: usize,
        reading: &mut Reading,
    ) -> Result<bool> {
        let mut behind = false;
        let own_vocab = self.decoder.config.vocab_size;
        let (mut tokens, mut wanted) = (Vec::new(), Vec::new());
        let (mut spans, mut guessing) = (Vec::new(), Vec::new());
        for Want {
            tokens: all,
            sampler,
            most,
            draft,
        } in wants
        {
            let Source::Model(memory) = &mut draft.source else {
                continue;
            };
            let unread = &all[memory.len()..];
            // A model may have rows that the other's padding lacks.
            if unread.is_empty() || unread.iter().any(|token| *token as usize >= own_vocab) {
                continue;
            }
            let unread = unread.len();
            behind |= unread > CLOSE;
            // A long prompt is caught up with piece by piece, before there are guesses.
            let count = unread.min(chunk.max(1));
            if memory.reserve(count).is_err() {
                *memory = self.pool.sequence();
                continue;
            }
            let from = tokens.len();
            tokens.extend_from_slice(&all[memory.len()..][..count]);
            let ready = count == unread && most > 0;
            if ready {
                wanted.push(tokens.len() - 1);
            }
            let rows = from..tokens.len();
            spans.push(Span { memory, rows });
            if ready {
                guessing.push((
                    spans.len() - 1,
                    sampler,
                    most.min(draft.reach),
                    &mut draft.tokens,
                ));
            }
        }
        if tokens.is_empty() {
            return Ok(behind);
        }
        let logits = self.decoder.read(&tokens, &mut spans, &wanted, reading)?;
        let guessing = guessing.into_iter().zip(logits.chunks_exact_mut(own_vocab));
        let mut guessing: Vec<Guessing> = guessing
            .filter_map(|((span, sampler, most, draft), logits)| {
                let mut guessing = Guessing {
                    sampler: sampler.to_guess(),
                    memory: spans[span].memory.clone(),
                    most,
                    vocab,
                    draft,
                };
                guessing.take(logits).then_some(guessing)
            })
            .collect();
        while !guessing.is_empty() {
            guessing.retain_mut(|g| g.memory.reserve(1).is_ok());
            if guessing.is_empty() {
                break;
            }
            let tokens: Vec<u32> = guessing
                .iter()
                .filter_map(|g| g.draft.last().copied())
                .collect();
            let wanted: Vec<usize> = (0..tokens.len()).collect();
            let spans = guessing.iter_mut().enumerate();
            let mut spans: Vec<Span> = spans
                .map(|(i, g)| Span {
                    memory: &mut g.memory,
                    rows: i..i + 1,
                })
                .collect();
            let logits = self.decoder.read(&tokens, &mut spans, &wanted, reading)?;
            let mut rows = logits.chunks_exact_mut(own_vocab);
            guessing.retain_mut(|g| rows.next().is_some_and(|row| g.take(row)));
        }
        Ok(behind)
    }
}

impl Guessing<'_> {
    /// One guess more; whether another may follow.
    fn take(&mut self, logits: &mut [f32]) -> bool {
        // Drawn with the random numbers that the sequence itself will draw with: models that agree draw the same.
        let Ok(drawn) = self.sampler.sample(logits) else {
            return false;
        };
        if drawn.token as usize >= self.vocab {
            return false;
        }
        self.draft.push(drawn.token);
        self.draft.len() < self.most && !drawn.last
    }
}
