//! The model as it decodes: over weights as they are stored, the next tokens of any number of sequences at once; here on the CPU.

use std::fmt;

use super::{Layer, Lm, ModelConfig};
use crate::Result;
use crate::hash::Hash;
use crate::mixer::{self, CacheType, Keeps, Pool, Span, Work};
use crate::op::cpu::entries;
use crate::op::linear::{Part, Stored, products};
use crate::op::rms_norm::norm_row;
use crate::op::runtime::free_memory;
use crate::op::sample::cuda::Draw;
use crate::op::swiglu::swiglu_row;
use crate::op::team::fill;

/// A device that decodes.
pub(super) trait Decodes: fmt::Debug + Send + Sync {
    /// As [`Decoder::pool`].
    fn pool(&self, keeps: &[Keeps], kind: CacheType, limit: usize) -> Result<Pool>;

    /// Bytes that nobody uses.
    fn free_memory(&self) -> Result<usize>;

    /// As [`Decoder::read_rows`]: tokens; where there is none the next row of `logits` is its.
    fn read(
        &self,
        tokens: &[u32],
        spans: &mut [Span],
        wanted: &[usize],
        asks: &[Ask],
        logits: &mut Vec<f32>,
    ) -> Result<Vec<Option<u32>>>;
}

/// What is asked of what follows a token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Ask {
    Logits,
    /// The first of the likeliest tokens is enough.
    Best,
    /// One that is drawn.
    Draw(Draw),
}

/// What follows a token.
#[derive(Debug)]
pub enum Row<'r> {
    /// `[V]`
    Logits(&'r mut [f32]),
    /// What a device has chosen, as it was asked to; all logits are below infinity.
    Token(u32),
}

#[derive(Debug)]
pub struct Decoder {
    pub config: ModelConfig,
    pub(super) embed_tokens: Stored,
    pub(super) layers: Vec<DecoderLayer>,
    pub(super) norm: Vec<f32>,
    pub(super) lm_head: Option<Stored>,
    /// What computes instead of the CPU.
    pub(super) device: Option<Box<dyn Decodes>>,
}

#[derive(Debug)]
pub(super) struct DecoderLayer {
    pub input_layernorm: Vec<f32>,
    pub mixer: mixer::Decoder,
    pub post_attention_layernorm: Vec<f32>,
    pub gate_proj: Stored,
    pub up_proj: Stored,
    pub down_proj: Stored,
}

/// What reading tokens works with, and what it gives.
#[derive(Default)]
pub struct Reading {
    work: Work,
    /// `[N, D]` each.
    hidden: Vec<f32>,
    normed: Vec<f32>,
    mixed: Vec<f32>,
    /// `[N, F]` each.
    gate: Vec<f32>,
    up: Vec<f32>,
    logits: Vec<f32>,
}

/// Where the system does not tell what is free.
const FALLBACK_MEMORY: usize = 2 << 30;

/// Entries below which other threads are not worth waking.
const ALONE: usize = 1 << 15;

impl Lm {
    /// What the layers remember of a sequence.
    ///
    /// # Errors
    /// A tensor library that fails.
    pub fn keeps(&self) -> Result<Vec<Keeps>> {
        Ok(self.host_decoder()?.keeps())
    }

    /// On the CPU.
    pub(super) fn host_decoder(&self) -> Result<Decoder> {
        let layer = |layer: &Layer| -> Result<DecoderLayer> {
            Ok(DecoderLayer {
                input_layernorm: entries(&layer.input_layernorm)?,
                mixer: layer.mixer.decoder()?,
                post_attention_layernorm: entries(&layer.post_attention_layernorm)?,
                gate_proj: layer.mlp.gate_proj.stored()?,
                up_proj: layer.mlp.up_proj.stored()?,
                down_proj: layer.mlp.down_proj.stored()?,
            })
        };
        Ok(Decoder {
            config: self.config.clone(),
            embed_tokens: self.embed_tokens.stored()?,
            layers: self.layers.iter().map(layer).collect::<Result<_>>()?,
            norm: match self.config.logits_scaling as f32 {
                1.0 => entries(&self.norm)?,
                scaling => entries(&self.norm)?.iter().map(|x| x / scaling).collect(),
            },
            lm_head: self.lm_head.as_ref().map(|w| w.stored()).transpose()?,
            device: None,
        })
    }
}

/// Half of what is free.
pub(super) fn host_room() -> usize {
    free_memory().map_or(FALLBACK_MEMORY, |free| free / 2)
}

impl Decoder {
    /// Whether two decoders are of one model: of its sizes, and of the first and last rows of its matrices.
    pub fn fingerprint(&self) -> String {
        let config = serde_json::to_vec(&self.config).expect("configs serialise");
        let mut hash = Hash::of(&config);
        let head = self.lm_head.iter().chain([&self.embed_tokens]);
        let layers = self
            .layers
            .iter()
            .flat_map(|l| [&l.gate_proj, &l.up_proj, &l.down_proj]);
        for w in head.chain(layers) {
            let bytes = w.bytes();
            let some = bytes.len().min(4096);
            hash = hash.with(&bytes[..some]).with(&bytes[bytes.len() - some..]);
        }
        hash.to_string()
    }

    /// What the layers remember of a sequence.
    pub fn keeps(&self) -> Vec<Keeps> {
        self.layers
            .iter()
            .map(|layer| layer.mixer.keeps())
            .collect()
    }

