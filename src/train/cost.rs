//! What a training step takes, counted from sizes alone: memory, part by part, and operations. `tests/memory.rs` holds the memory
//! to what processes are measured to take.

use candle_core::DType;
use serde::Serialize;

use super::optimizer::{OptimizerConfig, Roles};
use super::params::may_part;
use crate::mixer::Windows;
use crate::model::{LOGITS, ModelConfig, layer_of};
use crate::op::runtime::{OF_A_THREAD, between, shares_chunk};
use crate::weights::Precision;

const F32: usize = size_of::<f32>();
const BF16: usize = 2;

/// Memory of one kind.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Part {
    pub name: &'static str,
    pub bytes: usize,
    /// Pages of a file: the system may drop them and read them again.
    pub mapped: bool,
    /// Bytes among them in blocks that share pieces of memory.
    #[serde(skip)]
    shared: usize,
}

/// What is resident at a time.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Memory {
    pub parts: Vec<Part>,
}

impl Memory {
    fn add(mut self, added: Part) -> Self {
        match self.parts.iter_mut().find(|part| part.name == added.name) {
            Some(part) => {
                part.bytes = part.bytes.saturating_add(added.bytes);
                part.shared = part.shared.saturating_add(added.shared);
            }
            None if added.bytes == 0 => {}
            None => self.parts.push(added),
        }
        self
    }

    /// In few blocks, or large ones.
    pub fn with(self, name: &'static str, bytes: usize) -> Self {
        self.with_share(name, bytes, 0.0)
    }

    /// Of which this share is in blocks that share pieces of memory.
    fn with_share(self, name: &'static str, bytes: usize, share: f64) -> Self {
        self.add(Part {
            name,
            bytes,
            mapped: false,
            shared: (share * bytes as f64) as usize,
        })
    }

    pub fn with_file(self, name: &'static str, bytes: usize) -> Self {
        self.add(Part {
            name,
            bytes,
            mapped: true,
            shared: 0,
        })
    }

    /// Both at once.
    pub fn and(self, other: &Memory) -> Self {
        other.parts.iter().cloned().fold(self, Self::add)
    }

    fn sum(&self, mapped: bool) -> usize {
        let parts = self.parts.iter().filter(|part| part.mapped == mapped);
        parts.fold(0, |sum, part| sum.saturating_add(part.bytes))
    }

    /// Memory of the process's own.
    pub fn own(&self) -> usize {
        self.sum(false)
    }

    /// What the allocator has resident between its blocks.
    fn between(&self) -> usize {
        between(self.parts.iter().map(|part| part.shared).sum())
    }

    /// With what the allocator has resident besides as a part of its own.
    pub fn resident(mut self) -> Self {
        let between = self.between();
        self.parts.iter_mut().for_each(|part| part.shared = 0);
        self.with("allocator", between)
    }

    /// Pages of files.
    pub fn mapped(&self) -> usize {
        self.sum(true)
    }

    pub fn total(&self) -> usize {
        let own = self.own().saturating_add(self.between());
        own.saturating_add(self.mapped())
    }

    /// The largest.
    pub fn peak(phases: impl IntoIterator<Item = Memory>) -> Self {
        let largest = phases.into_iter().max_by_key(Memory::total);
        largest.unwrap_or_default()
    }
}

/// A model that learns, by its sizes.
#[derive(Clone, Copy)]
pub struct Learner<'a> {
    pub config: &'a ModelConfig,
    /// Which weights learn, by name.
    pub trained: &'a dyn Fn(&str) -> bool,
}

/// Of the trained weights.
struct Trained {
    /// Entries of each layer.
    layers: Vec<usize>,
    /// Of the largest matrix of each layer, times how often it is there on the way back beside its gradient: zeros and summand, and
    /// for matrices that stand in one tensor each part widened to the whole as well.
    largest: Vec<usize>,
    /// The same without those in bf16, whose gradients candle's graph does not have.
    beside: Vec<usize>,
    /// Of the largest in bf16, which is widened for its step.
    widened: usize,
    /// The head's own, or the embedding that is the head.
    head: bool,
    embedding: bool,
    all: usize,
    /// As they are kept.
    bytes: usize,
    /// Share of these in tensors of less than a piece of memory.
    small: f64,
    moments: usize,
}

