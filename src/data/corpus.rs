//! Documents packed into windows of equal length, from one data set or several.

use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use super::Tokenizer;
use super::batch::{Batch, Batches};
use super::manifest::{Listed, Manifest};
use super::mixture::{self, DataSet, Shares};
use super::ngrams::{Decontamination, Ngrams};
use super::order::{Shuffle, check_count};
use super::shard::{Draft, Dropped};
use super::tokenize::{Eos, Packing, Reading, tokens};
use super::tokens::{Tokens, Windows};
use crate::hash::Hash;
use crate::watch::Quiet;
use crate::{Error, Result};

/// Tokenised data sets.
#[derive(Debug)]
pub struct Corpus {
    sets: Vec<Set>,
    shuffle: Shuffle,
    /// All windows of some length in the data's order, where there are several sets.
    spread: Mutex<Option<(usize, Arc<Vec<u32>>)>>,
    /// What it was read from.
    source: Option<Source>,
}

/// How it was read.
#[derive(Debug)]
struct Source {
    tokenizer: Hash,
    packing: Packing,
    eos: Eos,
    decontaminate: Option<Decontamination>,
}

#[derive(Debug)]
struct Set {
    name: String,
    weight: Option<f64>,
    /// Tokens that were asked for.
    limit: Option<usize>,
    tokens: Tokens,
    /// Hash of the file.
    file: Option<Hash>,
}

impl Corpus {
    /// Reads files of texts, or what is kept of their tokens.
    ///
    /// # Errors
    /// Names the record that cannot be used, or the weight; [`Error::Interrupted`].
    pub fn open(sets: &[DataSet], reading: &Reading) -> Result<Self> {
        mixture::check(sets)?;
        reading.check()?;
        let open = |set: &DataSet| {
            let (tokens, file) = tokens(&set.path, set.tokens, reading)?;
            if reading.decontaminate.is_some() {
                reading.watch.note(&dropped(&set.name, &tokens));
            }
            Ok(Set {
                name: set.name.clone(),
                weight: set.weight,
                limit: set.tokens,
                tokens,
                file,
            })
        };
        let source = Source {
            tokenizer: reading.tokenizer.hash(),
            packing: reading.packing,
            eos: reading.eos,
            decontaminate: reading.decontaminate.map(Ngrams::about),
        };
        let sets = sets.iter().map(open).collect::<Result<_>>()?;
        Ok(Self::of(sets, Some(source)))
    }

    /// Reads a file of texts into memory.
    ///
    /// # Errors
    /// Names the record that cannot be used.
    pub fn load(path: &Path, tokenizer: &Tokenizer, packing: Packing) -> Result<Self> {
        let quiet = Quiet::default();
        let reading = Reading {
            packing,
            ..Reading::plain(tokenizer, &quiet)
        };
        Self::open(&[DataSet::of(path)], &reading)
    }

    pub fn new(documents: &[Vec<u32>], packing: Packing) -> Self {
        let mut draft = Draft::default();
        for document in documents {
            let begins = packing == Packing::Documents || draft.records() == 0;
            draft.push(document.iter().map(|id| (*id, true)), begins);
        }
        Tokens::new(vec![draft.shard()], None).into()
    }

    fn of(sets: Vec<Set>, source: Option<Source>) -> Self {
        Self {
            sets,
            shuffle: Shuffle::default(),
            spread: Mutex::default(),
            source,
        }
    }

    /// Of all data sets.
    pub fn tokens(&self) -> usize {
        self.sets.iter().map(|set| set.tokens.len()).sum()
    }

    fn shares(&self, len: usize) -> Shares {
        let windows = |set: &Set| set.tokens.len().checked_div(len).unwrap_or(0);
        Shares::new(self.sets.iter().map(|set| (windows(set), set.weight)))
    }

    /// Windows that an epoch takes of each data set.
    pub fn windows_taken(&self, len: usize) -> Vec<usize> {
        self.shares(len).taken
    }

    /// Whole windows of `len` tokens in an epoch; the rest is left out.
    pub fn windows(&self, len: usize) -> usize {
        self.shares(len).len()
    }

