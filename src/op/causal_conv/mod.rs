//! Depthwise causal convolution with optional SiLU (the short convolution of Mamba, Gu & Dao 2023).

mod reference;

use super::Documents;
use candle_core::{Result, Tensor, bail};

/// `x [B, T, C]`, `weight [C, W]` (last tap = the present), `bias [C]` → `[B, T, C]`; a tap that would
/// reach before the sequence or its document reads zero. `x` may be a view whose last axis is
/// contiguous (a narrowed projection): it is read in place.
pub fn causal_conv(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    silu: bool,
    documents: Option<&Documents>,
) -> Result<Tensor> {
    let (b, t, c) = x.dims3()?;
    let (weight_c, w) = weight.dims2()?;
    if weight_c != c || w == 0 || bias.dims() != [c] {
        bail!(
            "causal_conv: x {:?} wants weight [{c}, W] and bias [{c}], not {:?} and {:?}",
            x.shape(),
            weight.shape(),
            bias.shape()
        );
    }
    if let Some(documents) = documents
        && (documents.batch(), documents.len()) != (b, t)
    {
        bail!(
            "causal_conv: documents [{}, {}] do not fit x {:?}",
            documents.batch(),
            documents.len(),
            x.shape()
        );
    }
    reference::causal_conv(x, weight, bias, silu, documents)
}

/// The same for the next `T` inputs of a sequence whose last `W - 1` inputs are `state [B, W-1, C]`
/// (zeros at its beginning). Returns `y [B, T, C]` and the new state. No gradient.
pub fn causal_conv_resume(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    silu: bool,
    state: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let (b, t, c) = x.dims3()?;
    let (_, w) = weight.dims2()?;
    if state.dims() != [b, w - 1, c] {
        bail!(
            "causal_conv: x {:?} and width {w} want a state [{b}, {}, {c}], not {:?}",
            x.shape(),
            w - 1,
            state.shape()
        );
    }
    let all = Tensor::cat(&[&state.detach(), &x.detach()], 1)?; // [B, W - 1 + T, C]
    let y = causal_conv(&all, &weight.detach(), &bias.detach(), silu, None)?;
    Ok((
        y.narrow(1, w - 1, t)?,
        all.narrow(1, t, w - 1)?.contiguous()?,
    ))
}
