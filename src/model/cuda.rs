//! The model as it decodes on a GPU: the decoder's weights in the device's memory, activations in f32, and what sequences remember in
//! pieces of one array.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use candle_core::Device;

use super::Lm;
use super::decoder::{Ask, Decoder, DecoderLayer, Decodes, host_room};
use crate::mixer::batch::{Arena, Batch, Inputs, Plan};
use crate::mixer::{CacheType, Keeps, Pool, Span, cuda};
use crate::op::cuda::{Cuda, Gpu, Lasting, records_steps};
use crate::op::linear::cuda::{Weight, add_scaled, gather};
use crate::op::rms_norm::cuda::forward as rms_norm;
use crate::op::sample::cuda::{Draw, argmax, draw};
use crate::op::swiglu::cuda::forward as swiglu;
use crate::{Error, Result};

impl Lm {
    /// The next tokens of sequences, on the device that the model is on, or that it was told to decode on.
    ///
    /// # Errors
    /// A device that is neither the CPU nor a CUDA device, or that has no room for the weights.
    pub fn decoder(&self) -> Result<Decoder> {
        let mut decoder = self.host_decoder()?;
        if !self.decoding_device().is_cpu() {
            decoder.device = Some(open(self.decoding_device(), &decoder)?);
        }
        Ok(decoder)
    }

    /// Decodes on `device`, which gets the weights as they are stored: a model that is opened on the CPU takes no other memory there.
    pub fn decoding_on(self, device: &Device) -> Self {
        Self {
            decodes_on: Some(device.clone()),
            ..self
        }
    }

    pub fn decoding_device(&self) -> &Device {
        self.decodes_on.as_ref().unwrap_or(self.device())
    }
}

/// Bytes for what sequences remember on a device without a model.
///
/// # Errors
/// As [`Decoder::cache_room`].
pub fn cache_room(device: &Device) -> Result<usize> {
    match device.is_cpu() {
        true => Ok(host_room()),
        false => Ok(Cuda::on(device)?.free_memory()? / 2),
    }
}

/// Opens a device for a decoder.
///
/// # Errors
/// One that is no CUDA device, or has no room for the weights.
fn open(device: &Device, decoder: &Decoder) -> Result<Box<dyn Decodes>> {
    if !device.is_cuda() {
        return Err(Error::invalid(format!(
            "text is generated on the CPU or on a CUDA device, not on {:?}: choose --device cpu",
            device.location()
        )));
    }
    let found = OnGpu::new(Cuda::on(device)?, decoder, records_steps())?;
    Ok(Box::new(found))
}

#[derive(Debug)]
pub(super) struct OnGpu<G: Lasting> {
    gpu: Arc<G>,
    vocab: usize,
    width: usize,
    eps: f32,
    embedding_multiplier: f32,
    join: f32,
    embed_tokens: Weight<G::Array>,
    layers: Vec<LayerOnGpu<G::Array>>,
    norm: G::Array,
    lm_head: Option<Weight<G::Array>>,
    /// Whether steps are recorded.
    records: bool,
    /// The newest first.
    steps: Mutex<VecDeque<Step<G>>>,
}

/// Recorded steps that are kept.
const STEPS: usize = 16;

/// A step, to be played again where another is alike.
#[derive(Debug)]
struct Step<G: Lasting> {
    shape: Vec<usize>,
    pool: Pool,
    /// None: it cannot be recorded.
    recorded: Option<Recorded<G>>,
}

#[derive(Debug)]
struct Recorded<G: Lasting> {
    inputs: Inputs<G::Array>,
    logits: Option<G::Array>,
    recording: G::Recording,
}

#[derive(Debug)]
struct LayerOnGpu<A> {
    input_layernorm: A,
    mixer: cuda::OnGpu<A>,
    post_attention_layernorm: A,
    gate_proj: Weight<A>,
    up_proj: Weight<A>,
    down_proj: Weight<A>,
}

#[cfg(test)]
impl Decoder {
    /// The same by the kernels for a GPU, which `gpu` runs.
    pub(crate) fn launching_on<G: Lasting>(mut self, gpu: G, records: bool) -> Result<Self> {
        self.device = Some(Box::new(OnGpu::new(gpu, &self, records)?));
        Ok(self)
    }
}

