//! The model as it decodes: on the CPU, over weights as they are stored, the next tokens of any number of sequences at once.

use super::{Layer, Lm, ModelConfig};
use crate::hash::Hash;
use crate::mixer::{self, Keeps, Span, Work};
use crate::op::cpu::entries;
use crate::op::linear::{Part, Stored, products};
use crate::op::rms_norm::norm_row;
use crate::op::swiglu::swiglu_row;
use crate::op::team::fill;
use crate::{Error, Result};

#[derive(Debug)]
pub struct Decoder {
    pub config: ModelConfig,
    embed_tokens: Stored,
    layers: Vec<DecoderLayer>,
    norm: Vec<f32>,
    lm_head: Option<Stored>,
}

#[derive(Debug)]
struct DecoderLayer {
    input_layernorm: Vec<f32>,
    mixer: mixer::Decoder,
    post_attention_layernorm: Vec<f32>,
    gate_proj: Stored,
    up_proj: Stored,
    down_proj: Stored,
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

/// Entries below which other threads are not worth waking.
const ALONE: usize = 1 << 15;

impl Lm {
    /// # Errors
    /// On another device than the CPU.
    pub fn decoder(&self) -> Result<Decoder> {
        if !self.device().is_cpu() {
            return Err(Error::invalid(
                "text is generated on the CPU so far: choose --device cpu",
            ));
        }
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
        })
    }
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

    /// Reads `tokens [N]`, those of one span after those of the other (spans that have room for them reserved): the logits of what follows
    /// rows `wanted`, `[wanted, V]`. A row's are the same whatever is read beside it and however its sequence was cut.
    ///
    /// # Errors
    /// A token outside of the vocabulary.
    pub fn read<'r>(
        &self,
        tokens: &[u32],
        spans: &mut [Span],
        wanted: &[usize],
        reading: &'r mut Reading,
    ) -> Result<&'r mut [f32]> {
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
