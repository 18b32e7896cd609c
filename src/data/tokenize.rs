//! From a file of texts to its tokens. Those of a large file are made once, by all cores, and kept as shards, from which they are
//! mapped; an interrupted pass goes on behind the last of them.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Tokenizer;
use super::chat::{CHATML, ChatTemplate};
use super::records::Records;
use super::shard::{Draft, Shard};
use super::text::{Reader, WANTED, conversation};
use super::tokens::Tokens;
use crate::atomic::write_atomic;
use crate::hash::Hash;
use crate::watch::Watch;
use crate::{Error, Result};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Packing {
    /// Attention, convolution and state stop at document borders.
    #[default]
    Documents,
    /// One long text, as AMD packs.
    Stream,
}

/// How texts become tokens, and under whose eyes.
#[derive(Clone, Copy)]
pub struct Reading<'a> {
    pub tokenizer: &'a Tokenizer,
    pub packing: Packing,
    /// Where tokens of large files are kept, in folders named by all that decides them.
    pub cache: Option<&'a Path>,
    pub watch: &'a dyn Watch,
}

/// Bytes of a file from which on its tokens are kept: below they are made in a second or two.
const LARGE: u64 = 4 << 20;
/// Tokens after which a shard ends with its document.
const SHARD: usize = 1 << 23;
/// Bytes of records that are tokenised at once.
const PORTION: usize = 1 << 18;
const MB: u64 = 1_000_000;

/// Beside the shards of a whole file.
#[derive(Serialize, Deserialize)]
struct Index {
    shards: usize,
    hash: String,
}

/// The tokens of a file, or so many of them.
///
/// # Errors
/// Names the record that cannot be used, or the file; [`Error::Interrupted`].
pub(super) fn tokens(path: &Path, budget: Option<usize>, reading: &Reading) -> Result<Tokens> {
    let about = fs::metadata(path).map_err(Error::io("cannot read", path))?;
    match reading.cache {
        Some(cache) if about.len() >= LARGE => kept(path, (about.len(), budget), reading, cache),
        _ => {
            let mut shards = Vec::new();
            let keep = |draft: Draft| {
                shards.push(draft.shard());
                Ok(())
            };
            tokenise(path, reading, (0, budget), keep, |_| false)?;
            Ok(Tokens::new(shards, None))
        }
    }
}

/// The kept tokens of a file of `bytes`; what is missing of them is made.
fn kept(
    path: &Path,
    (bytes, budget): (u64, Option<usize>),
    reading: &Reading,
    cache: &Path,
) -> Result<Tokens> {
    let (watch, all) = (reading.watch, bytes.div_ceil(MB) as usize);
    let key = key(path, (bytes, budget), reading)?;
    let folder = cache.join(format!("data-{key}"));
    fs::create_dir_all(&folder).map_err(Error::io("cannot create", &folder))?;
    let shard = |number: usize| folder.join(format!("{number:05}.tokens"));
    let index = folder.join("index.json");
    let mut shards = Vec::new();
    while shard(shards.len()).exists() {
        match Shard::open(&shard(shards.len())) {
            Ok(shard) => shards.push(shard),
            Err(error) => {
                watch.note(&format!("{error}: it is made anew"));
                break;
            }
        }
    }
    let whole = fs::read(&index).ok();
    let whole: Option<Index> = whole.and_then(|text| serde_json::from_slice(&text).ok());
    if let Some(whole) = whole.filter(|whole| whole.shards == shards.len())
        && let Some(hash) = Hash::parse(&whole.hash)
    {
        return Ok(Tokens::new(shards, Some(hash)));
    }
    // What stands behind a shard that is made anew may begin elsewhere.
    let stale = (shards.len()..).map(shard).take_while(|path| path.exists());
    for path in stale.chain(index.exists().then(|| index.clone())) {
        fs::remove_file(&path).map_err(Error::io("cannot remove", &path))?;
    }
    watch.start("tokenise", all);
    let done: usize = shards.iter().map(|shard| shard.header.records).sum();
    let have: usize = shards.iter().map(|shard| shard.header.tokens).sum();
    let left = budget.map(|budget| budget.saturating_sub(have));
    let keep = |draft: Draft| {
        let path = shard(shards.len());
        draft.write(&path)?;
        shards.push(Shard::open(&path)?);
        Ok(())
    };
    let told = |share: f64| {
        watch.at((share * all as f64) as usize, "MB");
        share < 1.0 && watch.stop()
    };
    if let Some(share) = tokenise(path, reading, (done, left), keep, told)? {
        return Err(Error::Interrupted(format!(
            "the tokens of {:.0} of {all} MB are saved in {}; run the same command again to go on",
            share * all as f64,
            folder.display()
        )));
    }
    let tokens = Tokens::new(shards, None);
    let whole = Index {
        shards: tokens.shards(),
        hash: tokens.hash().to_string(),
    };
    let text = serde_json::to_string(&whole).expect("numbers serialise");
    write_atomic(&index, text.as_bytes())?;
    Ok(tokens)
}

