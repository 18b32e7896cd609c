//! A model in one GGUF file. A Llama is written as llama.cpp has it; anything else as architecture `zebroid`, whose layout is
//! our own format's: `zebroid.config` holds `config.json`, and tensors have the names that they have there.

use std::collections::BTreeSet;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use serde_json::Value as Json;

use super::output::check_output;
use crate::atomic::write_atomic_with;
use crate::gguf::{self, Gguf, Info, Value, tokenizer};
use crate::model::ModelConfig;
use crate::op::blocks;
use crate::op::linear::{Matrix, Storage, Stored};
use crate::weights::Weights;
use crate::{Error, Result};

mod llama;

/// Key of what kind of model it is.
pub(super) const ARCHITECTURE: &str = "general.architecture";
/// Our own architecture, and the key of its config.
const OWN: &str = "zebroid";
const CONFIG: &str = "zebroid.config";

/// An opened file.
#[derive(Debug)]
pub(super) struct GgufFile {
    file: Gguf,
    llama: bool,
    head_dim: usize,
}

impl GgufFile {
    /// The file and the model's sizes.
    ///
    /// # Errors
    /// Names the file, and the key or tensors that cannot be used.
    pub fn open(path: &Path) -> Result<(Self, ModelConfig)> {
        let file = Gguf::open(path)?;
        let at = |e: Error| Error::file(path, e);
        let metadata = &file.header.metadata;
        let (config, llama) = match metadata.get(ARCHITECTURE) {
            Some(Value::Text(name)) if name == llama::ARCHITECTURE => {
                let freqs = file.header.tensors.get(llama::ROPE_FREQS);
                let freqs = freqs.map(|info| widened(&file, info));
                let read = llama::read(metadata, &file.header.tensors, freqs);
                let mut config = read.map_err(at)?;
                let found = tokenizer::read(metadata).map_err(at)?;
                (config.bos_token_id, config.eos_token_id) = (found.bos, found.eos);
                (config, true)
            }
            Some(Value::Text(name)) if name == OWN => {
                let Some(Value::Text(text)) = metadata.get(CONFIG) else {
                    return Err(at(Error::invalid(format!("{CONFIG} is missing"))));
                };
                let value: Json = serde_json::from_str(text)
                    .map_err(|e| at(Error::invalid(format!("{CONFIG} is not JSON: {e}"))))?;
                (super::own(path, value)?, false)
            }
            other => {
                return Err(at(Error::invalid(format!(
                    "general.architecture {} is not supported: llama and zebroid are",
                    match other {
                        Some(Value::Text(name)) => name.as_str(),
                        _ => "(none)",
                    }
                ))));
            }
        };
        config.validate().map_err(at)?;
        let head_dim = config.attention(0).map_or(0, |a| a.head_dim);
        let found = Self {
            file,
            llama,
            head_dim,
        };
        found.check(&config)?;
        Ok((found, config))
    }

    /// # Errors
    /// Lists every tensor that is missing, unexpected or mis-shaped.
    fn check(&self, config: &ModelConfig) -> Result<()> {
        let mut problems = Vec::new();
        let mut known = BTreeSet::new();
        for (ours, shape) in config.params() {
            let name = self.name(&ours);
            match self.file.header.tensors.get(&name) {
                None => problems.push(format!("missing {name} {shape:?}")),
                Some(info) if info.shape != shape => problems.push(format!(
                    "{name} has shape {:?}, the metadata need {shape:?}",
                    info.shape
                )),
                Some(_) => {}
            }
            known.insert(name);
        }
        known.insert(llama::ROPE_FREQS.to_owned());
        let unknown = self
            .file
            .header
            .tensors
            .keys()
            .filter(|n| !known.contains(*n));
        problems.extend(unknown.map(|name| format!("unexpected {name}")));
        match problems.is_empty() {
            true => Ok(()),
            false => Err(Error::Tensors {
                path: self.file.path.clone(),
                problems,
            }),
        }
    }

    /// All that is stored: type, shape and bytes of each tensor.
    pub fn stored(&self) -> impl Iterator<Item = (String, &[usize], usize)> {
        let infos = self.file.header.tensors.values();
        infos.map(|info| {
            let name = info.storage.name().to_owned();
            (name, info.shape.as_slice(), info.range.len())
        })
    }

