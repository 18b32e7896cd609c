//! From files to batches: tokens, documents, packing.

mod arrow;
mod batch;
pub mod chat;
mod corpus;
mod guard;
mod manifest;
mod mixture;
mod ngrams;
mod order;
mod pair;
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
pub use manifest::{Listed, Manifest};
pub use mixture::DataSet;
pub use ngrams::{Decontamination, Ngrams};
pub use pair::{Lengths, Preference};
pub use preferences::Preferences;
pub use records::{Records, read_records};
pub use text::{Text, Texts, texts};
pub use tokenize::{Eos, Form, Packing, Reading, file_hash};
pub use tokenizer::{DecodeStream, Tokenizer};
