//! Models and files of data by path or by the hub's names. What is only named is no path: whoever opens one says first what is needed
//! of it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::Result;
use crate::cli::show::Progress;
use crate::hub::{self, Part};

/// A checkpoint's folder, a `.gguf` file, or `org/name[@revision][/FILE.gguf]`.
#[derive(Debug, Clone)]
pub struct Model(PathBuf);

impl Model {
    /// As it was typed.
    pub fn named(&self) -> &Path {
        &self.0
    }

    /// Where it is; downloaded first where it is the hub's and not kept.
    ///
    /// # Errors
    /// As [`hub::model`].
    pub fn fetch(&self) -> Result<PathBuf> {
        self.part(Part::Whole)
    }

    /// The same of what is needed.
    pub fn part(&self, part: Part) -> Result<PathBuf> {
        hub::model(&self.0, part, &Progress::default())
    }
}

impl From<OsString> for Model {
    fn from(typed: OsString) -> Self {
        Self(typed.into())
    }
}

/// A file, or `hf://datasets/org/name[@revision]/FILE`.
#[derive(Debug, Clone)]
pub struct DataFile(PathBuf);

impl DataFile {
    /// As it was typed.
    pub fn named(&self) -> &Path {
        &self.0
    }

    /// As [`Model::fetch`].
    pub fn fetch(&self) -> Result<PathBuf> {
        hub::data(&self.0, &Progress::default())
    }
}

impl From<OsString> for DataFile {
    fn from(typed: OsString) -> Self {
        Self(typed.into())
    }
}
