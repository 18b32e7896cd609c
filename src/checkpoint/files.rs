//! safetensors files, distrusted: headers are checked against the file before a tensor is made.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype, SafeTensors, View};

use super::{fp8, json};
use crate::atomic::write_atomic_with;
use crate::mapped::map;
use crate::op::isa::vectorised;
use crate::op::linear::{Matrix, Storage, Stored, finite_float8};
use crate::{Error, Result};

/// A mapped file and its parsed header.
#[derive(Debug)]
struct TensorFile {
    path: PathBuf,
    map: Arc<Mmap>,
    /// Bytes before the tensors' data.
    data_start: usize,
    header: Metadata,
}

impl TensorFile {
    fn open(path: &Path) -> Result<Self> {
        let map = Arc::new(map(path)?);
        let (header_len, header) = SafeTensors::read_metadata(&map).map_err(|e| {
            Error::file(
                path,
                format!("not a whole safetensors file ({e}); download or write it again"),
            )
        })?;
        let data_start = size_of::<u64>() + header_len;
        // The parser above keeps the last of two tensors with one name and forgets the other.
        json::distinct(&map[size_of::<u64>()..data_start])
            .map_err(|e| Error::file(path, format!("the header {e}; write the file again")))?;
        Ok(Self {
            path: path.to_owned(),
            data_start,
            map,
            header,
        })
    }

    /// # Errors
    /// Data that are not those that zebroid wrote; of another program's file nothing is known.
    fn verify(&self) -> Result<()> {
        let metadata = self.header.metadata().as_ref();
        let Some(written) = metadata.and_then(|metadata| metadata.get(CHECKSUM)) else {
            return Ok(());
        };
        let found = hex(checksum(&self.map[self.data_start..]));
        match *written == found {
            true => Ok(()),
            false => Err(Error::file(
                &self.path,
                format!(
                    "the data are damaged: their {CHECKSUM} is {found}, written was {written}; make or copy the file again"
                ),
            )),
        }
    }

    fn range(&self, info: &TensorInfo) -> Range<usize> {
        // The offsets were checked against the file when the header was read.
        let (from, to) = info.data_offsets;
        self.data_start + from..self.data_start + to
    }

    fn bytes(&self, info: &TensorInfo) -> &[u8] {
        &self.map[self.range(info)]
    }

    /// A matrix where it stands; of anything else a copy.
    fn matrix(&self, name: &str, info: &TensorInfo) -> Result<Matrix> {
        let storage = match info.dtype {
            Dtype::F32 => Storage::F32,
            Dtype::F16 => Storage::F16,
            Dtype::BF16 => Storage::Bf16,
            Dtype::F8_E4M3 => Storage::F8E4M3,
            _ => return Ok(self.load(name, info)?.into()),
        };
        match info.shape[..] {
            [rows, width] if width > 0 => {
                let bytes = self.range(info);
                Stored::new(self.map.clone(), bytes, storage, rows, width).map(Matrix::Stored)
            }
            _ => Ok(self.load(name, info)?.into()),
        }
    }

    fn load(&self, name: &str, info: &TensorInfo) -> Result<Tensor> {
        let Some(dtype) = dtype(info.dtype) else {
            return Err(Error::file(
                &self.path,
                format!("{name} has dtype {:?}, which is not supported", info.dtype),
            ));
        };
        Ok(Tensor::from_raw_buffer(
            self.bytes(info),
            dtype,
            &info.shape,
            &Device::Cpu,
        )?)
    }
}

/// Of a file's data, in its metadata.
const CHECKSUM: &str = "crc32";

fn hex(checksum: u32) -> String {
    format!("{checksum:08x}")
}

fn checksum(bytes: &[u8]) -> u32 {
    // Work for a thread.
    const PART: usize = 1 << 22;
    let of = |part: &[u8]| {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(part);
        hasher
    };
    let parts: Vec<_> = bytes.par_chunks(PART).map(of).collect();
    let mut whole = crc32fast::Hasher::new();
    parts.iter().for_each(|part| whole.combine(part));
    whole.finalize()
}

/// Counts what goes through it.
struct Summed<W> {
    inner: W,
    hasher: crc32fast::Hasher,
}

