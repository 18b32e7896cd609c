//! Tokenised documents as they stand in a file, which is mapped and never read whole. Those of a small text have the same form in
//! memory.
//!
//! A shard is a row of 64-bit words in the machine's own order: a mark, the header's length in words, the hash of header and places; the
//! header (JSON); where documents begin; where learning turns off and on; the tokens, of 16 bits where all fit, else of 32.

use std::io::Write;
use std::ops::Range;
use std::path::Path;

use bytemuck::{cast_slice, try_cast_slice};
use memmap2::Mmap;
use serde::{Deserialize, Serialize};

use crate::atomic::write_atomic_with;
use crate::hash::Hash;
use crate::mapped::{map, release};
use crate::{Error, Result};

/// Read in another order of bytes it is another.
const MARK: u64 = u64::from_be_bytes(*b"zebshard");
const VERSION: u32 = 1;
/// Words before the header.
const FIRST: usize = 3;

/// What a shard holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Header {
    version: u32,
    /// Of a token.
    bits: usize,
    pub tokens: usize,
    starts: usize,
    turns: usize,
    /// Records of the text that it stands for, those that were dropped among them.
    pub records: usize,
    pub dropped: usize,
    /// The first of these.
    pub examples: Vec<Dropped>,
}

/// A record that is not learned from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Dropped {
    /// From 1.
    pub record: usize,
    /// The words that it shares with an evaluation set.
    pub words: String,
}

/// Dropped records of which a shard keeps the words.
const EXAMPLES: usize = 4;

impl Header {
    /// Words of the tokens.
    fn token_words(&self) -> Option<usize> {
        Some(self.tokens.checked_mul(self.bits / 8)?.div_ceil(8))
    }
}

#[derive(Debug)]
enum Bytes {
    Memory(Vec<u64>),
    Mapped(Mmap),
}

impl Bytes {
    /// None of a file that is cut within a word.
    fn words(&self) -> &[u64] {
        match self {
            Bytes::Memory(words) => words,
            Bytes::Mapped(map) => try_cast_slice(map).unwrap_or_default(),
        }
    }
}

#[derive(Debug)]
pub(super) struct Shard {
    bytes: Bytes,
    pub header: Header,
    /// The first word of the places.
    places: usize,
}

/// Ids of a shard, as wide as they are stored.
enum Ids<T, U> {
    Short(T),
    Long(U),
}

impl Shard {
    /// A file's shard. All but the tokens themselves are checked by their hash, and the tokens by their number.
    ///
    /// # Errors
    /// A file that cannot be read, or is damaged.
    pub fn open(path: &Path) -> Result<Self> {
        let shard = Self::read(Bytes::Mapped(map(path)?)).map_err(|e| Error::file(path, e))?;
        shard.release();
        Ok(shard)
    }

    fn read(bytes: Bytes) -> Result<Self> {
        let damaged = |what: &str| Error::invalid(format!("a damaged shard of tokens ({what})"));
        let words = bytes.words();
        let [MARK, length, hash, rest @ ..] = words else {
            return Err(damaged("no mark"));
        };
        let length = usize::try_from(*length).unwrap_or(usize::MAX);
        let header = rest.get(..length).ok_or_else(|| damaged("cut"))?;
        let header: Header =
            serde_json::from_slice(cast_slice(header)).map_err(|_| damaged("no header"))?;
        if header.version != VERSION || ![16, 32].contains(&header.bits) {
            return Err(damaged("of another version"));
        }
        let sum = |a: usize, b: Option<usize>| a.checked_add(b?);
        let before = sum(length, header.starts.checked_add(header.turns));
        let all = before.and_then(|before| sum(before, header.token_words()));
        let (Some(before), true) = (before, all == Some(rest.len())) else {
            return Err(damaged("cut"));
        };
        if Hash::of(cast_slice(&rest[..before])).bits() != *hash {
            return Err(damaged("another hash"));
        }
        Ok(Self {
            places: FIRST + length,
            header,
            bytes,
        })
    }