/// Tokenises the records of a file behind the first `done`, up to so many tokens where they are limited. `keep` gets drafts of
/// shards; `stop` is told how much of the file has been read, and says whether to stop there: then that share is given.
fn tokenise(
    path: &Path,
    reading: &Reading,
    (done, limit): (usize, Option<usize>),
    mut keep: impl FnMut(Draft) -> Result<()>,
    stop: impl Fn(f64) -> bool,
) -> Result<Option<f64>> {
    let mut records = Records::open(path, WANTED)?;
    for _ in 0..done {
        records.next().transpose()?;
    }
    let (tokenizer, reader) = (reading.tokenizer, Reader::new(reading.tokenizer));
    let mut draft = Draft::default();
    let mut first = done == 0;
    let mut left = limit.unwrap_or(usize::MAX);
    while left > 0 {
        let portion = portion(&mut records);
        if portion.is_empty() {
            break;
        }
        let made = portion.into_par_iter().map(|(line, record)| {
            let tokens = |record| reader.text(&record)?.tokens(tokenizer);
            let wrong = |e: Error| Error::Line {
                path: path.to_owned(),
                line,
                message: e.to_string(),
            };
            tokens(record?).map_err(wrong)
        });
        // In the file's order, so that the first mistake is the one that is said.
        for record in made.collect::<Vec<_>>() {
            let begins = first || reading.packing == Packing::Documents;
            let record = record?;
            draft.push(record.iter().copied().take(left), begins);
            left -= left.min(record.len());
            first = false;
            if left == 0 {
                break;
            }
            if draft.tokens() >= SHARD {
                keep(std::mem::take(&mut draft))?;
            }
        }
        let share = records.share();
        if stop(share) {
            if draft.records() > 0 {
                keep(draft)?;
            }
            return Ok(Some(share));
        }
    }
    if draft.records() > 0 {
        keep(draft)?;
    }
    Ok(None)
}

/// The next records, with their numbers, up to the first that cannot be read.
fn portion(records: &mut Records) -> Vec<(usize, Result<Value>)> {
    let (mut portion, mut size) = (Vec::new(), 0);
    while size < PORTION
        && let Some(record) = records.next()
    {
        size += record.as_ref().map_or(PORTION, bytes);
        portion.push((records.number(), record));
    }
    portion
}

/// About as many as a value takes in memory.
fn bytes(value: &Value) -> usize {
    const EACH: usize = 32;
    EACH + match value {
        Value::String(text) => text.len(),
        Value::Array(all) => all.iter().map(bytes).sum(),
        Value::Object(fields) => fields.values().map(bytes).sum(),
        _ => 0,
    }
}

/// All that decides a file's tokens. What the program makes of records is in it as the tokens of a few, not as a version that
/// people would have to raise.
fn key(path: &Path, (bytes, budget): (u64, Option<usize>), reading: &Reading) -> Result<Hash> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let form = name.split_once('.').map(|(_, form)| form.to_lowercase());
    // One that cannot be read is an error where it is asked for.
    let template = reading.tokenizer.chat_template().ok().flatten();
    let inputs = json!({
        "file": file_hash(path, bytes, reading.watch)?.to_string(),
        "form": form,
        "tokenizer": reading.tokenizer.hash().to_string(),
        "template": template.map(|template| template.hash().to_string()),
        "packing": reading.packing,
        "tokens": budget,
        "sample": sample(reading.tokenizer)?.to_string(),
    });
    Ok(Hash::of(inputs.to_string().as_bytes()))
}

