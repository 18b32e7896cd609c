//! Matrices whose rows are coded in blocks, in GGUF's layouts (llama.cpp's `Q8_0`, `Q6_K`, `Q4_K`, `Q4_0`): what a block means
//! (`plain.rs`), how weights are rounded into it (`quantize.rs`), and products that read blocks where they stand.
//!
//! `y = x Wᵀ` rounds `x` to 8 bits, 32 entries a scale, and multiplies integers: products within a block are exact, so the paths of
//! one processor differ by the order of a sum of floats only. Which path runs is found at run time ([`Isa::here`](super::isa::Isa::here)).

mod activations;
mod dot;
mod plain;
mod quantize;
#[cfg(test)]
mod tests;

pub use activations::{Activations, Forms};
pub use dot::rows;
pub use plain::dequantize;
pub use quantize::quantize;

use half::f16;
use rayon::prelude::*;

use crate::{Error, Result};

/// How a row of weights is coded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BlockType {
    /// 32 weights: `d · q`, `q` in 8 bits.
    Q8_0,
    /// 256 weights: `d · s · (q − 32)`, `q` in 6 bits, a signed 8-bit scale `s` for every 16.
    Q6K,
    /// 256 weights: `d · s · q − m_d · m`, `q` in 4 bits, 6-bit `s` and `m` for every 32.
    Q4K,
    /// 32 weights: `d · (q − 8)`, `q` in 4 bits.
    Q4_0,
}

impl BlockType {
    pub const ALL: [Self; 4] = [Self::Q8_0, Self::Q6K, Self::Q4K, Self::Q4_0];

    /// As llama.cpp spells it, in small letters.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q8_0 => "q8_0",
            Self::Q6K => "q6_k",
            Self::Q4K => "q4_k",
            Self::Q4_0 => "q4_0",
        }
    }

    /// Weights a block.
    pub const fn weights(self) -> usize {
        match self {
            Self::Q8_0 | Self::Q4_0 => 32,
            Self::Q6K | Self::Q4K => 256,
        }
    }

    /// Bytes a block.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Q8_0 => 2 + 32,
            Self::Q6K => 128 + 64 + 16 + 2,
            Self::Q4K => 2 + 2 + 12 + 128,
            Self::Q4_0 => 2 + 16,
        }
    }

    /// Where in a block its scale and its minimum stand, in f16.
    const fn halves(self) -> &'static [usize] {
        match self {
            Self::Q8_0 | Self::Q4_0 => &[0],
            Self::Q4K => &[0, 2],
            Self::Q6K => &[208],
        }
    }

    /// Bytes of a row of `width` weights.
    ///
    /// # Errors
    /// A width that is no whole number of blocks.
    pub fn row_bytes(self, width: usize) -> Result<usize> {
        let weights = self.weights();
        match width.is_multiple_of(weights) {
            true => Ok(width / weights * self.bytes()),
            false => Err(Error::invalid(format!(
                "a row of {width} weights cannot be {}: its blocks have {weights}",
                self.name()
            ))),
        }
    }
}

/// Whether no block's scale or minimum is infinite or no number.
pub fn finite(kind: BlockType, bytes: &[u8]) -> bool {
    let places = kind.halves();
    let finite = |half: &[u8]| f16::from_le_bytes([half[0], half[1]]).is_finite();
    // Work for a thread.
    bytes.par_chunks(4096 * kind.bytes()).all(|part| {
        let mut blocks = part.chunks_exact(kind.bytes());
        blocks.all(|block| places.iter().all(|at| finite(&block[*at..])))
    })
}

impl std::str::FromStr for BlockType {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|kind| kind.name() == text);
        found.ok_or_else(|| {
            let names = Self::ALL.map(Self::name);
            Error::invalid(format!("{text:?}: choose {}", names.join(", ")))
        })
    }
}
