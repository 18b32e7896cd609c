//! Causal grouped-query attention with document boundaries.
use super::Documents;
use candle_core::{Result, Tensor};

/// `q [B, T, H, K]`, `k [B, S, G, K]`, `v [B, S, G, V]` → `[B, T, H, V]`, `H` a multiple of `G`.
/// Query `t` stands at key position `S - T + t` and sees keys up to itself, from its document's start
/// (`documents` needs `S == T`).
pub fn causal_attention(
    _q: &Tensor,
    _k: &Tensor,
    _v: &Tensor,
    _scale: f64,
    _documents: Option<&Documents>,
) -> Result<Tensor> {
    unimplemented!()
}