impl<G: Lasting> OnGpu<G> {
    pub fn new(gpu: G, decoder: &Decoder, records: bool) -> Result<Self> {
        let layer = |layer: &DecoderLayer| -> Result<LayerOnGpu<G::Array>> {
            Ok(LayerOnGpu {
                input_layernorm: gpu.upload_f32(&layer.input_layernorm)?,
                mixer: layer.mixer.on(&gpu)?,
                post_attention_layernorm: gpu.upload_f32(&layer.post_attention_layernorm)?,
                gate_proj: Weight::new(&gpu, &layer.gate_proj)?,
                up_proj: Weight::new(&gpu, &layer.up_proj)?,
                down_proj: Weight::new(&gpu, &layer.down_proj)?,
            })
        };
        let config = &decoder.config;
        Ok(Self {
            vocab: config.vocab_size,
            width: config.hidden_size,
            eps: config.rms_norm_eps as f32,
            embedding_multiplier: config.embedding_multiplier as f32,
            join: config.residual_multiplier as f32,
            embed_tokens: Weight::new(&gpu, &decoder.embed_tokens)?,
            layers: decoder.layers.iter().map(layer).collect::<Result<_>>()?,
            norm: gpu.upload_f32(&decoder.norm)?,
            lm_head: match &decoder.lm_head {
                Some(w) => Some(Weight::new(&gpu, w)?),
                None => None,
            },
            gpu: Arc::new(gpu),
            records,
            steps: Mutex::default(),
        })
    }

    /// Logits of the rows that are wanted, `[wanted, V]`; none where none are.
    fn pass(&self, batch: &Batch<G>) -> candle_core::Result<Option<G::Array>> {
        let (gpu, inputs) = (batch.gpu, batch.inputs);
        let hidden = (self.embed_tokens).gather(gpu, inputs.tokens(), self.embedding_multiplier)?;
        for (i, layer) in self.layers.iter().enumerate() {
            let normed = rms_norm(gpu, &hidden, &layer.input_layernorm, self.eps)?;
            let mixed = layer.mixer.mix(batch, i, &normed)?;
            add_scaled(gpu, &hidden, &mixed, self.join)?;
            let normed = rms_norm(gpu, &hidden, &layer.post_attention_layernorm, self.eps)?;
            let gate = layer.gate_proj.product(gpu, &normed)?;
            let up = layer.up_proj.product(gpu, &normed)?;
            let down = layer.down_proj.product(gpu, &swiglu(gpu, &gate, &up)?)?;
            add_scaled(gpu, &hidden, &down, self.join)?;
        }
        if inputs.wants_nothing() {
            return Ok(None);
        }
        let wanted = gather(gpu, &hidden, inputs.wanted(), self.width)?;
        let normed = rms_norm(gpu, &wanted, &self.norm, self.eps)?;
        let head = self.lm_head.as_ref().unwrap_or(&self.embed_tokens);
        head.product(gpu, &normed).map(Some)
    }
}

impl<G: Lasting> OnGpu<G> {
    /// A pass, and what `then` makes of its logits; a step is recorded where that was asked for.
    fn run<R>(
        &self,
        plan: &Plan,
        pool: &Pool,
        steps: &mut VecDeque<Step<G>>,
        then: impl FnOnce(Option<&G::Array>) -> Result<R>,
    ) -> Result<R> {
        let gpu = &*self.gpu;
        let shape = plan.shape();
        let known = (steps.iter()).find(|step| step.shape == shape && step.pool.is(pool));
        if let Some(recorded) = known.and_then(|step| step.recorded.as_ref()) {
            recorded.inputs.write(gpu, plan)?;
            gpu.replay(&recorded.recording)?;
            return then(recorded.logits.as_ref());
        }
        let inputs = Inputs::new(gpu, plan)?;
        let batch = Batch {
            gpu,
            memory: Arena::<G>::of(pool)?.entries(),
            pool,
            inputs: &inputs,
        };
        if !self.records || !plan.is_step() || known.is_some() {
            return then(self.pass(&batch)?.as_ref());
        }
        // Its error is the engine's, not the tensor library's.
        let work = || self.pass(&batch);
        let (found, recorded) = gpu.record(work, |logits| Ok(then(logits.as_ref())))?;
        steps.truncate(STEPS - 1);
        steps.push_front(Step {
            shape,
            pool: pool.clone(),
            recorded: recorded.map(|(recording, logits)| Recorded {
                inputs,
                logits,
                recording,
            }),
        });
        found
    }

