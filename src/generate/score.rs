//! Log-likelihoods of continuations. Requests with one context share its memory: the context is read once, and every continuation
//! goes on from there.

use std::collections::BTreeMap;

use crate::data::Tokenizer;
use crate::mixer::{CacheType, Full, Memory, Pool, Span};
use crate::model::{Decoder, Lm, Reading};
use crate::op::cpu::exp;
use crate::op::isa::vectorised;
use crate::op::team::team;
use crate::watch::Watch;
use crate::{Error, Result};

/// A request in tokens; neither part is empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokens {
    pub context: Vec<u32>,
    pub continuation: Vec<u32>,
    /// Tokens that the context lost to the model's length.
    pub cut: usize,
}

impl Tokens {
    /// Of both parts together.
    pub fn size(&self) -> usize {
        self.context.len() + self.continuation.len()
    }
}

/// Splits a request as lm-evaluation-harness does: spaces at the context's end belong to the continuation,
/// and the continuation's tokens are what both together have more than the context alone. An empty context
/// is the tokenizer's begin (or end) token. What is longer than the model's context loses its beginning.
///
/// # Errors
/// A tokenizer without begin and end token where one is needed, or whose tokens do not split there.
pub fn tokens(
    tokenizer: &Tokenizer,
    context: &str,
    continuation: &str,
    max_length: usize,
) -> Result<Tokens> {
    let failed = |why: &str| Error::invalid(format!("{why}: {context:?} + {continuation:?}"));
    let kept = context.trim_end();
    let moved = &context[kept.len()..];
    let (mut left, right) = if kept.is_empty() && moved.is_empty() {
        let prefix = tokenizer.bos().or(tokenizer.eos().first().copied());
        let prefix = prefix.ok_or_else(|| {
            failed("an empty context needs the tokenizer's begin or end token, and it has neither")
        })?;
        let ids = tokenizer.encode_plain(continuation)?;
        match ids.first() == Some(&prefix) {
            true => (vec![prefix], ids[1..].to_vec()),
            false => (vec![prefix], ids),
        }
    } else {
        let whole = tokenizer.encode(&format!("{kept}{moved}{continuation}"))?;
        let left = tokenizer.encode(kept)?;
        let right = whole.get(left.len()..).unwrap_or_default().to_vec();
        (left, right)
    };
    if right.is_empty() || left.is_empty() {
        return Err(failed(
            "the tokenizer cannot split context and continuation",
        ));
    }
    if right.len() > max_length {
        return Err(failed(&format!(
            "the continuation has {} tokens, the model's context {max_length}",
            right.len()
        )));
    }
    // The last token is only predicted, so one more than the model's context fits.
    let excess = (left.len() + right.len()).saturating_sub(max_length + 1);
    left.drain(..excess);
    Ok(Tokens {
        context: left,
        continuation: right,
        cut: excess,
    })
}

/// Whether the tokens say the text, white space aside.
pub fn survives(tokenizer: &Tokenizer, text: &str) -> Result<bool> {
    let said = tokenizer.decode(&tokenizer.encode_plain(text)?)?;
    let solid = |text: &str| text.split_whitespace().collect::<String>();
    Ok(solid(&said) == solid(text))
}

/// A context and what follows it: request number and continuation.
struct Shared<'a> {
    context: &'a [u32],
    followers: Vec<(usize, &'a [u32])>,
}

/// Scalars of logits that are computed at once.
const LOGITS: usize = 1 << 26;

