//! Targets of all windows of a corpus, as they stand on disk: a folder with `logits.json` (what they are of), the teacher's
//! `tokenizer.json`, the corpus' `data.json`, and shards.
//!
//! A shard is a row of windows of equal size: the [`Record`] of every position, then a CRC-32 of these, of the window's number and of
//! what `logits.json` says, so that no window is taken for another. A window is found by its number in the corpus
//! ([`Batch::examples`](crate::data::Batch)): epochs, seeds and batch sizes may be any. Shards appear whole; those that are there are not
//! made again.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use memmap2::Mmap;
use serde::{Deserialize, Serialize};

use super::record::{Record, Targets};
use crate::atomic::write_atomic;
use crate::data::{Batches, Corpus, Manifest, Tokenizer};
use crate::hash::Hash;
use crate::mapped::{map, release};
use crate::{Error, Result};

const ABOUT: &str = "logits.json";
const MANIFEST: &str = "data.json";
const VERSION: u32 = 1;
/// Bytes after which a shard ends with its window.
const SHARD: usize = 1 << 26;

/// What stored targets are of: all that decides them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct About {
    /// Version of the form.
    zebroid_logits: u32,
    /// Hash of the teacher's weights, or the address and name of one that is served.
    pub teacher: String,
    /// What it was computed with, as far as it is known.
    pub numerics: String,
    /// Of the corpus: tokens, borders, weights.
    pub data: String,
    /// Hash of the tokenizer.
    pub tokenizer: String,
    pub vocab_size: usize,
    /// Tokens a window.
    pub seq_len: usize,
    /// Likeliest tokens of each position.
    pub top_k: usize,
    pub windows: usize,
}

impl About {
    /// Of a corpus in windows of `seq_len` tokens. `teacher`: as [`About::teacher`] and [`About::numerics`].
    ///
    /// # Errors
    /// Names the setting that cannot work.
    pub fn new(
        (teacher, numerics): (String, String),
        corpus: &Corpus,
        tokenizer: &Tokenizer,
        vocab_size: usize,
        (seq_len, top_k): (usize, usize),
    ) -> Result<Self> {
        corpus.check(1, seq_len)?;
        if top_k == 0 || top_k > vocab_size {
            return Err(Error::invalid(format!(
                "top_k {top_k} must lie between 1 and the vocabulary's {vocab_size}"
            )));
        }
        Ok(Self {
            zebroid_logits: VERSION,
            teacher,
            numerics,
            data: corpus.hash(),
            tokenizer: tokenizer.hash().to_string(),
            vocab_size,
            seq_len,
            top_k,
            windows: corpus.all_windows(seq_len),
        })
    }

