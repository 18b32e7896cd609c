//! The convolution as a sum of shifted copies: any device and float type, differentiable.

use super::Documents;
use candle_core::{Result, Tensor};

pub(super) fn causal_conv(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    silu: bool,
    documents: Option<&Documents>,
) -> Result<Tensor> {
    let (_, t, _) = x.dims3()?;
    let (c, w) = weight.dims2()?;
    let mut y = bias.reshape((1, 1, c))?.broadcast_as(x.shape())?;
    for back in 0..w.min(t) {
        let tap = weight.narrow(1, w - 1 - back, 1)?.reshape((1, 1, c))?;
        let past = x.narrow(1, 0, t - back)?.pad_with_zeros(1, back, 0)?; // [B, T, C]
        let mut term = past.broadcast_mul(&tap)?;
        if let Some(documents) = documents {
            term = term.broadcast_mul(
                &inside(documents, back)?
                    .to_device(x.device())?
                    .to_dtype(x.dtype())?,
            )?;
        }
        y = (y + term)?;
    }
    if silu { y.silu() } else { Ok(y) }
}

/// `[B, T, 1]`: 1 where the position `back` before belongs to the same document, else 0.
fn inside(documents: &Documents, back: usize) -> Result<Tensor> {
    let (b, t) = (documents.batch(), documents.len());
    let mask: Vec<f32> = (0..b)
        .flat_map(|row| documents.row(row).iter().enumerate())
        .map(|(position, &start)| (position >= start as usize + back) as u8 as f32)
        .collect();
    Tensor::from_vec(mask, (b, t, 1), &candle_core::Device::Cpu)
}
