//! From files to batches: tokens, documents, packing.

pub mod chat;
mod packing;
mod preferences;
mod records;
pub mod stories;
mod text;
mod tokenizer;

pub use packing::{Batch, Batches, Corpus, Packing};
pub use preferences::{Preference, Preferences};
pub use records::{Records, read_records};
pub use text::{Text, texts};
pub use tokenizer::{DecodeStream, Tokenizer};
