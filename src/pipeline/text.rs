//! Texts, as a recipe or a flag names them.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{self, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::decontaminate::Decontaminate;
use crate::checkpoint::{self, Input};
use crate::data::{Batches, Corpus, DataSet, Manifest, Reading, Records, file_hash, stories};
use crate::hash::Hash;
use crate::hub::{Hub, Id};
use crate::watch::Watch;
use crate::{Error, Result};

/// A file of texts, here or on the hub (`hf://datasets/org/name[@revision]/FILE`, or all files of a split: `hf://datasets/org/name[/CONFIG/SPLIT]`), or `stories:SEED:COUNT`, which the program writes
/// itself; behind it `#K/N` for every N-th line, from the K-th (from 1), and of several texts `#weight=W` and `#tokens=N`; or
/// `manifest:FILE`, which names all of a corpus. A file that has such a name goes before what it would mean.
#[derive(Debug, Clone, PartialEq)]
pub struct Text {
    source: Source,
    part: Option<Part>,
    /// What its windows are to those of the other texts.
    weight: Option<f64>,
    /// Tokens of its beginning that are used [default: all].
    tokens: Option<usize>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Source {
    File(PathBuf),
    /// A file of a data set on the hub.
    Hub(Id),
    Stories {
        seed: u64,
        count: usize,
    },
    /// Of all texts of a corpus.
    Manifest(PathBuf),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Part {
    /// From 1.
    number: usize,
    of: usize,
}

impl Text {
    /// All of a file.
    pub fn of(path: &Path) -> Self {
        Self {
            source: Source::File(path.to_owned()),
            part: None,
            weight: None,
            tokens: None,
        }
    }

    /// The file that must be there.
    pub fn source(&self) -> Option<&Path> {
        match &self.source {
            Source::File(path) | Source::Manifest(path) => Some(path),
            Source::Hub(_) | Source::Stories { .. } => None,
        }
    }

    /// What a record calls texts that are read as one.
    pub fn names(texts: &[Self]) -> String {
        let names: Vec<String> = texts.iter().map(Self::name).collect();
        names.join(" + ")
    }

    /// What a record says of texts that a step has read.
    pub fn input(role: &str, texts: &[Self], read: &Corpus) -> Input {
        Input::new(role, Self::names(texts), Some(read.hash()))
    }

    /// Without its folder.
    pub(super) fn name(&self) -> String {
        let mut named = self.clone();
        if let Source::File(path) = &mut named.source {
            *path = path.file_name().unwrap_or_default().into();
        }
        named.to_string()
    }

    /// Of the text as it lies there (one that is still to be written, about), a part's share of it; none where there is no file.
    pub(super) fn bytes(&self) -> Option<u64> {
        const SOME: usize = 100;
        let all = match &self.source {
            Source::File(path) => std::fs::metadata(path).ok().filter(|m| m.is_file())?.len(),
            Source::Stories { seed, count } => {
                (stories::to_jsonl(*seed, SOME).len() * count / SOME) as u64
            }
            // What it names is not looked at.
            Source::Hub(_) | Source::Manifest(_) => return None,
        };
        // What is in a packed file, or which share of a mixture an epoch takes, is not known before it is read.
        if self.source().is_some_and(Records::is_packed) || self.weight.is_some() {
            return None;
        }
        let most = self.tokens.map_or(u64::MAX, |tokens| 4 * tokens as u64);
        Some(most.min(all / self.part.map_or(1, |part| part.of as u64)))
    }

    /// Relative paths start at `folder`.
    pub(super) fn settle(&mut self, folder: &Path) {
        if let Source::File(path) | Source::Manifest(path) = &mut self.source {
            *path = folder.join(&*path);
        }
    }

    /// The text as a file; what is written for it goes into `made`, what is downloaded into the hub's cache.
    ///
    /// # Errors
    /// A file that cannot be read or written, or what became of a download.
    pub(super) fn file(
        &self,
        made: &Path,
        preferences: bool,
        watch: &dyn Watch,
    ) -> Result<PathBuf> {
        let write = |name: String, lines: String| {
            let path = made.join(format!("{name}.jsonl"));
            checkpoint::write_atomic(&path, lines.as_bytes())?;
            Ok(path)
        };
        let path = match &self.source {
            Source::File(path) => path.clone(),
            Source::Hub(id) => Hub::from_env().file(id, watch)?,
            Source::Manifest(path) => {
                let message =
                    "a manifest is read alone, and for texts; name it as manifest:FILE once";
                return Err(Error::file(path, message));
            }
            Source::Stories { seed, count } if preferences => write(
                format!("preferences-{seed}-{count}"),
                stories::preferences_to_jsonl(*seed, *count),
            )?,
            Source::Stories { seed, count } => write(
                format!("stories-{seed}-{count}"),
                stories::to_jsonl(*seed, *count),
            )?,
        };
        let Some(Part { number, of }) = self.part else {
            return Ok(path);
        };
        let records = Records::open(&path, "a JSON object")?;
        let mut lines = String::new();
        for (i, record) in records.enumerate() {
            // What another part has must be whole too.
            let record = record?;
            if i % of == number - 1 {
                lines += &record.to_string();
                lines.push('\n');
            }
        }
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        // Texts of one mixture may have one name in different folders.
        let place = Hash::of(path.as_os_str().as_encoded_bytes());
        write(format!("part-{stem}-{place}-{number}-{of}"), lines)
    }

    /// The manifest that it is, with nothing behind its name.
    fn manifest(&self) -> Option<&Path> {
        match (&self.source, self.part, self.weight, self.tokens) {
            (Source::Manifest(path), None, None, None) => Some(path),
            _ => None,
        }
    }

    /// A split of a data set on the hub as its files.
    ///
    /// # Errors
    /// A hub that cannot tell them, or several where a share of one text is meant.
    fn files(&self, watch: &dyn Watch) -> Result<Vec<Self>> {
        let Source::Hub(id) = &self.source else {
            return Ok(vec![self.clone()]);
        };
        if !id.is_split() {
            return Ok(vec![self.clone()]);
        }
        let files = Hub::from_env().files(id, watch)?;
        let of_one = self.part.is_some() || self.weight.is_some() || self.tokens.is_some();
        if of_one && files.len() > 1 {
            return Err(Error::invalid(format!(
                "{self}: this data set has {} files, and what stands behind # is of one: name files, as {}",
                files.len(),
                files[0]
            )));
        }
        let of = |id| Self {
            source: Source::Hub(id),
            ..self.clone()
        };
        Ok(files.into_iter().map(of).collect())
    }

    /// The text as a part of a mixture; `made` as in [`Text::file`].
    fn data_set(&self, made: &Path, watch: &dyn Watch) -> Result<DataSet> {
        let mut named = Self {
            weight: None,
            tokens: None,
            ..self.clone()
        };
        if let Source::File(path) = &mut named.source {
            *path = std::path::absolute(&*path).unwrap_or_else(|_| path.clone());
        }
        Ok(DataSet {
            name: named.to_string(),
            path: self.file(made, false, watch)?,
            weight: self.weight,
            tokens: self.tokens,
        })
    }

    /// Whether a file's name is one that [`Text::file`] gives.
    pub(super) fn is_made(name: &str) -> bool {
        let Some(name) = name.strip_suffix(".jsonl") else {
            return false;
        };
        let mut words = name.rsplit('-');
        let mut number = || words.next().is_some_and(|word| word.parse::<u64>().is_ok());
        let numbers = number() && number();
        let kind = name.split('-').next();
        numbers && kind.is_some_and(|kind| ["stories", "preferences", "part"].contains(&kind))
    }
}

impl FromStr for Text {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        let mut found = Self::of(Path::new(text));
        let mut name = text;
        while !Path::new(name).is_file()
            && let Some((before, said)) = name.rsplit_once('#')
        {
            let known = match said.split_once('=') {
                Some(("weight", weight)) => parse(weight, &mut found.weight),
                Some(("tokens", tokens)) => parse(tokens, &mut found.tokens),
                _ => parse(said, &mut found.part),
            };
            if known.is_none() {
                return Err(Error::invalid(format!(
                    "data {text:?}: give TEXT#K/N, the K-th (from 1) of N parts, TEXT#weight=W or TEXT#tokens=N"
                )));
            }
            name = before;
        }
        let manifest = name.strip_prefix("manifest:");
        found.source = match name.strip_prefix("stories:") {
            None => match (manifest, Id::data(Path::new(name))?) {
                (Some(path), _) => Source::Manifest(path.into()),
                (None, Some(id)) => Source::Hub(id),
                (None, None) => Source::File(name.into()),
            },
            Some(rest) => {
                let numbers = rest.split_once(':');
                let numbers = numbers
                    .and_then(|(seed, count)| Some((seed.parse().ok()?, count.parse().ok()?)));
                let wrong = || Error::invalid(format!("data {text:?}: give stories:SEED:COUNT"));
                let (seed, count) = numbers.ok_or_else(wrong)?;
                Source::Stories { seed, count }
            }
        };
        Ok(found)
    }
}

/// What is said once.
fn parse<T: FromStr>(text: &str, to: &mut Option<T>) -> Option<()> {
    match to.replace(text.parse().ok()?) {
        Some(_) => None,
        None => Some(()),
    }
}

impl FromStr for Part {
    type Err = ();
    fn from_str(text: &str) -> Result<Self, ()> {
        let (number, of) = text.split_once('/').ok_or(())?;
        let number = number.parse().map_err(drop)?;
        let of = of.parse().map_err(drop)?;
        match (1..=of).contains(&number) {
            true => Ok(Self { number, of }),
            false => Err(()),
        }
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            Source::File(path) => write!(f, "{}", path.display())?,
            Source::Hub(id) => write!(f, "{id}")?,
            Source::Stories { seed, count } => write!(f, "stories:{seed}:{count}")?,
            Source::Manifest(path) => write!(f, "manifest:{}", path.display())?,
        }
        if let Some(Part { number, of }) = self.part {
            write!(f, "#{number}/{of}")?;
        }
        if let Some(weight) = self.weight {
            write!(f, "#weight={weight}")?;
        }
        match self.tokens {
            Some(tokens) => write!(f, "#tokens={tokens}"),
            None => Ok(()),
        }
    }
}

