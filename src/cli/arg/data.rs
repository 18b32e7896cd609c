//! `--data` and how it is read.

use std::path::{Path, PathBuf};

use super::cache;
use crate::cli::positive;
use crate::data::{Corpus, Eos, Lengths, Packing, Preferences, Reading, Tokenizer};
use crate::pipeline::{Decontaminate, Mixture, NGRAM, Text};
use crate::watch::Watch;
use crate::{Error, Result};

/// How texts that are learned from are read.
#[derive(Debug, Clone, clap::Args)]
pub struct DataArgs {
    /// documents: attention, convolution and state stop at document borders; stream: they do not.
    #[arg(long, value_enum, default_value = "documents")]
    pub packing: Packing,
    /// Whether a token ends each text: if the tokenizer itself adds one (auto), always or never. What a chat template writes stays.
    #[arg(long, value_enum, default_value = "auto")]
    pub eos: Eos,
    /// Leave out texts of --data that share a run of words with these evaluation sets: files of records (hf://datasets/.. too), tasks, or groups of tasks.
    #[arg(long, value_delimiter = ',', value_name = "FILE|TASK,..")]
    pub decontaminate: Vec<String>,
    /// Words of such a run.
    #[arg(long, value_parser = positive, default_value_t = NGRAM)]
    pub ngram: usize,
    /// Folder of the tasks' datasets [default: downloaded from Hugging Face].
    #[arg(long)]
    pub data_dir: Option<PathBuf>,
}

impl DataArgs {
    /// The corpus of texts that are learned from.
    ///
    /// # Errors
    /// As [`corpus`], or an evaluation set that cannot be read.
    pub fn corpus(
        &self,
        texts: &[Text],
        tokenizer: &Tokenizer,
        watch: &dyn Watch,
    ) -> Result<Corpus> {
        let against = Decontaminate {
            against: self.decontaminate.clone(),
            ngram: self.ngram,
            data_dir: self.data_dir.clone(),
        };
        let ngrams = match self.decontaminate.is_empty() {
            true => None,
            false => Some(against.ngrams(watch)?),
        };
        let reading = Reading {
            packing: self.packing,
            eos: self.eos,
            decontaminate: ngrams.as_ref(),
            ..Reading::plain(tokenizer, watch)
        };
        open(texts, &reading)
    }

    /// # Errors
    /// What is said of texts where pairs are read.
    pub fn check_unused(&self) -> Result<()> {
        match self.eos == Eos::Auto && self.decontaminate.is_empty() {
            true => Ok(()),
            false => Err(Error::invalid(
                "--eos and --decontaminate are of texts, and preference pairs are read as they are: leave them out",
            )),
        }
    }

    /// The corpus of texts that are held out.
    ///
    /// # Errors
    /// As [`corpus`].
    pub fn held_out(
        &self,
        texts: &[Text],
        tokenizer: &Tokenizer,
        watch: &dyn Watch,
    ) -> Result<Corpus> {
        let reading = Reading {
            eos: self.eos,
            ..Reading::plain(tokenizer, watch)
        };
        open(texts, &reading)
    }
}

/// The corpus of some texts; the tokens of large ones are kept in the cache.
///
/// # Errors
/// No text, or those of [`Mixture::open`].
pub fn corpus(
    texts: &[Text],
    tokenizer: &Tokenizer,
    packing: Packing,
    watch: &dyn Watch,
) -> Result<Corpus> {
    let reading = Reading {
        packing,
        ..Reading::plain(tokenizer, watch)
    };
    open(texts, &reading)
}

/// The pairs of a file; the tokens of a large one are kept in the cache.
///
/// # Errors
/// Those of [`Preferences::open`].
pub fn pairs(
    file: &Path,
    lengths: Lengths,
    tokenizer: &Tokenizer,
    watch: &dyn Watch,
) -> Result<Preferences> {
    let reading = Reading {
        cache: Some(&cache::folder()),
        ..Reading::plain(tokenizer, watch)
    };
    Preferences::open(file, lengths, &reading)
}

fn open(texts: &[Text], reading: &Reading) -> Result<Corpus> {
    let texts = Mixture::of(texts).ok_or_else(|| Error::invalid("no text is named"))?;
    // What is written for it is read at once.
    let made = tempfile::tempdir();
    let made = made.map_err(Error::io("cannot create", &std::env::temp_dir()))?;
    let reading = Reading {
        cache: Some(&cache::folder()),
        ..*reading
    };
    texts.open(made.path(), &reading)
}
