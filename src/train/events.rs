//! The figures of a run as TensorBoard reads them: an event file, that is TFRecord frames of `Event` messages
//! (`tensorflow/core/util/event.proto`), of which only scalars are written.

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::StepMetrics;
use crate::{Error, Result};

/// An event file that grows.
pub(super) struct Events {
    path: PathBuf,
    file: fs::File,
}

impl Events {
    /// The file of a run whose steps so far are `metrics`: events of later steps, which a resumed run takes again, are cut
    /// off, and those that are missing are added.
    ///
    /// # Errors
    /// A file that cannot be read or written.
    pub fn open(path: &Path, metrics: &[StepMetrics]) -> Result<Self> {
        let cannot = || Error::io("cannot write", path);
        let options = fs::File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(path);
        let mut file = options.map_err(cannot())?;
        let bytes = fs::read(path).map_err(Error::io("cannot read", path))?;
        let last = metrics.last().map_or(0, |m| m.step);
        let (mut length, mut written) = (0, 0);
        for (end, event) in frames(&bytes) {
            match step_of(event) {
                Some(step) if step <= last => (length, written) = (end, step),
                _ => break,
            }
        }
        file.set_len(length as u64).map_err(cannot())?;
        file.seek(SeekFrom::End(0)).map_err(cannot())?;
        let mut events = Self {
            path: path.to_owned(),
            file,
        };
        if length == 0 {
            events.append(0, &field(3, b"brain.Event:2"))?;
        }
        let missing = metrics.iter().filter(|m| m.step > written);
        missing.into_iter().try_for_each(|m| events.log(m))?;
        Ok(events)
    }

    /// The scalars of a step.
    pub fn log(&mut self, metrics: &StepMetrics) -> Result<()> {
        let values = scalars(metrics).into_iter().map(|(tag, value)| {
            let simple_value = [&[0x15][..], &(value as f32).to_le_bytes()].concat();
            field(1, &[field(1, tag.as_bytes()), simple_value].concat())
        });
        let summary = values.collect::<Vec<_>>().concat();
        self.append(metrics.step, &field(5, &summary))
    }

    /// An event of now: time, step, and what it is.
    fn append(&mut self, step: u64, what: &[u8]) -> Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let seconds = now.map_or(0.0, |now| now.as_secs_f64());
        let event = [
            &[TIME][..],
            &seconds.to_le_bytes(),
            &[STEP],
            &varint(step),
            what,
        ];
        let written = self.file.write_all(&frame(&event.concat()));
        written.map_err(Error::io("cannot write", &self.path))
    }
}

/// By the names of `metrics.jsonl`.
fn scalars(metrics: &StepMetrics) -> Vec<(String, f64)> {
    let mut all: Vec<(String, f64)> = metrics.figures().into_iter().collect();
    let own = [
        ("lr", metrics.lr),
        ("tokens", metrics.tokens as f64),
        ("tokens_per_s", metrics.tokens_per_s),
    ];
    all.extend(own.map(|(name, value)| (name.to_owned(), value)));
    for (name, norms) in [
        ("grad_norm", &metrics.grad_norm),
        ("layer_grad_norm", &metrics.layer_grad_norm),
    ] {
        let norms = norms.iter().enumerate();
        all.extend(norms.map(|(i, norm)| (format!("{name}/{i}"), *norm)));
    }
    all
}

// Keys of protobuf are `number << 3 | kind`: kind 0 is a varint, 1 eight bytes, 2 a length and as many bytes, 5 four bytes.
const TIME: u8 = 1 << 3 | 1;
const STEP: u8 = 2 << 3;

fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let key = [number << 3 | 2];
    [&key, &varint(bytes.len() as u64)[..], bytes].concat()
}

/// Seven bits a byte, the lowest first; the eighth says that more follow.
fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

/// The step of an event that [`Events`] wrote.
fn step_of(event: &[u8]) -> Option<u64> {
    let step = event.get(9..)?;
    if (event[0], *step.first()?) != (TIME, STEP) {
        return None;
    }
    let mut value = 0;
    for (i, byte) in step[1..].iter().take(9).enumerate() {
        value |= u64::from(byte & 0x7f) << (7 * i);
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// The steps of a file, in its order; 0 is its head.
#[cfg(test)]
pub(super) fn steps(path: &Path) -> Vec<u64> {
    let file = fs::read(path).unwrap();
    let all = frames(&file).map(|(_, event)| step_of(event).unwrap());
    all.collect()
}

/// Length, its checksum, the bytes, their checksum.
fn frame(bytes: &[u8]) -> Vec<u8> {
    let length = (bytes.len() as u64).to_le_bytes();
    let sums = [&length[..], bytes].map(|part| masked(crc32c(part)).to_le_bytes());
    [&length, &sums[0][..], bytes, &sums[1]].concat()
}

/// The whole frames at the beginning of a file: where each ends, and its bytes.
fn frames(file: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let rest = file.get(at..)?;
        let length = u64::from_le_bytes(rest.get(..8)?.try_into().ok()?);
        let bytes = rest.get(12..)?.get(..usize::try_from(length).ok()?)?;
        let whole = frame(bytes);
        at += whole.len();
        rest.starts_with(&whole).then_some((at, bytes))
    })
}