impl<W: Write> Write for Summed<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

fn dtype(dtype: Dtype) -> Option<DType> {
    Some(match dtype {
        Dtype::F64 => DType::F64,
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        Dtype::I64 => DType::I64,
        Dtype::U32 => DType::U32,
        Dtype::U8 => DType::U8,
        _ => return None,
    })
}

/// The weights of a checkpoint folder, in one or more files.
#[derive(Debug)]
pub(super) struct TensorFiles {
    files: Vec<TensorFile>,
    /// Which file holds a tensor.
    place: BTreeMap<String, usize>,
}

const SINGLE: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";

impl TensorFiles {
    /// `model.safetensors`, or the shards of its index, or every `.safetensors` file (as AMD's loader).
    pub fn open(folder: &Path) -> Result<Self> {
        let index = folder.join(INDEX);
        let single = folder.join(SINGLE);
        let mut promised = BTreeMap::new();
        let paths: Vec<PathBuf> = if single.exists() {
            vec![single]
        } else if index.exists() {
            promised = read_index(&index)?;
            let mut names: Vec<&String> = promised.values().collect();
            names.sort();
            names.dedup();
            names.into_iter().map(|name| folder.join(name)).collect()
        } else {
            all_safetensors(folder)?
        };
        if paths.is_empty() {
            return Err(Error::file(
                folder,
                "no .safetensors file here; convert .bin or .pt weights to safetensors first",
            ));
        }
        let mut files = Vec::new();
        let mut place: BTreeMap<String, usize> = BTreeMap::new();
        let mut problems = Vec::new();
        for path in paths {
            if !path.exists() {
                return Err(Error::file(
                    &path,
                    format!("this shard is named in {INDEX} but is not there"),
                ));
            }
            let file = TensorFile::open(&path)?;
            for name in file.header.tensors().keys() {
                if let Some(first) = place.insert(name.clone(), files.len()) {
                    let first: &TensorFile = &files[first];
                    problems.push(format!(
                        "{name} is stored twice: {} and {}",
                        first.path.display(),
                        path.display()
                    ));
                }
            }
            files.push(file);
        }
        for (name, shard) in &promised {
            let found = place
                .get(name)
                .map(|i| files[*i].path.file_name().unwrap_or_default());
            if found != Some(std::ffi::OsStr::new(shard)) {
                problems.push(format!(
                    "{name} should be in {shard} according to {INDEX}, but is not"
                ));
            }
        }
        match problems.is_empty() {
            true => Ok(Self { files, place }),
            false => Err(Error::Tensors {
                path: folder.to_owned(),
                problems,
            }),
        }
    }

    /// Whether a folder has any, whole or not.
    pub fn are_in(folder: &Path) -> bool {
        let files = || all_safetensors(folder).is_ok_and(|files| !files.is_empty());
        folder.join(INDEX).exists() || files()
    }

    /// All that is stored: type, shape and bytes of each tensor.
    pub fn stored(&self) -> impl Iterator<Item = (String, &[usize], usize)> {
        let files = self.files.iter();
        let infos = files.flat_map(|file| file.header.tensors().into_values());
        infos.map(|info| {
            let (from, to) = info.data_offsets;
            let name = info.dtype.to_string().to_lowercase();
            (name, info.shape.as_slice(), to - from)
        })
    }

    /// # Errors
    /// Names the file whose data are not those that were written.
    pub fn verify(&self) -> Result<()> {
        self.files.iter().try_for_each(TensorFile::verify)
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.place
            .keys()
            .map(String::as_str)
            .filter(|name| !ignored(name) && !self.beside_fp8(name))
    }

    pub fn contains(&self, name: &str) -> bool {
        self.place.contains_key(name)
    }

    fn find(&self, name: &str) -> Option<(&TensorFile, &TensorInfo)> {
        let file = &self.files[*self.place.get(name)?];
        file.header.info(name).map(|info| (file, info))
    }

    fn is_fp8(&self, name: &str) -> bool {
        (self.find(name)).is_some_and(|(_, info)| info.dtype == Dtype::F8_E4M3)
    }

