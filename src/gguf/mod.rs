//! GGUF (version 3, little-endian), llama.cpp's file of a whole model: metadata, and tensors that stand at aligned offsets.
//! This file reads and writes the container, distrusting it; what its names mean is for `checkpoint` and `data` to say.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;

use crate::mapped::map;
use crate::op::blocks::BlockType;
use crate::op::linear::{Owner, Storage};
use crate::{Error, Result};

#[cfg(test)]
mod tests;
pub mod tokenizer;

const MAGIC: &[u8; 4] = b"GGUF";
const VERSION: u32 = 3;
/// Where the file does not say (`general.alignment`).
const ALIGNMENT: usize = 32;
/// Arrays of arrays of arrays have no use.
const MAX_DEPTH: usize = 4;
const MAX_DIMS: usize = 4;

/// A metadata value; integers of all sizes are one.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    Array(Vec<Value>),
}

/// ggml's numbers of the types that we know.
const STORAGES: [(u32, Storage); 7] = [
    (0, Storage::F32),
    (1, Storage::F16),
    (30, Storage::Bf16),
    (2, Storage::Blocks(BlockType::Q4_0)),
    (8, Storage::Blocks(BlockType::Q8_0)),
    (12, Storage::Blocks(BlockType::Q4K)),
    (14, Storage::Blocks(BlockType::Q6K)),
];

/// A tensor's place in the file.
#[derive(Debug, Clone, PartialEq)]
pub struct Info {
    /// Rows first, as everywhere here: GGUF stores the axes the other way round.
    pub shape: Vec<usize>,
    pub storage: Storage,
    /// Bytes of the file.
    pub range: std::ops::Range<usize>,
}

/// An opened file.
#[derive(Debug)]
pub struct Gguf {
    pub path: PathBuf,
    pub header: Header,
    map: Arc<Mmap>,
}

impl Gguf {
    /// # Errors
    /// Names the file and what is wrong with it.
    pub fn open(path: &Path) -> Result<Self> {
        let map = map(path)?;
        Ok(Self {
            path: path.to_owned(),
            header: Header::read(&map).map_err(|e| Error::file(path, e))?,
            map: Arc::new(map),
        })
    }

    /// The file's bytes, for what reads them where they stand.
    pub fn owner(&self) -> Owner {
        self.map.clone()
    }

    /// Whether a path is that of such a file, by its name.
    pub fn is_named(path: &Path) -> bool {
        path.extension()
            .is_some_and(|e| e.eq_ignore_ascii_case("gguf"))
    }

    /// Whether a file begins as such a file does.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn begins(path: &Path) -> Result<bool> {
        let mut magic = [0; MAGIC.len()];
        let read = std::fs::File::open(path).and_then(|mut file| file.read(&mut magic));
        read.map_err(Error::io("cannot read", path))?;
        Ok(magic == *MAGIC)
    }

    /// The stored bytes of a tensor.
    pub fn bytes(&self, info: &Info) -> &[u8] {
        &self.map[info.range.clone()]
    }
}

/// What a file says before its tensors' data.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Header {
    pub metadata: BTreeMap<String, Value>,
    pub tensors: BTreeMap<String, Info>,
}

