//! Models and data sets of the Hugging Face hub, in the cache and by the settings of Hugging Face's own tools: what those have
//! downloaded is found here, and the other way round.
//!
//! A model is `org/name[@revision]`, or `org/name[@revision]/FILE.gguf` where it is one file; `hf://` before it says that no path is
//! meant. A file of a data set is `hf://datasets/org/name[@revision]/FILE`: Hugging Face's own spelling in fsspec, which `datasets`,
//! pandas, Polars and DuckDB read, and which no path to a file looks like; a data set without a file is its split train, in the parquet
//! files that the hub makes of it. A path that exists goes before an id.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;

use crate::watch::Watch;
use crate::{Error, Result};

mod cache;
mod download;
#[cfg(test)]
pub(crate) mod fake_tests;
mod http;
mod id;
mod pool;
#[cfg(test)]
mod tests;

pub use id::{Id, Kind};

use cache::{Folder, is_commit};
use download::{Announced, download};
use http::{Ask, Client, Failure, Patience, escaped, header};

/// What of a model is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Its sizes.
    Config,
    /// Its tokenizer and chat template, with the ids that configs name.
    Tokenizer,
    /// That, and the weights.
    Whole,
}

/// Where a model is that a flag or a recipe names: the path itself, or the folder (file) of an id in the cache, downloaded if it is not
/// there.
///
/// # Errors
/// Those of [`Hub::model`].
pub fn model(said: impl AsRef<Path>, part: Part, watch: &dyn Watch) -> Result<PathBuf> {
    match Id::model(said.as_ref())? {
        Some(id) => Hub::from_env().model(&id, part, watch),
        None => Ok(said.as_ref().to_owned()),
    }
}

/// A model's name as a file in `folder` has it: relative paths start there, and an id stays one wherever it is read.
pub fn settled(said: &Path, folder: &Path) -> PathBuf {
    let path = folder.join(said);
    match Id::model(said) {
        _ if path.exists() => path,
        Ok(Some(id)) => id.to_string().into(),
        Ok(None) => path,
        // Whoever opens it says what is wrong.
        Err(_) => said.to_owned(),
    }
}

/// Where a file of data is that a flag or a recipe names, as [`model`].
///
/// # Errors
/// Those of [`Hub::file`].
pub fn data(said: impl AsRef<Path>, watch: &dyn Watch) -> Result<PathBuf> {
    match Id::data(said.as_ref())? {
        Some(id) => Hub::from_env().file(&id, watch),
        None => Ok(said.as_ref().to_owned()),
    }
}

/// A hub, and the cache of what was downloaded from it.
#[derive(Debug, Clone)]
pub struct Hub {
    pub endpoint: String,
    /// Sent as a bearer token, to the endpoint alone.
    pub token: Option<String>,
    /// Never ask the hub, take what is kept.
    pub offline: bool,
    pub cache: PathBuf,
    /// Before a request is made a second time; doubled before each further one.
    pub pause: Duration,
}

/// What the hub says of a revision.
#[derive(Deserialize)]
struct Listing {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

/// A revision's files, and which commit it is.
struct Listed {
    commit: String,
    files: Vec<String>,
    /// The hub could not be asked, and why: these are the files that are kept.
    kept: Option<String>,
}

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const CONFIGS: &[&str] = &["config.json", "hybrid_config.json"];
/// What is read besides configs and weights. The card says the licence.
const SMALL: &[&str] = &[
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
    "provenance.json",
    "README.md",
];
/// The branch where the hub keeps the parquet files that it makes of every data set.
const PARQUET: &str = "refs/convert/parquet";
const MIB: u64 = 1 << 20;

impl Hub {
    pub fn new(endpoint: &str, cache: PathBuf) -> Self {
        Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: None,
            offline: false,
            cache,
            pause: Duration::from_millis(500),
        }
    }

