//! The same update in plain tensor operations, written back at the end: any device and float type.

use super::AdamW;
use candle_core::{DType, Result, Tensor};

pub(super) fn adamw_step(
    param: &Tensor,
    grad: &Tensor,
    moments: &Tensor,
    grad_scale: f64,
    step: u64,
    hyper: &AdamW,
) -> Result<()> {
    let &AdamW {
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
    } = hyper;
    let grad = (grad.detach() * grad_scale)?;
    let first = ((moments.get(0)? * beta1)? + (&grad * (1. - beta1))?)?;
    let second = ((moments.get(1)? * beta2)? + (grad.sqr()? * (1. - beta2))?)?;
    let mean = (&first / (1. - beta1.powf(step as f64)))?;
    let deviation = (&second / (1. - beta2.powf(step as f64)))?.sqrt()?;
    let decayed = (param.detach() * (1. - lr * weight_decay))?;
    let updated = (decayed - ((mean / (deviation + eps)?)? * lr)?)?;
    overwrite(param, &updated)?;
    overwrite(moments, &Tensor::stack(&[first, second], 0)?)
}

/// Copies `value` into the storage of `target`, which every view of it (its `Var` too) then shows.
fn overwrite(target: &Tensor, value: &Tensor) -> Result<()> {
    let value = value.contiguous()?.flatten_all()?;
    target.detach().flatten_all()?.slice_set(&value, 0, 0)
}

pub(super) fn sum_of_squares(x: &Tensor) -> Result<f64> {
    // Metal has no f64: there the sum stays in f32.
    let wide = if x.device().is_metal() {
        DType::F32
    } else {
        DType::F64
    };
    let sum = x.to_dtype(wide)?.sqr()?.sum_all()?;
    sum.to_device(&candle_core::Device::Cpu)?
        .to_dtype(DType::F64)?
        .to_scalar()
}