    /// Of targets that are whole.
    ///
    /// # Errors
    /// A folder that is none of stored targets.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(ABOUT);
        if !path.is_file() {
            let message = "no stored logits (zebroid teach makes them)";
            return Err(Error::file(folder, message));
        }
        let text = std::fs::read_to_string(&path).map_err(Error::io("cannot read", &path))?;
        let about: Self = serde_json::from_str(&text)
            .map_err(|e| Error::file(&path, format!("no description of stored logits ({e})")))?;
        let sizes = [about.vocab_size, about.seq_len, about.top_k, about.windows];
        if about.zebroid_logits != VERSION {
            let version = about.zebroid_logits;
            let message = format!("logits of version {version}; this program reads {VERSION}");
            return Err(Error::file(&path, message));
        }
        if sizes.contains(&0) || sizes.iter().any(|size| u32::try_from(*size).is_err()) {
            return Err(Error::file(&path, "sizes that no logits have"));
        }
        Ok(about)
    }

    /// # Errors
    /// Windows of another length.
    pub fn check_len(&self, folder: &Path, seq_len: usize) -> Result<()> {
        match self.seq_len == seq_len {
            true => Ok(()),
            false => Err(Error::file(
                folder,
                format!(
                    "logits of windows of {} tokens, and seq_len is {seq_len}: train with --seq-len {}, or teach with {seq_len}",
                    self.seq_len, self.seq_len
                ),
            )),
        }
    }

    /// # Errors
    /// Another corpus, or one that was read in another way.
    pub fn check_data(&self, folder: &Path, corpus: &Corpus) -> Result<()> {
        match self.data == corpus.hash() {
            true => Ok(()),
            false => Err(Error::file(folder, other_data(folder, corpus))),
        }
    }

    pub(super) fn record(&self) -> Record {
        Record::new(self.top_k, self.vocab_size)
    }

    /// Of a token.
    pub fn bytes_per_token(&self) -> usize {
        self.record().bytes()
    }

    pub fn tokens(&self) -> usize {
        self.windows.saturating_mul(self.seq_len)
    }

    /// Of all shards.
    pub fn bytes(&self) -> usize {
        self.windows.saturating_mul(self.window())
    }

    /// Of a window.
    fn window(&self) -> usize {
        (self.seq_len.saturating_mul(self.bytes_per_token())).saturating_add(CRC)
    }

    /// Windows of every shard but the last.
    pub(super) fn per_shard(&self) -> usize {
        (SHARD / self.window()).max(1)
    }

    pub fn shards(&self) -> usize {
        self.windows.div_ceil(self.per_shard())
    }

    /// Bytes of a shard.
    fn shard(&self, shard: usize) -> usize {
        let first = shard * self.per_shard();
        (self.windows - first).min(self.per_shard()) * self.window()
    }

    /// A fingerprint of what decides the targets.
    pub fn hash(&self) -> Hash {
        let text = serde_json::to_string(self).expect("names and numbers serialise");
        Hash::of(text.as_bytes())
    }

    /// The first field in which it differs from another.
    fn difference(&self, before: &Self) -> Option<String> {
        let fields =
            |about: &Self| serde_json::to_value(about).expect("names and numbers serialise");
        let (now, before) = (fields(self), fields(before));
        let now = now.as_object().into_iter().flatten();
        let mut different = now.filter(|(name, value)| before[name.as_str()] != **value);
        different
            .next()
            .map(|(name, value)| format!("{name} was {}, now {value}", before[name.as_str()]))
    }
}

/// Of the sum behind a window.
const CRC: usize = size_of::<u32>();

fn sum(of: Hash, window: usize, records: &[u8]) -> u32 {
    let mut sum = crc32fast::Hasher::new();
    sum.update(&of.bits().to_le_bytes());
    sum.update(&(window as u64).to_le_bytes());
    sum.update(records);
    sum.finalize()
}

/// What a killed process was writing stays behind under a name of its own.
fn remove_torn(folder: &Path) -> Result<()> {
    for entry in std::fs::read_dir(folder).map_err(Error::io("cannot list", folder))? {
        let path = entry.map_err(Error::io("cannot list", folder))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(".zebroid-") {
            std::fs::remove_file(&path).map_err(Error::io("cannot remove", &path))?;
        }
    }
    Ok(())
}

fn shard_path(folder: &Path, shard: usize) -> PathBuf {
    folder.join(format!("{shard:05}.logits"))
}

/// Whether a shard stands in a folder, by its size.
fn is_there(folder: &Path, about: &About, shard: usize) -> bool {
    let file = std::fs::metadata(shard_path(folder, shard));
    file.is_ok_and(|file| file.is_file() && file.len() == about.shard(shard) as u64)
}

/// A folder that is being filled.
pub(super) struct Draft<'a> {
    folder: &'a Path,
    about: &'a About,
    of: Hash,
    record: Record,
    /// Windows of the next shard.
    written: Vec<u8>,
}