    /// Whether a tensor is the scale of another, or is there for those who round more than weights.
    fn beside_fp8(&self, name: &str) -> bool {
        let scale = fp8::scaled_by(name).is_some_and(|of| self.is_fp8(of));
        scale || (fp8::is_of_others(name) && self.place.keys().any(|name| self.is_fp8(name)))
    }

    /// What a matrix in 8 bits is multiplied by.
    fn scales(&self, name: &str, rows: usize) -> Result<Vec<f32>> {
        let name = fp8::scale_of(name);
        let (file, info) = self.finite(&name)?;
        let scales = file
            .load(&name, info)?
            .to_dtype(DType::F32)?
            .flatten_all()?;
        let scales = scales.to_vec1::<f32>()?;
        Ok(match scales[..] {
            [one] => vec![one; rows],
            _ => scales,
        })
    }

    pub fn same_bytes(&self, a: &str, b: &str) -> bool {
        match (self.find(a), self.find(b)) {
            (Some((fa, a)), Some((fb, b))) => {
                (a.dtype, &a.shape, fa.bytes(a)) == (b.dtype, &b.shape, fb.bytes(b))
            }
            _ => false,
        }
    }

    /// # Errors
    /// Lists every tensor that is missing, unexpected, mis-shaped or of a wrong dtype.
    pub fn check(&self, folder: &Path, expected: &[(String, Vec<usize>)]) -> Result<()> {
        let mut problems = Vec::new();
        for (name, shape) in expected {
            let Some((file, info)) = self.find(name) else {
                problems.push(format!("missing {name} {shape:?}"));
                continue;
            };
            let place = file.path.display();
            // torch keeps a depthwise convolution's middle axis; some exporters drop it.
            if &info.shape != shape {
                problems.push(format!(
                    "{name} has shape {:?}, the config needs {shape:?} ({place})",
                    info.shape
                ));
            }
            match (info.dtype, &info.shape[..]) {
                (Dtype::F32 | Dtype::F16 | Dtype::BF16, _) => {}
                (Dtype::F8_E4M3, [rows, _]) => {
                    let scale = self.find(&fp8::scale_of(name)).map(|(_, info)| &info.shape[..]);
                    let of_blocks = self.contains(&format!("{}_inv", fp8::scale_of(name)));
                    let wrong = fp8::wrong(name, *rows, scale, of_blocks);
                    problems.extend(wrong.map(|what| format!("{what} ({place})")));
                }
                (dtype, _) => problems.push(format!(
                    "{name} has dtype {dtype:?}; F32, F16, BF16 and for matrices F8_E4M3 are supported ({place})"
                )),
            }
        }
        let expected: std::collections::BTreeSet<&str> =
            expected.iter().map(|(n, _)| n.as_str()).collect();
        for name in self.names() {
            let tied_head = name == "lm_head.weight";
            if !expected.contains(name) && !tied_head {
                let (file, _) = self.find(name).expect("a name of the map");
                problems.push(format!("unexpected {name} ({})", file.path.display()));
            }
        }
        match problems.is_empty() {
            true => Ok(()),
            false => Err(Error::Tensors {
                path: folder.to_owned(),
                problems,
            }),
        }
    }

    /// A matrix where it stands in its file, anything else in its stored dtype.
    ///
    /// # Errors
    /// When it holds a value that is not a finite number.
    pub fn matrix(&self, name: &str) -> Result<Matrix> {
        let (file, info) = self.finite(name)?;
        match file.matrix(name, info)? {
            Matrix::Stored(w) if info.dtype == Dtype::F8_E4M3 => {
                let scaled = self
                    .scales(name, w.rows())
                    .and_then(|scales| w.scaled(scales));
                let scaled = scaled.map_err(|e| match e {
                    Error::Invalid(what) => Error::file(&file.path, format!("{name}: {what}")),
                    other => other,
                });
                scaled.map(Matrix::Stored)
            }
            matrix => Ok(matrix),
        }
    }

    fn finite(&self, name: &str) -> Result<(&TensorFile, &TensorInfo)> {
        let Some((file, info)) = self.find(name) else {
            return Err(Error::invalid(format!("tensor {name} is missing")));
        };
        if !finite(file.bytes(info), info.dtype) {
            return Err(Error::file(
                &file.path,
                format!("{name} holds NaN or infinite values: the checkpoint is damaged"),
            ));
        }
        Ok((file, info))
    }
}