impl Header {
    /// Reads the header and checks every tensor's place against the file. Nothing larger than the file is allocated.
    ///
    /// # Errors
    /// Says what is wrong, and at which byte or of which key or tensor.
    pub fn read(file: &[u8]) -> Result<Self> {
        let mut r = Reader { file, at: 0 };
        if r.take(4)? != MAGIC {
            return Err(Error::invalid(
                "not a GGUF file (it does not begin with GGUF)",
            ));
        }
        match r.u32()? {
            VERSION => {}
            other if other.swap_bytes() == VERSION => {
                return Err(Error::invalid(
                    "a big-endian GGUF file; convert it to little-endian",
                ));
            }
            other => {
                return Err(Error::invalid(format!(
                    "GGUF version {other} is not supported, only {VERSION}: convert the model again"
                )));
            }
        }
        // Of a tensor: name length, axes, type, offset. Of a key: name length, type, one byte.
        let tensors = r.count(8 + 4 + 4 + 8, "tensors")?;
        let keys = r.count(8 + 4 + 1, "keys")?;
        let mut metadata = BTreeMap::new();
        for _ in 0..keys {
            let key = r.text()?;
            let kind = r.u32()?;
            let value = r
                .value(kind, 0)
                .map_err(|e| Error::invalid(format!("key {key}: {e}")))?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(Error::invalid(format!("key {key} is there twice")));
            }
        }
        let alignment = match metadata.get("general.alignment") {
            None => ALIGNMENT,
            Some(Value::Unsigned(n)) if n.is_power_of_two() && *n <= 1 << 20 => *n as usize,
            Some(other) => {
                return Err(Error::invalid(format!(
                    "general.alignment must be a power of two, not {other:?}"
                )));
            }
        };
        let mut infos = Vec::new();
        for _ in 0..tensors {
            let name = r.text()?;
            let info = r
                .info()
                .map_err(|e| Error::invalid(format!("tensor {name}: {e}")))?;
            infos.push((name, info));
        }
        let start = r.at.next_multiple_of(alignment);
        let mut tensors = BTreeMap::new();
        for (name, (shape, storage, offset)) in infos {
            let wrong = |what: String| Error::invalid(format!("tensor {name}: {what}"));
            let range = place(&shape, storage, offset, start, alignment).map_err(&wrong)?;
            if range.end > file.len() {
                return Err(wrong(format!(
                    "bytes {} to {} of a file of {}: it is cut off; download or write it again",
                    range.start,
                    range.end,
                    file.len()
                )));
            }
            let info = Info {
                shape,
                storage,
                range,
            };
            if tensors.insert(name.clone(), info).is_some() {
                return Err(wrong("is there twice".into()));
            }
        }
        Ok(Self { metadata, tensors })
    }
}

/// Where a tensor stands in the file.
fn place(
    shape: &[usize],
    storage: Storage,
    offset: u64,
    start: usize,
    alignment: usize,
) -> std::result::Result<std::ops::Range<usize>, String> {
    let (width, rows) = shape.split_last().expect("at least one axis");
    let row = storage.row_bytes(*width).map_err(|e| e.to_string())?;
    let rows = rows.iter().try_fold(1usize, |n, dim| n.checked_mul(*dim));
    let bytes = rows.and_then(|rows| rows.checked_mul(row));
    let from = usize::try_from(offset)
        .ok()
        .and_then(|at| at.checked_add(start));
    if !offset.is_multiple_of(alignment as u64) {
        return Err(format!("offset {offset} is no multiple of {alignment}"));
    }
    match (from, bytes) {
        (Some(from), Some(bytes)) => match from.checked_add(bytes) {
            Some(to) => Ok(from..to),
            None => Err(format!("offset {offset} is past all files")),
        },
        _ => Err(format!(
            "shape {shape:?} at offset {offset} is past all files"
        )),
    }
}

struct Reader<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let rest = &self.file[self.at..];
        let Some(found) = rest.get(..count) else {
            return Err(Error::invalid(format!(
                "the file ends at byte {}, {count} more were to follow byte {}: it is cut off or damaged",
                self.file.len(),
                self.at
            )));
        };
        self.at += count;
        Ok(found)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        Ok(self.take(N)?.try_into().expect("as many as were asked for"))
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A number of things that each take at least `size` bytes of what is left.
    fn count(&mut self, size: usize, what: &str) -> Result<usize> {
        let count = self.u64()?;
        let most = (self.file.len() - self.at) / size;
        match usize::try_from(count) {
            Ok(count) if count <= most => Ok(count),
            _ => Err(Error::invalid(format!(
                "{count} {what} do not fit into the file: it is cut off or damaged"
            ))),
        }
    }

    fn text(&mut self) -> Result<String> {
        let length = self.count(1, "bytes of text")?;
        let at = self.at;
        let text = std::str::from_utf8(self.take(length)?);
        let text =
            text.map_err(|_| Error::invalid(format!("the text at byte {at} is not UTF-8")))?;
        Ok(text.to_owned())
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<Value> {
        Ok(match kind {
            0 => Value::Unsigned(self.array::<1>()?[0].into()),
            1 => Value::Signed(i8::from_le_bytes(self.array()?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array()?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array()?).into()),
            4 => Value::Unsigned(self.u32()?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.array()?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array()?).into()),
            7 => match self.array::<1>()?[0] {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                other => return Err(Error::invalid(format!("{other} is neither true nor false"))),
            },
            8 => Value::Text(self.text()?),
            9 if depth < MAX_DEPTH => {
                let inner = self.u32()?;
                let size = match inner {
                    0 | 1 | 7 => 1,
                    2 | 3 => 2,
                    4..=6 => 4,
                    _ => 8,
                };
                let count = self.count(size, "entries")?;
                let entries = (0..count).map(|_| self.value(inner, depth + 1));
                Value::Array(entries.collect::<Result<_>>()?)
            }
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            other => return Err(Error::invalid(format!("a value of unknown type {other}"))),
        })
    }

    fn info(&mut self) -> Result<(Vec<usize>, Storage, u64)> {
        let dims = self.u32()? as usize;
        if !(1..=MAX_DIMS).contains(&dims) {
            return Err(Error::invalid(format!(
                "{dims} axes; 1 to {MAX_DIMS} are possible"
            )));
        }
        let mut shape = Vec::new();
        for _ in 0..dims {
            let dim = self.u64()?;
            let dim = usize::try_from(dim).ok().filter(|dim| *dim > 0);
            shape.push(dim.ok_or_else(|| Error::invalid("an axis without entries, or too long"))?);
        }
        shape.reverse();
        let kind = self.u32()?;
        let storage = STORAGES.iter().find(|(number, _)| *number == kind);
        let Some((_, storage)) = storage else {
            return Err(Error::invalid(format!(
                "ggml type {kind} is not supported: F32, F16, BF16, Q8_0, Q6_K, Q4_K and Q4_0 are"
            )));
        };
        Ok((shape, *storage, self.u64()?))
    }
}

