//! From a file of texts to its tokens. Those of a large file are made once, by all cores, and kept as shards, from which they are
//! mapped; an interrupted pass goes on behind the last of them.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Tokenizer;
use super::chat::{CHATML, ChatTemplate};
use super::ngrams::Ngrams;
use super::pair::{self, Lengths};
use super::records::Records;
use super::shard::{Draft, Dropped, Shard};
use super::text::{self, Document, Reader, Text, conversation};
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

/// Whether a token ends each text. What a chat template has written ends as the template ends it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Eos {
    /// If the tokenizer itself adds one (its post-processor), as the teacher's training had it.
    #[default]
    Auto,
    Always,
    Never,
}

/// What a record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// A document.
    #[default]
    Text,
    /// Two documents, a prompt with the chosen answer and with the rejected one, of which the answers are learned.
    Pair(Lengths),
}

impl Form {
    fn wanted(self) -> &'static str {
        match self {
            Self::Text => text::WANTED,
            Self::Pair(_) => pair::WANTED,
        }
    }
}

/// How texts become tokens, and under whose eyes.
#[derive(Clone, Copy)]
pub struct Reading<'a> {
    pub tokenizer: &'a Tokenizer,
    pub form: Form,
    pub packing: Packing,
    pub eos: Eos,
    /// Texts that share words with these are dropped.
    pub decontaminate: Option<&'a Ngrams>,
    /// Where tokens of large files are kept, in folders named by all that decides them.
    pub cache: Option<&'a Path>,
    pub watch: &'a dyn Watch,
}

impl<'a> Reading<'a> {
    /// By the tokenizer's own habits, documents apart, held against nothing, kept nowhere.
    pub fn plain(tokenizer: &'a Tokenizer, watch: &'a dyn Watch) -> Self {
        Self {
            tokenizer,
            form: Form::Text,
            packing: Packing::Documents,
            eos: Eos::Auto,
            decontaminate: None,
            cache: None,
            watch,
        }
    }

    /// # Errors
    /// An end that the tokenizer does not know.
    pub(super) fn check(&self) -> Result<()> {
        match self.eos == Eos::Always && self.tokenizer.eos().is_empty() {
            true => Err(Error::invalid(
                "eos always: the tokenizer names no token that ends a text; add eos_token to its tokenizer_config.json",
            )),
            false => Ok(()),
        }
    }
}

