//! The texts of a recipe, opened.

use std::path::Path;

use super::decontaminate::Decontaminate;
use super::text::{Mixture, Text};
use crate::checkpoint::Input;
use crate::data::{Batches, Corpus, Eos, Packing, Preferences, Reading};
use crate::train::stage::dpo::DpoConfig;
use crate::{Error, Result};

use serde::{Deserialize, Serialize};

/// `[data]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    pub train: Mixture,
    /// Held out: results are measured on it.
    pub validation: Mixture,
    /// Held out: what layers are chosen by [default: validation].
    #[serde(default)]
    pub selection: Option<Mixture>,
    #[serde(default)]
    pub preferences: Option<Text>,
    #[serde(default)]
    pub packing: Packing,
    /// Of all texts.
    #[serde(default)]
    pub eos: Eos,
    /// Of the training text.
    #[serde(default)]
    pub decontaminate: Option<Decontaminate>,
}

impl Data {
    /// All files, by the names of their keys.
    fn all(&self) -> impl Iterator<Item = (&'static str, &Path)> {
        let mixtures = [
            ("train", Some(&self.train)),
            ("validation", Some(&self.validation)),
            ("selection", self.selection.as_ref()),
        ];
        let mixtures = mixtures
            .into_iter()
            .filter_map(|(name, mixture)| Some((name, mixture?)));
        let files = mixtures.flat_map(|(name, mixture)| mixture.sources().map(move |p| (name, p)));
        let pairs = self.preferences.iter().filter_map(Text::source);
        files.chain(pairs.map(|path| ("preferences", path)))
    }

    /// Relative paths start at `folder`.
    pub(super) fn settle(&mut self, folder: &Path) {
        self.train.settle(folder);
        self.validation.settle(folder);
        self.selection
            .iter_mut()
            .for_each(|text| text.settle(folder));
        (self.preferences.iter_mut()).for_each(|text| text.settle(folder));
        (self.decontaminate.iter_mut()).for_each(|against| against.settle(folder));
    }

    /// # Errors
    /// Names the file that is not there; preferences are looked for where they are `read`.
    pub(super) fn check(&self, preferences_read: bool) -> Result<()> {
        for (name, path) in self.all() {
            if path.is_file() || (name == "preferences" && !preferences_read) {
                continue;
            }
            let problem = match path.is_dir() {
                true => "a directory",
                false => "No such file",
            };
            return Err(Error::invalid(format!(
                "{name} {}: {problem}; name a file there, or with --{name}",
                path.display()
            )));
        }
        Ok(())
    }
}

/// What stages learn from and are measured on.
pub struct Texts {
    pub train: Corpus,
    pub validation: Corpus,
    selection: Option<Corpus>,
    /// Where there is a DPO stage.
    pub preferences: Option<Preferences>,
    named: Data,
}

impl Texts {
    /// `made`: where the texts go that are written for it; `dpo`: how pairs are cut, where they are read; `reading`: how the
    /// training text is.
    ///
    /// # Errors
    /// Names the line that cannot be used.
    pub fn open(
        data: &Data,
        dpo: Option<&DpoConfig>,
        made: &Path,
        reading: &Reading,
    ) -> Result<Self> {
        let held_out = |text: &Mixture| {
            let held_out = Reading {
                packing: Packing::Documents,
                decontaminate: None,
                ..*reading
            };
            text.open(made, &held_out)
        };
        let pairs = dpo.zip(data.preferences.as_ref()).map(|(dpo, text)| {
            let file = text.file(made, true, reading.watch)?;
            Preferences::open(&file, dpo.lengths(), reading)
        });
        Ok(Self {
            train: data.train.open(made, reading)?,
            validation: held_out(&data.validation)?,
            selection: data.selection.as_ref().map(held_out).transpose()?,
            preferences: pairs.transpose()?,
            named: data.clone(),
        })
    }

    /// What records say of the training text.
    pub fn train_input(&self) -> Input {
        Input::new("data", self.named.train.name(), Some(self.train.hash()))
    }

    /// The same of the held-out text.
    pub fn validation_input(&self) -> Input {
        let hash = Some(self.validation.hash());
        Input::new("validation", self.named.validation.name(), hash)
    }

    /// The same of the pairs.
    pub fn preferences_input(&self) -> Option<Input> {
        let (text, pairs) = (self.named.preferences.as_ref()?, self.preferences.as_ref()?);
        Some(Input::new("data", text.name(), Some(pairs.hash())))
    }

    /// What layers are chosen by.
    pub fn selection(&self) -> &Corpus {
        self.selection.as_ref().unwrap_or(&self.validation)
    }
}