impl<'a> Learner<'a> {
    fn weights(&self, optimizer: OptimizerConfig, weights: Precision) -> Trained {
        let config = self.config;
        let roles = Roles::new(config);
        let count = config.layers.len();
        let tied = config.tie_word_embeddings;
        let mut found = Trained {
            layers: vec![0; count],
            largest: vec![0; count],
            beside: vec![0; count],
            widened: 0,
            embedding: (self.trained)(EMBEDDING),
            head: (self.trained)(if tied { EMBEDDING } else { HEAD }),
            all: 0,
            bytes: 0,
            small: 0.0,
            moments: 0,
        };
        let learns = |name: &str| (self.trained)(name);
        for (name, shape) in config.params().iter().filter(|(name, _)| learns(name)) {
            let entries: usize = shape.iter().product();
            let rounded = weights == Precision::Bf16 && roles.of(name, shape).may_be_rounded();
            found.all += entries;
            found.bytes += if rounded { BF16 } else { F32 } * entries;
            if rounded {
                found.widened = found.widened.max(entries);
            }
            found.small += if shares_chunk(entries * F32) {
                entries as f64
            } else {
                0.0
            };
            found.moments += optimizer.state_bytes(name, shape);
            if let Some(i) = layer_of(name) {
                let mixer = &config.layers[i];
                let stacked = mixer.stacked().iter().any(|(part, _)| name.ends_with(part));
                let times = if stacked { 4 } else { 2 };
                found.layers[i] += entries;
                found.largest[i] = found.largest[i].max(times * entries);
                if !rounded {
                    found.beside[i] = found.beside[i].max(times * entries);
                }
            }
        }
        found.small /= found.all.max(1) as f64;
        found
    }

    /// The first layer that gradients reach: what is before it keeps no graph.
    fn first(&self) -> usize {
        let config = self.config;
        if (self.trained)(EMBEDDING) {
            return 0;
        }
        let names = config.params();
        let learning = names.iter().filter(|(name, _)| (self.trained)(name));
        let layers = learning.filter_map(|(name, _)| layer_of(name));
        layers.min().unwrap_or(config.layers.len())
    }

    /// f32 entries that the graph of all layers keeps for the way back.
    fn graph(&self, windows: Windows) -> usize {
        let layers = self.first()..self.config.layers.len();
        let each = layers.map(|i| self.config.layer_pass(i, windows).kept);
        each.fold(0, usize::saturating_add)
    }

    /// Bytes of the same.
    pub fn activations(&self, windows: Windows) -> usize {
        self.graph(windows).saturating_mul(F32)
    }

    /// Bytes of the trained weights.
    pub fn bytes(&self, weights: Precision) -> usize {
        self.weights(OptimizerConfig::Adamw, weights).bytes
    }

    /// Entries that learn.
    pub fn entries(&self) -> usize {
        let names = self.config.params().into_iter();
        let learning = names.filter(|(name, _)| (self.trained)(name));
        learning
            .map(|(_, shape)| shape.iter().product::<usize>())
            .sum()
    }

    /// Entries of gradients that groups of windows beside each other ([`Windows::groups`]) have besides, where `entries` learn in f32.
    fn beside(windows: Windows, entries: usize) -> usize {
        match may_part(entries) {
            true => (windows.groups().count() - 1) * entries,
            false => 0,
        }
    }

    /// Bytes of the moments.
    pub fn moments(&self, optimizer: OptimizerConfig) -> usize {
        self.weights(optimizer, Precision::F32).moments
    }