    /// Up to `rows` windows from window `from` on, in the data's order; those of several data sets are spread evenly.
    ///
    /// # Errors
    /// When there is no such window.
    pub fn ordered(&self, from: usize, rows: usize, len: usize) -> Result<Batch> {
        self.check(from + 1, len)?;
        let shares = self.shares(len);
        let windows = from..shares.len().min(from + rows);
        let order: Vec<usize> = match self.sets.len() {
            1 => windows.collect(),
            _ => (self.spread(&shares, len)[windows].iter())
                .map(|window| *window as usize)
                .collect(),
        };
        Ok(self.gather(&shares, order, len))
    }

    /// Windows of `len` tokens that there are, those included that an epoch leaves to the next: they are what
    /// [`Batch::examples`] numbers.
    pub fn all_windows(&self, len: usize) -> usize {
        self.shares(len).windows.iter().sum()
    }

    /// The windows of these numbers.
    ///
    /// # Errors
    /// When there is no such window.
    pub fn numbered(&self, windows: Range<usize>, len: usize) -> Result<Batch> {
        let shares = self.shares(len);
        let all = shares.windows.iter().sum();
        match windows.end > all {
            true => Err(Error::invalid(format!(
                "the data has {all} windows of {len}, and no window {}",
                windows.end - 1
            ))),
            false => Ok(self.gather(&shares, windows.collect(), len)),
        }
    }

    fn spread(&self, shares: &Shares, len: usize) -> Arc<Vec<u32>> {
        let mut kept = self.spread.lock().unwrap_or_else(PoisonError::into_inner);
        match &*kept {
            Some((of, spread)) if *of == len => spread.clone(),
            _ => kept.insert((len, Arc::new(shares.spread()))).1.clone(),
        }
    }

    fn gather(&self, shares: &Shares, windows: Vec<usize>, len: usize) -> Batch {
        let mut found = Windows::default();
        for window in &windows {
            let (set, window) = shares.place(*window);
            self.sets[set].tokens.window(window * len, len, &mut found);
        }
        Batch {
            examples: windows,
            ..Batch::new(found.ids, found.starts, &found.learned, len)
        }
    }
}

/// How many records of a text were dropped, and for what words.
fn dropped(name: &str, tokens: &Tokens) -> String {
    let (count, records) = (tokens.dropped(), tokens.records());
    let example = |d: &Dropped| format!("; record {}: {:?}", d.record, d.words);
    let examples: String = tokens.examples().take(3).map(example).collect();
    format!("decontamination: {count} of {records} records of {name} are dropped{examples}")
}

impl From<Tokens> for Corpus {
    fn from(tokens: Tokens) -> Self {
        let set = Set {
            name: String::new(),
            weight: None,
            limit: None,
            tokens,
            file: None,
        };
        Self::of(vec![set], None)
    }
}

impl Batches for Corpus {
    fn check(&self, rows: usize, len: usize) -> Result<()> {
        let shares = self.shares(len);
        let weighted = self.sets.iter().filter(|_| self.sets.len() > 1);
        let shared = weighted.zip(shares.windows.iter().zip(&shares.taken));
        // What has no window at all leaves none to the others.
        let lacking = shared.filter(|(set, (_, taken))| set.weight.is_some() && **taken == 0);
        if let Some((set, (windows, _))) = lacking.min_by_key(|(_, (windows, _))| **windows) {
            let tokens = set.tokens.len();
            return Err(Error::invalid(match windows {
                0 => format!(
                    "data {} has {tokens} tokens, not one window of {len}: give more data, or lower --seq-len",
                    set.name
                ),
                _ => format!(
                    "data {} has so little weight that an epoch takes none of its {windows} windows of {len}: raise it",
                    set.name
                ),
            }));
        }
        let windows = shares.len();
        if windows < rows.max(1) {
            return Err(Error::invalid(format!(
                "the data has {} tokens: {windows} windows of {len}, a batch needs {rows}; \
                 give more data, or lower --batch-size or --seq-len",
                self.tokens()
            )));
        }
        // Numbers are of all windows that there are.
        check_count(shares.windows.iter().sum())
    }

    fn examples(&self, len: usize) -> usize {
        self.windows(len)
    }

    fn hash(&self) -> String {
        match &self.sets[..] {
            // A weight says nothing of one alone.
            [set] => set.tokens.hash(),
            sets => sets.iter().fold(Hash::new(), |hash, set| {
                let weight = set.weight.map_or(0, f64::to_bits);
                let hash = hash.with(&set.tokens.hash().bits().to_le_bytes());
                hash.with(&weight.to_le_bytes())
            }),
        }
        .to_string()
    }

