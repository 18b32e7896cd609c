//! Decoupled weight decay Adam (Loshchilov & Hutter 2019), in place.

mod reference;

use candle_core::{Result, Tensor, bail};

/// The hyperparameters of one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    /// A step shrinks the parameter by the factor `1 − lr · weight_decay`.
    pub weight_decay: f64,
}

/// Updates `param` and `moments [2, ..param]` (first, second; zeros before step 1) in place for step
/// `step` (from 1), with the bias correction of the paper. The gradient is multiplied by `grad_scale`
/// first (global-norm clipping).
///
/// Both must be contiguous: every tensor that shares their storage, such as the model's, sees the
/// update.
pub fn adamw_step(
    param: &Tensor,
    grad: &Tensor,
    moments: &Tensor,
    grad_scale: f64,
    step: u64,
    hyper: &AdamW,
) -> Result<()> {
    if grad.dims() != param.dims() || moments.dims().split_first() != Some((&2, param.dims())) {
        bail!(
            "adamw: parameter {:?}, gradient {:?} and moments {:?} do not fit",
            param.shape(),
            grad.shape(),
            moments.shape()
        );
    }
    if !param.is_contiguous() || !moments.is_contiguous() {
        bail!(
            "adamw: parameter {:?} and its moments must be contiguous",
            param.shape()
        );
    }
    if step == 0 {
        bail!("adamw: steps count from 1");
    }
    reference::adamw_step(param, grad, moments, grad_scale, step, hyper)
}

/// Sum of squares of a tensor of any layout, accumulated in f64 (f32 on Metal) in a fixed order.
pub fn sum_of_squares(x: &Tensor) -> Result<f64> {
    reference::sum_of_squares(x)
}
