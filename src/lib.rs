//! Zebroid composes hybrid (MLA + Mamba2) language models from pretrained Llama checkpoints.
//!
//! # Layout
//! Modules in data-flow order: each uses only what has a higher number. `tests/arrows.rs` reads this table and guards it.
//!
//! | rank | module | holds |
//! |---|---|---|
//! | 1 | [`cli`] | one file per command |
//! | 2 | [`serve`] | models behind HTTP |
//! | 1 | [`fuzz`] | parsers of outside input as functions of bytes |
//! | 2 | [`pipeline`] | an opened teacher and its stages, shared by commands and recipes |
//! | 3 | [`eval`] | KL, perplexity, parity, recall, probes, retention, sensitivity; `task/<name>.rs` and `harness/` |
//! | 3 | [`train`] | one loop; `stage/<name>.rs` says data, loss, what is frozen, `optimizer/<name>.rs` what a step follows |
//! | 3 | [`convert`] | Llama checkpoint + layer plan → hybrid checkpoint |
//! | 4 | [`generate`] | prefill, decode, sampling; log-likelihoods |
//! | 4 | [`report`] | HTML pages and plots |
//! | 5 | [`checkpoint`] | folders on disk: formats, families, shards, atomic save |
//! | 5 | [`data`] | tokens, packing, the story generator |
//! | 6 | [`model`] | embedding, layer, head: the first file to read; `parts.rs`: a model before it runs |
//! | 7 | [`mixer`] | `<name>/`: config, forward, step, state, initialisation from attention, cost |
//! | 8 | [`weights`] | named weights, taken strictly; where and in what they are computed with |
//! | 8 | [`gguf`] | a GGUF file: the container, its tokenizer |
//! | 9 | [`hub`] | models and data sets of the Hugging Face hub, and their cache |
//! | 9 | [`op`] | one folder per kernel: public function, plain version, CPU kernel, tests |
//! | 10 | [`numerics`] | what results that are kept depend on besides their inputs |
//! | 10 | [`atomic`] | files that appear whole or not at all |
//! | 10 | [`mapped`] | files seen as memory |
//! | 10 | [`watch`] | progress of long work, and the wish to stop it |
//! | 11 | [`error`], [`hash`] | the error type; content hashes for resume checks |
//!
//! # Unsafe code
//! Denied but in these files; every block says why it is sound. `tests/arrows.rs` guards the list.
//!
//! | file | for |
//! |---|---|
//! | `op/matmul/mod.rs` | the product of matrices, by pointers into checked slices |
//! | `op/matmul/tiles.rs` | vector loads from checked slices, tiles, rows of one buffer that threads write apart |
//! | `op/ssd/cpu.rs` | columns of one buffer that threads write apart |
//! | `op/ssd/backward.rs`, `op/ssd/resume.rs` | the same, for gradients and for decoding |
//! | `op/isa.rs` | the choice of instructions that the processor has |
//! | `op/linear/dot/mod.rs` | the choice of instructions that the processor has |
//! | `op/amx.rs` | tiles of a processor that has them |
//! | `op/linear/dot/x86.rs`, `op/linear/dot/amx.rs` | vector loads from checked slices, tiles |
//! | `op/linear/product.rs` | places of one buffer that threads write apart |
//! | `op/team.rs` | work that threads share while its owner waits for them |
//! | `op/cuda/device.rs`, `op/cuda/recording.rs` | memory of the GPU, launches of kernels, recorded launches |
//! | `op/runtime.rs` | the process: its environment, its allocator |
//! | `mapped.rs` | the memory map of a file |
//! | `op/blocks/dot.rs` | the choice of instructions that the processor has |
//! | `op/blocks/dot/avx2.rs`, `op/blocks/dot/avx512.rs`, `op/blocks/dot/amx.rs`, `op/blocks/dot/panel.rs`, `op/blocks/dot/many.rs` | vector loads from checked slices, tiles |
//! | `main.rs` | the call of `op::runtime::prepare`, before any thread |
//!
//! # Shape letters
//! `B` batch, `T` query positions, `S` key positions, `D` hidden size, `H` query heads, `G` key/value
//! heads (groups), `K` head dim of queries and keys, `V` head dim of values or vocabulary, `P` Mamba2
//! head dim, `N` Mamba2 state dim, `C` convolution channels, `R` latent rank, `L` layers. Suffixes
//! carry them: `x_BTD`-like shapes are written in comments as `[B, T, D]`.

pub mod atomic;
pub mod checkpoint;
pub mod cli;
pub mod convert;
pub mod data;
pub mod error;
pub mod eval;
#[doc(hidden)]
pub mod fuzz;
pub mod generate;
pub mod gguf;
pub mod hash;
pub mod hub;
pub mod mapped;
pub mod mixer;
pub mod model;
pub mod numerics;
pub mod op;
pub mod pipeline;
pub mod report;
pub mod serve;
pub mod train;
pub mod watch;
pub mod weights;

pub use error::{Error, Result};