fn file_hash(path: &Path, bytes: u64, watch: &dyn Watch) -> Result<Hash> {
    const PIECE: u64 = 1 << 24;
    watch.start("read data", bytes.div_ceil(MB) as usize);
    let mut file = File::open(path).map_err(Error::io("cannot read", path))?;
    let (mut piece, mut hash, mut done) = (Vec::new(), Hash::new(), 0);
    loop {
        piece.clear();
        let read = (&mut file).take(PIECE).read_to_end(&mut piece);
        if read.map_err(Error::io("cannot read", path))? == 0 {
            return Ok(hash);
        }
        hash = hash.with(&piece);
        done += piece.len() as u64;
        watch.reached((done / MB) as usize, bytes.div_ceil(MB) as usize, "MB")?;
    }
}

/// What becomes of a few records.
fn sample(tokenizer: &Tokenizer) -> Result<Hash> {
    let reader = Reader::new(tokenizer);
    let chatml = ChatTemplate::new(CHATML, Vec::new())?;
    let said = |role: &str, content: &str| json!({ "role": role, "content": content });
    let messages = [
        said("user", "How many?"),
        said("assistant", "123, she said."),
    ];
    let texts = [
        reader.text(&json!({ "text": "Zoë's  cat saw 1,024 mice.\n\tIt ran." }))?,
        reader.text(&json!({ "prompt": "What is 2 + 2? ", "completion": "Four." }))?,
        conversation(&chatml, &messages, &Value::Null, 0)?,
    ];
    texts.iter().try_fold(Hash::new(), |hash, text| {
        let tokens = text.tokens(tokenizer)?.into_iter();
        Ok(tokens.fold(hash, |hash, (id, learned)| {
            hash.with(&id.to_le_bytes()).with(&[u8::from(learned)])
        }))
    })
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::super::stories;
    use super::super::{Batch, Batches, Corpus};
    use super::*;
    use crate::watch::Quiet;

    /// A text of several portions, a tokenizer, and a cache.
    struct Bench {
        folder: tempfile::TempDir,
        tokenizer: Tokenizer,
    }

    impl Bench {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            stories::write_tokenizer(folder.path()).unwrap();
            let bench = Self {
                tokenizer: Tokenizer::open(folder.path()).unwrap(),
                folder,
            };
            let long = stories::to_jsonl(6, 40).replace('\n', " ");
            let long = json!({ "prompt": "Tom had", "completion": long });
            let short = "{\"text\": \"The end.\"}\n";
            let text = format!("{long}\n{short}{}{short}", stories::to_jsonl(5, 1000));
            assert!(text.len() > PORTION * 3 / 2, "{}", text.len());
            fs::write(bench.data(), text).unwrap();
            bench
        }

        fn data(&self) -> PathBuf {
            self.folder.path().join("all.jsonl")
        }

        fn corpus(&self, packing: Packing, watch: &dyn Watch) -> Result<Corpus> {
            let reading = Reading {
                tokenizer: &self.tokenizer,
                packing,
                cache: Some(self.folder.path()),
                watch,
            };
            let bytes = fs::metadata(self.data()).unwrap().len();
            let kept = kept(&self.data(), (bytes, None), &reading, self.folder.path())?;
            Ok(Corpus::from(kept))
        }

        fn plain(&self, packing: Packing) -> Corpus {
            Corpus::load(&self.data(), &self.tokenizer, packing).unwrap()
        }

        /// Files of the cache.
        fn files(&self) -> Vec<PathBuf> {
            let inside = |path: &Path| -> Vec<PathBuf> {
                let entries = fs::read_dir(path).unwrap();
                entries.map(|entry| entry.unwrap().path()).collect()
            };
            let folders = inside(self.folder.path())
                .into_iter()
                .filter(|p| p.is_dir());
            let mut files: Vec<PathBuf> = folders.flat_map(|folder| inside(&folder)).collect();
            files.sort();
            files
        }
    }

    fn same(a: &Batch, b: &Batch) -> bool {
        let documents = |batch: &Batch| -> Vec<u32> {
            (0..batch.rows)
                .flat_map(|row| batch.documents.row(row).to_vec())
                .collect()
        };
        a.input_ids == b.input_ids
            && a.targets == b.targets
            && a.mask == b.mask
            && documents(a) == documents(b)
            && a.examples == b.examples
    }

    #[track_caller]
    fn check_same(a: &Corpus, b: &Corpus) {
        assert_eq!((a.tokens(), a.hash()), (b.tokens(), b.hash()));
        for index in [0, 7, 5000] {
            let batch = |corpus: &Corpus| corpus.batch(3, index, 4, 100).unwrap();
            assert!(same(&batch(a), &batch(b)), "batch {index}");
        }
        let last = a.windows(100) - 3;
        let ordered = |corpus: &Corpus| corpus.ordered(last, 16, 100).unwrap();
        assert!(same(&ordered(a), &ordered(b)));
    }

    /// Ids, borders, learned tokens and places of the windows, against loops that know no shards.
    #[test]
    fn kept_tokens_are_those_of_the_records() {
        let bench = Bench::new();
        let (mut ids, mut learned, mut starts) = (Vec::new(), Vec::new(), Vec::new());
        for text in super::super::texts(&bench.data(), &bench.tokenizer).unwrap() {
            let tokens = text.unwrap().tokens(&bench.tokenizer).unwrap();
            starts.push(ids.len() as u64);
            ids.extend(tokens.iter().map(|(id, _)| *id));
            learned.extend(tokens.iter().map(|(_, learned)| *learned));
        }
        let hash = |starts: &[u64]| {
            let prompts = (0..ids.len())
                .filter(|at| !learned[*at])
                .map(|at| at as u64);
            let hash = (ids.iter()).fold(
                Hash::new()
                    .with(&(ids.len() as u64).to_le_bytes())
                    .with(&(starts.len() as u64).to_le_bytes()),
                |hash, id| hash.with(&id.to_le_bytes()),
            );
            let places = starts.iter().copied().chain(prompts);
            places
                .fold(hash, |hash, at| hash.with(&at.to_le_bytes()))
                .to_string()
        };
        let documents = bench.corpus(Packing::Documents, &Quiet::default()).unwrap();
        assert_eq!(documents.hash(), hash(&starts));
        check_same(&documents, &bench.plain(Packing::Documents));
        let stream = bench.corpus(Packing::Stream, &Quiet::default()).unwrap();
        assert_eq!(stream.hash(), hash(&[0]));
        check_same(&stream, &bench.plain(Packing::Stream));
        // The second time nothing is tokenised.
        let quiet = Quiet::default();
        let again = bench.corpus(Packing::Documents, &quiet).unwrap();
        check_same(&again, &documents);
        assert_eq!(quiet.steps(), 1, "one step of reading the file");
    }

    #[test]
    fn damaged_and_interrupted_work_is_made_up() {
        struct Notes(AtomicUsize);
        impl Watch for Notes {
            fn start(&self, _: &str, _: usize) {}
            fn at(&self, _: usize, _: &str) {}
            fn note(&self, line: &str) {
                assert!(line.ends_with("it is made anew"), "{line}");
                self.0.fetch_add(1, Ordering::Relaxed);
            }
            fn stop(&self) -> bool {
                false
            }
        }
        let bench = Bench::new();
        let packing = Packing::Documents;
        let stopped = bench.corpus(packing, &Quiet::stop_after(2)).err().unwrap();
        assert_eq!(stopped.exit_code(), 130, "{stopped}");
        assert!(stopped.to_string().contains("MB are saved in"), "{stopped}");
        assert_eq!(bench.files().len(), 1);
        let plain = bench.plain(packing);
        check_same(&bench.corpus(packing, &Quiet::default()).unwrap(), &plain);
        let files = bench.files();
        assert_eq!(files.len(), 3, "two shards and an index");
        let whole = fs::read(&files[0]).unwrap();
        fs::write(&files[0], &whole[..whole.len() - 8]).unwrap();
        let notes = Notes(AtomicUsize::new(0));
        check_same(&bench.corpus(packing, &notes).unwrap(), &plain);
        assert_eq!(notes.0.into_inner(), 1);
        assert_eq!(bench.files().len(), 2, "one shard now");
    }

    /// The first mistake of a file is said, wherever the cores are.
    #[test]
    fn the_first_mistake_is_said() {
        let folder = tempfile::tempdir().unwrap();
        stories::write_tokenizer(folder.path()).unwrap();
        let tokenizer = Tokenizer::open(folder.path()).unwrap();
        let path = folder.path().join("bad.jsonl");
        let text = format!("{}{{\"txt\": 1}}\nnonsense\n", stories::to_jsonl(1, 50));
        fs::write(&path, text).unwrap();
        let said = Corpus::load(&path, &tokenizer, Packing::Documents)
            .err()
            .unwrap();
        assert!(
            said.to_string().contains("line 51: not a JSON object with"),
            "{said}"
        );
    }
}
