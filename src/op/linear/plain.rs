//! `y = x Wᵀ` in tensor operations.

use candle_core::{Result, Tensor};

pub fn linear(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let (outs, ins) = w.dims2()?;
    let mut dims = x.dims().to_vec();
    let m = x.elem_count() / ins.max(1);
    *dims.last_mut().expect("checked to end with the inputs") = outs;
    x.contiguous()?
        .reshape((m, ins))?
        .matmul(&w.t()?)?
        .reshape(dims)
}

/// `dy W`
pub fn back(dy: &Tensor, w: &Tensor) -> Result<Tensor> {
    dy.matmul(w)
}
