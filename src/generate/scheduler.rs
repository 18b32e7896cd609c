//! Continuous batching: every pass over the weights continues all sequences that are under way by a token, and reads a piece of the
//! prompts that wait (Orca, OSDI 2022; Sarathi, arXiv 2308.16369).

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Instant;

use super::prefix::{PrefixCache, PrefixStatistics};
use super::sampler::{Drawn, logprob};
use super::speculation::{self, Draft, Drafter, Pace, Want};
use super::{Engine, Generation, Logprob, Sampler, SamplingParams};
use crate::data::DecodeStream;
use crate::mixer::{Memory, Span};
use crate::model::{Ask, Reading, Row};
use crate::op::team::team;
use crate::{Error, Result};

/// A prompt to be continued.
pub struct Request {
    /// The caller's name for it.
    pub id: u64,
    pub prompt: Vec<u32>,
    pub params: SamplingParams,
    /// What has read the prompt's beginning: a session.
    pub memory: Option<Memory>,
    /// The same from a file: tokens that were read, and [`Memory::to_bytes`] of them.
    pub stored: Option<(usize, Vec<u8>)>,
    /// Further answers to the same prompt, which is read once: their names and seeds.
    pub siblings: Vec<(u64, u64)>,
}

impl Request {
    pub fn new(id: u64, prompt: Vec<u32>, params: SamplingParams) -> Self {
        Self {
            id,
            prompt,
            params,
            memory: None,
            stored: None,
            siblings: Vec::new(),
        }
    }
}

/// What a step brought.
pub enum Event {
    /// Text that is certain.
    Text {
        id: u64,
        text: String,
        /// Of the tokens in it, where they were asked for.
        logprobs: Vec<Logprob>,
    },
    Done {
        id: u64,
        finish: Box<Finish>,
    },
    /// It cannot go on; the others do.
    Failed {
        id: u64,
        error: Error,
    },
}

/// How a request ended.
pub struct Finish {
    pub generation: Generation,
    /// Prompt and answer.
    pub tokens: Vec<u32>,
    /// What has read a beginning of them.
    pub memory: Memory,
    /// A stop text ended it: the tokens go on where the text has ended.
    pub stopped: bool,
}

/// Since the scheduler began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct Statistics {
    pub passes: usize,
    /// By all passes together.
    pub read_tokens: usize,
    /// Sequences that had to leave and be read again.
    pub preempted: usize,
    /// Tokens that were guessed, and those of them that were right.
    pub drafted: usize,
    pub accepted: usize,
    pub prefix: PrefixStatistics,
}

pub struct Scheduler<'e> {
    engine: &'e Engine,
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    /// One had to leave: none comes in until another is done.
    crowded: bool,
    prefix: Option<PrefixCache>,
    reading: Reading,
    pace: Pace,
    draft_reading: Reading,
    statistics: Statistics,
}

struct Sequence {
    id: u64,
    /// Prompt and answer; the memory has read a beginning of them.
    tokens: Vec<u32>,
    prompt: usize,
    memory: Memory,
    sampler: Sampler,
    stream: DecodeStream,
    stops: Stops,
    most: usize,
    submitted: Instant,
    ttft_s: f64,
    so_far: Generation,
    /// Log-probabilities of tokens whose text has not been said.
    unsaid: Vec<Logprob>,
    params: SamplingParams,
    siblings: Vec<(u64, u64)>,
    draft: Option<Draft>,
    /// What it remembered before it read guesses, where that cannot be cut back to.
    before: Option<Memory>,
    /// Tokens of the prompt whose log-probabilities this pass brings.
    scored: Range<usize>,
    failed: Option<Error>,
}

/// Unread tokens beside which a sequence guesses; more, after wrong guesses, are read again first, so that they do not add up.
const CLOSE: usize = 4;
/// Unread tokens that are read beside any prompt: the last one, or what is read again after a wrong guess.
const FEW: usize = CLOSE + speculation::MOST;

/// At a snapshot's border less than this is left of a prompt, so that the same prompt is read quickly the next time.
const BORDER: usize = 64;

impl<'e> Scheduler<'e> {
    pub fn new(engine: &'e Engine) -> Self {
        let cache = || PrefixCache::new(engine.pool.has_state());
        Self {
            prefix: engine.options.prefix_cache.then(cache),
            waiting: VecDeque::new(),
            running: Vec::new(),
            crowded: false,
            reading: Reading::default(),
            pace: Pace::default(),
            draft_reading: Reading::default(),
            statistics: Statistics::default(),
            engine,
        }
    }

