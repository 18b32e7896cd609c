//! The state-space dual of Mamba2 (Dao & Gu 2024).

mod reference;

use super::Documents;
use candle_core::{Result, Tensor, bail};

/// Sizes of one SSD call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SsdShape {
    /// `H`
    pub heads: usize,
    /// `G`: heads of x and B; head `h` reads group `h / (H / G)`.
    pub groups: usize,
    /// `P`
    pub head_dim: usize,
    /// `N`
    pub d_state: usize,
    /// Positions a chunk; never changes the answer.
    pub chunk: usize,
}

impl SsdShape {
    /// Channels of `xbc`: `G·P + G·N + H·N`.
    pub fn channels(&self) -> usize {
        self.groups * (self.head_dim + self.d_state) + self.heads * self.d_state
    }

    fn check(&self, xbc: &Tensor, dt: &Tensor, params: &Tensor) -> Result<()> {
        let h = self.heads;
        if self.groups == 0 || !h.is_multiple_of(self.groups) || h == 0 {
            bail!("ssd: {h} heads do not share {} groups evenly", self.groups);
        }
        if self.chunk == 0 {
            bail!("ssd: the chunk must be at least one position");
        }
        let (b, t, channels) = xbc.dims3()?;
        if channels != self.channels() || dt.dims() != [b, t, h] || params.dims() != [3, h] {
            bail!(
                "ssd: {self:?} wants xbc [B, T, {}], dt [B, T, {h}] and params [3, {h}], not {:?}, {:?} and {:?}",
                self.channels(),
                xbc.shape(),
                dt.shape(),
                params.shape()
            );
        }
        Ok(())
    }
}

/// Per head: `Δ = softplus(dt + dt_bias)`, `S ← exp(−exp(A_log)·Δ) S + Δ x ⊗ B`, `y = S C + D x`.
/// `xbc [B, T, G·P + G·N + H·N]` (x, B, C side by side), `dt [B, T, H]`, `params [3, H]` (rows A_log,
/// dt_bias, D) → `y [B, T, H·P]`. The state is zero where a document starts.
pub fn ssd(
    xbc: &Tensor,
    dt: &Tensor,
    params: &Tensor,
    shape: SsdShape,
    documents: Option<&Documents>,
) -> Result<Tensor> {
    shape.check(xbc, dt, params)?;
    let (b, t, _) = xbc.dims3()?;
    if let Some(documents) = documents
        && (documents.batch(), documents.len()) != (b, t)
    {
        bail!(
            "ssd: documents [{}, {}] do not fit xbc {:?}",
            documents.batch(),
            documents.len(),
            xbc.shape()
        );
    }
    Ok(reference::ssd(xbc, dt, params, shape, documents, None)?.0)
}

/// The same from `state [B, H, P, N]`; returns `y` and the state after the last position. No gradient.
pub fn ssd_resume(
    xbc: &Tensor,
    dt: &Tensor,
    params: &Tensor,
    shape: SsdShape,
    state: &Tensor,
) -> Result<(Tensor, Tensor)> {
    shape.check(xbc, dt, params)?;
    let SsdShape {
        heads: h,
        head_dim: p,
        d_state: n,
        ..
    } = shape;
    let (b, _, _) = xbc.dims3()?;
    if state.dims() != [b, h, p, n] {
        bail!(
            "ssd: {shape:?} wants a state [{b}, {h}, {p}, {n}], not {:?}",
            state.shape()
        );
    }
    let (xbc, dt, params) = (&xbc.detach(), &dt.detach(), &params.detach());
    reference::ssd(xbc, dt, params, shape, None, Some(&state.detach()))
}
