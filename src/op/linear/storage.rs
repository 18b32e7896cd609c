//! How the entries of a matrix stand in a file.

use half::{bf16, f16};

use crate::op::blocks::{BlockType, dequantize};

/// How entries are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    F32,
    F16,
    Bf16,
    Blocks(BlockType),
}

impl Storage {
    /// Bytes of an entry.
    ///
    /// # Panics
    /// In blocks none stands alone.
    pub fn entry_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
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
            Self::Blocks(kind) => kind.row_bytes(width),
        }
    }

    /// The entries of whole rows.
    pub fn widen(self, bytes: &[u8], out: &mut [f32]) {
        let halves = |to: fn(u16) -> f32, out: &mut [f32]| {
            for (x, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *x = to(u16::from_le_bytes([b[0], b[1]]));
            }
        };
        match self {
            Self::F32 => {
                for (x, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                    *x = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                }
            }
            Self::F16 => halves(|bits| f16::from_bits(bits).to_f32(), out),
            Self::Bf16 => halves(|bits| bf16::from_bits(bits).to_f32(), out),
            Self::Blocks(kind) => dequantize(kind, bytes, out),
        }
    }
}