impl<'a> Draft<'a> {
    /// Begins, or goes on with what an earlier attempt has left in `folder`; what is there of other settings goes with `force`.
    ///
    /// # Errors
    /// What is there is of other settings; a folder that cannot be written.
    pub fn open(
        folder: &'a Path,
        about: &'a About,
        tokenizer: &Tokenizer,
        manifest: Option<Manifest>,
        force: bool,
    ) -> Result<Self> {
        let left = folder.join(ABOUT).exists().then(|| About::open(folder));
        if let Some(difference) = left.transpose()?.and_then(|left| about.difference(&left)) {
            if !force {
                let message = format!(
                    "an unfinished teach of other settings is here ({difference}): repeat its command, or drop it with --force"
                );
                return Err(Error::file(folder, message));
            }
            std::fs::remove_dir_all(folder).map_err(Error::io("cannot remove", folder))?;
        }
        if !folder.join(ABOUT).exists() {
            std::fs::create_dir_all(folder).map_err(Error::io("cannot create", folder))?;
            let json = |name: &str, value: &serde_json::Value| {
                let text = serde_json::to_string_pretty(value).expect("JSON is written");
                write_atomic(&folder.join(name), text.as_bytes())
            };
            json("tokenizer.json", &tokenizer.to_json()?)?;
            if let Some(manifest) = manifest {
                json(MANIFEST, &serde_json::json!(manifest))?;
            }
            // Last, so that whoever finds it finds all of this.
            json(ABOUT, &serde_json::json!(about))?;
        }
        remove_torn(folder)?;
        Ok(Self {
            folder,
            about,
            of: about.hash(),
            record: about.record(),
            written: Vec::new(),
        })
    }

    /// Shards that are to be made.
    pub fn missing(&self) -> Vec<usize> {
        let all = 0..self.about.shards();
        all.filter(|shard| !is_there(self.folder, self.about, *shard))
            .collect()
    }

    /// Adds the next window, which has this number.
    pub fn push(&mut self, window: usize, targets: &Targets) {
        let from = self.written.len();
        self.record.write(targets, &mut self.written);
        let sum = sum(self.of, window, &self.written[from..]);
        self.written.extend(sum.to_le_bytes());
    }

    /// Writes the windows as a shard, whole or not at all.
    ///
    /// # Errors
    /// A disk that does not take it.
    pub fn write(&mut self, shard: usize) -> Result<()> {
        write_atomic(&shard_path(self.folder, shard), &self.written)?;
        self.written.clear();
        Ok(())
    }
}

/// Stored targets, mapped.
#[derive(Debug)]
pub struct Stored {
    folder: PathBuf,
    pub about: About,
    of: Hash,
    shards: Vec<OnceLock<Mmap>>,
    /// Tokens that a student has.
    vocab_size: usize,
}

impl Stored {
    /// Of windows of `seq_len` tokens of `corpus`, for a student with `vocab_size` tokens, which are those of `tokenizer`.
    ///
    /// # Errors
    /// A folder that holds none, or not all, or targets of other windows or another vocabulary: says what differs.
    pub fn open(
        folder: &Path,
        corpus: &Corpus,
        seq_len: usize,
        tokenizer: &Tokenizer,
        vocab_size: usize,
    ) -> Result<Self> {
        let about = About::open(folder)?;
        about.check_len(folder, seq_len)?;
        if about.tokenizer != tokenizer.hash().to_string()
            && let Some((id, token)) = Tokenizer::open(folder)?.lacks(tokenizer)
        {
            return Err(Error::file(
                folder,
                format!(
                    "the teacher's vocabulary is not the student's: token {id} ({token:?}) of the student is another there, or none; \
                     distillation needs one vocabulary, or a teacher's that has all of the student's"
                ),
            ));
        }
        about.check_data(folder, corpus)?;
        let missing = (0..about.shards()).find(|shard| !is_there(folder, &about, *shard));
        if let Some(shard) = missing {
            let path = shard_path(folder, shard);
            return Err(Error::file(&path, "missing or cut: make the logits again"));
        }
        Ok(Self {
            folder: folder.to_owned(),
            of: about.hash(),
            shards: (0..about.shards()).map(|_| OnceLock::new()).collect(),
            about,
            vocab_size,
        })
    }