/// The bytes before the tensors' data, and for each tensor (in order) its offset in the data; `tensors` are names,
/// shapes (rows first) and how they are stored.
///
/// # Errors
/// A tensor whose rows are no whole blocks.
pub fn header(
    metadata: &[(&str, Value)],
    tensors: &[(String, Vec<usize>, Storage)],
) -> Result<(Vec<u8>, Vec<usize>)> {
    let mut out = MAGIC.to_vec();
    out.extend(VERSION.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    let text = |out: &mut Vec<u8>, text: &str| {
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text.as_bytes());
    };
    for (key, value) in metadata {
        text(&mut out, key);
        out.extend(number(value).to_le_bytes());
        write_value(&mut out, value);
    }
    let (mut offsets, mut at) = (Vec::new(), 0);
    for (name, shape, storage) in tensors {
        text(&mut out, name);
        out.extend((shape.len() as u32).to_le_bytes());
        for dim in shape.iter().rev() {
            out.extend((*dim as u64).to_le_bytes());
        }
        let found = STORAGES.iter().find(|(_, known)| known == storage);
        out.extend(found.expect("all are listed").0.to_le_bytes());
        out.extend((at as u64).to_le_bytes());
        offsets.push(at);
        let (width, rows) = shape.split_last().expect("at least one axis");
        at += rows.iter().product::<usize>() * storage.row_bytes(*width)?;
        at = at.next_multiple_of(ALIGNMENT);
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
    Ok((out, offsets))
}

/// GGUF's number of the type that a value is written as: llama.cpp asks for 32-bit numbers where they do.
fn number(value: &Value) -> u32 {
    match value {
        Value::Unsigned(n) if u32::try_from(*n).is_ok() => 4,
        Value::Unsigned(_) => 10,
        Value::Signed(n) if i32::try_from(*n).is_ok() => 5,
        Value::Signed(_) => 11,
        Value::Float(_) => 6,
        Value::Bool(_) => 7,
        Value::Text(_) => 8,
        Value::Array(_) => 9,
    }
}

fn write_value(out: &mut Vec<u8>, value: &Value) {
    match (value, number(value)) {
        (Value::Unsigned(n), 4) => out.extend((*n as u32).to_le_bytes()),
        (Value::Unsigned(n), _) => out.extend(n.to_le_bytes()),
        (Value::Signed(n), 5) => out.extend((*n as i32).to_le_bytes()),
        (Value::Signed(n), _) => out.extend(n.to_le_bytes()),
        (Value::Float(x), _) => out.extend((*x as f32).to_le_bytes()),
        (Value::Bool(b), _) => out.push(u8::from(*b)),
        (Value::Text(text), _) => {
            out.extend((text.len() as u64).to_le_bytes());
            out.extend(text.as_bytes());
        }
        (Value::Array(entries), _) => {
            // An empty array needs some type: that of texts.
            out.extend(entries.first().map_or(8, number).to_le_bytes());
            out.extend((entries.len() as u64).to_le_bytes());
            entries.iter().for_each(|entry| write_value(out, entry));
        }
    }
}