impl Eos {
    /// The tokens of a text with the end that it shall have.
    fn tokens(self, text: &Text, tokenizer: &Tokenizer) -> Result<Vec<(u32, bool)>> {
        let mut tokens = text.tokens(tokenizer)?;
        let eos = tokenizer.eos();
        let last = tokens.last().copied();
        let ends = last.filter(|(id, _)| eos.contains(id));
        match (self, ends) {
            _ if text.templated => {}
            (Eos::Always, None) => {
                let learned = last.is_none_or(|(_, learned)| learned);
                tokens.extend(eos.first().map(|id| (*id, learned)));
            }
            (Eos::Never, Some((id, _))) => {
                // What the text itself says stays.
                let spelled = tokenizer.token(id);
                let said = spelled.is_some_and(|spelled| text.text.ends_with(&spelled));
                let there = tokens.iter().rev().take_while(|(last, _)| *last == id);
                if there.count() > usize::from(said) {
                    tokens.pop();
                }
            }
            _ => {}
        }
        Ok(tokens)
    }
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

/// The tokens of a file, or so many of them, and the file's hash (a pipe has none).
///
/// # Errors
/// Names the record that cannot be used, or the file; [`Error::Interrupted`].
pub(super) fn tokens(
    path: &Path,
    budget: Option<usize>,
    reading: &Reading,
) -> Result<(Tokens, Option<Hash>)> {
    let about = fs::metadata(path).map_err(Error::io("cannot read", path))?;
    let hash = match about.is_file() {
        true => Some(file_hash(path, reading.watch)?),
        false => None,
    };
    let tokens = match (reading.cache, hash) {
        (Some(cache), Some(hash)) if about.len() >= LARGE => {
            let folder = cache.join(format!("data-{}", key(path, (hash, budget), reading)?));
            kept(path, (about.len(), budget), reading, &folder)?
        }
        _ => {
            let mut shards = Vec::new();
            let keep = |draft: Draft| {
                shards.push(draft.shard());
                Ok(())
            };
            tokenise(path, reading, (0, 0, budget), keep, |_| false)?;
            Tokens::new(shards, None)
        }
    };
    Ok((tokens, hash))
}

/// The tokens of a file of `bytes` that a folder keeps; what is missing of them is made.
fn kept(
    path: &Path,
    (bytes, budget): (u64, Option<usize>),
    reading: &Reading,
    folder: &Path,
) -> Result<Tokens> {
    let (watch, all) = (reading.watch, bytes.div_ceil(MB) as usize);
    fs::create_dir_all(folder).map_err(Error::io("cannot create", folder))?;
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
    let good: Vec<PathBuf> = (0..shards.len()).map(shard).collect();
    for entry in fs::read_dir(folder).map_err(Error::io("cannot list", folder))? {
        let path = entry.map_err(Error::io("cannot list", folder))?.path();
        let stale = path.extension().is_some_and(|end| end == "tokens") && !good.contains(&path);
        if stale || path == index {
            fs::remove_file(&path).map_err(Error::io("cannot remove", &path))?;
        }
    }
    watch.start("tokenise", all);
    let done: usize = shards.iter().map(|shard| shard.header.records).sum();
    let have: usize = shards.iter().map(|shard| shard.header.tokens).sum();
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
    if let Some(share) = tokenise(path, reading, (done, have, budget), keep, told)? {
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

/// What becomes of a record.
enum Made {
    Text(Document),
    Pair([Document; 2]),
    Dropped(Dropped),
}

/// Tokenises the records of a file behind the first `done`, which had so many tokens, up to a limit of all. `keep` gets drafts of
/// shards; `stop` is told how much of the file has been read, and says whether to stop there: then that share is given.
fn tokenise(
    path: &Path,
    reading: &Reading,
    (done, had, limit): (usize, usize, Option<usize>),
    mut keep: impl FnMut(Draft) -> Result<()>,
    stop: impl Fn(f64) -> bool,
) -> Result<Option<f64>> {
    let mut records = Records::open(path, reading.form.wanted())?;
    for _ in 0..done {
        records.next().transpose()?;
    }
    let (tokenizer, eos, ngrams) = (reading.tokenizer, reading.eos, reading.decontaminate);
    let (reader, form) = (Reader::new(tokenizer), reading.form);
    let mut draft = Draft::default();
    let mut first = had == 0;
    let mut left = limit.unwrap_or(usize::MAX).saturating_sub(had);
    while left > 0 {
        let portion = portion(&mut records);
        if portion.is_empty() {
            break;
        }
        let made = portion.into_par_iter().map(|(number, record)| {
            let record = record?;
            let make = || {
                if let Form::Pair(lengths) = form {
                    return pair::pair(&record, &reader, lengths).map(Made::Pair);
                }
                let text = reader.text(&record)?;
                match ngrams.and_then(|ngrams| ngrams.find(&text.text)) {
                    Some(words) => Ok(Made::Dropped(Dropped {
                        record: number,
                        words: words.to_owned(),
                    })),
                    None => eos.tokens(&text, tokenizer).map(Made::Text),
                }
            };
            make().map_err(|e: Error| Error::Line {
                path: path.to_owned(),
                line: number,
                message: e.to_string(),
            })
        });
        // In the file's order, so that the first mistake is the one that is said.
        for made in made.collect::<Vec<Result<Made>>>() {
            match made? {
                Made::Text(tokens) => {
                    let begins = first || reading.packing == Packing::Documents;
                    draft.push(tokens.iter().copied().take(left), begins);
                    left -= left.min(tokens.len());
                    first = false;
                }
                Made::Pair([chosen, rejected]) => {
                    draft.push(chosen.into_iter(), true);
                    draft.also(rejected.into_iter(), true);
                }
                Made::Dropped(record) => draft.drop(record),
            }
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
fn key(path: &Path, (file, budget): (Hash, Option<usize>), reading: &Reading) -> Result<Hash> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let form = name.split_once('.').map(|(_, form)| form.to_lowercase());
    // One that cannot be read is an error where it is asked for.
    let template = reading.tokenizer.chat_template().ok().flatten();
    let ends = (reading.eos, reading.tokenizer.eos());
    let mut inputs = json!({
        "file": file.to_string(),
        "form": form,
        "tokenizer": reading.tokenizer.hash().to_string(),
        "template": template.map(|template| template.hash().to_string()),
        "packing": reading.packing,
        "eos": (reading.eos != Eos::Auto).then_some(ends),
        "decontaminate": reading.decontaminate.map(|ngrams| ngrams.hash().to_string()),
        "tokens": budget,
        "sample": sample(reading)?.to_string(),
    });
    if reading.form != Form::Text {
        inputs["records"] = json!(reading.form);
    }
    Ok(Hash::of(inputs.to_string().as_bytes()))
}

/// The hash of a file's bytes.
///
/// # Errors
/// A file that cannot be read; [`Error::Interrupted`].
pub fn file_hash(path: &Path, watch: &dyn Watch) -> Result<Hash> {
    const PIECE: u64 = 1 << 24;
    let mut file = File::open(path).map_err(Error::io("cannot read", path))?;
    let bytes = file.metadata().map_or(0, |about| about.len());
    let all = bytes.div_ceil(MB) as usize;
    if bytes >= LARGE {
        watch.start("read data", all);
    }
    let (mut piece, mut hash, mut done) = (Vec::new(), Hash::new(), 0);
    loop {
        piece.clear();
        let read = (&mut file).take(PIECE).read_to_end(&mut piece);
        if read.map_err(Error::io("cannot read", path))? == 0 {
            return Ok(hash);
        }
        hash = hash.with(&piece);
        done += piece.len() as u64;
        if bytes >= LARGE {
            watch.reached((done / MB) as usize, all, "MB")?;
        }
    }
}

/// What becomes of a few records.
fn sample(reading: &Reading) -> Result<Hash> {
    let tokenizer = reading.tokenizer;
    let reader = Reader::by(tokenizer, ChatTemplate::new(CHATML, Vec::new())?);
    let said = |role: &str, content: &str| json!({ "role": role, "content": content });
    let messages = [
        said("user", "How many?"),
        said("assistant", "123, she said."),
    ];
    let texts = [
        reader.text(&json!({ "text": "Zoë's  cat saw 1,024 mice.\n\tIt ran." }))?,
        reader.text(&json!({ "prompt": "What is 2 + 2? ", "completion": "Four." }))?,
        conversation(reader.template()?, &messages, &Value::Null, 0)?,
    ];
    let mut documents = Vec::new();
    for text in &texts {
        documents.push(text.tokens(tokenizer)?);
    }
    if let Form::Pair(_) = reading.form {
        // Of lengths that cut prompts and answers.
        let lengths = Lengths {
            max_prompt: 3,
            max_length: 8,
        };
        let [question, answer] = &messages;
        let other = said("assistant", "I know of none.");
        for pair in [
            json!({ "prompt": "What is 2 + 2?", "chosen": " Four.", "rejected": " Five, I say, as others do." }),
            json!({ "chosen": [question, answer], "rejected": [question, other] }),
        ] {
            documents.extend(pair::pair(&pair, &reader, lengths)?);
        }
    }
    let tokens = documents.into_iter().flatten();
    Ok(tokens.fold(Hash::new(), |hash, (id, learned)| {
        hash.with(&id.to_le_bytes()).with(&[u8::from(learned)])
    }))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::super::stories;
    use super::super::{Batch, Batches, Corpus};
    use super::*;
    use crate::watch::Quiet;

    fn reading(tokenizer: &Tokenizer) -> Reading<'_> {
        Reading::plain(tokenizer, Box::leak(Box::default()) as &Quiet)
    }

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
                packing,
                watch,
                ..reading(&self.tokenizer)
            };
            let bytes = fs::metadata(self.data()).unwrap().len();
            let folder = self.folder.path().join(format!("{packing:?}"));
            let kept = kept(&self.data(), (bytes, None), &reading, &folder)?;
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
        assert_eq!(quiet.steps(), 0);
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
        let stopped = bench.corpus(packing, &Quiet::stop_after(1)).err().unwrap();
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

    /// The key of a large file names all that its tokens depend on.
    #[test]
    fn keys_are_of_all_that_decides_the_tokens() {
        let folder = tempfile::tempdir().unwrap();
        stories::write_tokenizer(folder.path()).unwrap();
        let tokenizer = Tokenizer::open(folder.path()).unwrap();
        let template = folder.path().join("chat_template.jinja");
        let plain = reading(&tokenizer);
        let (file, path) = (Hash::of(b"a"), Path::new("a.jsonl"));
        let of = |path: &str, hash, budget, with: &Reading| {
            key(Path::new(path), (hash, budget), with)
                .unwrap()
                .to_string()
        };
        let ngrams = Ngrams::new(13, &[], None).unwrap();
        let packing = Packing::Stream;
        let decontaminate = Some(&ngrams);
        let mut keys = vec![
            of("a.jsonl", file, None, &plain),
            of("a.txt", file, None, &plain),
            of("a.jsonl", Hash::of(b"b"), None, &plain),
            of("a.jsonl", file, Some(5), &plain),
            of("a.jsonl", file, None, &Reading { packing, ..plain }),
            of(
                "a.jsonl",
                file,
                None,
                &Reading {
                    eos: Eos::Always,
                    ..plain
                },
            ),
            of(
                "a.jsonl",
                file,
                None,
                &Reading {
                    eos: Eos::Never,
                    ..plain
                },
            ),
            of(
                "a.jsonl",
                file,
                None,
                &Reading {
                    decontaminate,
                    ..plain
                },
            ),
        ];
        assert_eq!(
            key(path, (file, None), &plain).unwrap().to_string(),
            keys[0]
        );
        fs::write(&template, "{{ messages }}").unwrap();
        keys.push(of("a.jsonl", file, None, &plain));
        let different: std::collections::BTreeSet<&String> = keys.iter().collect();
        assert_eq!(different.len(), 9);
    }

    #[test]
    fn texts_end_as_they_shall() {
        let folder = tempfile::tempdir().unwrap();
        stories::write_tokenizer(folder.path()).unwrap();
        let plain = Tokenizer::open(folder.path()).unwrap();
        let mut json = plain.to_json().unwrap();
        let end = json!({"SpecialToken": {"id": "</s>", "type_id": 0}});
        json["post_processor"]["single"]
            .as_array_mut()
            .unwrap()
            .push(end);
        let special = json!({"id": "</s>", "ids": [1], "tokens": ["</s>"]});
        json["post_processor"]["special_tokens"]["</s>"] = special;
        fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
        let ending = Tokenizer::open(folder.path()).unwrap();
        let [whole, said] = ["Tom ran", "Tom ran</s>"].map(|text| Text::whole(text.into()));
        let asked = Reader::new(&plain);
        let asked = asked
            .text(&json!({ "prompt": "Tom", "completion": " ran" }))
            .unwrap();
        let ends = |eos: Eos, tokenizer: &Tokenizer, text: &Text| {
            let tokens = eos.tokens(text, tokenizer).unwrap();
            let ends = tokens.iter().rev().take_while(|(id, _)| *id == 1).count();
            (ends, tokens.last().unwrap().1)
        };
        for (eos, of_plain, of_ending, of_said) in [
            (Eos::Auto, 0, 1, 2),
            (Eos::Always, 1, 1, 2),
            (Eos::Never, 0, 0, 1),
        ] {
            assert_eq!(ends(eos, &plain, &whole), (of_plain, true), "{eos:?}");
            assert_eq!(ends(eos, &plain, &asked), (of_plain, true), "{eos:?}");
            assert_eq!(ends(eos, &ending, &whole), (of_ending, true), "{eos:?}");
            assert_eq!(ends(eos, &ending, &said).0, of_said, "{eos:?}");
        }
        let templated = Text {
            templated: true,
            ..whole
        };
        assert_eq!(ends(Eos::Always, &plain, &templated).0, 0);
        let nameless = Tokenizer::from_json(json.to_string().as_bytes()).unwrap();
        let always = Reading {
            eos: Eos::Always,
            ..reading(&nameless)
        };
        assert!(
            always
                .check()
                .unwrap_err()
                .to_string()
                .contains("eos always")
        );
        Reading {
            tokenizer: &plain,
            ..always
        }
        .check()
        .unwrap();
    }

    /// A planted run of words is found and its record dropped, in a kept text too; the others stay as they are.
    #[test]
    fn what_an_evaluation_set_has_is_not_learned_from() {
        let bench = Bench::new();
        let text = fs::read_to_string(bench.data()).unwrap();
        let question =
            "which of these will a magnet pull the most: wood, glass, iron, or paper, and why";
        let mut ngrams = Ngrams::new(13, &[], None).unwrap();
        ngrams.add(&json!({ "question": question, "answer": "iron" }));
        let planted = json!({ "text": format!("It asks {}!", question.to_uppercase()) });
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        lines.insert(300, planted.to_string());
        let path = bench.folder.path().join("planted.jsonl");
        fs::write(&path, lines.join("\n")).unwrap();
        let with = Reading {
            decontaminate: Some(&ngrams),
            ..reading(&bench.tokenizer)
        };
        let folder = bench.folder.path().join("kept");
        for tokens in [
            tokens(&path, None, &with).unwrap().0,
            kept(&path, (1_000_000, None), &with, &folder).unwrap(),
            kept(&path, (1_000_000, None), &with, &folder).unwrap(),
        ] {
            assert_eq!((tokens.records(), tokens.dropped()), (lines.len(), 1));
            let dropped: Vec<&Dropped> = tokens.examples().collect();
            assert_eq!(dropped[0].record, 301);
            assert!(
                dropped[0].words.starts_with("WHICH OF THESE WILL"),
                "{dropped:?}"
            );
            check_same(&Corpus::from(tokens), &bench.plain(Packing::Documents));
        }
    }
}
