//! Attention over the pages of sequences' caches, on a GPU; on the CPU it is `mixer/paged.rs`.

pub mod cuda;
