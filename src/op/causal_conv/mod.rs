//! Depthwise causal convolution with optional SiLU.
use super::Documents;
use candle_core::{Result, Tensor};

/// `x [B, T, C]`, `weight [C, W]` (last tap = the present), `bias [C]` → `[B, T, C]`; a tap that would
/// reach before the sequence or its document reads zero.
pub fn causal_conv(
    _x: &Tensor,
    _weight: &Tensor,
    _bias: &Tensor,
    _silu: bool,
    _documents: Option<&Documents>,
) -> Result<Tensor> {
    unimplemented!()
}

/// The same for the next `T` inputs of a sequence whose last `W - 1` inputs are `state [B, W-1, C]`.
/// Returns `y [B, T, C]` and the new state. No gradient.
pub fn causal_conv_resume(
    _x: &Tensor,
    _weight: &Tensor,
    _bias: &Tensor,
    _silu: bool,
    _state: &Tensor,
) -> Result<(Tensor, Tensor)> {
    unimplemented!()
}
