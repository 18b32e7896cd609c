//! `y = x Wᵀ`.
use candle_core::{Result, Tensor};

/// `x [.., in]`, `w [out, in]` → `[.., out]`.
pub fn linear(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    x.broadcast_matmul(&w.t()?)
}
