//! From files to batches: tokens, documents, packing.

pub mod chat;
mod packing;
mod preferences;
mod records;
mod shard;
pub mod stories;
mod text;
mod tokenize;
mod tokenizer;
mod tokens;

pub use packing::{Batch, Batches, Corpus};
pub use preferences::{Preference, Preferences};
pub use records::{Records, read_records};
pub use text::{Text, texts};
pub use tokenize::{Packing, Reading};
pub use tokenizer::{DecodeStream, Tokenizer};