    /// What is read of the logits `[wanted, V]`.
    fn rows(
        &self,
        found: Option<&G::Array>,
        asks: &[Ask],
        logits: &mut Vec<f32>,
    ) -> Result<Vec<Option<u32>>> {
        let Some(found) = found else {
            return Ok(Vec::new());
        };
        let gpu = &*self.gpu;
        let mut tokens = vec![None; asks.len()];
        if asks.contains(&Ask::Best) {
            tokens = argmax(gpu, found, self.vocab)?;
            let asked = tokens.iter_mut().zip(asks);
            let others = asked.filter(|(_, ask)| **ask != Ask::Best);
            others.for_each(|(token, _)| *token = None);
        }
        let draws = asks.iter().enumerate().filter_map(|(row, ask)| match ask {
            Ask::Draw(draw) => Some((row, *draw)),
            Ask::Logits | Ask::Best => None,
        });
        let draws: Vec<(usize, Draw)> = draws.collect();
        if !draws.is_empty() {
            let drawn = draw(gpu, found, self.vocab, &draws)?;
            for ((row, _), token) in draws.iter().zip(drawn) {
                tokens[*row] = token;
            }
        }
        // What a device cannot choose from the host explains.
        let rows: Vec<usize> = (0..asks.len()).filter(|i| tokens[*i].is_none()).collect();
        logits.resize(rows.len() * self.vocab, 0.);
        // Neighbours at once.
        let mut left = logits.as_mut_slice();
        for rows in rows.chunk_by(|a, b| a + 1 == *b) {
            let (to, behind) = left.split_at_mut(rows.len() * self.vocab);
            let at = size_of::<f32>() * rows[0] * self.vocab;
            gpu.read(found, at, bytemuck::cast_slice_mut(to))?;
            left = behind;
        }
        Ok(tokens)
    }
}

impl<G: Lasting> Decodes for OnGpu<G> {
    fn pool(&self, keeps: &[Keeps], kind: CacheType, limit: usize) -> Result<Pool> {
        let free = self.gpu.free_memory()?;
        let most = free / 10 * 9;
        let bytes = match limit {
            usize::MAX => most,
            limit if limit <= most => limit,
            limit => {
                return Err(Error::invalid(format!(
                    "a cache of {limit} bytes, where the device has {free} left behind the weights, a tenth of them for what passes compute \
                     with: lower --cache-memory, or use a model in fewer bits"
                )));
            }
        };
        Pool::on(keeps, kind, Box::new(Arena::new(&self.gpu, bytes)?))
    }

    fn free_memory(&self) -> Result<usize> {
        Ok(self.gpu.free_memory()?)
    }

    fn read(
        &self,
        tokens: &[u32],
        spans: &mut [Span],
        wanted: &[usize],
        asks: &[Ask],
        logits: &mut Vec<f32>,
    ) -> Result<Vec<Option<u32>>> {
        logits.clear();
        if let Some(token) = tokens.iter().find(|token| **token as usize >= self.vocab) {
            return Err(Error::invalid(format!(
                "token {token}, where the model has {}",
                self.vocab
            )));
        }
        let Some(pool) = spans.first().map(|span| span.memory.pool().clone()) else {
            return Ok(Vec::new());
        };
        pool.check()?;
        let mut plan = Plan::new(tokens, spans, wanted);
        for layer in &self.layers {
            layer.mixer.prepare(&mut plan)?;
        }
        // Decoding goes on in one pass at a time.
        let mut steps = self.steps.lock().unwrap_or_else(|e| e.into_inner());
        let found = self.run(&plan, &pool, &mut steps, |found| {
            self.rows(found, asks, logits)
        })?;
        for span in spans {
            span.memory.advance(span.rows.len());
        }
        Ok(found)
    }
}
