//! Records of a data file: JSON lines, a JSON list, parquet, Arrow or plain text, as they are or packed by gzip or zstd. One is read after the
//! other; a file is never in memory whole unless it is a list, or one text.

use std::cell::Cell;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use parquet::basic::Compression;
use parquet::file::metadata::ColumnChunkMetaData;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::arrow::Rows;
use super::guard::guarded;
use crate::{Error, Result};

/// The records of a file, in their order.
pub struct Records {
    path: PathBuf,
    /// Records so far; lines are counted too when they are empty.
    number: usize,
    source: Source,
    /// What a record should be.
    wanted: String,
    /// What is said where reading fails.
    failed: &'static str,
    /// Bytes of the file, or rows.
    size: u64,
    /// Bytes read of it.
    read: Rc<Cell<u64>>,
}

enum Source {
    Lines(Box<dyn BufRead>),
    List(std::vec::IntoIter<Value>),
    Parquet(RowIter<'static>),
    Arrow(Rows),
    Nothing,
}

impl Records {
    /// By the file's name: `.parquet`, `.arrow` and `.feather`, `.txt` (one record with the whole as `text`), `.json` (a list, or lines), else
    /// JSON lines; `.gz` and `.zst` behind any of these but parquet. `wanted` says in messages what a record should be.
    ///
    /// # Errors
    /// A file that cannot be read, is empty, or is not what its name says.
    pub fn open(path: &Path, wanted: &str) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("cannot read", path))?;
        let bytes = file.metadata().map_or(0, |about| about.len());
        let read = Rc::new(Cell::new(0));
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let mut name = name.to_lowercase();
        let bad = |e: &dyn std::fmt::Display| Error::file(path, e.to_string());
        let packed = [".gz", ".zst", ".zstd"]
            .iter()
            .any(|end| name.ends_with(end));
        let failed = match packed {
            true => "cannot be unpacked",
            false => "cannot be read",
        };
        let records = |source, size| Self {
            path: path.to_owned(),
            number: 0,
            source,
            wanted: wanted.to_owned(),
            failed,
            size,
            read: read.clone(),
        };
        if name.ends_with(".parquet") {
            let reader = SerializedFileReader::new(file).map_err(|e| bad(&e))?;
            let metadata = reader.metadata();
            let columns = metadata
                .row_groups()
                .iter()
                .flat_map(|group| group.columns());
            for column in columns {
                check_column(column).map_err(|message| bad(&message))?;
            }
            let count = metadata.file_metadata().num_rows();
            let rows = RowIter::from_file_into(Box::new(reader));
            return Ok(records(Source::Parquet(rows), count as u64));
        }
        let file = Counted {
            file,
            read: read.clone(),
        };
        let packed: Box<dyn Read> = match name.rsplit_once('.') {
            Some((stem, "gz")) => {
                name = stem.to_owned();
                Box::new(flate2::read::MultiGzDecoder::new(file))
            }
            Some((stem, "zst" | "zstd")) => {
                name = stem.to_owned();
                Box::new(zstd::Decoder::new(file).map_err(|e| bad(&e))?)
            }
            _ => Box::new(file),
        };
        let mut reader = BufReader::with_capacity(1 << 18, packed);
        let begin = reader.fill_buf();
        let begin = begin.map_err(|e| bad(&format!("{failed}: {e}")))?;
        if begin.is_empty() {
            return Err(records(Source::Nothing, bytes).empty());
        }
        if name.ends_with(".arrow") || name.ends_with(".feather") {
            let rows = Rows::open(Box::new(reader));
            let rows = rows.map_err(|e| bad(&format!("{failed}: {e}")))?;
            return Ok(records(Source::Arrow(rows), bytes));
        }
        if name.ends_with(".txt") {
            let mut text = String::new();
            let read = reader.read_to_string(&mut text);
            read.map_err(|e| bad(&format!("not a text: {e}")))?;
            let whole = vec![json!({ "text": text })];
            return Ok(records(Source::List(whole.into_iter()), bytes));
        }
        let list = begin.iter().find(|b| !b.is_ascii_whitespace()) == Some(&b'[');
        if name.ends_with(".json") && list {
            let all: Vec<Value> = serde_json::from_reader(reader).map_err(|e| bad(&e))?;
            return Ok(records(Source::List(all.into_iter()), bytes));
        }
        Ok(records(Source::Lines(Box::new(reader)), bytes))
    }

    /// Whether a file's name says that it holds records.
    pub fn is_named(path: &Path) -> bool {
        ends(path, &["jsonl", "ndjson", "json"]) || Self::is_packed(path)
    }

    /// Whether a file's name says that it holds more text than it has bytes.
    pub fn is_packed(path: &Path) -> bool {
        ends(path, &["parquet", "arrow", "feather", "gz", "zst", "zstd"])
    }

    fn empty(&self) -> Error {
        let message = format!("the file is empty; each line is to be {}", self.wanted);
        Error::file(&self.path, message)
    }

    /// What is wrong with the record that came last.
    pub fn wrong(&self, message: impl Into<String>) -> Error {
        Error::Line {
            path: self.path.clone(),
            line: self.number,
            message: message.into(),
        }
    }

    /// The record that came last (from 1).
    pub fn number(&self) -> usize {
        self.number
    }

    /// How much of the file has been read, from 0 to 1.
    pub fn share(&self) -> f64 {
        let (done, all) = match &self.source {
            Source::Lines(_) | Source::Arrow(_) => (self.read.get() as usize, self.size as usize),
            Source::List(rest) => (self.number, self.number + rest.len()),
            Source::Parquet(_) => (self.number, self.size as usize),
            Source::Nothing => (1, 1),
        };
        done as f64 / all.max(1) as f64
    }

    fn line(&mut self) -> Result<Option<Value>> {
        let Source::Lines(reader) = &mut self.source else {
            return Ok(None);
        };
        let mut line = Vec::new();
        let mut empty = None;
        loop {
            line.clear();
            let read = reader.read_until(b'\n', &mut line);
            let read =
                read.map_err(|e| Error::file(&self.path, format!("{}: {e}", self.failed)))?;
            if read == 0 {
                // Empty lines are allowed at the end only, and not alone.
                return match self.number == empty.map_or(0, |(_, count)| count) {
                    true => Err(self.empty()),
                    false => Ok(None),
                };
            }
            self.number += 1;
            if !line.trim_ascii().is_empty() {
                break;
            }
            let (first, count) = empty.unwrap_or((self.number, 0));
            empty = Some((first, count + 1));
        }
        if let Some((first, _)) = empty {
            self.number = first;
            return Err(self.wrong("an empty line; give one JSON object a line"));
        }
        let text = std::str::from_utf8(&line).map_err(|e| self.wrong(format!("not UTF-8: {e}")))?;
        let value = serde_json::from_str(text);
        value
            .map(Some)
            .map_err(|e| self.wrong(format!("not {}: {e}", self.wanted)))
    }

    fn take(&mut self) -> Result<Option<Value>> {
        let next = match &mut self.source {
            Source::Lines(_) => return self.line(),
            Source::List(all) => all.next(),
            Source::Parquet(rows) => {
                // It trusts the lengths in a page.
                let row = guarded(|| rows.next().transpose());
                let row = row.ok_or_else(|| Error::file(&self.path, "a page is broken"))?;
                let row = row.map_err(|e| Error::file(&self.path, e.to_string()))?;
                row.map(|row| row.to_json_value())
            }
            Source::Arrow(rows) => {
                let failed = self.failed;
                let row = rows.next();
                row.map_err(|e| Error::file(&self.path, format!("{failed}: {e}")))?
            }
            Source::Nothing => None,
        };
        self.number += 1;
        match (&next, self.number) {
            (None, 1) => Err(self.empty()),
            _ => Ok(next),
        }
    }
}