impl Serialize for Text {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

/// In a recipe: as a flag has it, or a table.
impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Words;
        impl<'de> Visitor<'de> for Words {
            type Value = Text;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a text, or a table of path, weight and tokens")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Text, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Text, A::Error> {
                #[derive(Deserialize)]
                #[serde(deny_unknown_fields)]
                struct Table {
                    path: String,
                    weight: Option<f64>,
                    tokens: Option<usize>,
                }
                let table = Table::deserialize(MapAccessDeserializer::new(map))?;
                let text: Text = table.path.parse().map_err(de::Error::custom)?;
                Ok(Text {
                    weight: table.weight.or(text.weight),
                    tokens: table.tokens.or(text.tokens),
                    ..text
                })
            }
        }
        from.deserialize_any(Words)
    }
}

/// Texts that are read as one: their windows are mixed by their weights, or all of them are taken.
#[derive(Debug, Clone, PartialEq)]
pub struct Mixture(Vec<Text>);

impl Mixture {
    /// None of no text.
    pub fn of(texts: &[Text]) -> Option<Self> {
        (!texts.is_empty()).then(|| Self(texts.to_vec()))
    }

    /// As [`Text::bytes`] of all, those beyond a token budget included.
    pub(super) fn bytes(&self) -> Option<u64> {
        self.0.iter().map(Text::bytes).sum()
    }