/// The log-likelihood of every continuation, and whether it is the likeliest token by token; `stage` is
/// what they are watched as. No more than `batch_tokens` tokens are read at once.
///
/// # Errors
/// [`Error::Interrupted`], or a device that the model cannot decode on, or that has too little memory.
pub fn log_likelihoods(
    lm: &Lm,
    requests: &[Tokens],
    batch_tokens: usize,
    stage: &str,
    watch: &dyn Watch,
) -> Result<Vec<(f64, bool)>> {
    let mut shared: BTreeMap<&[u32], Vec<(usize, &[u32])>> = BTreeMap::new();
    for (i, request) in requests.iter().enumerate() {
        let followers = shared.entry(&request.context).or_default();
        followers.push((i, &request.continuation));
    }
    let mut shared: Vec<Shared> = (shared.into_iter())
        .map(|(context, followers)| Shared { context, followers })
        .collect();
    // The longest first: what does not fit shows at once, and the time left is not underestimated.
    shared.sort_by_key(|s| std::cmp::Reverse(s.context.len()));
    watch.start(stage, requests.len());
    // All may be one batch, and this one of many calls.
    watch.reached(0, requests.len(), "requests")?;
    let mut scorer = Scorer::new(lm, batch_tokens)?;
    let mut found = vec![(0.0, false); requests.len()];
    let mut done = 0;
    let mut rest = shared.as_slice();
    while !rest.is_empty() {
        let (mut count, mut tokens) = (0, 0);
        while count < rest.len()
            && (count == 0 || tokens + rest[count].context.len() <= batch_tokens)
            && count < scorer.most_logits
        {
            tokens += rest[count].context.len();
            count += 1;
        }
        let (batch, behind) = rest.split_at(count);
        rest = behind;
        for (request, score) in scorer.score(batch)? {
            found[request] = score;
            done += 1;
        }
        watch.reached(done, requests.len(), "requests")?;
    }
    Ok(found)
}

struct Scorer {
    decoder: Decoder,
    pool: Pool,
    reading: Reading,
    batch_tokens: usize,
    /// Rows of logits at once.
    most_logits: usize,
}

/// A continuation behind a context that has been read.
struct Follower<'a> {
    request: usize,
    continuation: &'a [u32],
    memory: Memory,
    log_likelihood: f64,
    greedy: bool,
}

impl Scorer {
    fn new(lm: &Lm, batch_tokens: usize) -> Result<Self> {
        let decoder = lm.decoder()?;
        Ok(Self {
            pool: decoder.pool(CacheType::F32, usize::MAX)?,
            most_logits: (LOGITS / decoder.config.vocab_size).max(1),
            reading: Reading::default(),
            batch_tokens,
            decoder,
        })
    }

    /// Some contexts, and all that follows them.
    fn score(&mut self, batch: &[Shared]) -> Result<Vec<(usize, (f64, bool))>> {
        let mut memories: Vec<Memory> = batch.iter().map(|_| self.pool.sequence()).collect();
        let firsts =
            |shared: &Shared| -> Vec<u32> { shared.followers.iter().map(|(_, c)| c[0]).collect() };
        let mut found = Vec::new();
        if let [one] = batch {
            // It may be longer than what is read at once.
            let (last, before) = one.context.split_last().expect("never empty");
            for piece in before.chunks(self.batch_tokens) {
                self.read(&mut [(&mut memories[0], piece)], &[])?;
            }
            let ends = [(0, firsts(one))];
            found.extend(self.rows(&mut [(&mut memories[0], &[*last])], &ends)?);
        } else {
            let mut sequences: Vec<(&mut Memory, &[u32])> = (memories.iter_mut())
                .zip(batch.iter().map(|shared| shared.context))
                .collect();
            let mut row = 0;
            let ends: Vec<(usize, Vec<u32>)> = (batch.iter())
                .map(|shared| {
                    row += shared.context.len();
                    (row - 1, firsts(shared))
                })
                .collect();
            found.extend(self.rows(&mut sequences, &ends)?);
        }
        let mut followers = Vec::new();
        for ((shared, memory), first) in batch.iter().zip(&memories).zip(found) {
            let scored = shared.followers.iter().zip(first);
            followers.extend(
                scored.map(|((request, continuation), (score, greedy))| Follower {
                    request: *request,
                    continuation,
                    memory: memory.clone(),
                    log_likelihood: score,
                    greedy,
                }),
            );
        }
        drop(memories);
        self.follow(&mut followers)?;
        let scores = followers
            .iter()
            .map(|f| (f.request, (f.log_likelihood, f.greedy)));
        Ok(scores.collect())
    }

