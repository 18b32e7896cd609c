//! `y = x Wᵀ` in tensor operations.

use candle_core::{Result, Tensor};

use super::output;

pub fn linear(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let (outs, ins) = w.dims2()?;
    let m = x.elem_count() / ins.max(1);
    x.contiguous()?
        .reshape((m, ins))?
        .matmul(&w.t()?)?
        .reshape(output(x.dims(), outs))
}

/// `dy W`
pub fn back(dy: &Tensor, w: &Tensor) -> Result<Tensor> {
    dy.matmul(w)
}
