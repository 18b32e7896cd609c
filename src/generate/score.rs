//! Log-likelihoods of continuations. Requests with one context share its cache and state: the context is
//! read once, and every continuation goes on from there. Contexts of one length are read together, so no
//! row is padded before it ends.

use std::collections::BTreeMap;

use candle_core::{D, DType, Tensor};

use crate::data::Tokenizer;
use crate::model::{Lm, LmState};
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

/// The log-likelihood of every continuation, and whether it is the likeliest token by token; `stage` is
/// what they are watched as.
///
/// # Errors
/// [`Error::Interrupted`].
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
    let mut found = vec![(0.0, false); requests.len()];
    let mut done = 0;
    let mut at = 0;
    while at < shared.len() {
        let len = shared[at].context.len();
        let most = (batch_tokens / len).max(1);
        let equal = shared[at..].iter().take(most);
        let rows = equal.take_while(|s| s.context.len() == len).count();
        let batch = &shared[at..at + rows];
        at += rows;
        for (request, score) in score(lm, batch, batch_tokens)? {
            found[request] = score;
            done += 1;
        }
        watch.reached(done, requests.len(), "requests")?;
    }
    Ok(found)
}

/// Contexts of one length, and all that follows them.
fn score(lm: &Lm, batch: &[Shared], batch_tokens: usize) -> Result<Vec<(usize, (f64, bool))>> {
    let device = lm.device();
    let len = batch[0].context.len();
    let ids: Vec<u32> = batch.iter().flat_map(|s| s.context).copied().collect();
    let mut state = lm.state(batch.len())?;
    let ids = Tensor::from_vec(ids, (batch.len(), len), device)?;
    let hidden = lm.resume(&ids, &mut state)?;
    // [rows, D]: what predicts the first token of each continuation.
    let ends = hidden.narrow(1, len - 1, 1)?.squeeze(1)?.contiguous()?;
    let mut followers: Vec<(u32, usize, &[u32])> = (batch.iter().enumerate())
        .flat_map(|(row, s)| s.followers.iter().map(move |(i, c)| (row as u32, *i, *c)))
        .collect();
    followers.sort_by_key(|(_, _, continuation)| continuation.len());
    let mut found = Vec::with_capacity(followers.len());
    let mut rest = followers.as_slice();
    while let Some((_, _, last)) = rest.last() {
        // Alone, one row always fits.
        let most = (batch_tokens / last.len()).max(1).min(rest.len());
        let (before, chunk) = rest.split_at(rest.len() - most);
        rest = before;
        found.extend(follow(lm, &state, &ends, chunk)?);
    }
    Ok(found)
}

/// Continuations of rows of one state, filled up at their ends: all mixers are causal.
fn follow(
    lm: &Lm,
    state: &LmState,
    ends: &Tensor,
    chunk: &[(u32, usize, &[u32])],
) -> Result<Vec<(usize, (f64, bool))>> {
    let device = lm.device();
    let rows: Vec<u32> = chunk.iter().map(|(row, _, _)| *row).collect();
    let rows = Tensor::from_vec(rows, chunk.len(), device)?;
    let first = ends.index_select(&rows, 0)?;
    // The last token is predicted, not read.
    let read = chunk.iter().map(|(_, _, c)| c.len() - 1).max().unwrap_or(0);
    let mut hidden = first.unsqueeze(1)?;
    if read > 0 {
        let padded = |c: &[u32]| (0..read).map(|t| c.get(t).copied().unwrap_or(0)).collect();
        let ids: Vec<u32> = (chunk.iter())
            .flat_map(|(_, _, c)| -> Vec<u32> { padded(c) })
            .collect();
        let ids = Tensor::from_vec(ids, (chunk.len(), read), device)?;
        let rest = lm.resume(&ids, &mut state.select(&rows)?)?;
        hidden = Tensor::cat(&[&hidden, &rest], 1)?;
    }
    let (b, t, d) = hidden.dims3()?;
    let flat = hidden.reshape((b * t, d))?;
    // Only positions that predict a token of their continuation go through the head.
    let places: Vec<u32> = (chunk.iter().enumerate())
        .flat_map(|(row, (_, _, c))| (0..c.len()).map(move |at| (row * t + at) as u32))
        .collect();
    let wanted: Vec<u32> = chunk
        .iter()
        .flat_map(|(_, _, c)| c.iter().copied())
        .collect();
    let count = places.len();
    let places = Tensor::from_vec(places, count, device)?;
    let logits = lm
        .head(&flat.index_select(&places, 0)?)?
        .to_dtype(DType::F32)?;
    let best = logits.argmax(D::Minus1)?.to_vec1::<u32>()?;
    let targets = Tensor::from_vec(wanted.clone(), count, device)?;
    let losses = crate::op::loss::cross_entropy(&logits, &targets)?.to_vec1::<f32>()?;
    let mut at = 0;
    let scores = chunk.iter().map(|(_, request, c)| {
        let span = at..at + c.len();
        at = span.end;
        let log_likelihood = -losses[span.clone()]
            .iter()
            .map(|l| f64::from(*l))
            .sum::<f64>();
        (
            *request,
            (log_likelihood, best[span.clone()] == wanted[span]),
        )
    });
    Ok(scores.collect())
}
