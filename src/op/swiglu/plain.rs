//! SwiGLU in tensor operations.

use candle_core::{Result, Tensor};

pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.silu()? * up
}
