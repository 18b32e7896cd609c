//! How the entries of a matrix stand in a file.

use super::dot::widen_f16;
use super::float8;
use crate::op::blocks::{BlockType, dequantize};
use crate::op::isa::vectorised;

/// How entries are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    F32,
    F16,
    Bf16,
    /// In 8 bits, every row times its scale, which stands beside them ([`Stored::scaled`](super::Stored::scaled)).
    F8E4M3,
    Blocks(BlockType),
}

impl Storage {
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::F8E4M3 => "f8_e4m3",
            Self::Blocks(kind) => kind.name(),
        }
    }

    /// Bytes of an entry.
    ///
    /// # Panics
    /// In blocks none stands alone.
    pub fn entry_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::F8E4M3 => 1,
            Self::Blocks(kind) => unreachable!("{} has no entries of their own", kind.name()),
        }
    }

    /// Bytes of a row of `width` entries.
    ///
    /// # Errors
    /// A width that is no whole number of blocks, or past all memory.
    pub fn row_bytes(self, width: usize) -> crate::Result<usize> {
        let of = |bytes: usize| {
            let size = width.checked_mul(bytes);
            size.ok_or_else(|| crate::Error::invalid(format!("a row of {width} entries")))
        };
        match self {
            Self::F32 => of(4),
            Self::F16 | Self::Bf16 => of(2),
            Self::F8E4M3 => of(1),
            Self::Blocks(kind) => kind.row_bytes(width),
        }
    }

    /// The entries of whole rows, without their scales.
    pub fn widen(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Self::F32 => vectorised!(for (x, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                *x = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }),
            Self::F16 => widen_f16(bytes, out),
            Self::Bf16 => vectorised!(for (x, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *x = f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
            }),
            Self::F8E4M3 => float8::widen(bytes, out),
            Self::Blocks(kind) => dequantize(kind, bytes, out),
        }
    }
}