    pub fn engine(&self) -> &'e Engine {
        self.engine
    }

    /// Guesses whether it pays or not: to test with.
    #[cfg(test)]
    pub(super) fn guess_always(&mut self) {
        self.pace = Pace::always();
    }

    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Requests that wait, and those under way.
    pub fn load(&self) -> (usize, usize) {
        (self.waiting.len(), self.running.len())
    }

    pub fn statistics(&self) -> Statistics {
        Statistics {
            prefix: self
                .prefix
                .as_ref()
                .map(PrefixCache::statistics)
                .unwrap_or_default(),
            ..self.statistics
        }
    }

    /// # Errors
    /// Settings out of range, a form that cannot be compiled, or a prompt that there is no room for.
    pub fn submit(&mut self, request: Request) -> Result<()> {
        let Request {
            id,
            prompt,
            params,
            memory,
            stored,
            siblings,
        } = request;
        params.validate()?;
        let most = self.engine.most(prompt.len(), params.max_tokens)?;
        let constraint = self.engine.constraint(params.format.as_ref())?;
        let serves =
            |memory: &Memory| memory.len() < prompt.len() && params.prompt_logprobs.is_none();
        let restored = match stored {
            Some((read, bytes)) if memory.is_none() => self.restore(read, &bytes),
            _ => None,
        };
        let memory = memory.or(restored).filter(serves);
        let memory = memory.unwrap_or_else(|| self.engine.pool.sequence());
        self.waiting.push_back(Sequence {
            id,
            sampler: Sampler::new(&params, &prompt).constrained(constraint),
            stream: (self.engine.tokenizer.decode_stream(&prompt)).showing(&params.shown_tokens),
            stops: Stops::new(params.stop.clone()),
            most,
            submitted: Instant::now(),
            ttft_s: 0.0,
            so_far: Generation {
                text: String::new(),
                prompt_tokens: prompt.len(),
                cached_tokens: memory.len(),
                completion_tokens: 0,
                finish_reason: "length",
                ttft_s: 0.0,
                decode_tokens_per_s: 0.0,
                cache_bytes: 0,
                drafted_tokens: 0,
                accepted_tokens: 0,
                logprobs: Vec::new(),
                prompt_logprobs: Vec::new(),
            },
            unsaid: Vec::new(),
            params,
            siblings,
            draft: self.engine.drafter.as_ref().map(Drafter::draft),
            before: None,
            scored: 0..0,
            failed: None,
            prompt: prompt.len(),
            tokens: prompt,
            memory,
        });
        Ok(())
    }

    /// What a file remembers; none where there is no room for it even if nothing else is kept: its tokens can be read again.
    fn restore(&mut self, read: usize, bytes: &[u8]) -> Option<Memory> {
        loop {
            match Memory::from_bytes(&self.engine.pool, read, bytes) {
                Ok(memory) => return Some(memory),
                Err(_) if self.prefix.as_mut().is_some_and(PrefixCache::evict) => {}
                Err(_) => return None,
            }
        }
    }

    /// Ends a request where it stands; all it had is free at once. It is done with the next step.
    pub fn cancel(&mut self, id: u64) {
        let all = self.waiting.iter_mut().chain(&mut self.running);
        for sequence in all.filter(|s| s.id == id) {
            sequence.so_far.finish_reason = "cancelled";
            sequence.memory = self.engine.pool.sequence();
        }
    }

    /// Ends a request with what it has, as if it had reached its length; what it has read stays its own.
    pub fn stop(&mut self, id: u64) {
        let all = self.waiting.iter_mut().chain(&mut self.running);
        for sequence in all.filter(|s| s.id == id) {
            sequence.most = sequence.so_far.completion_tokens;
        }
    }

    /// One pass over the weights.
    ///
    /// # Errors
    /// A tensor library that fails.
    pub fn step(&mut self) -> Result<Vec<Event>> {
        let begun = Instant::now();
        let mut events = Vec::new();
        self.take_out(&mut events)?;
        self.admit();
        // Passes that continue every sequence are alike, but for guesses.
        let even = self.engine.drafter.is_some() && self.running.iter().all(|s| s.is_continued());
        let guesses = even && self.pace.pays(self.running.len());
        let catching_up = guesses && self.guess()?;
        let counts = self.share_out();
        let sequences = self.running.len();
        let tokens_before: usize = self.running.iter().map(|s| s.tokens.len()).sum();
        let (mut tokens, mut wanted, mut asks) = (Vec::new(), Vec::new(), Vec::new());
        let mut spans = Vec::new();
        for (sequence, count) in self.running.iter_mut().zip(&counts) {
            if *count == 0 {
                continue;
            }
            let read = sequence.memory.len();
            let from = tokens.len();
            tokens.extend_from_slice(&sequence.tokens[read..read + count]);
            sequence.scored = sequence.to_score(read..read + count);
            wanted.extend(sequence.scored.clone().map(|token| from + token - 1 - read));
            asks.resize(wanted.len(), Ask::Logits);
            if read + count == sequence.tokens.len() {
                wanted.push(tokens.len() - 1);
                // What follows the guesses is wanted too.
                for guess in sequence.draft.iter().flat_map(|draft| &draft.tokens) {
                    tokens.push(*guess);
                    wanted.push(tokens.len() - 1);
                    sequence.so_far.drafted_tokens += 1;
                    self.statistics.drafted += 1;
                }
            }
            asks.resize(wanted.len(), sequence.ask());
            spans.push(Span {
                memory: &mut sequence.memory,
                rows: from..tokens.len(),
            });
        }
        if tokens.is_empty() {
            return Ok(events);
        }
        let engine = self.engine;
        let rows =
            (engine.decoder).read_rows(&tokens, &mut spans, &wanted, &asks, &mut self.reading)?;
        drop(spans);
        self.statistics.passes += 1;
        self.statistics.read_tokens += tokens.len();
        let mut rows = rows.into_iter();
        let mut siblings = Vec::new();
        for (sequence, count) in self.running.iter_mut().zip(&counts) {
            if *count == 0 {
                continue;
            }
            sequence.score(&mut rows);
            let at_border = sequence.memory.len() == sequence.border();
            if at_border && let Some(prefix) = &mut self.prefix {
                prefix.insert(&sequence.tokens[..sequence.memory.len()], &sequence.memory);
            }
            if sequence.memory.len() < sequence.tokens.len() {
                continue;
            }
            let mut first = rows.next().expect("one for each that has read all it has");
            if sequence.most == 0 {
                continue;
            }
            for mut sibling in sequence.split() {
                match &mut first {
                    Row::Token(token) => sibling.take(engine, Row::Token(*token), &mut events),
                    Row::Logits(logits) => {
                        sibling.take(engine, Row::Logits(&mut logits.to_vec()), &mut events);
                    }
                }
                siblings.push(sibling);
            }
            let rows = std::iter::once(first).chain(&mut rows);
            self.statistics.accepted += sequence.take_all(engine, rows, &mut events);
        }
        // What reads something again does so because it has guessed.
        let guesses = guesses || counts.iter().any(|count| *count > 1);
        if even && !catching_up {
            let tokens: usize = self.running.iter().map(|s| s.tokens.len()).sum();
            let seconds = begun.elapsed().as_secs_f64();
            self.pace
                .tell(sequences, tokens - tokens_before, guesses, seconds);
        }
        self.running.extend(siblings);
        self.take_out(&mut events)?;
        Ok(events)
    }

    /// Guesses at what follows each sequence; whether the drafter had to catch up with a text.
    fn guess(&mut self) -> Result<bool> {
        let engine = self.engine;
        let Some(drafter) = &engine.drafter else {
            return Ok(false);
        };
        let wants = self.running.iter_mut().filter_map(|s| {
            let draft = s.draft.as_mut()?;
            draft.clear();
            let close = s.tokens.len() - s.memory.len() <= CLOSE;
            close.then(|| Want {
                // The pass itself brings one more.
                most: (s.most - s.so_far.completion_tokens).saturating_sub(1),
                tokens: &s.tokens,
                sampler: &s.sampler,
                draft,
            })
        });
        let vocab = engine.decoder.config.vocab_size;
        let chunk = engine.options.prefill_chunk;
        drafter.guess(wants.collect(), vocab, chunk, &mut self.draft_reading)
    }

    /// Lets go of what is done.
    fn take_out(&mut self, events: &mut Vec<Event>) -> Result<()> {
        let done = |s: &mut Sequence| s.is_done();
        let mut finished: Vec<Sequence> = self.running.extract_if(.., done).collect();
        let waiting = std::mem::take(&mut self.waiting);
        for sequence in waiting {
            match sequence.is_done() {
                true => finished.push(sequence),
                false => self.waiting.push_back(sequence),
            }
        }
        self.crowded &= finished.is_empty();
        for mut sequence in finished {
            // A prompt that was never read has answers all the same.
            for sibling in sequence.split() {
                sibling.finish(events)?;
            }
            let read = sequence.memory.len();
            if let Some(prefix) = &mut self.prefix
                && sequence.so_far.finish_reason != "cancelled"
                && read > 0
            {
                prefix.insert(&sequence.tokens[..read], &sequence.memory);
            }
            sequence.finish(events)?;
        }
        Ok(())
    }

    /// Brings in what waits, and looks whether its beginning was read before.
    fn admit(&mut self) {
        while (!self.crowded || self.running.is_empty())
            && self.running.len() < self.engine.options.max_batch
            && let Some(mut sequence) = self.waiting.pop_front()
        {
            // What was read before has no logits any more.
            if sequence.memory.is_empty()
                && sequence.unscored().is_empty()
                && let Some(prefix) = &mut self.prefix
                && let Some(memory) = prefix.find(&sequence.tokens)
            {
                if sequence.so_far.completion_tokens == 0 {
                    sequence.so_far.cached_tokens = memory.len();
                }
                sequence.memory = memory;
            }
            self.running.push(sequence);
        }
    }

    /// How many tokens each running sequence reads now; there is room for them. A sequence alone that finds none fails.
    fn share_out(&mut self) -> Vec<usize> {
        loop {
            let mut left = self.engine.options.prefill_chunk.max(1);
            let mut counts = Vec::with_capacity(self.running.len());
            let mut full = false;
            for sequence in &mut self.running {
                let unread = sequence.tokens.len() - sequence.memory.len();
                let border = sequence.border().checked_sub(sequence.memory.len());
                let border = border.filter(|n| *n > 0).unwrap_or(usize::MAX);
                let mut count = unread.min(border);
                if unread > FEW {
                    count = count.min(left);
                    left -= count;
                }
                full = count > 0 && !sequence.reserve(count, self.engine.pool.has_state());
                if full {
                    break;
                }
                counts.push(count);
            }
            if !full {
                return counts;
            }
            let guesses = self.running.iter_mut().map(Sequence::give_up_guesses);
            if guesses.fold(false, |any, some| any | some)
                || self.prefix.as_mut().is_some_and(PrefixCache::evict)
            {
                continue;
            }
            if let [alone] = &mut self.running[..] {
                // Others than the scheduler hold the rest.
                let (used, limit) = (self.engine.pool.used(), self.engine.pool.limit());
                alone.failed = Some(Error::invalid(format!(
                    "no room in the cache for one sequence: {used} of {limit} bytes are in use; raise --cache-memory"
                )));
                alone.memory = self.engine.pool.sequence();
                return vec![0];
            }
            // The youngest lets go of what it has and reads it again later.
            let mut youngest = self.running.pop().expect("one of them found no room");
            self.statistics.preempted += 1;
            self.crowded = true;
            youngest.memory = self.engine.pool.sequence();
            if let (Some(draft), Some(drafter)) = (&mut youngest.draft, &self.engine.drafter) {
                draft.forget(drafter);
            }
            self.waiting.push_front(youngest);
        }
    }
}

