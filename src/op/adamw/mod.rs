//! Decoupled weight decay Adam (Loshchilov & Hutter 2019), one pass in place.
use candle_core::{Result, Tensor};

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
}

/// Updates `param` and `moments [2, ..param]` (first, second) in place for step `step` (from 1);
/// the gradient is multiplied by `grad_scale` first (global-norm clipping).
pub fn adamw_step(
    _param: &Tensor,
    _grad: &Tensor,
    _moments: &Tensor,
    _grad_scale: f64,
    _step: u64,
    _hyper: &AdamW,
) -> Result<()> {
    unimplemented!()
}

/// Sum of squares of a tensor of any layout, accumulated in f64 in a fixed order.
pub fn sum_of_squares(_x: &Tensor) -> Result<f64> {
    unimplemented!()
}
