//! From files to batches: tokens, documents, packing.

mod batch;
pub mod chat;
mod corpus;
mod mixture;
mod order;
mod preferences;
mod records;
mod shard;
pub mod stories;
mod text;
mod tokenize;
mod tokenizer;
mod tokens;

pub use batch::{Batch, Batches};
pub use corpus::Corpus;
pub use mixture::DataSet;
pub use preferences::{Preference, Preferences};
pub use records::{Records, read_records};
pub use text::{Text, texts};
pub use tokenize::{Packing, Reading};
pub use tokenizer::{DecodeStream, Tokenizer};
