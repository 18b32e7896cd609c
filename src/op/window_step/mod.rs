//! The next tokens of sequences in attention over a window, on a GPU; on the CPU it is `mixer/window/decode.rs`.

pub mod cuda;
