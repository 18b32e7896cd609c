//! `--data`: opening what commands read.

use std::path::Path;

use super::cache;
use crate::Result;
use crate::data::{Corpus, Packing, Reading, Tokenizer};
use crate::watch::Watch;

/// The corpus of a file; the tokens of a large one are kept in the cache.
///
/// # Errors
/// As [`Corpus::open`].
pub fn corpus(
    path: &Path,
    tokenizer: &Tokenizer,
    packing: Packing,
    watch: &dyn Watch,
) -> Result<Corpus> {
    let reading = Reading {
        tokenizer,
        packing,
        cache: Some(&cache::folder()),
        watch,
    };
    Corpus::open(path, &reading)
}
