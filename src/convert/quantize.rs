//! Rounding a model's matrices into blocks, where it costs least: what each matrix reads on a text says what an error is worth; or to
//! 8 bits with an exponent each.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use half::f16;
use rayon::prelude::*;

use crate::checkpoint::{as_kept, storage_of};
use crate::data::Corpus;
use crate::model::{Group, LOGITS, Parts, pieces};
use crate::op::blocks::{self, BlockType};
use crate::op::linear::{Matrix, Storage, Stored, quantize_float8};
use crate::op::runtime::pooled;
use crate::watch::Watch;
use crate::weights::{Place, Weights};
use crate::{Error, Result};

/// Of every matrix the mean square of each input on a text, by name.
#[derive(Debug, Clone, Default)]
pub struct Importance(BTreeMap<String, Vec<f32>>);

impl Importance {
    fn of(&self, name: &str) -> Option<&[f32]> {
        self.0.get(name).map(Vec::as_slice)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &[f32])> {
        self.0
            .iter()
            .map(|(name, of)| (name.as_str(), of.as_slice()))
    }
}

/// Windows a forward pass.
const CHUNK: usize = 4;

/// Reads the first `tokens` of a text in windows of `seq_len`.
///
/// # Errors
/// A text without a window, or [`Error::Interrupted`].
pub fn importance(
    parts: &Parts,
    corpus: &Corpus,
    tokens: usize,
    seq_len: usize,
    watch: &dyn Watch,
) -> Result<Importance> {
    let mut observers = BTreeMap::new();
    let all = parts.weights.iter().map(|(name, weight)| {
        let weight = match weight.shape().len() {
            2 => {
                let (weight, observer) = weight.observed()?;
                observers.insert(name.to_owned(), observer);
                weight
            }
            _ => weight.clone(),
        };
        Ok((name.to_owned(), weight))
    });
    let all = all.collect::<Result<BTreeMap<String, Matrix>>>()?;
    let lm = Parts::new(parts.config.clone(), Weights::from(all)).lm(&Place::cpu())?;
    let windows = (tokens / seq_len.max(1))
        .max(1)
        .min(corpus.windows(seq_len).max(1));
    watch.start("calibrate", windows);
    let mut done = 0;
    while done < windows {
        let batch = corpus.ordered(done, CHUNK.min(windows - done), seq_len)?;
        let ids = Tensor::from_slice(&batch.input_ids, (batch.rows, batch.len), lm.device())?;
        // Not in groups beside each other: sums have an order.
        let group = Group::whole(batch.rows, Some(&batch.documents));
        let embedded = lm.embed(&ids)?;
        let x = pooled(|| group.through(&lm.layers, embedded))?;
        let hidden = lm.normed(&x)?.flatten(0, 1)?;
        for range in pieces(batch.targets.len(), lm.config.vocab_size, LOGITS) {
            lm.logits(&hidden, &range)?;
        }
        done += batch.rows;
        watch.reached(done, windows, "windows")?;
    }
    let found = observers.into_iter();
    let found = found.filter_map(|(name, observer)| Some((name, observer.mean_squares()?)));
    Ok(Importance(found.collect()))
}

/// What a matrix becomes: the type asked for, Q8_0 where its rows are no whole super-blocks, and 16 bits where they are no
/// whole blocks at all.
pub fn storage(kind: BlockType, weight: &Matrix) -> Storage {
    let width = weight.shape().last().copied().unwrap_or(0);
    let kept = match storage_of(weight) {
        Storage::F32 => Storage::F16,
        kept => kept,
    };
    [kind, BlockType::Q8_0]
        .into_iter()
        .find(|kind| kind.row_bytes(width).is_ok())
        .map_or(kept, Storage::Blocks)
}

