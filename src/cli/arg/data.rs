//! `--data`: what commands read.

use super::cache;
use crate::data::{Corpus, Packing, Reading, Tokenizer};
use crate::pipeline::{Mixture, Text};
use crate::watch::Watch;
use crate::{Error, Result};

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
    let texts = Mixture::of(texts).ok_or_else(|| Error::invalid("no text is named"))?;
    let reading = Reading {
        tokenizer,
        packing,
        cache: Some(&cache::folder()),
        watch,
    };
    // What is written for it is read at once.
    let made = tempfile::tempdir();
    let made = made.map_err(Error::io("cannot create", &std::env::temp_dir()))?;
    texts.open(made.path(), &reading)
}
