//! From files to batches: tokens, documents, packing.

mod jsonl;
mod packing;
pub mod stories;
mod tokenizer;

pub use jsonl::read_texts;
pub use packing::{Batch, Corpus, Packing};
pub use tokenizer::{DecodeStream, Tokenizer};
