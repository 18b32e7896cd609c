//! What is kept so that nothing is made twice: results and unfinished work, named by what decides them.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::files::{map_tensors, read_tensors_with_metadata, write_tensors};
use crate::atomic::write_atomic;
use crate::hash::Hash;
use crate::numerics;
use crate::op::linear::Matrix;
use crate::{Error, Result};

/// Everything that decides a result: its inputs, and what the program computes from them on which kind of device.
/// Prints as 16 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key(String);

impl Key {
    /// `inputs`: an object.
    pub fn new(stage: numerics::Stage, device: &Device, mut inputs: Value) -> Self {
        inputs["numerics"] = numerics::version(stage, device).into();
        Self(inputs.to_string())
    }

    /// The first setting in which this key differs from one that was kept.
    fn difference(&self, before: &str) -> String {
        let parse = |text: &str| serde_json::from_str::<Value>(text).unwrap_or_default();
        difference(&parse(before), &parse(&self.0), "")
            .unwrap_or_else(|| "it was written by another version".into())
    }
}

fn difference(before: &Value, now: &Value, at: &str) -> Option<String> {
    match (before.as_object(), now.as_object()) {
        (Some(before), Some(now)) => now.iter().find_map(|(key, value)| {
            let at = match at {
                "" => key.clone(),
                at => format!("{at}.{key}"),
            };
            difference(before.get(key).unwrap_or(&Value::Null), value, &at)
        }),
        _ if before == now => None,
        _ => Some(format!("{at} was {before}, now {now}")),
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Hash::of(self.0.as_bytes()).fmt(f)
    }
}

/// A folder of results.
#[derive(Debug, Clone)]
pub struct Store {
    folder: PathBuf,
}

impl Store {
    /// It appears with its first result.
    pub fn new(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
        }
    }

    /// Where a result stands: `NAME-KEY`, a folder or, with an extension, a file.
    pub fn path(&self, name: &str, key: &Key) -> PathBuf {
        self.folder.join(format!("{name}-{key}"))
    }

    /// What a file keeps, or what is made and kept now.
    ///
    /// # Errors
    /// Those of `make`, or a file that cannot be read or written.
    pub fn get<T: Serialize + DeserializeOwned>(
        &self,
        name: &str,
        key: &Key,
        make: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let path = self.path(name, key).with_extension("json");
        if path.exists() {
            let text = std::fs::read_to_string(&path).map_err(Error::io("cannot read", &path))?;
            // What another version wrote in other words is made again.
            if let Ok(found) = serde_json::from_str(&text) {
                return Ok(found);
            }
        }
        self.make(name, key, make)
    }

    /// The same, whatever is there.
    ///
    /// # Errors
    /// As [`Store::get`].
    pub fn make<T: Serialize>(
        &self,
        name: &str,
        key: &Key,
        make: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let made = make()?;
        let text = serde_json::to_string_pretty(&made).expect("results serialise");
        let create = std::fs::create_dir_all(&self.folder);
        create.map_err(Error::io("cannot create", &self.folder))?;
        write_atomic(
            &self.path(name, key).with_extension("json"),
            text.as_bytes(),
        )?;
        Ok(made)
    }
}

/// What a file of tensors holds.
pub enum Kept<T = Tensor> {
    Nothing,
    /// The result of another key; how it differs.
    Other(String),
    /// How far it is, in whatever its writer counts.
    Found {
        done: u64,
        tensors: BTreeMap<String, T>,
    },
}

const KEY: &str = "key";
const DONE: &str = "done";

/// Tensors of a result, or on the way to one.
///
/// # Errors
/// A file that cannot be written.
pub fn keep(path: &Path, key: &Key, done: u64, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
        std::fs::create_dir_all(parent).map_err(Error::io("cannot create", parent))?;
    }
    let metadata = [(KEY, key.0.clone()), (DONE, done.to_string())];
    let metadata = metadata.map(|(name, value)| (name.to_owned(), value));
    write_tensors(path, tensors, metadata.into())
}

/// What [`keep`] left.
///
/// # Errors
/// A file that cannot be read as a whole, or that is something else.
pub fn kept(path: &Path, key: &Key) -> Result<Kept> {
    kept_as(path, key, read_tensors_with_metadata)
}

/// The same, matrices where they stand in the file.
///
/// # Errors
/// As [`kept`].
pub fn kept_in_place(path: &Path, key: &Key) -> Result<Kept<Matrix>> {
    kept_as(path, key, map_tensors)
}

type Read<T> = fn(&Path) -> Result<(BTreeMap<String, T>, HashMap<String, String>)>;

fn kept_as<T>(path: &Path, key: &Key, read: Read<T>) -> Result<Kept<T>> {
    if !path.exists() {
        return Ok(Kept::Nothing);
    }
    let (tensors, metadata) = read(path)?;
    let done = metadata.get(DONE).and_then(|done| done.parse().ok());
    match (metadata.get(KEY), done) {
        (Some(before), _) if *before != key.0 => Ok(Kept::Other(key.difference(before))),
        (Some(_), Some(done)) => Ok(Kept::Found { done, tensors }),
        _ => Err(Error::file(path, "no result that zebroid keeps: remove it")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn key(lr: f64) -> Key {
        let inputs = json!({ "train": { "lr": lr, "seed": 1 } });
        Key::new(numerics::Stage::Kd, &Device::Cpu, inputs)
    }

    #[test]
    fn what_is_there_is_not_made_again() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::new(&root.path().join("results"));
        let made = store.get("eval", &key(0.1), || Ok(vec![1.0f64])).unwrap();
        let again = |lr: f64| store.get("eval", &key(lr), || Ok(vec![2.0]));
        assert_eq!(
            (again(0.1).unwrap(), again(0.2).unwrap()),
            (made, vec![2.0])
        );
        assert_eq!(store.make("eval", &key(0.1), || Ok(3)).unwrap(), 3);
        assert_eq!(store.get("eval", &key(0.1), || Ok(4)).unwrap(), 3);
    }

    #[test]
    fn tensors_are_of_their_key() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("inside").join("state.safetensors");
        assert!(matches!(kept(&path, &key(0.1)).unwrap(), Kept::Nothing));
        let tensors = BTreeMap::from([(
            "a".to_owned(),
            Tensor::new(&[1f32, 2.0], &Device::Cpu).unwrap(),
        )]);
        keep(&path, &key(0.1), 7, &tensors).unwrap();
        let Kept::Found { done: 7, tensors } = kept(&path, &key(0.1)).unwrap() else {
            panic!("not found")
        };
        assert_eq!(tensors["a"].to_vec1::<f32>().unwrap(), [1.0, 2.0]);
        let Kept::Other(difference) = kept(&path, &key(0.2)).unwrap() else {
            panic!("found")
        };
        assert_eq!(difference, "train.lr was 0.1, now 0.2");
        write_tensors(&path, &tensors, Default::default()).unwrap();
        let error = kept(&path, &key(0.1)).map(drop).unwrap_err().to_string();
        assert!(error.contains("no result that zebroid keeps"), "{error}");
    }
}
