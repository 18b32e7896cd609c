//! Losses over logits, a value per row in nats.
use candle_core::{Result, Tensor};

/// `logits [M, V]`, `targets [M]` (u32) → `−log softmax(logits)[target]`, `[M]`.
pub fn cross_entropy(_logits: &Tensor, _targets: &Tensor) -> Result<Tensor> {
    unimplemented!()
}

/// `KL(softmax(teacher / τ) ‖ softmax(student / τ))`, `[M]`; both `[M, V]`. The teacher gets no gradient.
pub fn forward_kl(_teacher: &Tensor, _student: &Tensor, _temperature: f64) -> Result<Tensor> {
    unimplemented!()
}

/// `Σ(x − target)² / Σ target²` over all entries, a scalar; both `[M, D]`. The target gets no gradient.
pub fn relative_mse(_x: &Tensor, _target: &Tensor) -> Result<Tensor> {
    unimplemented!()
}

/// `mean over rows of ‖x − target‖₂` (the reference's ILD term), a scalar; both `[M, D]`.
pub fn mean_l2(_x: &Tensor, _target: &Tensor) -> Result<Tensor> {
    unimplemented!()
}
