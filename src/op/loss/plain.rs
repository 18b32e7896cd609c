//! The losses in plain tensor operations: any device and float type, differentiable.

use super::{ABSENT, Divergence, NO_TOKEN};
use candle_core::{D, Result, Tensor};

/// `[M, V]` → `[M, V]`.
fn log_softmax(logits: &Tensor) -> Result<Tensor> {
    let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?;
    let log_sum = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
    shifted.broadcast_sub(&log_sum)
}

pub(super) fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let target_column = targets.unsqueeze(1)?; // [M, 1]
    log_softmax(logits)?
        .gather(&target_column, 1)?
        .squeeze(1)?
        .neg()
}

pub(super) fn with_rest(logits: &Tensor, tokens: &[u32]) -> Result<Tensor> {
    let (m, v) = logits.dims2()?;
    let k = tokens.len() / m;
    let mut is_other = vec![1u8; m * v];
    for (i, token) in tokens.iter().enumerate().filter(|(_, t)| **t != NO_TOKEN) {
        is_other[i / k * v + *token as usize] = 0;
    }
    let device = logits.device();
    let is_other = Tensor::from_vec(is_other, (m, v), device)?;
    let absent = Tensor::new(ABSENT, device)?.to_dtype(logits.dtype())?;
    let others = is_other.where_cond(logits, &absent.broadcast_as((m, v))?)?; // [M, V]
    let max = others.max_keepdim(D::Minus1)?.detach();
    let sum = others.broadcast_sub(&max)?.exp()?.sum_keepdim(D::Minus1)?;
    let rest = (sum.log()? + max)?; // [M, 1]
    let known = tokens.iter().map(|token| u8::from(*token != NO_TOKEN));
    let known = Tensor::from_vec(known.collect::<Vec<u8>>(), (m, k), device)?;
    let tokens = tokens.iter().map(|token| match *token {
        NO_TOKEN => 0,
        token => token,
    });
    let tokens = Tensor::from_vec(tokens.collect::<Vec<u32>>(), (m, k), device)?;
    let chosen = logits.contiguous()?.gather(&tokens, 1)?;
    let chosen = known.where_cond(&chosen, &absent.broadcast_as((m, k))?)?;
    Tensor::cat(&[chosen, rest], 1)
}

pub(super) fn divergence(
    kind: Divergence,
    teacher: &Tensor,
    student: &Tensor,
    temperature: f64,
) -> Result<Tensor> {
    let log_p = log_softmax(&(teacher.detach() / temperature)?)?;
    let log_q = log_softmax(&(student / temperature)?)?;
    let (p, q) = (log_p.exp()?, log_q.exp()?);
    let terms = match kind {
        Divergence::ForwardKl => (p * (log_p - log_q)?)?,
        Divergence::ReverseKl => (q * (log_q - log_p)?)?,
        Divergence::Jsd => {
            // What neither holds possible is 0 times a number.
            let log_m = ((&p + &q)? * 0.5)?.maximum(1e-37)?.log()?;
            (((p * (log_p - &log_m)?)? + (q * (log_q - log_m)?)?)? * 0.5)?
        }
        Divergence::Tvd => ((p - q)?.abs()? * 0.5)?,
    };
    terms.sum(D::Minus1)
}

pub(super) fn relative_mse(x: &Tensor, target: &Tensor) -> Result<Tensor> {
    let target = target.detach();
    let error = (x - &target)?.sqr()?.sum_all()?;
    error / target.sqr()?.sum_all()?
}

pub(super) fn mean_l2(x: &Tensor, target: &Tensor) -> Result<Tensor> {
    let squares = (x - target.detach())?.sqr()?.sum(D::Minus1)?; // [M]
    // The root has no slope at zero: those rows pass through 1 and are masked, so they get zero.
    let is_zero = squares.detach().eq(0.)?.to_dtype(squares.dtype())?;
    let norms = ((squares + &is_zero)?.sqrt()? - is_zero)?;
    norms.mean_all()
}