    /// Memory for sequences where the decoder computes, up to `limit` bytes; `usize::MAX`: all that there is.
    ///
    /// # Errors
    /// Too little for one token, or more than a device has.
    pub fn pool(&self, kind: CacheType, limit: usize) -> Result<Pool> {
        match &self.device {
            Some(device) => device.pool(&self.keeps(), kind, limit),
            None => Pool::new(&self.keeps(), kind, limit, 1),
        }
    }

    /// Bytes for what sequences remember, where nobody says how many: half of what is free where the decoder computes.
    ///
    /// # Errors
    /// A device that fails.
    pub fn cache_room(&self) -> Result<usize> {
        Ok(match &self.device {
            Some(device) => device.free_memory()? / 2,
            None => host_room(),
        })
    }

    /// As [`Decoder::read`]; a device keeps the logits of rows of which no more than a token is asked, the CPU gives all.
    ///
    /// # Errors
    /// As [`Decoder::read`].
    pub fn read_rows<'r>(
        &self,
        tokens: &[u32],
        spans: &mut [Span],
        wanted: &[usize],
        asks: &[Ask],
        reading: &'r mut Reading,
    ) -> Result<Vec<Row<'r>>> {
        let vocab = self.config.vocab_size;
        let Some(device) = &self.device else {
            let logits = self.read(tokens, spans, wanted, reading)?;
            return Ok(logits.chunks_exact_mut(vocab).map(Row::Logits).collect());
        };
        let found = device.read(tokens, spans, wanted, asks, &mut reading.logits)?;
        let mut logits = reading.logits.chunks_exact_mut(vocab);
        let rows = found.into_iter().map(|token| match token {
            Some(token) => Row::Token(token),
            None => Row::Logits(logits.next().expect("one where no token is")),
        });
        Ok(rows.collect())
    }

    /// Reads `tokens [N]`, those of one span after those of the other (spans that have room for them reserved): the logits of what follows
    /// rows `wanted`, `[wanted, V]`. On the CPU a row's are the same whatever is read beside it and however its sequence was cut.
    ///
    /// # Errors
    /// A token outside of the vocabulary, or a device that fails.
    pub fn read<'r>(
        &self,
        tokens: &[u32],
        spans: &mut [Span],
        wanted: &[usize],
        reading: &'r mut Reading,
    ) -> Result<&'r mut [f32]> {
        if let Some(device) = &self.device {
            let asks = vec![Ask::Logits; wanted.len()];
            device.read(tokens, spans, wanted, &asks, &mut reading.logits)?;
            return Ok(&mut reading.logits);
        }
        let (d, f, eps) = (
            self.config.hidden_size,
            self.config.intermediate_size,
            self.config.rms_norm_eps as f32,
        );
        let n = tokens.len();
        let Reading {
            work,
            hidden,
            normed,
            mixed,
            gate,
            up,
            logits,
        } = reading;
        for (room, width) in [
            (&mut *hidden, d),
            (&mut *normed, d),
            (&mut *mixed, d),
            (&mut *gate, f),
            (&mut *up, f),
        ] {
            room.resize(n * width, 0.);
        }
        self.embed_tokens.gather_into(tokens, hidden)?;
        let embedding_multiplier = self.config.embedding_multiplier as f32;
        if embedding_multiplier != 1.0 {
            hidden.iter_mut().for_each(|x| *x *= embedding_multiplier);
        }
        let join = self.config.residual_multiplier as f32;
        for (i, layer) in self.layers.iter().enumerate() {
            norm(hidden, &layer.input_layernorm, eps, normed);
            layer.mixer.mix(i, normed, spans, mixed, work);
            add(hidden, mixed, join);
            norm(hidden, &layer.post_attention_layernorm, eps, normed);
            let mut parts = [
                Part {
                    w: &layer.gate_proj,
                    y: &mut *gate,
                },
                Part {
                    w: &layer.up_proj,
                    y: &mut *up,
                },
            ];
            products(normed, &mut parts, &mut work.scratch);
            by_rows(gate, f, |i, gate| swiglu_row(gate, &up[i * f..][..f]));
            let down = Part {
                w: &layer.down_proj,
                y: &mut *mixed,
            };
            products(gate, &mut [down], &mut work.scratch);
            add(hidden, mixed, join);
        }
        for span in spans {
            span.memory.advance(span.rows.len());
        }
        // Only what is asked for goes through the head.
        for (row, to) in wanted.iter().zip(normed.chunks_exact_mut(d)) {
            norm_row(&hidden[row * d..][..d], &self.norm, eps, to);
        }
        let head = self.lm_head.as_ref().unwrap_or(&self.embed_tokens);
        logits.resize(wanted.len() * head.rows(), 0.);
        let part = Part {
            w: head,
            y: &mut *logits,
        };
        products(&normed[..wanted.len() * d], &mut [part], &mut work.scratch);
        Ok(logits)
    }
}

fn by_rows(out: &mut [f32], width: usize, work: impl Fn(usize, &mut [f32]) + Sync) {
    fill(out.len() >= ALONE, out, width, work);
}

fn norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let d = weight.len();
    by_rows(out, d, |i, out| {
        norm_row(&x[i * d..][..d], weight, eps, out)
    });
}

fn add(x: &mut [f32], y: &[f32], factor: f32) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += factor * y);
}
