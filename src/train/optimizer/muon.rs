//! Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum whose singular values are all
//! brought near 1 by five Newton-Schulz iterations, for weight matrices. In plain tensor operations on
//! every device: matrix products are its whole cost.

use candle_core::{Result, Tensor, bail};

use crate::op::adamw::AdamW;

const MOMENTUM: f64 = 0.95;

/// Matrices of a parameter's size that a step makes on its way.
pub const MADE: usize = 8;

/// Of the momentum.
pub fn state_bytes(entries: usize) -> usize {
    entries * size_of::<f32>()
}

/// The hyperparameters of one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Muon {
    /// Of AdamW's scale: the update's root mean square is 0.2, as AdamW's is about (Moonlight, arXiv
    /// 2502.16982, section 2.2).
    pub lr: f64,
    pub momentum: f64,
    /// A step shrinks the parameter by the factor `1 − lr · weight_decay`.
    pub weight_decay: f64,
}

impl Muon {
    /// At AdamW's learning rate and decay.
    pub fn of(adamw: &AdamW) -> Self {
        Self {
            lr: adamw.lr,
            momentum: MOMENTUM,
            weight_decay: adamw.weight_decay,
        }
    }
}

/// The values of `param [M, N]` and `momentum [M, N]` after a step. `rows` are those of the matrices that
/// stand one above the other in `param`, `Σ rows = M`; none: it is one. The gradient is multiplied by
/// `grad_scale` first (global-norm clipping).
pub fn muon_step(
    param: &Tensor,
    grad: &Tensor,
    momentum: &Tensor,
    rows: &[usize],
    grad_scale: f64,
    hyper: &Muon,
) -> Result<(Tensor, Tensor)> {
    let (m, n) = param.dims2()?;
    if grad.dims() != [m, n] || momentum.dims() != [m, n] {
        bail!(
            "muon: parameter {:?}, gradient {:?} and momentum {:?} do not fit",
            param.shape(),
            grad.shape(),
            momentum.shape()
        );
    }
    let grad = (grad * grad_scale)?;
    let momentum = ((momentum * hyper.momentum)? + &grad)?;
    let nesterov = (grad + (&momentum * hyper.momentum)?)?;
    let whole = [m];
    let rows = if rows.is_empty() { &whole } else { rows };
    if rows.iter().sum::<usize>() != m {
        bail!("muon: matrices of {rows:?} rows in a parameter of {m}");
    }
    let mut updates = Vec::with_capacity(rows.len());
    let mut at = 0;
    for rows in rows.iter().copied().filter(|r| *r > 0) {
        let size = 0.2 * (rows.max(n) as f64).sqrt();
        let update = orthogonalised(&nesterov.narrow(0, at, rows)?)?;
        updates.push((update * (hyper.lr * size))?);
        at += rows;
    }
    let update = Tensor::cat(&updates, 0)?;
    let kept = (param * (1.0 - hyper.lr * hyper.weight_decay))?;
    Ok(((kept - update)?, momentum))
}

/// `U Vᵀ` of `x = U S Vᵀ`, nearly: singular values between about 0.7 and 1.2.
fn orthogonalised(x: &Tensor) -> Result<Tensor> {
    const COEFFICIENTS: [f64; 3] = [3.4445, -4.7750, 2.0315];
    let [a, b, c] = COEFFICIENTS;
    let (m, n) = x.dims2()?;
    let wide = match m > n {
        true => x.t()?.contiguous()?,
        false => x.contiguous()?,
    };
    let norm = wide.sqr()?.sum_all()?.sqrt()?;
    let mut x = wide.broadcast_div(&(norm + 1e-7)?)?;
    for _ in 0..5 {
        let gram = x.matmul(&x.t()?.contiguous()?)?;
        let polynomial = ((&gram * b)? + (gram.matmul(&gram)? * c)?)?;
        x = ((&x * a)? + polynomial.matmul(&x)?)?;
    }
    match m > n {
        true => x.t()?.contiguous(),
        false => Ok(x),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::op::laws::random;

    /// Every singular direction moves by about the same.
    #[test]
    fn updates_have_equal_singular_values() {
        for shape in [[6, 20], [20, 6], [8, 8]] {
            let grad = random(&[&shape], 3)[0].clone();
            let zero = grad.zeros_like().unwrap();
            let hyper = Muon {
                lr: 1.0,
                momentum: 0.9,
                weight_decay: 0.0,
            };
            let (after, momentum) = muon_step(&zero, &grad, &zero, &[], 0.5, &hyper).unwrap();
            let half = (&grad * 0.5).unwrap();
            assert_eq!(
                momentum.to_vec2::<f64>().unwrap(),
                half.to_vec2::<f64>().unwrap()
            );
            let size = 0.2 * (shape[0].max(shape[1]) as f64).sqrt();
            let moved = (after / size).unwrap();
            let short = if shape[0] > shape[1] {
                moved.t().unwrap()
            } else {
                moved
            };
            let gram = short.matmul(&short.t().unwrap()).unwrap();
            // Eigenvalues are bounded by rows' sums, and their mean is the trace's.
            let rows = gram.to_vec2::<f64>().unwrap();
            let trace: f64 = (0..rows.len()).map(|i| rows[i][i]).sum();
            let mean = trace / rows.len() as f64;
            assert!((0.5..1.3).contains(&mean), "{shape:?}: {mean}");
        }
    }

    /// Matrices in one tensor move as they would alone.
    #[test]
    fn stacked_matrices_are_stepped_apart() {
        let [param, grad, momentum] = &random(&[&[9, 4], &[9, 4], &[9, 4]], 5)[..] else {
            panic!()
        };
        let hyper = Muon {
            lr: 0.1,
            momentum: 0.9,
            weight_decay: 0.1,
        };
        let step = |at: usize, rows: usize, stacked: &[usize]| {
            let [p, g, m] = [param, grad, momentum].map(|t| t.narrow(0, at, rows).unwrap());
            let (value, _) = muon_step(&p, &g, &m, stacked, 1.0, &hyper).unwrap();
            value.to_vec2::<f64>().unwrap()
        };
        let apart = [step(0, 6, &[]), step(6, 3, &[])].concat();
        assert_eq!(step(0, 9, &[6, 3]), apart);
        assert_ne!(step(0, 9, &[]), apart);
        assert!(muon_step(param, grad, momentum, &[6, 2], 1.0, &hyper).is_err());
    }

    /// `½‖W − T‖²` falls to the step's own size.
    #[test]
    fn a_quadratic_is_descended() {
        let target = random(&[&[12, 5]], 4)[0].to_dtype(DType::F32).unwrap();
        let mut w = Tensor::zeros((12, 5), DType::F32, &Device::Cpu).unwrap();
        let mut momentum = w.clone();
        let distance = |w: &Tensor| {
            let gap = (w - &target).unwrap().sqr().unwrap().sum_all().unwrap();
            gap.to_scalar::<f32>().unwrap().sqrt()
        };
        let first = distance(&w);
        for step in 0..200 {
            let grad = (&w - &target).unwrap();
            let hyper = Muon {
                lr: 0.05 * (1.0 - step as f64 / 200.0),
                momentum: 0.9,
                weight_decay: 0.0,
            };
            (w, momentum) = muon_step(&w, &grad, &momentum, &[], 1.0, &hyper).unwrap();
        }
        assert!(distance(&w) < 0.02 * first, "{} of {first}", distance(&w));
    }
}