/// A sum of what holds sums itself would tell little (TFRecord).
fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// The Castagnoli polynomial, bits reversed.
fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
    !bytes
        .iter()
        .fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_vectors() {
        // RFC 3720, B.4.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(varint(300), [0xac, 0x02]);
    }

    fn metrics(step: u64) -> StepMetrics {
        let terms = serde_json::json!({ "kl": 0.25, "name": "x" });
        StepMetrics {
            step,
            tokens: 100 * step,
            loss: 1.0 / step as f64,
            lr: 0.5,
            grad_norm: vec![2.0, 3.0],
            layer_grad_norm: vec![1.5],
            terms: terms.as_object().unwrap().clone(),
            tokens_per_s: 9.0,
            skipped: None,
        }
    }

    /// A message's fields: numbers, and their bytes.
    fn fields(mut bytes: &[u8]) -> Vec<(u8, &[u8])> {
        let mut found = Vec::new();
        while let Some((key, rest)) = bytes.split_first() {
            // Lengths and steps are small here.
            let (skipped, length) = match key & 7 {
                0 => (0, 1),
                1 => (0, 8),
                2 if rest[0] < 0x80 => (1, usize::from(rest[0])),
                2 => (2, usize::from(rest[0] & 0x7f) | usize::from(rest[1]) << 7),
                5 => (0, 4),
                other => panic!("kind {other}"),
            };
            found.push((key >> 3, &rest[skipped..skipped + length]));
            bytes = &rest[skipped + length..];
        }
        found
    }

    /// Steps and scalars of a file that is whole to its last byte.
    fn read(path: &Path) -> Vec<(u8, Vec<(String, f32)>)> {
        let file = fs::read(path).unwrap();
        let ends = frames(&file).map(|(end, _)| end).max();
        assert_eq!(ends, Some(file.len()));
        let all = frames(&file).map(|(_, event)| {
            let event = fields(event);
            let time = f64::from_le_bytes(event[0].1.try_into().unwrap());
            assert!(event[0].0 == 1 && time > 1.7e9, "{time}");
            assert_eq!(event[1].0, 2);
            let step = event[1].1[0];
            if step == 0 {
                assert_eq!(event[2], (3, &b"brain.Event:2"[..]));
                return (step, Vec::new());
            }
            assert_eq!(event[2].0, 5);
            let values = fields(event[2].1).into_iter().map(|(number, value)| {
                assert_eq!(number, 1);
                let value = fields(value);
                assert_eq!((value[0].0, value[1].0), (1, 2));
                let tag = String::from_utf8(value[0].1.to_vec()).unwrap();
                (tag, f32::from_le_bytes(value[1].1.try_into().unwrap()))
            });
            (step, values.collect())
        });
        all.collect()
    }

    #[test]
    fn a_resumed_file_has_every_step_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events");
        let all: Vec<_> = (1..=5).map(metrics).collect();
        let mut events = Events::open(&path, &[]).unwrap();
        all.iter().for_each(|m| events.log(m).unwrap());
        let straight = read(&path);
        let wanted = [
            ("kl", 0.25),
            ("loss", 0.5),
            ("lr", 0.5),
            ("tokens", 200.0),
            ("tokens_per_s", 9.0),
            ("grad_norm/0", 2.0),
            ("grad_norm/1", 3.0),
            ("layer_grad_norm/0", 1.5),
        ];
        assert_eq!(
            straight[2],
            (2, wanted.map(|(tag, x)| (tag.to_owned(), x)).into())
        );
        let steps = |found: &[(u8, Vec<(String, f32)>)]| -> Vec<u8> {
            found.iter().map(|(step, _)| *step).collect()
        };
        assert_eq!(steps(&straight), [0, 1, 2, 3, 4, 5]);
        // Killed in the middle of an event after the save of step 3, damaged before it, or without events until now.
        let whole = fs::read(&path).unwrap();
        let mut damaged = whole.clone();
        damaged[whole.len() / 2] ^= 1;
        for left in [&whole[..whole.len() - 3], &damaged, &[]] {
            fs::write(&path, left).unwrap();
            let mut events = Events::open(&path, &all[..3]).unwrap();
            assert_eq!(steps(&read(&path)), [0, 1, 2, 3]);
            all[3..].iter().for_each(|m| events.log(m).unwrap());
            assert_eq!(read(&path), straight);
        }
    }
}