    /// Whether the activations of a pass are too many to be kept where so many bytes are free before the first step: more than half of
    /// what gradients and moments (in full) will leave.
    pub fn is_short(&self, windows: Windows, free: usize) -> bool {
        let entries = 3 * self.entries() + Self::beside(windows, self.entries());
        let besides = F32 * entries + of_threads(windows);
        self.activations(windows) > free.saturating_sub(besides) / 2
    }
}

/// What threads keep for themselves that take groups of windows.
fn of_threads(windows: Windows) -> usize {
    let threads = windows.groups().count().min(rayon::current_num_threads());
    (threads - 1) * OF_A_THREAD
}

/// Entries of f32 that as many of `compute` take.
fn stored(entries: usize, compute: DType) -> usize {
    entries.saturating_mul(compute.size_in_bytes()) / F32
}

/// Share of activations in blocks that share pieces of memory: all, or none where the MLP's are larger.
fn shared_activations(config: &ModelConfig, tokens: usize) -> f64 {
    match shares_chunk(tokens * config.intermediate_size * F32) {
        true => 1.0,
        false => 0.0,
    }
}

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// Logits pieces that are there at once: a model's, the zeros, summand and sum of their gradient; with a teacher its own.
const PIECES: usize = 4;

/// How a model learns: from a teacher's logits, or from text or pairs alone.
#[derive(Clone, Copy)]
pub struct StepSizes<'a> {
    pub learner: Learner<'a>,
    pub teacher: Option<&'a ModelConfig>,
    /// A micro-batch.
    pub windows: Windows,
    pub accumulation: usize,
    pub weights: Precision,
    /// Of activations between products.
    pub compute: DType,
    pub optimizer: OptimizerConfig,
    /// Activations are computed anew on the way back.
    pub anew: bool,
    /// Gradients are applied as they appear.
    pub at_once: bool,
}

impl StepSizes<'_> {
    /// The process's own memory while a step is taken, at the most: weights that are trained and all that goes with them.
    pub fn memory(&self) -> Memory {
        let config = self.learner.config;
        let (n, d, count) = (
            self.windows.tokens(),
            config.hidden_size,
            config.layers.len(),
        );
        let trained = self.learner.weights(self.optimizer, self.weights);
        let held = Memory::default()
            .with_share(WEIGHTS, trained.bytes, trained.small)
            .with_share("moments", trained.moments, trained.small);
        let share = shared_activations(config, n);
        let before = if self.accumulation > 1 {
            trained.all
        } else {
            0
        };
        let piece = (LOGITS / config.vocab_size).clamp(1, n.max(1)) * config.vocab_size;
        let phase = |gradients: usize, kept: usize, back: usize, pieces: usize| {
            let logits = if shares_chunk(piece * F32) { 1.0 } else { 0.0 };
            held.clone()
                .with_share("gradients", gradients * F32, trained.small)
                .with_share("activations", kept * F32, share)
                .with_share("on the way back", back * F32, share)
                .with_share("logits", pieces * piece * F32, logits)
        };
        // In f32 entries; the residual stream is in f32 itself.
        let stored = |entries: usize| stored(entries, self.compute);
        let taught = self.teacher.map_or(0, |teacher| n * teacher.hidden_size);
        let mut phases = Vec::new();
        if let Some(teacher) = self.teacher {
            let layers = 0..teacher.layers.len();
            let widest = layers.map(|i| teacher.layer_pass(i, self.windows).kept);
            let forward = stored(widest.max().unwrap_or(0)) + 2 * n * teacher.hidden_size;
            phases.push(phase(before, forward, 0, 0));
        }
        let first = self.learner.first();
        let graph = match self.anew {
            true => (count - first) * n * d,
            false => stored(self.learner.graph(self.windows)),
        };
        let head = match trained.head {
            true => config.vocab_size * d,
            false => 0,
        };
        // The last layer's output and its norm, the norm's gradient piece by piece and whole.
        let pieces = PIECES + usize::from(self.teacher.is_some());
        phases.push(phase(before + head, graph + taught + 4 * n * d, 0, pieces));
        let mut gradients = head;
        // An embedding's gradient has its last part at the end.
        let tied = if config.tie_word_embeddings { head } else { 0 };
        for i in (first..count).rev() {
            let pass = config.layer_pass(i, self.windows);
            gradients += trained.layers[i];
            let kept = match self.anew {
                true => (i + 1 - first) * n * d + stored(pass.kept),
                false => graph + n * d,
            };
            let so_far = match (self.accumulation > 1, self.anew) {
                _ if self.at_once => tied + trained.layers[i],
                (true, true) => before + trained.layers[i],
                _ => before + gradients,
            };
            let mlp = 2 * n * config.intermediate_size + 7 * n * d;
            let back = stored(pass.back).max(stored(mlp) + trained.beside[i]);
            phases.push(phase(so_far, kept + taught, back, 0));
        }
        let all = match self.at_once {
            true => head.max(trained.layers.iter().copied().max().unwrap_or(0)),
            false => before.max(trained.all),
        };
        if trained.embedding && !config.tie_word_embeddings {
            phases.push(phase(all, taught + 3 * n * d, config.vocab_size * d, 0));
        }
        let made = self.optimizer.made() * trained.largest.iter().max().unwrap_or(&0) / 2;
        phases.push(phase(all, 0, made + trained.widened, 0));
        let beside = match self.at_once || self.weights != Precision::F32 {
            true => 0,
            false => Learner::beside(self.windows, trained.all),
        };
        Memory::peak(phases)
            .with("gradients", beside * F32)
            .with("threads", of_threads(self.windows))
    }

    /// Multiplications and additions of a token, teacher included.
    pub fn operations(&self) -> f64 {
        let student = operations(self.learner, self.windows, self.anew);
        let teacher = self.teacher.map(|t| forward(t, self.windows));
        student + teacher.unwrap_or(0.0)
    }
}

