//! Rotary position embedding (Su et al. 2021).
use candle_core::{Result, Tensor};

/// Which dims of a head turn together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RopeLayout {
    /// Dim `i` with `i + D/2` (Hugging Face Llama).
    Halves,
    /// Dim `2i` with `2i + 1` (DeepSeek, the reference MLA).
    Interleaved,
}

/// `x [B, T, H, D]`, `cos, sin [T, D/2]` → `[B, T, H, D]`, every dim staying where it was.
pub fn rope(_x: &Tensor, _cos: &Tensor, _sin: &Tensor, _layout: RopeLayout) -> Result<Tensor> {
    unimplemented!()
}