/// # Errors
/// A type that none of the matrices can have.
pub fn check(kind: BlockType, parts: &Parts) -> Result<()> {
    let all: Vec<_> = parts.weights.iter().collect();
    let mut matrices = all.iter().filter(|(_, weight)| weight.shape().len() == 2);
    let fits = |weight: &Matrix| storage(kind, weight) == Storage::Blocks(kind);
    match all.iter().any(|(_, weight)| fits(weight)) {
        true => Ok(()),
        false => {
            let first = matrices.next().map_or(String::new(), |(name, weight)| {
                format!(" ({name} has {})", weight.shape()[1])
            });
            Err(Error::invalid(format!(
                "no matrix has rows of whole {} blocks, {} weights each{first}: choose another type",
                kind.name(),
                kind.weights()
            )))
        }
    }
}

/// Rows that a thread rounds at a time.
const ROWS: usize = 64;

/// The rows of a matrix as [`storage`] says.
///
/// # Errors
/// A matrix that cannot be read, or that has values past the range of 16 bits.
pub fn encoded(
    name: &str,
    weight: &Matrix,
    storage: Storage,
    importance: &Importance,
) -> Result<Vec<u8>> {
    match storage {
        Storage::Blocks(kind) => quantized(name, weight, kind, importance),
        Storage::F16 if storage_of(weight) != storage => {
            let halves = weight.to_host()?.into_iter().map(f16::from_f32);
            let halves: Vec<f16> = halves.collect();
            match halves.iter().all(|x| x.is_finite()) {
                true => Ok(halves.iter().flat_map(|x| x.to_le_bytes()).collect()),
                false => Err(Error::invalid(format!(
                    "{name} has rows of no whole blocks and values past the range of f16: export the model with --dtype bf16 first"
                ))),
            }
        }
        _ => as_kept(name, weight, storage),
    }
}

fn quantized(
    name: &str,
    weight: &Matrix,
    kind: BlockType,
    importance: &Importance,
) -> Result<Vec<u8>> {
    let (rows, width) = weight.dims()?;
    let row_bytes = kind.row_bytes(width)?;
    let mut out = vec![0; rows * row_bytes];
    let parts = out.par_chunks_mut(ROWS * row_bytes).enumerate();
    parts.try_for_each(|(i, out)| -> Result<()> {
        let count = out.len() / row_bytes;
        let x = weight.rows(i * ROWS, count)?.to_host()?;
        for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(row_bytes)) {
            blocks::quantize(kind, x, importance.of(name), out);
        }
        Ok(())
    })?;
    Ok(out)
}

/// Whether a weight is to be in E4M3: what multiplies within layers. The embedding and the head stay, as programs that read such files
/// expect.
pub fn takes_float8(name: &str, weight: &Matrix) -> bool {
    let outside = ["model.embed_tokens.weight", "lm_head.weight"].contains(&name);
    weight.shape().len() == 2 && !outside
}

/// Matrices in E4M3 with a scale a row; those that stay, in 16 bits; all else as it is.
///
/// # Errors
/// A matrix that cannot be read, or [`Error::Interrupted`].
pub fn float8(weights: &Weights, watch: &dyn Watch) -> Result<Weights> {
    let matrices = weights.iter().filter(|(_, w)| w.shape().len() == 2);
    let matrices = matrices.count();
    watch.start("quantize", matrices);
    let mut all = BTreeMap::new();
    let mut done = 0;
    for (name, weight) in weights.iter() {
        let rounded = match weight.shape()[..] {
            [rows, width] if takes_float8(name, weight) => {
                let (codes, scales) = quantize_float8(&weight.to_host()?, width);
                let bytes = 0..codes.len();
                let stored = Stored::new(Arc::new(codes), bytes, Storage::F8E4M3, rows, width)?;
                Matrix::Stored(stored.scaled(scales)?)
            }
            [_, _] if !matches!(storage_of(weight), Storage::F16 | Storage::Bf16) => {
                weight.to_tensor()?.to_dtype(DType::BF16)?.into()
            }
            _ => weight.clone(),
        };
        if rounded.shape().len() == 2 {
            done += 1;
            watch.reached(done, matrices, "matrices")?;
        }
        all.insert(name.to_owned(), rounded);
    }
    Ok(all.into())
}