    /// What a record calls it.
    pub fn name(&self) -> String {
        Text::names(&self.0)
    }

    /// The files that must be there.
    pub fn sources(&self) -> impl Iterator<Item = &Path> {
        self.0.iter().filter_map(Text::source)
    }

    pub(super) fn settle(&mut self, folder: &Path) {
        self.0.iter_mut().for_each(|text| text.settle(folder));
    }

    /// The corpus of all; what is written for it goes into `made`. A manifest's is read as it says, whatever `reading` does.
    ///
    /// # Errors
    /// As [`Corpus::open`], or a file that cannot be written; names what is not as a manifest has it.
    pub fn open(&self, made: &Path, reading: &Reading) -> Result<Corpus> {
        if let [text] = &self.0[..]
            && let Some(path) = text.manifest()
        {
            return replay(path, made, reading);
        }
        let files = self.0.iter().map(|text| text.files(reading.watch));
        let files = files.collect::<Result<Vec<_>>>()?.concat();
        let sets = files.iter().map(|text| text.data_set(made, reading.watch));
        Corpus::open(&sets.collect::<Result<Vec<_>>>()?, reading)
    }
}

/// The corpus of a manifest, if all is as it was.
fn replay(path: &Path, made: &Path, reading: &Reading) -> Result<Corpus> {
    let manifest = Manifest::open(path)?;
    let changed = |what: &str| {
        let next = "put it back, or name the texts themselves";
        let message = format!("{what} has changed since the manifest was written: {next}");
        Error::file(path, message)
    };
    if manifest.tokenizer != reading.tokenizer.hash().to_string() {
        return Err(changed("the tokenizer"));
    }
    if reading.decontaminate.is_some() && manifest.decontaminate.is_none() {
        let message = "a manifest says how its texts are read, and these are held against nothing: leave out the decontamination, or name the \
                       texts themselves";
        return Err(Error::file(path, message));
    }
    let ngrams = manifest.decontaminate.as_ref().map(|before| {
        let ngrams = Decontaminate::of(before).ngrams(reading.watch)?;
        match ngrams.hash().to_string() == before.hash {
            true => Ok(ngrams),
            false => Err(changed(&format!(
                "what the texts are held against ({})",
                before.against.join(", ")
            ))),
        }
    });
    let ngrams = ngrams.transpose()?;
    let mut sets = Vec::new();
    for listed in &manifest.data {
        let text = Text {
            weight: listed.weight,
            tokens: listed.limit,
            ..listed.text.parse()?
        };
        let set = text.data_set(made, reading.watch)?;
        let now = file_hash(&set.path, reading.watch)?.to_string();
        if listed.hash != Some(now) {
            return Err(changed(&listed.text));
        }
        sets.push(set);
    }
    let reading = Reading {
        packing: manifest.packing,
        eos: manifest.eos,
        decontaminate: ngrams.as_ref(),
        ..*reading
    };
    let corpus = Corpus::open(&sets, &reading)?;
    match corpus.hash() == manifest.hash {
        true => Ok(corpus),
        false => Err(changed("the chat template or the program")),
    }
}

