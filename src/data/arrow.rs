//! Rows of Arrow IPC: the stream format, in which Hugging Face's `datasets` keeps what it has, and the file format (Feather), which is a stream
//! between a magic and a footer. The footer says only where batches lie, for who wants one of them; read in order, and from a packed file
//! too, both are one format. <https://arrow.apache.org/docs/format/Columnar.html#serialization-and-interprocess-communication-ipc>

use std::collections::HashMap;
use std::io::{Error, ErrorKind, Read, Result};

use arrow_array::cast::AsArray;
use arrow_array::types::{
    ArrowPrimitiveType, Float16Type, Float32Type, Float64Type, Int8Type, Int16Type, Int32Type,
    Int64Type, UInt8Type, UInt16Type, UInt32Type, UInt64Type,
};
use arrow_array::{Array, ArrayRef, RecordBatch};
use arrow_ipc::{CompressionType, Endianness, Field, Message, Type};
use arrow_schema::{ArrowError, DataType, Fields, SchemaRef};
use flatbuffers::VerifierOptions;
use serde_json::Value;

use super::guard::guarded;

/// A table, a batch of rows in memory at a time.
pub(super) struct Rows {
    from: Box<dyn Read>,
    schema: SchemaRef,
    /// By their numbers in the schema; a later one takes the place of one before.
    dictionaries: HashMap<i64, ArrayRef>,
    batch: RecordBatch,
    /// The row of the batch that is next.
    row: usize,
    /// A file has a footer behind its stream; where nothing comes, the rest of it is missing.
    footer: bool,
    ended: bool,
}

/// A file's first bytes.
const MAGIC: [u8; 8] = *b"ARROW1\0\0";
/// Before the length of every message, since Arrow 0.15 (2019).
const MARK: [u8; 4] = [0xff; 4];

impl Rows {
    /// # Errors
    /// What cannot be read, is no Arrow, or has columns of types that are not known.
    pub(super) fn open(mut from: Box<dyn Read>) -> Result<Self> {
        let mut begin = prefix(&mut from)?;
        let footer = begin == Some(MAGIC);
        if footer {
            begin = prefix(&mut from)?;
            // Arrow's Rust writer aligns the first message to 64 bytes.
            while begin == Some([0; 8]) {
                begin = prefix(&mut from)?;
            }
        } else if !begin.is_some_and(|begin| begin.starts_with(&MARK)) {
            return Err(invalid(
                "it begins neither with ARROW1 nor as a stream of Arrow (since 0.15)",
            ));
        }
        let head = head(&mut from, begin)?;
        let head = head.ok_or_else(|| invalid("it ends before its schema"))?;
        let message = message(&head)?;
        take(&mut from, message.bodyLength())?;
        let schema = message.header_as_schema();
        let schema = schema.ok_or_else(|| invalid("its first message is not a schema"))?;
        if schema.endianness() != Endianness::Little {
            return Err(invalid("its numbers are big-endian: write it anew"));
        }
        for field in schema.fields().into_iter().flatten() {
            check_type(field, field.name().unwrap_or_default())?;
        }
        // Both panic at types that are none, as a map without keys.
        let made = guarded(|| {
            let schema = SchemaRef::new(arrow_ipc::convert::try_fb_to_schema(schema)?);
            Ok((RecordBatch::new_empty(schema.clone()), schema))
        });
        let made = made.ok_or_else(|| invalid("its schema is broken"))?;
        let (batch, schema) = made.map_err(other)?;
        Ok(Self {
            from,
            batch,
            schema,
            dictionaries: HashMap::new(),
            row: 0,
            footer,
            ended: false,
        })
    }

    /// # Errors
    /// What cannot be read.
    pub(super) fn next(&mut self) -> Result<Option<Value>> {
        while self.row == self.batch.num_rows() {
            if !self.read_batch()? {
                return Ok(None);
            }
        }
        let record = object(self.schema.fields(), self.batch.columns(), self.row);
        self.row += 1;
        Ok(Some(record))
    }

    /// Whether there was another batch.
    fn read_batch(&mut self) -> Result<bool> {
        while !self.ended {
            let begin = prefix(&mut self.from)?;
            if begin.is_none() && self.footer {
                return Err(cut());
            }
            let Some(head) = head(&mut self.from, begin)? else {
                self.ended = true;
                break;
            };
            let message = message(&head)?;
            let body = take(&mut self.from, message.bodyLength())?;
            let version = message.version();
            if let Some(batch) = message.header_as_record_batch() {
                check(&batch, &body)?;
                let (schema, known) = (self.schema.clone(), &self.dictionaries);
                let body = body.into();
                let read = arrow_ipc::reader::read_record_batch;
                self.batch = decoded(|| read(&body, batch, schema, known, None, &version))?;
                self.row = 0;
                return Ok(true);
            }
            if let Some(dictionary) = message.header_as_dictionary_batch() {
                let words = dictionary.data();
                let words = words.ok_or_else(|| invalid("a dictionary without values"))?;
                check(&words, &body)?;
                let (body, known) = (body.into(), &mut self.dictionaries);
                let read = arrow_ipc::reader::read_dictionary;
                decoded(|| read(&body, dictionary, &self.schema, known, &version))?;
                continue;
            }
            let kind = message.header_type();
            return Err(invalid(format!(
                "a message that is no batch of rows: {kind:?}"
            )));
        }
        Ok(false)
    }
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidData, message.into())
}