    /// What follows the first token of each.
    fn follow(&mut self, followers: &mut [Follower]) -> Result<()> {
        let most = self.batch_tokens.min(self.most_logits).max(1);
        let mut rest = followers;
        while !rest.is_empty() {
            let (mut count, mut tokens) = (0, 0);
            // The last token is predicted, not read.
            while count < rest.len()
                && (count == 0 || tokens + rest[count].continuation.len() <= most)
            {
                tokens += rest[count].continuation.len();
                count += 1;
            }
            let (batch, behind) = std::mem::take(&mut rest).split_at_mut(count);
            rest = behind;
            let longest = batch.iter().map(|f| f.continuation.len() - 1).max();
            // A long continuation alone goes piece by piece.
            for from in (0..longest.unwrap_or(0)).step_by(most) {
                let mut sequences = Vec::new();
                let (mut rows, mut owners, mut row) = (Vec::new(), Vec::new(), 0);
                for (i, f) in batch.iter_mut().enumerate() {
                    let to = (f.continuation.len() - 1).min(from + most);
                    if from >= to {
                        continue;
                    }
                    for at in from..to {
                        rows.push((row, vec![f.continuation[at + 1]]));
                        owners.push(i);
                        row += 1;
                    }
                    sequences.push((&mut f.memory, &f.continuation[from..to]));
                }
                let found = self.rows(&mut sequences, &rows)?;
                for (i, found) in owners.into_iter().zip(found) {
                    let (score, greedy) = found[0];
                    batch[i].log_likelihood += score;
                    batch[i].greedy &= greedy;
                }
            }
        }
        Ok(())
    }

    /// The next tokens of some sequences; of the rows that are named the log-probability of each token asked for, and whether it is the
    /// likeliest.
    fn rows(
        &mut self,
        sequences: &mut [(&mut Memory, &[u32])],
        asked: &[(usize, Vec<u32>)],
    ) -> Result<Vec<Vec<(f64, bool)>>> {
        let wanted: Vec<usize> = asked.iter().map(|(row, _)| *row).collect();
        let vocab = self.decoder.config.vocab_size;
        let logits = self.read(sequences, &wanted)?;
        let mut found: Vec<Vec<(f64, bool)>> = vec![Vec::new(); asked.len()];
        team().fill(&mut found, 1, |i, found| {
            let logits = &logits[i * vocab..][..vocab];
            let best = logits.iter().fold(f32::NEG_INFINITY, |m, l| m.max(*l));
            let likeliest = logits.iter().position(|l| *l == best);
            let sum = vectorised!({
                let mut sum = 0f64;
                for l in logits {
                    sum += f64::from(exp(l - best));
                }
                sum
            });
            found[0] = (asked[i].1.iter())
                .map(|token| {
                    let logit = logits[*token as usize];
                    (
                        f64::from(logit - best) - sum.ln(),
                        likeliest == Some(*token as usize),
                    )
                })
                .collect();
        });
        Ok(found)
    }

    fn read(
        &mut self,
        sequences: &mut [(&mut Memory, &[u32])],
        wanted: &[usize],
    ) -> Result<&[f32]> {
        let tokens: Vec<u32> = sequences.iter().flat_map(|(_, t)| *t).copied().collect();
        let mut from = 0;
        let limit = self.pool.limit();
        let spans = sequences.iter_mut().map(|(memory, tokens)| {
            // On the host there is no limit.
            memory.reserve(tokens.len()).map_err(|Full| {
                Error::invalid(format!(
                    "what is read at once does not fit the device's {limit} bytes of cache: lower --batch-tokens"
                ))
            })?;
            let rows = from..from + tokens.len();
            from = rows.end;
            Ok(Span { memory, rows })
        });
        let mut spans: Vec<Span> = spans.collect::<Result<_>>()?;
        let logits = self
            .decoder
            .read(&tokens, &mut spans, wanted, &mut self.reading)?;
        Ok(logits)
    }
}
