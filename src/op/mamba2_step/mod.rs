//! The next tokens of sequences in Mamba2 between its projections, on a GPU; on the CPU it is `mixer/mamba2/decode.rs`.

pub mod cuda;
