//! RMSNorm (Zhang & Sennrich 2019) and its gated form of Mamba2.
use candle_core::{Result, Tensor};

/// `x / sqrt(mean(x²) + eps) · weight`; `x [.., D]`, `weight [D]` → `[.., D]`.
pub fn rms_norm(_x: &Tensor, _weight: &Tensor, _eps: f64) -> Result<Tensor> {
    unimplemented!()
}

/// `RMSNorm_per_group(y · silu(z)) · weight`, groups of `group` neighbouring channels.
/// `y, z [.., D]`, `weight [D]` → `[.., D]`.
pub fn gated_rms_norm(
    _y: &Tensor,
    _z: &Tensor,
    _weight: &Tensor,
    _group: usize,
    _eps: f64,
) -> Result<Tensor> {
    unimplemented!()
}