    fn manifest(&self) -> Option<Manifest> {
        let source = self.source.as_ref()?;
        let tokenizer = source.tokenizer.to_string();
        let mut manifest = Manifest::new(self.hash(), tokenizer, source.packing, source.eos);
        manifest.decontaminate = source.decontaminate.clone();
        manifest.data.extend(self.sets.iter().map(|set| Listed {
            text: set.name.clone(),
            hash: set.file.map(|hash| hash.to_string()),
            records: set.tokens.records(),
            dropped: set.tokens.dropped(),
            tokens: set.tokens.len(),
            weight: set.weight,
            limit: set.limit,
        }));
        Some(manifest)
    }

    fn batch(&self, seed: u64, index: u64, rows: usize, len: usize) -> Result<Batch> {
        self.check(rows, len)?;
        let shares = self.shares(len);
        let all = |epoch: u64| shares.epoch(seed, epoch);
        let windows = (self.shuffle).batch((rows, len), shares.len(), seed, index, all);
        Ok(self.gather(&shares, windows, len))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn documents() -> Vec<Vec<u32>> {
        vec![vec![1, 2, 3], vec![4, 5], vec![6, 7, 8, 9, 10, 11, 12]]
    }

    #[test]
    fn borders_mask_targets_and_restart_documents() {
        let batch = Corpus::new(&documents(), Packing::Documents)
            .ordered(0, 2, 6)
            .unwrap();
        assert_eq!(batch.input_ids, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
        assert_eq!(batch.targets, [2, 3, 0, 5, 0, 0, 8, 9, 10, 11, 12, 0]);
        assert_eq!(batch.mask, [1., 1., 0., 1., 0., 0., 1., 1., 1., 1., 1., 0.]);
        assert_eq!(batch.documents.row(0), [0, 0, 0, 3, 3, 5]);
        assert_eq!(batch.documents.row(1), [0; 6]);
        let stream = Corpus::new(&documents(), Packing::Stream)
            .ordered(0, 1, 6)
            .unwrap();
        assert_eq!(stream.documents.row(0), [0; 6]);
        assert_eq!(stream.mask, [1., 1., 1., 1., 1., 0.]);
    }

    #[test]
    fn prompts_are_read_but_not_learned() {
        let folder = tempfile::tempdir().unwrap();
        crate::data::stories::write_tokenizer(folder.path()).unwrap();
        let tokenizer = Tokenizer::open(folder.path()).unwrap();
        let load = |line: &str| {
            let path = folder.path().join("data.jsonl");
            std::fs::write(&path, line).unwrap();
            Corpus::load(&path, &tokenizer, Packing::Documents).unwrap()
        };
        let whole = load(r#"{"text": "Tom has a red ball."}"#);
        let asked = load(r#"{"prompt": "Tom has", "completion": " a red ball."}"#);
        let ids = |corpus: &Corpus| corpus.ordered(0, 1, corpus.tokens()).unwrap().input_ids;
        assert_eq!(ids(&whole), ids(&asked));
        assert_ne!(whole.hash(), asked.hash());
        let prompt = tokenizer.encode("Tom has").unwrap().len();
        let mask = asked.ordered(0, 1, asked.tokens()).unwrap().mask;
        let expected = |at: usize| at + 1 >= prompt && at + 1 < asked.tokens();
        for (at, mask) in mask.into_iter().enumerate() {
            assert_eq!(mask == 1.0, expected(at), "{at}");
        }
    }

    #[test]
    fn every_epoch_sees_every_window_in_a_new_order() {
        let corpus = Corpus::new(&[(0..64).collect()], Packing::Documents);
        let epoch = |epoch: u64| {
            let mut firsts = Vec::new();
            for i in 0..4 {
                let batch = corpus.batch(9, epoch * 4 + i, 4, 4).unwrap();
                firsts.extend(batch.input_ids.chunks(4).map(|row| row[0]));
            }
            firsts
        };
        let (first, second) = (epoch(0), epoch(1));
        assert_ne!(first, second);
        assert_eq!(first, epoch(0));
        let mut sorted = first.clone();
        sorted.sort();
        assert_eq!(sorted, (0..16).map(|i| i * 4).collect::<Vec<u32>>());
    }

    /// A file of texts of equal length.
    fn numbered(folder: &Path, name: &str, count: usize) -> DataSet {
        let path = folder.join(name);
        let line = |i: usize| format!("{{\"text\": \"{name} {i:03}\"}}\n");
        std::fs::write(&path, (0..count).map(line).collect::<String>()).unwrap();
        DataSet::of(&path)
    }

    #[test]
    fn mixtures_have_their_shares() {
        let folder = tempfile::tempdir().unwrap();
        crate::data::stories::write_tokenizer(folder.path()).unwrap();
        let tokenizer = Tokenizer::open(folder.path()).unwrap();
        let quiet = Quiet::default();
        let reading = Reading::plain(&tokenizer, &quiet);
        let mut sets = [
            numbered(folder.path(), "a", 60),
            numbered(folder.path(), "b", 90),
        ];
        let open = |sets: &[DataSet]| Corpus::open(sets, &reading).unwrap();
        let alone = sets.each_ref().map(|set| open(std::slice::from_ref(set)));
        let len = tokenizer.encode("a 000").unwrap().len();
        assert_eq!(alone.each_ref().map(|corpus| corpus.windows(len)), [60, 90]);
        let plain = open(&sets);
        assert_eq!(plain.windows(len), 150);
        (sets[0].weight, sets[1].weight) = (Some(0.8), Some(0.2));
        let mixed = open(&sets);
        assert_eq!((mixed.windows(len), mixed.tokens()), (75, 150 * len));
        let hashes = [&alone[0], &alone[1], &plain, &mixed].map(Batches::hash);
        for (i, hash) in hashes.iter().enumerate() {
            assert!(!hashes[..i].contains(hash));
        }
        let of_a = |batch: &Batch| batch.examples.iter().filter(|e| **e < 60).count();
        // Five epochs of fifteen batches: all of `a` in each, `b` in turn.
        let mut seen = std::collections::BTreeMap::new();
        for epoch in 0..5 {
            let batches = (0..15).map(|i| mixed.batch(3, epoch * 15 + i, 5, len).unwrap());
            let batches: Vec<Batch> = batches.collect();
            assert_eq!(batches.iter().map(of_a).sum::<usize>(), 60);
            for row in batches.iter().flat_map(|b| b.input_ids.chunks(len)) {
                *seen.entry(tokenizer.decode(row).unwrap()).or_insert(0) += 1;
            }
        }
        let times = |name: char, n: usize| {
            let with = seen
                .iter()
                .filter(|(text, times)| text.contains(name) && **times == n);
            with.count()
        };
        assert_eq!((times('a', 5), times('b', 1)), (60, 75));
        let first = mixed.ordered(0, 10, len).unwrap();
        assert_eq!((of_a(&first), first.rows), (8, 10));
        // By their numbers all are found, those that no epoch has had among them.
        assert_eq!(mixed.all_windows(len), 150);
        let all = mixed.numbered(0..150, len).unwrap();
        for (row, example) in first.input_ids.chunks(len).zip(&first.examples) {
            assert_eq!(row, &all.input_ids[example * len..][..len]);
        }
        assert!(mixed.numbered(149..151, len).is_err());
        // One alone is itself, whatever its weight.
        let one = open(&sets[..1]);
        assert_eq!(one.hash(), alone[0].hash());
        let batch = |corpus: &Corpus| corpus.batch(3, 70, 5, len).unwrap().input_ids;
        assert_eq!(batch(&one), batch(&alone[0]));
        // The beginning of one.
        sets[1].tokens = Some(10 * len + 1);
        assert_eq!(open(&sets[1..]).tokens(), 10 * len + 1);
        assert_eq!(open(&sets).windows(len), 10 + 40);
        sets[1].weight = Some(1e-6);
        let said = open(&sets).check(1, len).unwrap_err().to_string();
        assert!(
            said.contains("b has so little weight") && said.contains("none of its 10 windows"),
            "{said}"
        );
        let said = open(&sets).check(1, 11 * len).unwrap_err().to_string();
        assert!(
            said.contains("b has") && said.contains("not one window"),
            "{said}"
        );
    }

    #[test]
    fn too_little_data_is_said() {
        let corpus = Corpus::new(&documents(), Packing::Documents);
        let message = corpus.batch(0, 0, 4, 6).unwrap_err().to_string();
        assert!(
            message.contains("12 tokens: 2 windows of 6, a batch needs 4"),
            "{message}"
        );
    }
}
