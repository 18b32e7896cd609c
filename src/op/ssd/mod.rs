//! The state-space dual of Mamba2 (Dao & Gu 2024), in chunks.
use super::Documents;
use candle_core::{Result, Tensor};

/// Sizes of one SSD call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SsdShape {
    /// `H`
    pub heads: usize,
    /// `G`: heads of x and B; head `h` reads group `h / (H / G)`.
    pub groups: usize,
    /// `P`
    pub head_dim: usize,
    /// `N`
    pub d_state: usize,
    /// Positions a chunk; never changes the answer.
    pub chunk: usize,
}

/// Per head: `Δ = softplus(dt + dt_bias)`, `S ← exp(−exp(A_log)·Δ) S + Δ x ⊗ B`, `y = S C + D x`.
/// `xbc [B, T, G·P + G·N + H·N]` (x, B, C side by side), `dt [B, T, H]`, `params [3, H]` (rows A_log,
/// dt_bias, D) → `y [B, T, H·P]`. The state is zero where a document starts.
pub fn ssd(
    _xbc: &Tensor,
    _dt: &Tensor,
    _params: &Tensor,
    _shape: SsdShape,
    _documents: Option<&Documents>,
) -> Result<Tensor> {
    unimplemented!()
}

/// The same from `state [B, H, P, N]`; returns `y` and the state after the last position. No gradient.
pub fn ssd_resume(
    _xbc: &Tensor,
    _dt: &Tensor,
    _params: &Tensor,
    _shape: SsdShape,
    _state: &Tensor,
) -> Result<(Tensor, Tensor)> {
    unimplemented!()
}