/// Buffers that older savers wrote; they follow from the config.
fn ignored(name: &str) -> bool {
    name.ends_with("rotary_emb.inv_freq")
}

pub(super) fn finite(bytes: &[u8], dtype: Dtype) -> bool {
    // A whole number of entries, and work for a thread.
    const PART: usize = 1 << 20;
    bytes
        .par_chunks(PART)
        .all(|part| part_is_finite(part, dtype))
}

fn part_is_finite(bytes: &[u8], dtype: Dtype) -> bool {
    // All exponent bits set: infinite or NaN. All of a part is looked at, which vectors do faster than to stop at the first, if what they find
    // is a value of their own: one outside of the closure would be written for every entry.
    let halves = |exponent: u16| {
        vectorised!({
            let (mut found, exponent) = (0, exponent);
            for b in bytes.as_chunks::<2>().0 {
                found |= u16::from(u16::from_le_bytes(*b) & exponent == exponent);
            }
            found == 0
        })
    };
    match dtype {
        Dtype::F16 => halves(0x7c00),
        Dtype::BF16 => halves(0x7f80),
        Dtype::F32 => vectorised!({
            let mut found = 0;
            for b in bytes.as_chunks::<4>().0 {
                found |= u32::from(u32::from_le_bytes(*b) & 0x7f80_0000 == 0x7f80_0000);
            }
            found == 0
        }),
        Dtype::F8_E4M3 => finite_float8(bytes),
        _ => true,
    }
}

fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    let value = super::read_json(path)?;
    let Some(map) = value["weight_map"].as_object() else {
        return Err(Error::file(path, "weight_map is missing"));
    };
    map.iter()
        .map(|(name, file)| {
            let plain = file
                .as_str()
                .filter(|f| Path::new(f).components().count() == 1);
            let file = plain.ok_or_else(|| {
                Error::file(
                    path,
                    format!("weight_map: {name} names {file}, not a file beside the index"),
                )
            })?;
            Ok((name.clone(), file.to_owned()))
        })
        .collect()
}

fn all_safetensors(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::io("cannot list", folder))? {
        let path = entry.map_err(Error::io("cannot list", folder))?.path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// All tensors of one file, in their stored dtypes.
pub fn read_tensors(path: &Path) -> Result<BTreeMap<String, Tensor>> {
    Ok(read_tensors_with_metadata(path)?.0)
}

/// What is in one file, by name, and its metadata.
type Read<T> = Result<(BTreeMap<String, T>, HashMap<String, String>)>;

/// All tensors of one file and its metadata.
pub fn read_tensors_with_metadata(path: &Path) -> Read<Tensor> {
    read(path, TensorFile::load)
}

/// The same, matrices where they stand in the file.
pub(super) fn map_tensors(path: &Path) -> Read<Matrix> {
    read(path, TensorFile::matrix)
}

fn read<T>(path: &Path, one: fn(&TensorFile, &str, &TensorInfo) -> Result<T>) -> Read<T> {
    let file = TensorFile::open(path)?;
    file.verify()?;
    let mut tensors = BTreeMap::new();
    for (name, info) in file.header.tensors() {
        tensors.insert(name.clone(), one(&file, &name, info)?);
    }
    Ok((tensors, file.header.metadata().clone().unwrap_or_default()))
}

/// Writes one file, whole or not at all; the same tensors and metadata give the same bytes.
pub fn write_tensors(
    path: &Path,
    tensors: &BTreeMap<String, Tensor>,
    metadata: HashMap<String, String>,
) -> Result<()> {
    let matrices = tensors.iter().map(|(n, t)| (n.clone(), t.clone().into()));
    write_matrices(path, &matrices.collect(), metadata)
}

/// What a weight stands in a file as.
fn written_as(weight: &Matrix) -> Dtype {
    match weight {
        Matrix::Dense(t) => View::dtype(t),
        Matrix::Trained(_) => Dtype::BF16,
        Matrix::Stored(w) => match w.storage() {
            Storage::F16 => Dtype::F16,
            Storage::Bf16 => Dtype::BF16,
            Storage::F8E4M3 => Dtype::F8_E4M3,
            Storage::F32 | Storage::Blocks(_) => Dtype::F32,
        },
    }
}

/// How many bytes a weight takes in a file.
pub(super) fn bytes_of(weight: &Matrix) -> usize {
    weight.shape().iter().product::<usize>() * written_as(weight).bitsize() / 8
}

fn bytes(weight: &Matrix) -> candle_core::Result<Cow<'_, [u8]>> {
    Ok(match weight {
        Matrix::Dense(t) => View::data(t),
        Matrix::Trained(w) => View::data(&w.narrow()?).into_owned().into(),
        Matrix::Stored(w) => match w.storage() {
            Storage::Blocks(_) => {
                let entries = weight.to_host()?;
                let bytes = entries.iter().flat_map(|x| x.to_le_bytes());
                bytes.collect::<Vec<u8>>().into()
            }
            _ => w.bytes().into(),
        },
    })
}