    /// Where documents begin among its tokens, in order.
    pub fn starts(&self) -> &[u64] {
        &self.bytes.words()[self.places..][..self.header.starts]
    }

    /// The tokens before which learning turns off, on, off, ..; it is on at first.
    pub fn turns(&self) -> &[u64] {
        let from = self.places + self.header.starts;
        &self.bytes.words()[from..][..self.header.turns]
    }

    fn ids(&self) -> Ids<&[u16], &[u32]> {
        let from = self.places + self.header.starts + self.header.turns;
        let words = &self.bytes.words()[from..];
        match self.header.bits {
            16 => Ids::Short(&cast_slice(words)[..self.header.tokens]),
            _ => Ids::Long(&cast_slice(words)[..self.header.tokens]),
        }
    }

    /// Tells the ids of some tokens, in order.
    pub fn each(&self, tokens: Range<usize>, mut tell: impl FnMut(u32)) {
        match self.ids() {
            Ids::Short(ids) => ids[tokens].iter().for_each(|id| tell(u32::from(*id))),
            Ids::Long(ids) => ids[tokens].iter().for_each(|id| tell(*id)),
        }
    }

    /// Whether each of some tokens is to be learned.
    pub fn learned(&self, tokens: Range<usize>) -> impl Iterator<Item = bool> {
        let turns = self.turns();
        let mut passed = turns.partition_point(|at| *at <= tokens.start as u64);
        tokens.map(move |token| {
            while turns.get(passed).is_some_and(|at| *at <= token as u64) {
                passed += 1;
            }
            passed.is_multiple_of(2)
        })
    }

    /// What was looked at counts as this process's memory no more.
    pub fn release(&self) {
        if let Bytes::Mapped(map) = &self.bytes {
            release(map);
        }
    }
}

/// A shard that is being filled.
pub(super) struct Draft {
    ids: Ids<Vec<u16>, Vec<u32>>,
    starts: Vec<u64>,
    turns: Vec<u64>,
    records: usize,
    dropped: usize,
    examples: Vec<Dropped>,
}

impl Default for Draft {
    fn default() -> Self {
        Self {
            ids: Ids::Short(Vec::new()),
            starts: Vec::new(),
            turns: Vec::new(),
            records: 0,
            dropped: 0,
            examples: Vec::new(),
        }
    }
}

impl Draft {
    pub fn tokens(&self) -> usize {
        match &self.ids {
            Ids::Short(ids) => ids.len(),
            Ids::Long(ids) => ids.len(),
        }
    }

    pub fn records(&self) -> usize {
        self.records
    }

    /// Passes over a record.
    pub fn drop(&mut self, record: Dropped) {
        self.records += 1;
        self.dropped += 1;
        if self.examples.len() < EXAMPLES {
            self.examples.push(record);
        }
    }

    /// Adds a record of one document: its ids, and whether each is to be learned. `begins`: whether a document begins with it.
    pub fn push(&mut self, record: impl Iterator<Item = (u32, bool)>, begins: bool) {
        self.records += 1;
        self.also(record, begins);
    }

    /// Adds to the last record what [`Draft::push`] began it with.
    pub fn also(&mut self, record: impl Iterator<Item = (u32, bool)>, begins: bool) {
        if begins {
            self.starts.push(self.tokens() as u64);
        }
        for (id, learned) in record {
            if learned != self.turns.len().is_multiple_of(2) {
                self.turns.push(self.tokens() as u64);
            }
            if let (Ids::Short(ids), Err(_)) = (&self.ids, u16::try_from(id)) {
                self.ids = Ids::Long(ids.iter().map(|id| u32::from(*id)).collect());
            }
            match &mut self.ids {
                Ids::Short(ids) => ids.push(id as u16),
                Ids::Long(ids) => ids.push(id),
            }
        }
    }