fn other(error: ArrowError) -> Error {
    invalid(error.to_string())
}

/// What the crate makes of a batch; it panics at some that [`check`] cannot tell, as offsets that are no whole number of them.
fn decoded<T>(work: impl FnOnce() -> std::result::Result<T, ArrowError>) -> Result<T> {
    let made = guarded(work).ok_or_else(|| invalid("a batch of rows is broken"))?;
    made.map_err(other)
}

fn cut() -> Error {
    invalid("it ends where more should come: it was cut, or is still written")
}

/// What a message begins with, its mark and its length; none where the file ends.
fn prefix(from: &mut impl Read) -> Result<Option<[u8; 8]>> {
    let mut bytes = Vec::new();
    from.take(8).read_to_end(&mut bytes)?;
    match bytes.as_slice() {
        [] => Ok(None),
        bytes => bytes.try_into().map(Some).map_err(|_| cut()),
    }
}

/// So many bytes; a length that is not true takes no more memory than the file.
fn take(from: &mut impl Read, length: i64) -> Result<Vec<u8>> {
    let length = u64::try_from(length).map_err(|_| invalid("a message of negative length"))?;
    let mut bytes = Vec::new();
    match from.take(length).read_to_end(&mut bytes)? as u64 == length {
        true => Ok(bytes),
        false => Err(cut()),
    }
}

/// A message without its body; none behind the last one.
fn head(from: &mut impl Read, begin: Option<[u8; 8]>) -> Result<Option<Vec<u8>>> {
    let Some([a, b, c, d, length @ ..]) = begin else {
        return Ok(None);
    };
    if [a, b, c, d] != MARK {
        return Err(invalid("a message begins without its mark"));
    }
    match i32::from_le_bytes(length) {
        0 => Ok(None),
        length => take(from, length.into()).map(Some),
    }
}

fn message(head: &[u8]) -> Result<Message<'_>> {
    // Tables and texts that are named by many others are read for each of them: how much that is in all is bound to what lies there.
    let options = VerifierOptions {
        max_apparent_size: 64 * head.len(),
        ..VerifierOptions::default()
    };
    arrow_ipc::root_as_message_with_opts(&options, head)
        .map_err(|e| invalid(format!("a message that is none: {e}")))
}

/// Types of which [`value`] knows the JSON, or for which it has none ([`OTHER`]). It is asked before the crate makes its own of them, which not all
/// can be made.
fn check_type(field: Field, name: &str) -> Result<()> {
    let kind = field.type_type();
    let is_text = [Type::Utf8, Type::LargeUtf8, Type::Utf8View].contains(&kind);
    let plain = [
        Type::Null,
        Type::Bool,
        Type::Int,
        Type::FloatingPoint,
        Type::List,
        Type::LargeList,
        Type::Struct_,
    ];
    let known = plain.contains(&kind) || OTHER.contains(&kind);
    if !is_text && (field.dictionary().is_some() || !known) {
        let of = match field.dictionary() {
            Some(_) => "a dictionary of ",
            None => "",
        };
        let kind = kind.variant_name().unwrap_or("unknown");
        return Err(invalid(format!(
            "column {name} is of type {of}{kind}, which is not read: save the data without it, or as parquet"
        )));
    }
    for child in field.children().into_iter().flatten() {
        check_type(child, &format!("{name}.{}", child.name().unwrap_or("item")))?;
    }
    Ok(())
}

/// Types of columns that are read over: a record is without them.
const OTHER: [Type; 12] = [
    Type::Date,
    Type::Time,
    Type::Timestamp,
    Type::Duration,
    Type::Interval,
    Type::Decimal,
    Type::Binary,
    Type::LargeBinary,
    Type::BinaryView,
    Type::FixedSizeBinary,
    Type::FixedSizeList,
    Type::Map,
];