impl Sequence {
    fn is_done(&self) -> bool {
        self.so_far.finish_reason != "length"
            || (self.so_far.completion_tokens >= self.most && self.unscored().is_empty())
            || self.failed.is_some()
    }

    /// Tokens of the prompt whose log-probabilities were asked for and are not known; the first has none.
    fn unscored(&self) -> Range<usize> {
        let known = self.so_far.prompt_logprobs.len() + 1;
        match self.params.prompt_logprobs {
            Some(_) => known.min(self.prompt)..self.prompt,
            None => 0..0,
        }
    }

    /// Those that reading the tokens of `read` brings.
    fn to_score(&self, read: Range<usize>) -> Range<usize> {
        let unscored = self.unscored();
        let from = unscored.start.max(read.start + 1);
        from..unscored.end.min(read.end + 1).max(from)
    }

    /// What it needs to know of the rows behind all that it has; of several rows, and for several answers, no token can be drawn yet.
    fn ask(&self) -> Ask {
        let guesses = self.draft.as_ref().map_or(0, |draft| draft.tokens.len());
        match self.sampler.ask() {
            Ask::Draw(_) if guesses > 0 || !self.siblings.is_empty() => Ask::Logits,
            ask => ask,
        }
    }

    /// Takes the rows of logits `[V]` that they were asked for.
    fn score<'l>(&mut self, rows: &mut impl Iterator<Item = Row<'l>>) {
        let scored = std::mem::take(&mut self.scored);
        let rows = rows.by_ref().take(scored.len());
        let rows: Vec<&[f32]> = rows
            .map(|row| match row {
                Row::Logits(logits) => &*logits,
                Row::Token(_) => unreachable!("asked for with its logits"),
            })
            .collect();
        let top = self.params.prompt_logprobs.unwrap_or_default();
        let mut found = vec![None; rows.len()];
        team().fill(&mut found, 1, |i, found| {
            found[0] = Some(logprob(rows[i], self.tokens[scored.start + i], top));
        });
        self.so_far
            .prompt_logprobs
            .extend(found.into_iter().flatten());
    }

    /// Its prompt has been read, and its answer but for the last few tokens.
    fn is_continued(&self) -> bool {
        self.so_far.completion_tokens > 0
            && self.memory.len() >= self.border()
            && self.tokens.len() - self.memory.len() <= FEW
    }

    /// Whether there is room for so many tokens more, and for the guesses, which are let go of where there is none.
    fn reserve(&mut self, count: usize, has_state: bool) -> bool {
        let guesses = self.draft.as_ref().map_or(0, |draft| draft.tokens.len());
        if guesses > 0 {
            self.before = has_state.then(|| self.memory.clone());
            if self.memory.reserve(count + guesses).is_ok() {
                return true;
            }
            self.give_up_guesses();
        }
        self.memory.reserve(count).is_ok()
    }

    /// Whether there were some.
    fn give_up_guesses(&mut self) -> bool {
        self.before = None;
        let draft = self.draft.as_mut();
        draft.is_some_and(|draft| !std::mem::take(&mut draft.tokens).is_empty())
    }

    /// The further answers, which share all that has been read.
    fn split(&mut self) -> Vec<Sequence> {
        let siblings = std::mem::take(&mut self.siblings);
        let own = siblings.into_iter().map(|(id, seed)| {
            let params = SamplingParams {
                seed,
                ..self.params.clone()
            };
            Sequence {
                id,
                sampler: self.sampler.seeded(seed),
                stops: Stops::new(params.stop.clone()),
                tokens: self.tokens.clone(),
                memory: self.memory.clone(),
                stream: self.stream.clone(),
                so_far: self.so_far.clone(),
                unsaid: Vec::new(),
                siblings: Vec::new(),
                draft: self.draft.clone(),
                before: None,
                scored: 0..0,
                failed: None,
                params,
                ..*self
            }
        });
        own.collect()
    }

    /// Where a snapshot of the prompt is taken.
    fn border(&self) -> usize {
        (self.prompt - 1) / BORDER * BORDER
    }

    /// The tokens that follow what has been read: those guesses that were right, and the one behind them. How many were.
    fn take_all<'l>(
        &mut self,
        engine: &Engine,
        mut rows: impl Iterator<Item = Row<'l>>,
        events: &mut Vec<Event>,
    ) -> usize {
        let read = self.tokens.len();
        let guesses = self.draft.as_ref().map_or(&[][..], |draft| &draft.tokens);
        let guesses = guesses.to_vec();
        let mut right = 0;
        for i in 0..=guesses.len() {
            let row = rows.next().expect("one for each, and for what follows");
            // Once a guess was wrong, what follows the next ones is of no use.
            if right == i && !self.is_done() {
                self.take(engine, row, events);
                let drawn = self.tokens.get(read + i);
                right += usize::from(drawn.is_some() && drawn == guesses.get(i));
            }
        }
        let before = self.before.take();
        if right < guesses.len() {
            match before {
                Some(before) => self.memory = before,
                None => self.memory.truncate(read + right),
            }
        }
        if let Some(draft) = self.draft.as_mut().filter(|draft| !draft.tokens.is_empty()) {
            draft.judged(right);
            self.so_far.accepted_tokens += right;
        }
        right
    }

    /// The next token from its row.
    fn take(&mut self, engine: &Engine, row: Row, events: &mut Vec<Event>) {
        if let Err(error) = self.try_take(engine, row, events) {
            self.failed = Some(error);
        }
    }

    fn try_take(&mut self, engine: &Engine, row: Row, events: &mut Vec<Event>) -> Result<()> {
        let Drawn {
            token,
            logprob,
            last,
        } = self.sampler.take(row)?;
        if self.so_far.completion_tokens == 0 {
            self.ttft_s = self.submitted.elapsed().as_secs_f64();
        }
        self.so_far.completion_tokens += 1;
        // One for every token that is counted, the end's too.
        self.unsaid.extend(logprob);
        if engine.is_eos(token) {
            self.so_far.finish_reason = "stop";
            return Ok(());
        }
        self.tokens.push(token);
        let piece = self.stream.push(token)?;
        let (text, stopped) = self.stops.push(&piece);
        if stopped || last {
            self.so_far.finish_reason = "stop";
        }
        self.say(text, events);
        Ok(())
    }

    fn say(&mut self, text: String, events: &mut Vec<Event>) {
        if text.is_empty() {
            return;
        }
        self.so_far.text.push_str(&text);
        let logprobs = std::mem::take(&mut self.unsaid);
        self.so_far.logprobs.extend(logprobs.iter().cloned());
        events.push(Event::Text {
            id: self.id,
            text,
            logprobs,
        });
    }

    fn finish(mut self, events: &mut Vec<Event>) -> Result<()> {
        if let Some(error) = self.failed {
            events.push(Event::Failed { id: self.id, error });
            return Ok(());
        }
        if !self.stops.stopped {
            let rest = self.stream.clone().finish()?;
            let (mut text, stopped) = self.stops.push(&rest);
            if !stopped {
                text.push_str(&self.stops.rest());
            }
            self.say(text, events);
        }
        let logprobs = std::mem::take(&mut self.unsaid);
        if !logprobs.is_empty() {
            self.so_far.logprobs.extend(logprobs.iter().cloned());
            let (id, text) = (self.id, String::new());
            events.push(Event::Text { id, text, logprobs });
        }
        let decoding = self.submitted.elapsed().as_secs_f64() - self.ttft_s;
        self.so_far.ttft_s = self.ttft_s;
        self.so_far.cache_bytes = self.memory.bytes();
        self.so_far.decode_tokens_per_s =
            self.so_far.completion_tokens.saturating_sub(1) as f64 / decoding.max(1e-9);
        events.push(Event::Done {
            id: self.id,
            finish: Box::new(Finish {
                generation: self.so_far,
                tokens: self.tokens,
                memory: self.memory,
                stopped: self.stops.stopped,
            }),
        });
        Ok(())
    }
}