    fn name(&self, ours: &str) -> String {
        match self.llama {
            true => llama::name(ours).unwrap_or_else(|| ours.to_owned()),
            false => ours.to_owned(),
        }
    }

    /// A matrix where it stands in its file (queries and keys of a Llama: a copy in our order), anything else in f32.
    ///
    /// # Errors
    /// A tensor that is missing, or that holds a value which is not a finite number.
    pub fn matrix(&self, ours: &str) -> Result<Matrix> {
        let name = self.name(ours);
        let Some(info) = self.file.header.tensors.get(&name) else {
            return Err(Error::invalid(format!("tensor {name} is missing")));
        };
        if !finite(self.file.bytes(info), info.storage) {
            return Err(Error::file(
                &self.file.path,
                format!("{name} holds NaN or infinite values: the file is damaged"),
            ));
        }
        let [rows, width] = info.shape[..] else {
            let data = widened(&self.file, info);
            return Ok(Tensor::from_vec(data, info.shape.as_slice(), &Device::Cpu)?.into());
        };
        let order = llama::row_order(ours, self.head_dim).filter(|_| self.llama);
        let stored = match order {
            None => Stored::new(
                self.file.owner(),
                info.range.clone(),
                info.storage,
                rows,
                width,
            ),
            Some(order) => {
                let (from, size) = (self.file.bytes(info), info.storage.row_bytes(width)?);
                let row = |i: usize| &from[order(i) * size..][..size];
                let bytes = (0..rows).map(row).collect::<Vec<_>>().concat();
                let range = 0..bytes.len();
                Stored::new(Arc::new(bytes), range, info.storage, rows, width)
            }
        };
        stored.map(Matrix::Stored)
    }
}

fn widened(file: &Gguf, info: &Info) -> Vec<f32> {
    let mut out = vec![0.; info.shape.iter().product()];
    info.storage.widen(file.bytes(info), &mut out);
    out
}

fn finite(bytes: &[u8], storage: Storage) -> bool {
    match storage {
        Storage::F32 => super::files::finite(bytes, safetensors::Dtype::F32),
        Storage::F16 => super::files::finite(bytes, safetensors::Dtype::F16),
        Storage::Bf16 => super::files::finite(bytes, safetensors::Dtype::BF16),
        Storage::F8E4M3 => super::files::finite(bytes, safetensors::Dtype::F8_E4M3),
        Storage::Blocks(kind) => blocks::finite(kind, bytes),
    }
}

/// How a weight is written: its storage, and its bytes row after row.
pub type Encode<'a> = dyn Fn(&str, &Matrix, Storage) -> Result<Vec<u8>> + 'a;

/// What stands in a GGUF: matrices as they are kept (trained ones, and those in E4M3, which it does not have, in f32), anything else in f32.
pub fn storage_of(weight: &Matrix) -> Storage {
    match weight {
        Matrix::Stored(w) if w.storage() != Storage::F8E4M3 => w.storage(),
        Matrix::Stored(_) | Matrix::Dense(_) | Matrix::Trained(_) => Storage::F32,
    }
}

/// A weight as it is kept.
///
/// # Errors
/// A tensor that cannot be read.
pub fn as_kept(_: &str, weight: &Matrix, _: Storage) -> Result<Vec<u8>> {
    Ok(match weight {
        Matrix::Stored(w) if w.storage() != Storage::F8E4M3 => w.bytes().to_vec(),
        Matrix::Stored(_) | Matrix::Dense(_) | Matrix::Trained(_) => {
            let entries = weight.to_host()?;
            entries.iter().flat_map(|x| x.to_le_bytes()).collect()
        }
    })
}