impl Iterator for Records {
    type Item = Result<Value>;

    fn next(&mut self) -> Option<Result<Value>> {
        let next = self.take().transpose();
        if matches!(next, None | Some(Err(_))) {
            self.source = Source::Nothing;
            self.number = self.number.max(1);
        }
        next
    }
}

fn ends(path: &Path, endings: &[&str]) -> bool {
    let ending = path.extension().map(|e| e.to_string_lossy().to_lowercase());
    ending.is_some_and(|ending| endings.contains(&ending.as_str()))
}

/// That parquet's reader has the codec, and does not panic.
fn check_column(column: &ColumnChunkMetaData) -> std::result::Result<(), String> {
    let start = column.dictionary_page_offset();
    if start.unwrap_or(column.data_page_offset()) < 0 || column.compressed_size() < 0 {
        return Err("a column has a negative place or size".into());
    }
    let codec = match column.compression() {
        Compression::BROTLI(_) => "brotli",
        Compression::LZO => "LZO",
        _ => return Ok(()),
    };
    let name = column.column_path().string();
    Err(format!(
        "column {name} is packed by {codec}, which is not read: write it anew by zstd"
    ))
}

/// A file, and how many bytes of it were read.
struct Counted {
    file: File,
    read: Rc<Cell<u64>>,
}

