//! Losses over logits `[M, V]`, a value per row in nats, and distances between hidden states `[M, D]`.
//! Teachers and targets get no gradient.

mod reference;

use candle_core::{DType, Result, Tensor, bail};

/// `logits [M, V]`, `targets [M]` (u32) → `−log softmax(logits)[target]`, `[M]`.
///
/// # Errors
/// A target outside the vocabulary, with its row.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let (m, v) = logits.dims2()?;
    if targets.dims() != [m] || targets.dtype() != DType::U32 {
        bail!(
            "cross_entropy: logits [{m}, {v}] want u32 targets [{m}], not {:?} {:?}",
            targets.dtype(),
            targets.shape()
        );
    }
    let wanted = targets.to_vec1::<u32>()?;
    if let Some(row) = wanted.iter().position(|&target| target as usize >= v) {
        bail!(
            "cross_entropy: target {} of row {row} is outside the vocabulary of {v}",
            wanted[row]
        );
    }
    reference::cross_entropy(logits, targets)
}

/// `KL(softmax(teacher / τ) ‖ softmax(student / τ))`, `[M]`; both `[M, V]` (Hinton et al. 2015, without
/// their factor τ²).
pub fn forward_kl(teacher: &Tensor, student: &Tensor, temperature: f64) -> Result<Tensor> {
    same_rows("forward_kl", teacher, student)?;
    if !(temperature > 0. && temperature.is_finite()) {
        bail!("forward_kl: the temperature must be positive, not {temperature}");
    }
    reference::forward_kl(teacher, student, temperature)
}

/// `Σ(x − target)² / Σ target²` over all entries, a scalar; both `[M, D]`. Not finite where the whole
/// target is zero.
pub fn relative_mse(x: &Tensor, target: &Tensor) -> Result<Tensor> {
    same_rows("relative_mse", x, target)?;
    reference::relative_mse(x, target)
}

/// Mean over rows of `‖x − target‖₂`, a scalar; both `[M, D]`. A row at its target has gradient zero.
pub fn mean_l2(x: &Tensor, target: &Tensor) -> Result<Tensor> {
    same_rows("mean_l2", x, target)?;
    reference::mean_l2(x, target)
}

fn same_rows(op: &str, lhs: &Tensor, rhs: &Tensor) -> Result<()> {
    if lhs.rank() != 2 || lhs.dims() != rhs.dims() {
        bail!(
            "{op}: two equal shapes of rank 2 wanted, not {:?} and {:?}",
            lhs.shape(),
            rhs.shape()
        );
    }
    Ok(())
}