/// Texts that end an answer: what may be the beginning of one is held back.
struct Stops {
    texts: Vec<String>,
    held: String,
    stopped: bool,
}

impl Stops {
    fn new(texts: Vec<String>) -> Self {
        Self {
            texts,
            held: String::new(),
            stopped: false,
        }
    }

    /// What is certain after `piece`, and whether the answer ends there.
    fn push(&mut self, piece: &str) -> (String, bool) {
        self.held.push_str(piece);
        let ends = self.texts.iter().filter_map(|stop| self.held.find(stop));
        if let Some(end) = ends.min() {
            self.stopped = true;
            self.held.truncate(end);
            return (std::mem::take(&mut self.held), true);
        }
        let open = self.texts.iter().map(|stop| overlap(&self.held, stop));
        let certain = self.held.len() - open.max().unwrap_or(0);
        let held = self.held.split_off(certain);
        (std::mem::replace(&mut self.held, held), false)
    }

    fn rest(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes at the end of `text` that `stop` begins with.
fn overlap(text: &str, stop: &str) -> usize {
    let most = text.len().min(stop.len());
    let begins = |n: &usize| {
        text.is_char_boundary(text.len() - n) && stop.starts_with(&text[text.len() - n..])
    };
    (1..=most).rev().find(begins).unwrap_or(0)
}