/// As [`write_tensors`], of weights however they are kept; blocks are widened to f32. Scales of 8 bits are weights of their own
/// ([`fp8::with_scales`]).
pub(super) fn write_matrices(
    path: &Path,
    weights: &BTreeMap<String, Matrix>,
    metadata: HashMap<String, String>,
) -> Result<()> {
    // The format hint that `transformers` asks for; in order, so that the same tensors give the same bytes.
    let mut metadata: BTreeMap<String, String> = metadata.into_iter().collect();
    metadata.insert("format".into(), "pt".into());
    // Not known before all is written.
    metadata.insert(CHECKSUM.into(), hex(0));
    // The widest types first: every tensor then stands at a multiple of its entries' size.
    let order = weights.iter().map(|(name, w)| (written_as(w), name, w));
    let mut order: Vec<_> = order.collect();
    order.sort_by(|(a, n, _), (b, m, _)| b.cmp(a).then(n.cmp(m)));
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".into(), serde_json::json!(metadata));
    let mut at = 0;
    for (dtype, name, weight) in &order {
        let end = at + bytes_of(weight);
        let info = TensorInfo {
            dtype: *dtype,
            shape: weight.shape(),
            data_offsets: (at, end),
        };
        header.insert((*name).clone(), serde_json::json!(info));
        at = end;
    }
    let mut header = serde_json::to_vec(&header).map_err(|e| Error::file(path, e))?;
    header.resize(header.len().next_multiple_of(size_of::<u64>()), b' ');
    let unknown = format!("\"{CHECKSUM}\":\"{}\"", hex(0));
    let mut windows = header.windows(unknown.len());
    let place = windows.position(|window| window == unknown.as_bytes());
    let place = place.map(|at| size_of::<u64>() + at + CHECKSUM.len() + "\"\":\"".len());
    write_atomic_with(path, |file| {
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        let mut data = BufWriter::new(Summed {
            inner: &mut *file,
            hasher: crc32fast::Hasher::new(),
        });
        for (_, _, weight) in &order {
            data.write_all(&bytes(weight).map_err(std::io::Error::other)?)?;
        }
        data.flush()?;
        let summed = data.into_inner().map_err(|e| e.into_error())?;
        let checksum = hex(summed.hasher.finalize());
        if let Some(place) = place {
            file.seek(SeekFrom::Start(place as u64))?;
            file.write_all(checksum.as_bytes())?;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The parser alone would keep one of the two and not say which.
    #[test]
    fn a_header_that_names_something_twice_is_refused() {
        const A: &str = r#""a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}"#;
        const META: &str = r#""__metadata__":{"format":"pt"}"#;
        const METAS: &str = r#""__metadata__":{"format":"pt","format":"np"}"#;
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("model.safetensors");
        let open = |entries: &[&str]| {
            let header = format!("{{{}}}", entries.join(","));
            let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
            bytes.extend(header.as_bytes());
            bytes.push(7);
            fs::write(&path, bytes).unwrap();
            TensorFile::open(&path)
        };
        open(&[META, A]).unwrap();
        for (entries, name) in [(&[META, A, A][..], "a"), (&[METAS, A][..], "format")] {
            let message = open(entries).unwrap_err().to_string();
            let wanted = format!("model.safetensors: the header names {name} twice");
            assert!(message.contains(&wanted), "{message}");
        }
    }
}