impl Serialize for Mixture {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match &self.0[..] {
            [text] => text.serialize(to),
            texts => texts.serialize(to),
        }
    }
}

/// One text, or a list.
impl<'de> Deserialize<'de> for Mixture {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Texts;
        impl<'de> Visitor<'de> for Texts {
            type Value = Mixture;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a text, a table of path, weight and tokens, or a list of such")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Mixture, E> {
                Ok(Mixture(vec![text.parse().map_err(E::custom)?]))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Mixture, A::Error> {
                let text = Text::deserialize(MapAccessDeserializer::new(map))?;
                Ok(Mixture(vec![text]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Mixture, A::Error> {
                let texts = Vec::deserialize(SeqAccessDeserializer::new(list))?;
                Mixture::of(&texts).ok_or_else(|| de::Error::custom("a list of no text"))
            }
        }
        from.deserialize_any(Texts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Eos, Packing, Tokenizer};
    use crate::watch::Quiet;

    #[test]
    fn parts_of_a_file_share_no_line_and_leave_none_out() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("all.jsonl");
        std::fs::write(&path, "1\n2\n3\n4\n5\n").unwrap();
        let part = |share: &str| {
            let text: Text = format!("{}#{share}", path.display()).parse().unwrap();
            let file = text.file(root.path(), false, &Quiet::default()).unwrap();
            assert!(Text::is_made(file.file_name().unwrap().to_str().unwrap()));
            assert_eq!(text.name(), format!("all.jsonl#{share}"));
            std::fs::read_to_string(file).unwrap()
        };
        assert_eq!(
            [part("1/3"), part("2/3"), part("3/3")],
            ["1\n4\n", "2\n5\n", "3\n"]
        );
        for wrong in [
            "a#0/3",
            "a#4/3",
            "a#1",
            "a#x/y",
            "stories:1",
            "a#weight=x",
            "a#tokens=-1",
            "a#1/2#1/2",
            "hf://datasets/org/set/train",
        ] {
            let error = wrong.parse::<Text>().unwrap_err().to_string();
            assert!(error.contains(wrong), "{error}");
        }
        assert!(!Text::is_made("stories.jsonl") && !Text::is_made("mine-1-2.jsonl"));
    }

    #[test]
    fn texts_of_the_hub_have_parts_and_weights() {
        let spelled = "hf://datasets/org/set@v1/in/a.parquet#1/2#weight=0.7";
        let mut text: Text = spelled.parse().unwrap();
        assert_eq!((text.weight, text.source()), (Some(0.7), None));
        // It is nobody's path.
        text.settle(Path::new("/recipes"));
        assert_eq!(
            (text.to_string(), text.name()),
            (spelled.into(), spelled.into())
        );
        assert_eq!(text.bytes(), None);
    }

    #[test]
    fn texts_have_weights_in_flags_and_recipes() {
        let spelled = "a.jsonl#1/2#weight=0.7#tokens=5000";
        let text: Text = spelled.parse().unwrap();
        assert_eq!((text.weight, text.tokens), (Some(0.7), Some(5000)));
        assert_eq!(text.to_string(), spelled);
        #[derive(Deserialize, Serialize)]
        struct Data {
            train: Mixture,
        }
        let read = |text: &str| toml::from_str::<Data>(text);
        let table = r#"{ path = "a.jsonl#1/2", weight = 0.7, tokens = 5000 }"#;
        let one = read(&format!("train = {table}")).unwrap().train;
        assert_eq!(one, Mixture(vec![text.clone()]));
        let list = read(&format!("train = [{table}, \"stories:1:2#weight=2\"]")).unwrap();
        assert_eq!(list.train.0[0], text);
        // As it is written it is read.
        let again = toml::to_string(&list).unwrap();
        assert_eq!(read(&again).unwrap().train, list.train);
        for (wrong, part) in [
            ("train = []", "a list of no text"),
            ("train = 3", "a text, a table of path"),
            ("train = { path = \"a\", wight = 1 }", "wight"),
            ("train = [\"a#0/1\"]", "a#0/1"),
        ] {
            let said = read(wrong).err().unwrap().to_string();
            assert!(said.contains(part), "{said}");
        }
        // A file of that very name.
        let folder = tempfile::tempdir().unwrap();
        let odd = folder.path().join("odd#weight=2");
        std::fs::write(&odd, "{}").unwrap();
        for (ending, weight) in [("", None), ("#weight=3", Some(3.0))] {
            let text: Text = format!("{}{ending}", odd.display()).parse().unwrap();
            assert_eq!((text.source(), text.weight), (Some(odd.as_path()), weight));
        }
    }

    /// Two texts with weights, a part, a beginning, an end and a planted run: the manifest's batches are theirs, and what has
    /// changed is named.
    #[test]
    fn manifests_replay_to_the_same_batches() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        stories::write_tokenizer(folder.path()).unwrap();
        let tokenizer = Tokenizer::open(folder.path()).unwrap();
        stories::write_jsonl(&at("a.jsonl"), 1, 60).unwrap();
        let first = stories::to_jsonl(1, 1);
        std::fs::write(at("eval.jsonl"), &first).unwrap();
        let quiet = Quiet::default();
        let plain = Reading {
            cache: Some(folder.path()),
            ..Reading::plain(&tokenizer, &quiet)
        };
        let against = Decontaminate {
            against: vec![at("eval.jsonl").display().to_string()],
            ngram: 50,
            data_dir: None,
        };
        let ngrams = against.ngrams(&quiet).unwrap();
        let reading = Reading {
            packing: Packing::Stream,
            eos: Eos::Always,
            decontaminate: Some(&ngrams),
            ..plain
        };
        let file = at("a.jsonl").display().to_string();
        let texts = [
            format!("{file}#1/2#weight=0.7").parse().unwrap(),
            "stories:2:30#weight=0.3#tokens=4000".parse().unwrap(),
        ];
        let mixture = Mixture::of(&texts).unwrap();
        let corpus = mixture.open(folder.path(), &reading).unwrap();
        let manifest = corpus.manifest().unwrap();
        assert_eq!(
            (manifest.data[0].records, manifest.data[0].dropped),
            (30, 1)
        );
        let text = serde_json::to_string(&manifest).unwrap();
        std::fs::write(at("data.json"), &text).unwrap();
        let named = format!("manifest:{}", at("data.json").display());
        let replayed: Mixture = Mixture::of(&[named.parse().unwrap()]).unwrap();
        assert_eq!(replayed.sources().collect::<Vec<_>>(), [at("data.json")]);
        // Whatever the flags say.
        let again = replayed.open(folder.path(), &plain).unwrap();
        assert_eq!(again.hash(), corpus.hash());
        assert_eq!(again.manifest().unwrap(), manifest);
        for index in 0..9 {
            let batch = |corpus: &Corpus| {
                let batch = corpus.batch(5, index, 4, 64).unwrap();
                (batch.input_ids, batch.mask, batch.examples)
            };
            assert_eq!(batch(&again), batch(&corpus));
        }
        let refused = |part: &str| {
            let said = replayed
                .open(folder.path(), &plain)
                .err()
                .unwrap()
                .to_string();
            assert!(said.contains("data.json") && said.contains(part), "{said}");
        };
        std::fs::write(at("eval.jsonl"), stories::to_jsonl(1, 2)).unwrap();
        refused("eval.jsonl) has changed");
        std::fs::write(at("eval.jsonl"), &first).unwrap();
        stories::write_jsonl(&at("a.jsonl"), 1, 61).unwrap();
        refused(&format!("{file}#1/2 has changed"));
        stories::write_jsonl(&at("a.jsonl"), 1, 60).unwrap();
        std::fs::write(
            at("data.json"),
            text.replace(&corpus.hash(), "0123456789abcdef"),
        )
        .unwrap();
        refused("the chat template or the program has changed");
        std::fs::write(at("data.json"), "[]").unwrap();
        refused("no manifest of data");
        let two = Mixture::of(&[named.parse().unwrap(), texts[0].clone()]).unwrap();
        let said = two.open(folder.path(), &plain).err().unwrap().to_string();
        assert!(said.contains("read alone"), "{said}");
    }
}