/// What is trained, as it is kept.
const WEIGHTS: &str = "trained weights";

/// The way back of what has no weights (attention's scores, the scan) over its way there: scores or states again, and a gradient of
/// every operand.
const BACK: f64 = 2.5;

/// Operations of a token through the layers `from` on.
fn layers(config: &ModelConfig, windows: Windows, from: usize) -> [f64; 2] {
    let params = config.params();
    let inner = params
        .iter()
        .filter(|(name, _)| layer_of(name).is_some_and(|i| i >= from));
    let products = ModelConfig::products(inner.map(|(_, shape)| shape.as_slice()));
    let mixers = (from..config.layers.len()).map(|i| config.layer_pass(i, windows).flops);
    [products, mixers.sum::<f64>() / windows.tokens() as f64]
}

fn head(config: &ModelConfig) -> f64 {
    2.0 * (config.vocab_size * config.hidden_size) as f64
}

/// Operations of a token through a model, without a way back.
pub fn forward(config: &ModelConfig, windows: Windows) -> f64 {
    layers(config, windows, 0).iter().sum::<f64>() + head(config)
}

fn operations(learner: Learner, windows: Windows, anew: bool) -> f64 {
    let config = learner.config;
    let [products, mixers] = layers(config, windows, learner.first());
    let params = config.params();
    let learning = params.iter().filter(|(name, _)| (learner.trained)(name));
    let (inner, ends): (Vec<_>, Vec<_>) = learning.partition(|(name, _)| layer_of(name).is_some());
    let weights = ModelConfig::products(inner.iter().map(|(_, shape)| shape.as_slice()));
    let again = if anew { products + mixers } else { 0.0 };
    let trained_head = if ends.is_empty() { 0.0 } else { head(config) };
    forward(config, windows)
        + again
        + products
        + weights
        + BACK * mixers
        + head(config)
        + trained_head
}

/// Layers that learn towards a teacher's, one after the other: what one of the teacher's reads and gives is there, and one layer's
/// graph.
pub struct IldSizes<'a> {
    pub teacher: &'a ModelConfig,
    pub candidates: &'a [ModelConfig],
    pub windows: Windows,
    pub accumulation: usize,
    pub weights: Precision,
    /// Of activations between products.
    pub compute: DType,
    pub optimizer: OptimizerConfig,
    /// Layers read what the student's own give as well.
    pub joint: bool,
    /// Layers that learn at once.
    pub at_once: usize,
    /// A layer's gradients are applied before the next layer's are there.
    pub applied: bool,
}