    /// All before the tokens, and the tokens without what fills their last word.
    fn parts(&self) -> (Vec<u64>, &[u8]) {
        let (bits, ids): (usize, &[u8]) = match &self.ids {
            Ids::Short(ids) => (16, cast_slice(ids)),
            Ids::Long(ids) => (32, cast_slice(ids)),
        };
        let header = Header {
            version: VERSION,
            bits,
            tokens: self.tokens(),
            starts: self.starts.len(),
            turns: self.turns.len(),
            records: self.records,
            dropped: self.dropped,
            examples: self.examples.clone(),
        };
        let mut text = serde_json::to_vec(&header).expect("numbers and texts serialise");
        text.resize(text.len().next_multiple_of(8), b' ');
        let mut words = vec![MARK, (text.len() / 8) as u64, 0];
        words.extend(words_of(&text));
        words.extend_from_slice(&self.starts);
        words.extend_from_slice(&self.turns);
        words[2] = Hash::of(cast_slice(&words[FIRST..])).bits();
        (words, ids)
    }

    /// Writes the shard, whole or not at all.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let (words, ids) = self.parts();
        let rest = ids.len().next_multiple_of(8) - ids.len();
        write_atomic_with(path, |file| {
            file.write_all(cast_slice(&words))?;
            file.write_all(ids)?;
            file.write_all(&[0; 8][..rest])
        })
    }

    /// The shard in memory.
    pub fn shard(&self) -> Shard {
        let (mut words, ids) = self.parts();
        words.extend(words_of(ids));
        Shard::read(Bytes::Memory(words)).expect("what was just made")
    }
}

/// Bytes as words; the last is filled up.
fn words_of(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.chunks(8).map(|piece| {
        let mut word = [0; 8];
        word[..piece.len()].copy_from_slice(piece);
        u64::from_ne_bytes(word)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draft(large: u32) -> Draft {
        let mut draft = Draft::default();
        draft.push([(1, true), (2, true)].into_iter(), true);
        draft.push([(3, false), (large, false), (5, true)].into_iter(), true);
        draft.push([(6, false)].into_iter(), false);
        draft
    }

    #[test]
    fn files_and_memory_hold_the_same() {
        let folder = tempfile::tempdir().unwrap();
        for (large, bits) in [(65_535, 16), (65_536, 32)] {
            let (draft, path) = (draft(large), folder.path().join("shard"));
            draft.write(&path).unwrap();
            for shard in [Shard::open(&path).unwrap(), draft.shard()] {
                let header = &shard.header;
                assert_eq!((header.bits, header.tokens, header.records), (bits, 6, 3));
                assert_eq!(
                    (shard.starts(), shard.turns()),
                    (&[0, 2][..], &[2, 4, 5][..])
                );
                let ids = |range| {
                    let mut ids = Vec::new();
                    shard.each(range, |id| ids.push(id));
                    ids
                };
                assert_eq!(ids(0..6), [1, 2, 3, large, 5, 6]);
                assert_eq!(ids(3..5), [large, 5]);
                for from in 0..6 {
                    let all = [true, true, false, false, true, false];
                    assert!(shard.learned(from..6).eq(all[from..].iter().copied()));
                }
            }
        }
    }

    #[test]
    fn damage_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("shard");
        draft(9).write(&path).unwrap();
        let whole = std::fs::read(&path).unwrap();
        let mut damaged = vec![Vec::new(), whole[..8].to_vec()];
        damaged.extend([1, 8].map(|cut| whole[..whole.len() - cut].to_vec()));
        // Of all but the tokens, each byte.
        for at in 0..whole.len() - 16 {
            let mut other = whole.clone();
            other[at] ^= 1;
            damaged.push(other);
        }
        for bytes in damaged {
            std::fs::write(&path, bytes).unwrap();
            let said = Shard::open(&path).err().unwrap().to_string();
            assert!(said.contains("a damaged shard of tokens"), "{said}");
        }
    }
}