    /// The targets of some windows, position by position.
    ///
    /// # Errors
    /// Damaged windows, by number and file.
    pub fn read(&self, windows: &[usize]) -> Result<Targets> {
        let (about, record) = (&self.about, self.about.record());
        let (per_shard, bytes) = (about.per_shard(), about.window());
        let mut found = Targets::new(about.top_k);
        for window in windows {
            let (shard, at) = (window / per_shard, window % per_shard * bytes);
            let path = shard_path(&self.folder, shard);
            let damaged = || {
                Error::file(
                    &path,
                    format!("window {window} is damaged: make the logits again"),
                )
            };
            let place = self.shards.get(shard).ok_or_else(damaged)?;
            let mapped = match place.get() {
                Some(mapped) => mapped,
                None => {
                    let mapped = map(&path)?;
                    place.get_or_init(|| mapped)
                }
            };
            let stored = mapped.get(at..at + bytes).ok_or_else(damaged)?;
            let (records, stored_sum) = stored.split_at(bytes - CRC);
            if sum(self.of, *window, records).to_le_bytes() != stored_sum {
                return Err(damaged());
            }
            record.read(records, &mut found);
            release(mapped);
        }
        found.narrow(self.vocab_size);
        Ok(found)
    }
}

/// What makes another corpus of the stored one, as far as both manifests say.
fn other_data(folder: &Path, corpus: &Corpus) -> String {
    let before = Manifest::open(&folder.join(MANIFEST)).ok();
    let what = before.zip(corpus.manifest()).and_then(|(before, now)| {
        let pair = |what: &str, before: &dyn std::fmt::Debug, now: &dyn std::fmt::Debug| {
            let words = format!("{what} was {before:?}, now {now:?}");
            words.to_lowercase()
        };
        match () {
            () if before.packing != now.packing => {
                Some(pair("packing", &before.packing, &now.packing))
            }
            () if before.eos != now.eos => Some(pair("eos", &before.eos, &now.eos)),
            () if before.decontaminate != now.decontaminate => {
                Some("another decontamination".to_owned())
            }
            () => None,
        }
    });
    format!(
        "logits of another corpus ({}): learn from the same --data, read in the same way (--data manifest:{} is what they are of), or \
         teach anew",
        what.unwrap_or_else(|| "other texts, token budgets or weights".into()),
        folder.join(MANIFEST).display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Packing, stories};
    use crate::op::loss::NO_TOKEN;

    fn setting() -> (tempfile::TempDir, Tokenizer, Corpus) {
        let folder = tempfile::tempdir().unwrap();
        stories::write_tokenizer(folder.path()).unwrap();
        let tokenizer = Tokenizer::open(folder.path()).unwrap();
        let documents: Vec<Vec<u32>> = (0..9).map(|i| (i..i + 30).collect()).collect();
        (
            folder,
            tokenizer,
            Corpus::new(&documents, Packing::Documents),
        )
    }

    fn about(corpus: &Corpus, tokenizer: &Tokenizer, top_k: usize) -> About {
        let teacher = ("t".to_owned(), "n".to_owned());
        About::new(teacher, corpus, tokenizer, 431, (8, top_k)).unwrap()
    }

    /// Of a window: numbers by which it is known.
    fn targets(window: usize, k: usize) -> Targets {
        let mut targets = Targets::new(k);
        for at in 0..8 {
            let tokens: Vec<u32> = (0..k as u32).map(|i| window as u32 + at + 9 * i).collect();
            targets.push(&tokens, (0..k).map(|i| -(i as f32)), -2.0);
        }
        targets
    }

    fn fill(folder: &Path, about: &About, tokenizer: &Tokenizer) {
        let mut draft = Draft::open(folder, about, tokenizer, None, false).unwrap();
        for shard in draft.missing() {
            for window in 0..about.windows {
                draft.push(window, &targets(window, about.top_k));
            }
            draft.write(shard).unwrap();
        }
    }

    #[test]
    fn windows_are_found_by_their_numbers_and_damage_is_seen() {
        let (folder, tokenizer, corpus) = setting();
        let out = folder.path().join("logits");
        let about = about(&corpus, &tokenizer, 3);
        assert_eq!((about.windows, about.shards()), (33, 1));
        fill(&out, &about, &tokenizer);
        let open = || Stored::open(&out, &corpus, 8, &tokenizer, 431).unwrap();
        let stored = open();
        let read = stored.read(&[7, 0, 32]).unwrap();
        let expected = [7, 0, 32].map(|window| targets(window, 3).tokens).concat();
        assert_eq!(read.tokens, expected);
        assert_eq!(&read.logits[..4], [0.0, -1.0, -2.0, -2.0]);
        // A student with fewer tokens.
        let small = Stored::open(&out, &corpus, 8, &tokenizer, 10).unwrap();
        assert_eq!(&small.read(&[0]).unwrap().tokens[..3], [0, 9, NO_TOKEN]);
        let shard = out.join("00000.logits");
        let whole = std::fs::read(&shard).unwrap();
        let mut other = whole.clone();
        other[about.window() + 5] ^= 1;
        std::fs::write(&shard, &other).unwrap();
        let stored = open();
        stored.read(&[0, 2]).unwrap();
        let said = stored.read(&[1]).unwrap_err().to_string();
        assert!(said.contains("00000.logits: window 1 is damaged"), "{said}");
        // Windows in each other's places.
        let (first, second) = whole.split_at(about.window());
        let (second, rest) = second.split_at(about.window());
        std::fs::write(&shard, [second, first, rest].concat()).unwrap();
        assert!(open().read(&[0]).is_err());
        std::fs::write(&shard, &whole[1..]).unwrap();
        let said = Stored::open(&out, &corpus, 8, &tokenizer, 431).unwrap_err();
        assert!(said.to_string().contains("missing or cut"), "{said}");
    }

    #[test]
    fn what_does_not_belong_together_is_refused_by_name() {
        let (folder, tokenizer, corpus) = setting();
        let out = folder.path().join("logits");
        let nothing = Stored::open(&out, &corpus, 8, &tokenizer, 431).unwrap_err();
        assert!(nothing.to_string().contains("zebroid teach"), "{nothing}");
        let three = about(&corpus, &tokenizer, 3);
        fill(&out, &three, &tokenizer);
        // Goes on, or says why not.
        let begun = Draft::open(&out, &three, &tokenizer, None, false).unwrap();
        assert!(begun.missing().is_empty());
        let four = about(&corpus, &tokenizer, 4);
        let said = Draft::open(&out, &four, &tokenizer, None, false)
            .err()
            .unwrap()
            .to_string();
        assert!(said.contains("top_k was 3, now 4"), "{said}");
        let said = |corpus: &Corpus, len: usize, tokenizer: &Tokenizer| {
            let refused = Stored::open(&out, corpus, len, tokenizer, 431).unwrap_err();
            refused.to_string()
        };
        let length = said(&corpus, 16, &tokenizer);
        assert!(
            length.contains("windows of 8 tokens, and seq_len is 16"),
            "{length}"
        );
        let documents: Vec<Vec<u32>> = (0..9).map(|i| (i..i + 30).collect()).collect();
        let stream = said(&Corpus::new(&documents, Packing::Stream), 8, &tokenizer);
        assert!(stream.contains("logits of another corpus"), "{stream}");
        let mut other = tokenizer.to_json().unwrap();
        let vocab = other["model"]["vocab"].as_object_mut().unwrap();
        let (first, second) = (vocab["a"].clone(), vocab["b"].clone());
        (vocab["a"], vocab["b"]) = (second, first);
        let other = Tokenizer::from_json(&serde_json::to_vec(&other).unwrap()).unwrap();
        let vocabulary = said(&corpus, 8, &other);
        assert!(
            vocabulary.contains("of the student is another there"),
            "{vocabulary}"
        );
        let none = About::new(Default::default(), &corpus, &tokenizer, 431, (8, 432));
        assert!(none.unwrap_err().to_string().contains("top_k 432"));
    }
}