/// Writes one file, tensor by tensor, with the tokenizer of `source` (a folder with `tokenizer.json`, or a GGUF). What is there
/// before stays if anything fails.
///
/// # Errors
/// An existing `out` without `force`, a tokenizer that GGUF cannot say, a disk that does not take it, or what `encode` says.
pub fn save_gguf(
    out: &Path,
    config: &ModelConfig,
    weights: &Weights,
    source: &Path,
    force: bool,
    storage: &dyn Fn(&str, &Matrix) -> Storage,
    encode: &Encode,
) -> Result<()> {
    check_output(out, force, &[])?;
    let llama = llama::write(config);
    let mut metadata: Vec<(String, Value)> = vec![(
        ARCHITECTURE.into(),
        Value::Text(llama.as_ref().map_or(OWN, |_| llama::ARCHITECTURE).into()),
    )];
    let name = source.file_stem().unwrap_or_default().to_string_lossy();
    metadata.push(("general.name".into(), Value::Text(name.into())));
    match &llama {
        Some(llama) => metadata.extend(llama.metadata.iter().cloned()),
        None => {
            let text = serde_json::to_string(config).expect("configs serialise");
            metadata.push((CONFIG.into(), Value::Text(text)));
        }
    }
    let json = tokenizer_json(source)?;
    let (bos, eos) = (config.bos_token_id, &config.eos_token_id);
    let words = tokenizer::write(&json, config.vocab_size, bos, eos)?;
    metadata.extend(
        words
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value)),
    );
    let mut tensors = Vec::new();
    let mut sources = Vec::new();
    for (ours, shape) in config.params() {
        let weight = weights.matrix(&ours)?;
        let (name, order) = match &llama {
            Some(llama) => (
                llama::name(&ours).unwrap_or_else(|| ours.clone()),
                llama::row_order(&ours, llama.head_dim),
            ),
            None => (ours.clone(), None),
        };
        let kept = match shape.len() {
            2 => storage(&ours, &weight),
            _ => Storage::F32,
        };
        tensors.push((name, shape, kept));
        sources.push((ours, weight, order));
    }
    let freqs = llama.and_then(|llama| llama.freqs);
    if let Some(freqs) = &freqs {
        tensors.push((llama::ROPE_FREQS.into(), vec![freqs.len()], Storage::F32));
    }
    let pairs: Vec<(&str, Value)> = metadata
        .iter()
        .map(|(k, v)| (k.as_str(), v.clone()))
        .collect();
    let (header, offsets) = gguf::header(&pairs, &tensors)?;
    let body = |file: &mut BufWriter<&mut std::fs::File>| -> Result<()> {
        let wrote = |done: std::io::Result<()>| done.map_err(Error::io("cannot write", out));
        wrote(file.write_all(&header))?;
        let mut at = 0;
        for ((tensor, offset), source) in tensors
            .iter()
            .zip(&offsets)
            .zip(sources.iter().map(Some).chain([None]))
        {
            wrote(file.write_all(&vec![0; offset - at]))?;
            let bytes = match source {
                Some((ours, weight, order)) => {
                    let bytes = match tensor.1.len() {
                        2 => encode(ours, weight, tensor.2)?,
                        _ => as_kept(ours, weight, Storage::F32)?,
                    };
                    match order {
                        None => bytes,
                        Some(order) => reordered(&bytes, tensor.1[0], order),
                    }
                }
                None => freqs
                    .iter()
                    .flatten()
                    .flat_map(|x| x.to_le_bytes())
                    .collect(),
            };
            wrote(file.write_all(&bytes))?;
            at = offset + bytes.len();
        }
        wrote(file.flush())
    };
    let mut failed = None;
    let written = write_atomic_with(out, |file| {
        body(&mut BufWriter::new(file)).map_err(|error| {
            let said = std::io::Error::other(error.to_string());
            failed = Some(error);
            said
        })
    });
    match failed {
        Some(error) => Err(error),
        None => written,
    }
}

/// Our rows in the file's order.
fn reordered(bytes: &[u8], rows: usize, order: &dyn Fn(usize) -> usize) -> Vec<u8> {
    let size = bytes.len() / rows;
    let mut out = vec![0; bytes.len()];
    for (i, row) in bytes.chunks_exact(size).enumerate() {
        out[order(i) * size..][..size].copy_from_slice(row);
    }
    out
}

/// The `tokenizer.json` of a folder, or what a GGUF says of it.
pub(super) fn tokenizer_json(source: &Path) -> Result<Json> {
    match Gguf::is_named(source) {
        true => {
            let file = Gguf::open(source)?;
            let found = tokenizer::read(&file.header.metadata);
            Ok(found.map_err(|e| Error::file(source, e))?.json)
        }
        false => super::read_json(&source.join("tokenizer.json")),
    }
}