impl Read for Counted {
    fn read(&mut self, to: &mut [u8]) -> std::io::Result<usize> {
        let read = self.file.read(to)?;
        self.read.set(self.read.get() + read as u64);
        Ok(read)
    }
}

/// All records of a file.
///
/// # Errors
/// Names the file and the record (from 1) that is not what is `wanted`.
pub fn read_records<T: DeserializeOwned>(path: &Path, wanted: &str) -> Result<Vec<T>> {
    let mut records = Records::open(path, wanted)?;
    let mut all = Vec::new();
    while let Some(value) = records.next().transpose()? {
        let value = serde_json::from_value(value);
        all.push(value.map_err(|e| records.wrong(format!("not {wanted}: {e}")))?);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// Files of the same two records in every form.
    #[test]
    fn every_form_gives_the_same_records() {
        let folder = tempfile::tempdir().unwrap();
        let lines = "{\"text\":\"a\"}\n{\"text\":\"b\"}\n";
        let write = |name: &str, bytes: &[u8]| {
            let path = folder.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            path
        };
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(lines.as_bytes()).unwrap();
        let gz = gz.finish().unwrap();
        let frame = |text: &str| zstd::encode_all(text.as_bytes(), 1).unwrap();
        // A frame of something else's, which is passed over.
        let skipped = [
            &0x184D_2A53_u32.to_le_bytes()[..],
            &3u32.to_le_bytes(),
            b"xyz",
        ]
        .concat();
        let (first, second) = lines.split_at(13);
        let frames = [skipped, frame(first), frame(second)].concat();
        let files = [
            write("two.jsonl.zstd", &frames),
            write("a.jsonl", lines.as_bytes()),
            write("a.json", lines.as_bytes()),
            write("b.json", b" [{\"text\":\"a\"}, {\"text\":\"b\"}]"),
            write("a.jsonl.gz", &gz),
            write("a.jsonl.zst", &frame(lines)),
        ];
        let wanted = [json!({"text": "a"}), json!({"text": "b"})];
        for file in files {
            let found: Vec<Value> = read_records(&file, "an object").unwrap();
            assert_eq!(found, wanted, "{}", file.display());
        }
        let text = write("c.txt", b"all of it\n");
        let found: Vec<Value> = read_records(&text, "an object").unwrap();
        assert_eq!(found, [json!({"text": "all of it\n"})]);
        for (name, bytes, said) in [
            ("cut.jsonl.gz", &gz[..gz.len() / 2], "cannot be unpacked"),
            ("no.jsonl.zst", b"nothing of the kind", "no.jsonl.zst"),
            ("no.parquet", b"PAR0", "no.parquet"),
            ("cut.json", b"[{", "cut.json"),
            ("none.json", b"[]", "the file is empty"),
            ("none.txt", b"", "the file is empty"),
        ] {
            let file = write(name, bytes);
            let message = read_records::<Value>(&file, "an object").unwrap_err();
            assert!(message.to_string().contains(said), "{name}: {message}");
        }
    }

    /// What pyarrow wrote (`make.py`).
    const WRITTEN: &str = "tests/golden/records";

    fn written(name: &str) -> PathBuf {
        Path::new(WRITTEN).join(name)
    }

    fn rows(file: &Path) -> Vec<Value> {
        read_records(file, "an object").unwrap_or_else(|e| panic!("{e}"))
    }

    #[test]
    fn columns_give_the_records_of_the_lines() {
        let folder = tempfile::tempdir().unwrap();
        let made = |name: &str, bytes: &[u8]| {
            let path = folder.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            path
        };
        let stream = std::fs::read(written("stream.arrow")).unwrap();
        let file = std::fs::read(written("file.arrow")).unwrap();
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(&file).unwrap();
        // As Arrow's Rust writer begins a file.
        let aligned = [&b"ARROW1"[..], &[0; 58], &stream].concat();
        // A stream may end without a mark.
        let open = &stream[..stream.len() - 8];
        let all = rows(&written("rows.jsonl"));
        for file in [
            written("stream.arrow"),
            written("file.arrow"),
            written("large.arrow"),
            written("views.arrow"),
            written("lz4.feather"),
            written("zstd.feather"),
            made("file.arrow.gz", &gz.finish().unwrap()),
            made(
                "stream.arrow.zst",
                &zstd::encode_all(&stream[..], 1).unwrap(),
            ),
            made("aligned.arrow", &aligned),
            made("open.arrow", open),
        ] {
            assert_eq!(rows(&file), all, "{}", file.display());
        }
        let with = |names: &[&str]| -> Vec<Value> {
            let some = |row: &Value| {
                names
                    .iter()
                    .map(|n| (n.to_string(), row[n].clone()))
                    .collect()
            };
            all.iter().map(some).collect()
        };
        assert_eq!(rows(&written("deltas.arrow")), with(&["source"]));
        // Dates, times, decimals, bytes, fixed lists and maps are left out.
        let left = with(&["text"]);
        let left = left.into_iter().map(|mut row| {
            row["meta"] = row.clone();
            row
        });
        assert_eq!(rows(&written("other.arrow")), left.collect::<Vec<_>>());
        for codec in ["snappy", "gzip", "zstd", "lz4"] {
            let file = written(&format!("{codec}.parquet"));
            assert_eq!(rows(&file), with(&["text", "messages"]), "{codec}");
        }
    }

    #[test]
    fn columns_that_cannot_be_read_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let stream = std::fs::read(written("stream.arrow")).unwrap();
        let file = std::fs::read(written("file.arrow")).unwrap();
        let packed = std::fs::read(written("zstd.feather")).unwrap();
        // Where the first batch begins, and the number at `at` behind it.
        let marks = |bytes: &[u8]| -> Vec<usize> {
            let found = bytes.windows(4).enumerate();
            let found = found.filter(|(at, word)| at % 8 == 0 && *word == [0xff; 4]);
            found.map(|(at, _)| at).collect()
        };
        let with = |bytes: &[u8], at: usize, number: &[u8]| {
            let mut bytes = bytes.to_vec();
            bytes[at..at + number.len()].copy_from_slice(number);
            bytes
        };
        let batch = marks(&stream)[1];
        let end = *marks(&file).last().unwrap();
        let huge = 0x7fff_ffff_u32.to_le_bytes();
        for (name, bytes, said) in [
            ("no.arrow", b"ARROW1".to_vec(), "cut"),
            ("old.feather", b"FEA1    ".to_vec(), "neither with ARROW1"),
            (
                "text.arrow",
                b"{\"text\": 1}\n".to_vec(),
                "neither with ARROW1",
            ),
            ("none.arrow", Vec::new(), "the file is empty"),
            ("empty.arrow", stream[..batch].to_vec(), "the file is empty"),
            ("head.arrow", stream[..batch + 20].to_vec(), "cut"),
            ("body.arrow", stream[..stream.len() - 20].to_vec(), "cut"),
            // A file without its footer has lost something; a stream may end.
            ("footer.arrow", file[..end].to_vec(), "cut"),
            ("huge.arrow", with(&stream, batch + 4, &huge), "cut"),
            (
                "negative.arrow",
                with(&stream, batch + 4, &[0xff; 4]),
                "negative",
            ),
            ("mark.arrow", with(&stream, batch, &[0; 4]), "mark"),
            ("tables.arrow", with(&stream, batch + 8, &huge), "is none"),
            ("packed.arrow.gz", packed, "unpacked"),
        ] {
            let path = folder.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            let message = read_records::<Value>(&path, "an object").unwrap_err();
            let message = message.to_string();
            assert!(
                message.contains(said) && message.contains(name),
                "{message}"
            );
        }
        for (name, said) in [
            (
                "number.arrow",
                "column number is of type a dictionary of Int",
            ),
            ("brotli.parquet", "column text is packed by brotli"),
        ] {
            let message = Records::open(&written(name), "an object").err().unwrap();
            assert!(message.to_string().contains(said), "{message}");
        }
    }
}
