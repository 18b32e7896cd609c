//! From files to batches: tokens, documents, packing.

pub mod chat;
mod jsonl;
mod packing;
mod preferences;
pub mod stories;
mod tokenizer;

pub use jsonl::{Text, read_lines, read_texts};
pub use packing::{Batch, Batches, Corpus, Packing};
pub use preferences::{Preference, Preferences};
pub use tokenizer::{DecodeStream, Tokenizer};