/// What ILD trains of a candidate.
pub fn in_layers(name: &str) -> bool {
    layer_of(name).is_some()
}

impl IldSizes<'_> {
    fn learners(&self) -> impl Iterator<Item = Learner<'_>> {
        self.candidates.iter().map(|config| Learner {
            config,
            trained: &in_layers,
        })
    }

    /// As [`StepSizes::memory`].
    pub fn memory(&self) -> Memory {
        let (n, d) = (self.windows.tokens(), self.teacher.hidden_size);
        // Input, mixer's and layer's output, and the next layer's input.
        let lesson = 4 * n * d;
        let mut held = Memory::default();
        let own = if self.joint {
            self.candidates.len() * n * d
        } else {
            0
        };
        let (mut kept, mut back, mut gradients) = (0, 0, 0);
        let mut beside = 0;
        for learner in self.learners() {
            let trained = learner.weights(self.optimizer, self.weights);
            let chunks = trained.layers.chunks(self.at_once.max(1));
            let most = chunks
                .map(|chunk| chunk.iter().sum::<usize>())
                .max()
                .unwrap_or(0);
            // These are spread over layers as entries are.
            let share = most as f64 / trained.all.max(1) as f64;
            let of = |bytes: usize| (share * bytes as f64) as usize;
            held = held
                .with_share(WEIGHTS, of(trained.bytes), trained.small)
                .with_share("moments", of(trained.moments), trained.small);
            if let (Precision::F32, Some(most)) = (self.weights, trained.layers.iter().max()) {
                beside = beside.max(Learner::beside(self.windows, *most));
            }
            match self.applied {
                true => gradients = trained.layers.iter().copied().fold(gradients, usize::max),
                false => held = held.with_share("gradients", most * F32, trained.small),
            }
            for (i, beside) in trained.beside.iter().enumerate() {
                let pass = learner.config.layer_pass(i, self.windows);
                let mlp = 2 * n * self.teacher.intermediate_size + 7 * n * d;
                kept = kept.max(stored(pass.kept, self.compute));
                let [pass, mlp] = [pass.back, mlp].map(|n| stored(n, self.compute));
                back = back.max(pass.max(mlp + beside));
            }
        }
        let times = if self.joint { 2 } else { 1 };
        let share = shared_activations(self.teacher, n);
        // Groups give outputs of their own, which are joined and copied.
        let lesson = match self.windows.groups().count() {
            1 => lesson,
            _ => lesson + 4 * n * d,
        };
        held.with("gradients", (gradients + beside) * F32)
            .with("threads", of_threads(self.windows))
            .with_share("activations", (lesson + own + times * kept) * F32, share)
            .with_share("on the way back", back * F32, share)
    }

    /// As [`StepSizes::operations`].
    pub fn operations(&self) -> f64 {
        let times = if self.joint { 2.0 } else { 1.0 };
        let each = self.learners().map(|learner| {
            let [products, mixers] = layers(learner.config, self.windows, 0);
            times * (3.0 * products + (1.0 + BACK) * mixers)
        });
        // Accumulated parts are weighed by what the teacher gives for them, in a pass of its own.
        let passes = if self.accumulation > 1 { 2.0 } else { 1.0 };
        // For the layers of each pass the teacher goes as far as they are.
        let count = self.teacher.layers.len();
        let ends = (0..count).step_by(self.at_once.max(1));
        let ends = ends.map(|first| (first + self.at_once.max(1)).min(count));
        let taught = ends.sum::<usize>() as f64 / count as f64;
        let teacher = layers(self.teacher, self.windows, 0).iter().sum::<f64>();
        each.sum::<f64>() + passes * taught * teacher
    }
}