    /// As Hugging Face's own tools are told: `HF_ENDPOINT`, `HF_TOKEN` (or the file of a login), `HF_HUB_OFFLINE`, `HF_HUB_CACHE`, `HF_HOME`.
    pub fn from_env() -> Self {
        Self::from_vars(&|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    fn from_vars(var: &dyn Fn(&str) -> Option<String>) -> Self {
        let caches = var("XDG_CACHE_HOME").map(PathBuf::from);
        let caches = caches.or_else(|| Some(PathBuf::from(var("HOME")?).join(".cache")));
        let home = var("HF_HOME").map(PathBuf::from);
        let home = home.unwrap_or_else(|| {
            let caches = caches.unwrap_or_else(std::env::temp_dir);
            caches.join("huggingface")
        });
        let cache = var("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from);
        let endpoint = var("HF_ENDPOINT").unwrap_or("https://huggingface.co".into());
        let login = var("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
        let token = var("HF_TOKEN").or_else(|| fs::read_to_string(login).ok());
        let token = token.map(|token| token.trim().to_owned());
        let offline = var("HF_HUB_OFFLINE").map(|value| value.to_uppercase());
        Self {
            token: token.filter(|token| !token.is_empty()),
            offline: offline.is_some_and(|v| ["1", "ON", "YES", "TRUE"].contains(&v.as_str())),
            ..Self::new(&endpoint, cache)
        }
    }

    /// The folder of a model's commit, or its one file, with what `part` needs.
    ///
    /// # Errors
    /// What the hub refuses or has not, [`Error::Unreachable`] where it cannot be asked and not all is kept, or [`Error::Interrupted`].
    pub fn model(&self, id: &Id, part: Part, watch: &dyn Watch) -> Result<PathBuf> {
        if id.file.is_some() {
            return self.file(id, watch);
        }
        let folder = Folder::new(&self.cache, id);
        let whole = |commit: &String| part.missing(&folder.snapshot(commit)).is_none();
        let kept = folder.commit(&id.revision).filter(whole);
        if let Some(commit) = kept.as_ref().filter(|_| is_commit(&id.revision)) {
            return Ok(folder.snapshot(commit));
        }
        let listed = self.listing(id, &folder, watch)?;
        let snapshot = folder.snapshot(&listed.commit);
        if listed.kept.is_none() {
            self.fetch(
                id,
                &folder,
                &listed.commit,
                &part.files(&listed.files),
                watch,
            )?;
            if part == Part::Whole {
                // The index names the shards; others may lie beside them.
                let shards = shards(&snapshot)?;
                self.fetch(id, &folder, &listed.commit, &shards, watch)?;
            }
        }
        match (part.missing(&snapshot), listed.kept) {
            (None, _) => folder.remember(&id.revision, &listed.commit)?,
            (Some(file), Some(why)) => {
                return Err(Error::Unreachable(format!(
                    "model {} is in {} without its {file}, and {why}",
                    id.repo,
                    folder.root.display()
                )));
            }
            (Some(file), None) => return Err(lacks(id, &file, &listed.files)),
        }
        Ok(snapshot)
    }

    /// A file of a repository; that of a split that has one.
    ///
    /// # Errors
    /// As [`Hub::model`], or a split of several files.
    pub fn file(&self, id: &Id, watch: &dyn Watch) -> Result<PathBuf> {
        if id.is_split() {
            return match &self.files(id, watch)?[..] {
                [file] => self.file(file, watch),
                files => Err(Error::invalid(format!(
                    "{id} has {} files, and one is read here: name it, as {}",
                    files.len(),
                    files[0]
                ))),
            };
        }
        let Some(file) = id.file.as_deref() else {
            return Err(Error::invalid(format!("{id} names no file")));
        };
        let folder = Folder::new(&self.cache, id);
        let commit = folder.commit(&id.revision);
        let kept = commit.map(|commit| folder.snapshot(&commit).join(file));
        let kept = kept.filter(|path| path.exists());
        if let Some(path) = kept.as_ref().filter(|_| is_commit(&id.revision)) {
            return Ok(path.clone());
        }
        let patience = Patience::first(kept.is_some());
        let announced = self.announced(id, &id.revision, file, patience, watch);
        let (commit, announced) = match (announced, kept) {
            (Ok(found), _) => found,
            (Err(Failure::Unreachable(why)), Some(path)) => {
                self.warn(id, &why);
                return Ok(path);
            }
            (Err(failure), _) => return Err(self.said(id, failure)),
        };
        if !folder.snapshot(&commit).join(file).exists() {
            self.get(id, &folder, &commit, &[announced], watch)?;
        }
        folder.remember(&id.revision, &commit)?;
        Ok(folder.snapshot(&commit).join(file))
    }

    /// The files of the split that `id` names, in order.
    ///
    /// # Errors
    /// As [`Hub::model`], or a split that several configurations have where none is named.
    pub fn files(&self, id: &Id, watch: &dyn Watch) -> Result<Vec<Id>> {
        let (config, split) = id.split();
        let (found, _) = self.parquet(&id.repo, config, split, watch)?;
        let configs = found.iter().filter_map(|file| file.split('/').next());
        let configs: BTreeSet<&str> = configs.collect();
        if configs.len() > 1 {
            let all = Vec::from_iter(configs);
            return Err(Error::invalid(format!(
                "{id} has the configurations {}: name one, as {id}/{}/{split}",
                all.join(", "),
                all[0]
            )));
        }
        let of = |file: String| Id {
            revision: PARQUET.to_owned(),
            file: Some(file),
            ..id.clone()
        };
        Ok(found.into_iter().map(of).collect())
    }

    /// The parquet files of a data set's split, in order, and the commit that they are of. `config` `*` is every configuration.
    ///
    /// # Errors
    /// As [`Hub::model`].
    pub fn split(
        &self,
        dataset: &str,
        config: &str,
        split: &str,
        watch: &dyn Watch,
    ) -> Result<(Vec<PathBuf>, String)> {
        let id = parquet_of(dataset);
        let (files, listed) = self.parquet(dataset, config, split, watch)?;
        let folder = Folder::new(&self.cache, &id);
        if listed.kept.is_none() {
            let backwards: Vec<String> = files.iter().rev().cloned().collect();
            self.fetch(&id, &folder, &listed.commit, &backwards, watch)?;
            folder.remember(PARQUET, &listed.commit)?;
        }
        let snapshot = folder.snapshot(&listed.commit);
        let paths = files.iter().map(|file| snapshot.join(file)).collect();
        Ok((paths, listed.commit))
    }

    /// The names of these files, and the listing that has them.
    fn parquet(
        &self,
        dataset: &str,
        config: &str,
        split: &str,
        watch: &dyn Watch,
    ) -> Result<(Vec<String>, Listed)> {
        let id = parquet_of(dataset);
        let folder = Folder::new(&self.cache, &id);
        let listed = self.listing(&id, &folder, watch)?;
        let wanted = |file: &&String| {
            // CONFIG/SPLIT/0000.parquet
            let parts: Vec<&str> = file.split('/').collect();
            matches!(parts[..], [of_config, of_split, name]
                if (config == "*" || of_config == config) && of_split == split && name.ends_with(".parquet"))
        };
        let mut files: Vec<String> = listed.files.iter().filter(wanted).cloned().collect();
        files.sort();
        let what = format!("configuration {config}, split {split}");
        match (&listed.kept, files.as_slice()) {
            // Files come from the last to the first: where the first is, all are.
            (Some(why), files) if !files.iter().any(|file| file.ends_with("/0000.parquet")) => {
                Err(Error::Unreachable(format!(
                    "data set {dataset}, {what}, is not in {}, and {why}",
                    self.cache.display()
                )))
            }
            (_, []) => Err(Error::invalid(format!(
                "the hub has no parquet file of data set {dataset}, {what}"
            ))),
            _ => Ok((files, listed)),
        }
    }

    fn client(&self) -> Client {
        Client::new(&self.endpoint, self.token.as_deref(), self.pause)
    }

    /// What a revision is, as the hub says, or where it cannot be asked, as it was last.
    fn listing(&self, id: &Id, folder: &Folder, watch: &dyn Watch) -> Result<Listed> {
        let kept = folder.commit(&id.revision);
        let url = format!(
            "{}/api/{}/{}/revision/{}",
            self.endpoint,
            id.plural(),
            id.repo,
            escaped(&id.revision, "")
        );
        let ask = Ask {
            url: &url,
            head: false,
            from: 0,
            patience: Patience::first(kept.is_some()),
        };
        let answer = match self.offline {
            true => Err(Failure::Unreachable(OFFLINE.into())),
            false => self.client().send(ask, watch),
        };
        let read = answer.and_then(|response| {
            let mut body = response.into_body();
            let body = body.with_config().limit(1 << 28).read_to_vec();
            body.map_err(|error| Failure::Unreachable(error.to_string()))
        });
        let bytes = match (read, kept) {
            (Ok(bytes), _) => bytes,
            (Err(Failure::Unreachable(why)), Some(commit)) => {
                self.warn(id, &why);
                return Ok(Listed {
                    files: folder.files(&commit),
                    commit,
                    kept: Some(self.unreachable(&why)),
                });
            }
            (Err(failure), _) => return Err(self.said(id, failure)),
        };
        let wrong = |why: &str| Error::invalid(format!("{url}: no listing of a hub: {why}"));
        let found: Listing = serde_json::from_slice(&bytes).map_err(|e| wrong(&e.to_string()))?;
        if !is_name(&found.sha) {
            return Err(wrong(&format!("sha {:?}", found.sha)));
        }
        let files = found.siblings.into_iter().map(|sibling| sibling.rfilename);
        Ok(Listed {
            commit: found.sha,
            files: files.filter(|file| id::is_inner_path(file)).collect(),
            kept: None,
        })
    }

    /// Commit, checksum and size of a file.
    fn announced(
        &self,
        id: &Id,
        revision: &str,
        file: &str,
        patience: Patience,
        watch: &dyn Watch,
    ) -> Result<(String, Announced), Failure> {
        if self.offline {
            return Err(Failure::Unreachable(OFFLINE.into()));
        }
        let base = match id.kind {
            Kind::Model => self.endpoint.clone(),
            Kind::Dataset => format!("{}/datasets", self.endpoint),
        };
        let address = |revision: &str| {
            let (revision, file) = (escaped(revision, ""), escaped(file, "/"));
            format!("{base}/{}/resolve/{revision}/{file}", id.repo)
        };
        let url = address(revision);
        let ask = Ask {
            url: &url,
            head: true,
            from: 0,
            patience,
        };
        let response = self.client().send(ask, watch)?;
        let word = |names: [&str; 2]| names.iter().find_map(|name| header(&response, name));
        let wrong = |what: &str| Error::invalid(format!("{url}: the hub does not say its {what}"));
        let etag = word(["x-linked-etag", "etag"]).unwrap_or_default();
        let etag = etag.trim_start_matches("W/").trim_matches('"');
        let size = word(["x-linked-size", "content-length"]).and_then(|size| size.parse().ok());
        let commit = header(&response, "x-repo-commit").unwrap_or_default();
        for (value, what) in [(etag, "ETag"), (commit, "X-Repo-Commit")] {
            if !is_name(value) {
                return Err(wrong(what).into());
            }
        }
        let announced = Announced {
            file: file.to_owned(),
            // Of the commit: a branch may move on while it comes.
            url: address(commit),
            etag: etag.to_owned(),
            size: size.ok_or_else(|| wrong("size"))?,
        };
        Ok((commit.to_owned(), announced))
    }

    /// Downloads those of a commit's files that are not kept.
    fn fetch(
        &self,
        id: &Id,
        folder: &Folder,
        commit: &str,
        files: &[String],
        watch: &dyn Watch,
    ) -> Result<()> {
        let snapshot = folder.snapshot(commit);
        let missing = files.iter().filter(|file| !snapshot.join(file).exists());
        let missing: Vec<&String> = missing.collect();
        let ask = |file: &&String, watch: &dyn Watch| {
            let announced = self.announced(id, commit, file, Patience::Long, watch)?;
            Ok(announced.1)
        };
        let all = pool::each(&missing, ask, || {}, watch);
        let all = all.map_err(|(i, failure)| self.said(&of_file(id, missing[i]), failure))?;
        match all.as_slice() {
            [] => Ok(()),
            all => self.get(id, folder, commit, all, watch),
        }
    }

    /// Downloads a commit's files, several at once. They stand in its folder, in this order, when all are there.
    fn get(
        &self,
        id: &Id,
        folder: &Folder,
        commit: &str,
        files: &[Announced],
        watch: &dyn Watch,
    ) -> Result<()> {
        let all = files.iter().map(|file| file.size).sum::<u64>();
        let all = all.div_ceil(MIB) as usize;
        watch.start(&format!("download {}", id.repo), all);
        let client = self.client();
        let came: Vec<_> = files.iter().map(|file| (file, AtomicU64::new(0))).collect();
        let one = |(file, came): &(&Announced, AtomicU64), watch: &dyn Watch| {
            let blob = folder.blob(&file.etag);
            let _lock = folder.lock(&file.etag, watch)?;
            if !blob.exists() {
                download(
                    &client,
                    file,
                    &blob,
                    &|bytes| came.store(bytes, Relaxed),
                    watch,
                )?;
            }
            came.store(file.size, Relaxed);
            Ok(())
        };
        let kept = || {
            let bytes = came.iter().map(|(_, came)| came.load(Relaxed));
            (bytes.sum::<u64>() / MIB) as usize
        };
        let mut told = 0;
        let look = || {
            let now = kept();
            // A telling a MiB, and not one a look.
            if std::mem::replace(&mut told, now) != now {
                watch.at(now, &under_way(&came));
            }
        };
        let done = pool::each(&came, one, look, watch);
        done.map_err(|(i, failure)| match failure {
            Failure::Interrupted => Error::Interrupted(format!(
                "{} of {all} MiB of {} are kept in {}; run the same command again to go on",
                kept(),
                id.repo,
                folder.root.display()
            )),
            other => self.said(&of_file(id, &files[i].file), other),
        })?;
        for file in files {
            folder.link(&file.etag, commit, &file.file)?;
        }
        watch.at(all, "MiB");
        Ok(())
    }

    fn warn(&self, id: &Id, why: &str) {
        if !self.offline {
            tracing::warn!(
                "{} cannot be reached ({why}); taking what is kept of {}",
                self.endpoint,
                id.repo
            );
        }
    }

    fn unreachable(&self, why: &str) -> String {
        match self.offline {
            true => why.to_owned(),
            false => format!(
                "{} cannot be reached ({why}): try again when it can be, or name another hub with HF_ENDPOINT",
                self.endpoint
            ),
        }
    }

    /// A failure in words, with the next step.
    fn said(&self, id: &Id, failure: Failure) -> Error {
        let (repo, endpoint) = (&id.repo, &self.endpoint);
        let noun = format!("{} {repo}", id.noun());
        let file = id.file.as_ref();
        let whole = file.map_or(noun.clone(), |file| format!("{noun}, {file}"));
        let page = match id.kind {
            Kind::Model => format!("{endpoint}/{repo}"),
            Kind::Dataset => format!("{endpoint}/datasets/{repo}"),
        };
        // What may have been meant for one.
        let no_path = match id.kind {
            Kind::Model => {
                let path = file.map_or(repo.clone(), |file| format!("{repo}/{file}"));
                format!("no folder or file {path} is here, and ")
            }
            Kind::Dataset => String::new(),
        };
        let (status, code, message) = match failure {
            Failure::Here(error) => return error,
            Failure::Interrupted => {
                return Error::Interrupted(format!(
                    "{repo} was still being asked for; run the same command again"
                ));
            }
            Failure::Unreachable(why) if self.offline => {
                return Error::Unreachable(format!(
                    "{no_path}{whole} is not in {}; {why}",
                    self.cache.display()
                ));
            }
            Failure::Unreachable(why) => {
                return Error::Unreachable(format!(
                    "{no_path}the hub was asked for {whole}: {}",
                    self.unreachable(&why)
                ));
            }
            Failure::Refused {
                status,
                code,
                message,
            } => (status, code, message),
        };
        let token = match &self.token {
            Some(_) => "the token that was sent (HF_TOKEN, or that of a login) has no access to it",
            None => "set HF_TOKEN to a token of your account",
        };
        Error::Invalid(match (code.as_str(), status) {
            ("GatedRepo", _) => format!(
                "{noun} is gated: accept its conditions at {page} with your account; {token}"
            ),
            ("RevisionNotFound", _) => format!(
                "{noun} has no revision {}: name a branch, a tag or a commit, as {repo}@main",
                id.revision
            ),
            ("EntryNotFound", _) => format!(
                "{noun} has no {} at revision {}: its files are listed at {page}/tree/{}",
                id.file.as_deref().unwrap_or("file of this name"),
                id.revision,
                id.revision
            ),
            ("RepoNotFound", _) | ("", 401 | 404) => format!(
                "{no_path}{endpoint} has no {whole}, or a private one: check the name; {token}"
            ),
            _ => format!(
                "{whole}: {endpoint} answers {status} {code} {message}: {token}, or name another hub with HF_ENDPOINT"
            ),
        })
    }
}

/// The same repository, and this file of it.
fn of_file(id: &Id, file: &str) -> Id {
    Id {
        file: Some(file.to_owned()),
        ..id.clone()
    }
}

/// The files that are coming, in words.
fn under_way(came: &[(&Announced, AtomicU64)]) -> String {
    let coming =
        |(file, came): &&(&Announced, AtomicU64)| (1..file.size).contains(&came.load(Relaxed));
    let mut coming = came.iter().filter(coming).map(|(file, _)| &file.file);
    match (coming.next(), coming.count()) {
        (None, _) => "MiB".to_owned(),
        (Some(first), 0) => format!("MiB, {first}"),
        (Some(first), others) => format!("MiB, {first} and {others} more"),
    }
}

/// Where the hub keeps the parquet files of a data set.
fn parquet_of(dataset: &str) -> Id {
    Id {
        kind: Kind::Dataset,
        repo: dataset.to_owned(),
        revision: PARQUET.to_owned(),
        file: None,
    }
}

const OFFLINE: &str = "HF_HUB_OFFLINE is set: unset it once to download what is missing";

/// Whether a word of the hub's can name a file of the cache.
fn is_name(word: &str) -> bool {
    let known = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    !word.is_empty() && word.chars().all(known) && !word.starts_with('.')
}

impl Part {
    /// Those of a model's files that are needed; of sharded weights the index, which names them.
    fn files(self, all: &[String]) -> Vec<String> {
        let has = |name: &str| all.iter().any(|file| file == name);
        let (single, index) = (has(SINGLE), has(INDEX));
        let wanted = |file: &&String| {
            let name = file.as_str();
            let weights = || match (single, index) {
                (true, _) => name == SINGLE,
                (false, true) => name == INDEX,
                (false, false) => name.ends_with(".safetensors") && !name.contains('/'),
            };
            match self {
                Part::Config => CONFIGS.contains(&name),
                Part::Tokenizer => CONFIGS.contains(&name) || SMALL.contains(&name),
                Part::Whole => CONFIGS.contains(&name) || SMALL.contains(&name) || weights(),
            }
        };
        // The small ones first: what is wrong with them is found before the weights come.
        let mut files: Vec<String> = all.iter().filter(wanted).cloned().collect();
        files.sort_by_key(|file| file.ends_with(".safetensors"));
        files
    }

    /// A file that is needed and not in a folder.
    fn missing(self, folder: &Path) -> Option<String> {
        let lacks = |name: &str| !folder.join(name).exists();
        let config = CONFIGS[0];
        match self {
            Part::Tokenizer if lacks("tokenizer.json") => Some("tokenizer.json".into()),
            Part::Config | Part::Whole if lacks(config) => Some(config.into()),
            Part::Whole if lacks(SINGLE) => match shards(folder) {
                Ok(shards) if !shards.is_empty() => shards.into_iter().find(|shard| lacks(shard)),
                // AMD's have no index.
                _ => {
                    let others = fs::read_dir(folder).into_iter().flatten().flatten();
                    let weights = |path: PathBuf| {
                        path.exists() && path.extension().is_some_and(|e| e == "safetensors")
                    };
                    let some = others.map(|entry| entry.path()).any(weights);
                    (!some).then(|| SINGLE.into())
                }
            },
            _ => None,
        }
    }
}

/// The files that a folder's index names; none without one.
fn shards(folder: &Path) -> Result<Vec<String>> {
    let index = folder.join(INDEX);
    if folder.join(SINGLE).exists() || !index.exists() {
        return Ok(Vec::new());
    }
    let text = fs::read_to_string(&index).map_err(Error::io("cannot read", &index))?;
    let json: Value = serde_json::from_str(&text).map_err(|e| Error::file(&index, e))?;
    let places = json["weight_map"].as_object().into_iter().flatten();
    let names = places.filter_map(|(_, name)| name.as_str().map(str::to_owned));
    let names: BTreeSet<String> = names.filter(|name| is_name(name)).collect();
    Ok(names.into_iter().collect())
}

/// What to say of a model that is not one of ours.
fn lacks(id: &Id, file: &str, files: &[String]) -> Error {
    let repo = &id.repo;
    let ggufs: Vec<&str> = files
        .iter()
        .map(String::as_str)
        .filter(|f| f.ends_with(".gguf"))
        .collect();
    Error::invalid(match ggufs.first() {
        Some(first) => format!(
            "model {repo} has no {file} but GGUF files ({}): name one, as {repo}/{first}",
            ggufs.join(", ")
        ),
        None if file == SINGLE => format!(
            "model {repo} has no weights in safetensors: convert its .bin or .pt files first, or choose another model"
        ),
        None => format!("model {repo} has no {file}: choose another model, or revision"),
    })
}