/// What the crate takes on trust, and would slice, reserve or count: buffers lie in the body, one beside the other; what they say they unpack to
/// is no more than a codec can pack; there are no more rows than bits.
fn check(batch: &arrow_ipc::RecordBatch, body: &[u8]) -> Result<()> {
    let codec = batch.compression().map(|packed| packed.codec());
    let (mut taken, mut unpacked) = (0, 0);
    for buffer in batch.buffers().into_iter().flatten() {
        let start = usize::try_from(buffer.offset()).ok();
        let length = usize::try_from(buffer.length()).ok();
        let place = start.zip(length).and_then(|(start, length)| {
            let end = start.checked_add(length)?;
            body.get(start..end)
        });
        let place = place.ok_or_else(|| invalid("a buffer lies outside of its message"))?;
        taken += place.len();
        unpacked += match codec {
            Some(codec) => unpacked_length(place, codec)?,
            None => place.len(),
        };
    }
    if taken > body.len() {
        return Err(invalid("the buffers of a message lie on each other"));
    }
    let most = unpacked.saturating_mul(8) as i64;
    let nodes = batch.nodes().into_iter().flatten();
    let counts = nodes.flat_map(|node| [node.length(), node.null_count()]);
    match counts
        .chain([batch.length()])
        .find(|count| !(0..=most).contains(count))
    {
        Some(count) => Err(invalid(format!(
            "a batch of {count} rows in {unpacked} bytes"
        ))),
        None => Ok(()),
    }
}

/// Behind the length that it says it has: -1 where it is not packed.
fn unpacked_length(buffer: &[u8], codec: CompressionType) -> Result<usize> {
    /// The most bytes that a byte stands for: of LZ4 one of a run's length, of zstd a quarter of a block of one repeated byte.
    const LZ4: usize = 255;
    const ZSTD: usize = 1 << 15;
    let most = match codec {
        CompressionType::LZ4_FRAME => LZ4,
        _ => ZSTD,
    };
    let Some((length, packed)) = buffer.split_first_chunk() else {
        return match buffer.is_empty() {
            true => Ok(0),
            false => Err(invalid("a packed buffer without its length")),
        };
    };
    match i64::from_le_bytes(*length) {
        -1 => Ok(packed.len()),
        length => usize::try_from(length)
            .ok()
            .filter(|length| *length <= packed.len().saturating_mul(most))
            .ok_or_else(|| {
                let packed = packed.len();
                invalid(format!("{packed} packed bytes that say to be {length}"))
            }),
    }
}

/// A row of columns, without those of types that JSON has nothing for.
fn object(fields: &Fields, columns: &[ArrayRef], row: usize) -> Value {
    let fields = fields.iter().zip(columns);
    let known = fields.filter(|(field, _)| is_json(field.data_type()));
    let named = known.map(|(field, column)| (field.name().clone(), value(column, row)));
    Value::Object(named.collect())
}

/// Whether JSON has something for it: not for those of [`OTHER`], nor for lists of them.
fn is_json(kind: &DataType) -> bool {
    match kind {
        DataType::List(item) | DataType::LargeList(item) => is_json(item.data_type()),
        kind if kind.is_temporal() || kind.is_decimal() => false,
        DataType::Binary
        | DataType::LargeBinary
        | DataType::BinaryView
        | DataType::FixedSizeBinary(_)
        | DataType::FixedSizeList(_, _)
        | DataType::Map(_, _) => false,
        _ => true,
    }
}

/// As JSON, as the crate `parquet` has it: a float that is none is null.
fn value(column: &dyn Array, row: usize) -> Value {
    if column.is_null(row) {
        return Value::Null;
    }
    match column.data_type() {
        DataType::Boolean => column.as_boolean().value(row).into(),
        DataType::Int8 => number::<Int8Type>(column, row),
        DataType::Int16 => number::<Int16Type>(column, row),
        DataType::Int32 => number::<Int32Type>(column, row),
        DataType::Int64 => number::<Int64Type>(column, row),
        DataType::UInt8 => number::<UInt8Type>(column, row),
        DataType::UInt16 => number::<UInt16Type>(column, row),
        DataType::UInt32 => number::<UInt32Type>(column, row),
        DataType::UInt64 => number::<UInt64Type>(column, row),
        DataType::Float16 => f32::from(column.as_primitive::<Float16Type>().value(row)).into(),
        DataType::Float32 => number::<Float32Type>(column, row),
        DataType::Float64 => number::<Float64Type>(column, row),
        DataType::Utf8 => column.as_string::<i32>().value(row).into(),
        DataType::LargeUtf8 => column.as_string::<i64>().value(row).into(),
        DataType::Utf8View => column.as_string_view().value(row).into(),
        DataType::List(_) => list(&column.as_list::<i32>().value(row)),
        DataType::LargeList(_) => list(&column.as_list::<i64>().value(row)),
        DataType::Struct(fields) => object(fields, column.as_struct().columns(), row),
        DataType::Dictionary(_, _) => {
            let dictionary = column.as_any_dictionary();
            let key = value(dictionary.keys(), row).as_u64();
            let key = key.expect("the crate has checked the keys");
            value(dictionary.values(), key as usize)
        }
        // The type Null; of others there is no column.
        _ => Value::Null,
    }
}

fn number<T: ArrowPrimitiveType>(column: &dyn Array, row: usize) -> Value
where
    Value: From<T::Native>,
{
    column.as_primitive::<T>().value(row).into()
}

fn list(values: &dyn Array) -> Value {
    (0..values.len()).map(|i| value(values, i)).collect()
}
