//! Sequences that are decoded together: read, continued a token at a time, and done, each for itself.

use std::time::Instant;

use candle_core::{DType, Tensor};

use super::{Engine, Generation, Sampler, SamplingParams};
use crate::Result;
use crate::data::DecodeStream;
use crate::model::LmState;

/// Sequences in the order of their prompts; those that are done have left.
pub struct Batch<'e> {
    engine: &'e Engine,
    state: LmState,
    sequences: Vec<Sequence>,
    started: Instant,
}

struct Sequence {
    /// Its place among the prompts.
    index: usize,
    sampler: Sampler,
    stream: DecodeStream,
    /// What is read next: the prompt, then the token that was drawn.
    next: Vec<u32>,
    most: usize,
    /// Seconds until the first token.
    ttft_s: f64,
    so_far: Generation,
}

/// Told of every piece of text as soon as it is certain, and of which prompt; false ends that sequence.
pub type Emit<'a> = &'a mut dyn FnMut(usize, &str) -> bool;

impl<'e> Batch<'e> {
    /// Nothing is computed yet.
    ///
    /// # Errors
    /// Settings out of range, or a prompt that fills the model's context.
    pub fn admit(engine: &'e Engine, prompts: &[&str], params: &SamplingParams) -> Result<Self> {
        params.validate()?;
        let sequences = prompts.iter().enumerate().map(|(index, prompt)| {
            let ids = engine.prompt(prompt)?;
            // Streams of their own, the first that of a prompt alone.
            let own = SamplingParams {
                seed: params.seed.wrapping_add(index as u64),
                ..params.clone()
            };
            Ok(Sequence {
                index,
                sampler: Sampler::new(&own),
                stream: engine.tokenizer.decode_stream(&ids),
                most: engine.most(ids.len(), params.max_tokens)?,
                ttft_s: 0.0,
                so_far: Generation::of(ids.len()),
                next: ids,
            })
        });
        Ok(Self {
            state: engine.lm.state(prompts.len())?,
            sequences: sequences.collect::<Result<_>>()?,
            started: Instant::now(),
            engine,
        })
    }

    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// One more token for every sequence. Gives those that are done, with their places.
    pub fn step(&mut self, emit: Emit) -> Result<Vec<(usize, Generation)>> {
        let logits = self.logits()?;
        let mut done = vec![false; self.sequences.len()];
        for ((sequence, logits), done) in self.sequences.iter_mut().zip(logits).zip(&mut done) {
            if sequence.most == 0 {
                *done = true;
                continue;
            }
            let token = sequence.sampler.sample(&logits)?;
            let so_far = &mut sequence.so_far;
            if so_far.completion_tokens == 0 {
                sequence.ttft_s = self.started.elapsed().as_secs_f64();
            }
            so_far.completion_tokens += 1;
            if self.engine.is_eos(token) {
                so_far.finish_reason = "stop";
                *done = true;
                continue;
            }
            let piece = sequence.stream.push(token)?;
            so_far.text.push_str(&piece);
            let left = !piece.is_empty() && !emit(sequence.index, &piece);
            *done = left || so_far.completion_tokens == sequence.most;
            sequence.next = vec![token];
        }
        self.finish(&done, emit)
    }

    /// Of every sequence's next token, after all that it has.
    fn logits(&mut self) -> Result<Vec<Vec<f32>>> {
        let lm = &self.engine.lm;
        let added: Vec<usize> = self.sequences.iter().map(|s| s.next.len()).collect();
        let (rows, len) = (added.len(), added.iter().copied().max().unwrap_or(0));
        let filled = |s: &Sequence| -> Vec<u32> {
            (0..len)
                .map(|t| s.next.get(t).copied().unwrap_or(0))
                .collect()
        };
        let ids: Vec<u32> = self.sequences.iter().flat_map(filled).collect();
        let ids = Tensor::from_vec(ids, (rows, len), lm.device())?;
        let ends: Vec<u32> = (added.iter().enumerate())
            .map(|(row, added)| (row * len + added - 1) as u32)
            .collect();
        let hidden = lm.extend(&ids, added, &mut self.state)?;
        let hidden = hidden.reshape((rows * len, lm.config.hidden_size))?;
        let ends = Tensor::from_vec(ends, rows, lm.device())?;
        let logits = lm.head(&hidden.index_select(&ends, 0)?)?;
        Ok(logits.to_dtype(DType::F32)?.to_vec2()?)
    }

    /// Lets go of what is done; the rest goes on without it.
    fn finish(&mut self, done: &[bool], emit: Emit) -> Result<Vec<(usize, Generation)>> {
        if !done.contains(&true) {
            return Ok(Vec::new());
        }
        let going: Vec<u32> = (0..done.len() as u32)
            .filter(|i| !done[*i as usize])
            .collect();
        let mut finished = Vec::new();
        let mut rest = Vec::new();
        for (sequence, done) in std::mem::take(&mut self.sequences).into_iter().zip(done) {
            match done {
                true => finished.push((sequence.index, sequence.finish(self.started, emit)?)),
                false => rest.push(sequence),
            }
        }
        if !going.is_empty() {
            let going = Tensor::from_vec(going, rest.len(), self.engine.lm.device())?;
            self.state = self.state.select(&going)?;
        }
        self.sequences = rest;
        Ok(finished)
    }
}

impl Sequence {
    fn finish(self, started: Instant, emit: Emit) -> Result<Generation> {
        let mut found = self.so_far;
        let rest = self.stream.finish()?;
        if !rest.is_empty() {
            found.text.push_str(&rest);
            emit(self.index, &rest);
        }
        let decoding = started.elapsed().as_secs_f64() - self.ttft_s;
        found.ttft_s = self.ttft_s;
        found.decode_tokens_per_s =
            found.completion_tokens.saturating_sub(1) as f64 / decoding.max(1e-9);
        Ok(found)
    }
}
