//! Losses over logits `[M, V]`, a value per row in nats, and distances between hidden states `[M, D]`.
//! Teachers and targets get no gradient.

mod cpu;
#[cfg(any(feature = "cuda", test))]
mod cuda;
mod plain;
#[cfg(test)]
mod tests;

use crate::op::cpu::{host, slice};
#[cfg(feature = "cuda")]
use crate::op::cuda::{Cuda, Gpu};
use crate::op::route::{Kernels, Route};
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, DType, Device, Layout, Result, Shape, Tensor, bail,
};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::sync::OnceLock;

const KERNELS: Kernels = Kernels::f32("loss").cuda(&[DType::F32, DType::BF16]);
const REST: Kernels = Kernels::f32("with_rest");
const DISTANCES: Kernels = Kernels::f32("distance");

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
    if KERNELS.route(&[logits]) == Route::Plain {
        return plain::cross_entropy(logits, targets);
    }
    logits.contiguous()?.apply_op1(CrossEntropy {
        targets: wanted,
        softmaxes: OnceLock::new(),
        #[cfg(feature = "cuda")]
        log_sums: OnceLock::new(),
    })
}

/// How far a student's distribution `q` is from its teacher's `p`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Divergence {
    /// `Σ p ln(p/q)`: covers all the teacher holds possible.
    #[default]
    ForwardKl,
    /// `Σ q ln(q/p)`: seeks what the teacher holds likely (MiniLLM, arXiv 2306.08543).
    ReverseKl,
    /// Jensen & Shannon's: both KL to the mean of `p` and `q`, half each.
    Jsd,
    /// Total variation, `½ Σ |p − q|`.
    Tvd,
}

/// The divergence of `softmax(student / τ)` from `softmax(teacher / τ)`, `[M]`; both `[M, V]` (Hinton et
/// al. 2015, without their factor τ²).
pub fn divergence(
    kind: Divergence,
    teacher: &Tensor,
    student: &Tensor,
    temperature: f64,
) -> Result<Tensor> {
    same_rows("divergence", teacher, student)?;
    if !(temperature > 0. && temperature.is_finite()) {
        bail!("divergence: the temperature must be positive, not {temperature}");
    }
    if KERNELS.route(&[teacher, student]) == Route::Plain {
        return plain::divergence(kind, teacher, student, temperature);
    }
    let op = Diverge {
        kind,
        temperature: temperature as f32,
        softmaxes: OnceLock::new(),
        #[cfg(feature = "cuda")]
        log_sums: OnceLock::new(),
    };
    teacher
        .detach()
        .contiguous()?
        .apply_op2(&student.contiguous()?, op)
}

/// `KL(softmax(teacher / τ) ‖ softmax(student / τ))`, `[M]`; both `[M, V]`.
pub fn forward_kl(teacher: &Tensor, student: &Tensor, temperature: f64) -> Result<Tensor> {
    divergence(Divergence::ForwardKl, teacher, student, temperature)
}

/// The `k` greatest entries of a row, the greatest first; of equal ones the earlier. `k` is at least 1 and at most the row's length.
pub fn likeliest(row: &[f32], k: usize) -> Vec<u32> {
    let descending = |a: &u32, b: &u32| {
        let order = row[*b as usize].total_cmp(&row[*a as usize]);
        order.then(a.cmp(b))
    };
    let mut order: Vec<u32> = (0..row.len() as u32).collect();
    order.select_nth_unstable_by(k - 1, descending);
    order.truncate(k);
    order.sort_unstable_by(descending);
    order
}

/// Both reduced to the `k` tokens that the teacher holds likeliest: `[M, V]` → `[M, k]`. A divergence
/// between these compares the distributions among those tokens.
pub fn top_k(teacher: &Tensor, student: &Tensor, k: usize) -> Result<(Tensor, Tensor)> {
    same_rows("top_k", teacher, student)?;
    let (m, v) = teacher.dims2()?;
    if k == 0 || k > v {
        bail!("top_k: {k} tokens of a vocabulary of {v}");
    }
    let rows = teacher.to_dtype(DType::F32)?.to_vec2::<f32>()?;
    let chosen = rows.par_iter().flat_map_iter(|row| {
        let mut order = likeliest(row, k);
        order.sort_unstable();
        order
    });
    let chosen = Tensor::from_vec(chosen.collect::<Vec<u32>>(), (m, k), teacher.device())?;
    let of = |logits: &Tensor| logits.contiguous()?.gather(&chosen, 1);
    Ok((of(&teacher.detach())?, of(student)?))
}

/// In the place of a token: none.
pub const NO_TOKEN: u32 = u32::MAX;
/// The logit of what is not there: so far below all others that its probability is 0, and finite, so that 0 times it is 0.
pub const ABSENT: f32 = -1e4;

/// The logits of some tokens of each row, and behind them that of all other tokens together, `ln Σ exp`: `[M, V]` → `[M, k + 1]`.
/// Its softmax has the probabilities of these tokens and of being another one, so a divergence of two such compares distributions in
/// which the others are one event. `tokens`: `k` a row, all different but for [`NO_TOKEN`], which no logit is of: [`ABSENT`].
///
/// # Errors
/// A token outside the vocabulary, with its row.
pub fn with_rest(logits: &Tensor, tokens: &[u32]) -> Result<Tensor> {
    let (m, v) = logits.dims2()?;
    if m == 0 || tokens.is_empty() || !tokens.len().is_multiple_of(m) {
        bail!("with_rest: {} tokens for {m} rows", tokens.len());
    }
    let outside = |token: &u32| *token as usize >= v && *token != NO_TOKEN;
    if let Some(at) = tokens.iter().position(outside) {
        let row = at / (tokens.len() / m);
        let token = tokens[at];
        bail!("with_rest: token {token} of row {row} is outside the vocabulary of {v}");
    }
    if REST.route(&[logits]) == Route::Plain {
        return plain::with_rest(logits, tokens);
    }
    logits.contiguous()?.apply_op1(WithRest {
        tokens: tokens.to_vec(),
        rests: OnceLock::new(),
    })
}

/// `Σ(x − target)² / Σ target²` over all entries, a scalar; both `[M, D]`. Not finite where the whole
/// target is zero.
pub fn relative_mse(x: &Tensor, target: &Tensor) -> Result<Tensor> {
    same_rows("relative_mse", x, target)?;
    if DISTANCES.route(&[x, target]) == Route::Plain {
        return plain::relative_mse(x, target);
    }
    Distance::between(x, target, DistanceKind::RelativeSquare)
}

/// Mean over rows of `‖x − target‖₂`, a scalar; both `[M, D]`. A row at its target has gradient zero.
pub fn mean_l2(x: &Tensor, target: &Tensor) -> Result<Tensor> {
    same_rows("mean_l2", x, target)?;
    if DISTANCES.route(&[x, target]) == Route::Plain {
        return plain::mean_l2(x, target);
    }
    Distance::between(x, target, DistanceKind::MeanNorm)
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

struct CrossEntropy {
    targets: Vec<u32>,
    softmaxes: OnceLock<Vec<cpu::Softmax>>,
    /// The same on the GPU.
    #[cfg(feature = "cuda")]
    log_sums: OnceLock<Tensor>,
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross_entropy"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (m, v) = layout.shape().dims2()?;
        let (loss, softmaxes) = cpu::cross_entropy(slice(logits, layout)?, v, &self.targets);
        self.softmaxes.get_or_init(|| softmaxes);
        Ok((CpuStorage::F32(loss), Shape::from(m)))
    }

    /// The losses are f32, whatever the logits are.
    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, logits: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let gpu = Cuda::new(&logits.device)?;
        let (m, v) = layout.shape().dims2()?;
        let targets = gpu.upload(&self.targets)?;
        let logits = gpu.array(logits, layout)?;
        let [loss, log_sums] = cuda::cross_entropy(&gpu, &logits, &targets, v)?;
        let log_sums = log_sums.into_tensor(m)?;
        self.log_sums.get_or_init(|| log_sums);
        Ok((loss.into_storage()?, Shape::from(m)))
    }

    fn bwd(&self, logits: &Tensor, _loss: &Tensor, dloss: &Tensor) -> Result<Option<Tensor>> {
        let (_, v) = logits.dims2()?;
        #[cfg(feature = "cuda")]
        if logits.device().is_cuda() {
            let dloss = dloss.contiguous()?;
            let gpu = Cuda::of(&dloss)?;
            let (entries, targets) = (gpu.tensor(logits)?, gpu.upload(&self.targets)?);
            let [log_sums, dloss] = [gpu.tensor(saved(&self.log_sums))?, gpu.tensor(&dloss)?];
            let dlogits =
                cuda::cross_entropy_backward(&gpu, &entries, &targets, &log_sums, &dloss, v)?;
            return dlogits.into_tensor(logits.shape()).map(Some);
        }
        let dloss = dloss.to_vec1::<f32>()?;
        let softmaxes = saved(&self.softmaxes);
        let (storage, layout) = logits.storage_and_layout();
        let logits_slice = slice(host(&storage)?, layout)?;
        let dlogits =
            cpu::cross_entropy_backward(logits_slice, v, &self.targets, softmaxes, &dloss);
        Tensor::from_vec(dlogits, logits.shape(), &Device::Cpu).map(Some)
    }
}

struct WithRest {
    tokens: Vec<u32>,
    /// Of every row's other tokens.
    rests: OnceLock<Vec<cpu::Softmax>>,
}

impl CustomOp1 for WithRest {
    fn name(&self) -> &'static str {
        "with_rest"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (m, v) = layout.shape().dims2()?;
        let k = self.tokens.len() / m;
        let (out, rests) = cpu::with_rest(slice(logits, layout)?, v, &self.tokens, k);
        self.rests.get_or_init(|| rests);
        Ok((CpuStorage::F32(out), Shape::from((m, k + 1))))
    }

    fn bwd(&self, logits: &Tensor, _out: &Tensor, dout: &Tensor) -> Result<Option<Tensor>> {
        let (m, v) = logits.dims2()?;
        let (tokens, k) = (&self.tokens, self.tokens.len() / m);
        let dout = dout.flatten_all()?.to_vec1::<f32>()?;
        let rests = saved(&self.rests);
        let (storage, layout) = logits.storage_and_layout();
        let logits_slice = slice(host(&storage)?, layout)?;
        let dlogits = cpu::with_rest_backward(logits_slice, v, tokens, k, rests, &dout);
        Tensor::from_vec(dlogits, logits.shape(), &Device::Cpu).map(Some)
    }
}

struct Diverge {
    kind: Divergence,
    temperature: f32,
    softmaxes: OnceLock<Vec<[cpu::Softmax; 2]>>,
    /// The same on the GPU, `[M, 2]`.
    #[cfg(feature = "cuda")]
    log_sums: OnceLock<Tensor>,
}

#[cfg(feature = "cuda")]
impl Diverge {
    fn launches(&self, v: usize) -> cuda::Diverge {
        cuda::Diverge {
            kind: self.kind,
            temperature: self.temperature,
            v,
        }
    }
}

impl CustomOp2 for Diverge {
    fn name(&self) -> &'static str {
        "divergence"
    }

    fn cpu_fwd(
        &self,
        teacher: &CpuStorage,
        teacher_layout: &Layout,
        student: &CpuStorage,
        student_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (m, v) = student_layout.shape().dims2()?;
        let (teacher, student) = (
            slice(teacher, teacher_layout)?,
            slice(student, student_layout)?,
        );
        let (value, softmaxes) = match self.kind {
            Divergence::ForwardKl => cpu::forward_kl(teacher, student, v, self.temperature),
            kind => cpu::divergence(kind, teacher, student, v, self.temperature),
        };
        self.softmaxes.get_or_init(|| softmaxes);
        Ok((CpuStorage::F32(value), Shape::from(m)))
    }

    /// The divergences are f32, whatever the logits are.
    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        teacher: &CudaStorage,
        teacher_layout: &Layout,
        student: &CudaStorage,
        student_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let gpu = Cuda::new(&student.device)?;
        let (m, v) = student_layout.shape().dims2()?;
        let teacher = gpu.array(teacher, teacher_layout)?;
        let student = gpu.array(student, student_layout)?;
        let [value, log_sums] = self.launches(v).forward(&gpu, &teacher, &student)?;
        let log_sums = log_sums.into_tensor((m, 2))?;
        self.log_sums.get_or_init(|| log_sums);
        Ok((value.into_storage()?, Shape::from(m)))
    }

    fn bwd(
        &self,
        teacher: &Tensor,
        student: &Tensor,
        _value: &Tensor,
        dvalue: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (_, v) = student.dims2()?;
        #[cfg(feature = "cuda")]
        if student.device().is_cuda() {
            let dvalue = dvalue.contiguous()?;
            let gpu = Cuda::of(&dvalue)?;
            let [p, q] = [gpu.tensor(teacher)?, gpu.tensor(student)?];
            let [log_sums, dvalue] = [gpu.tensor(saved(&self.log_sums))?, gpu.tensor(&dvalue)?];
            let launches = self.launches(v);
            let dstudent = launches.backward(&gpu, &p, &q, &log_sums, &dvalue)?;
            return Ok((None, Some(dstudent.into_tensor(student.shape())?)));
        }
        let dvalue = dvalue.to_vec1::<f32>()?;
        let softmaxes = saved(&self.softmaxes);
        let (teacher, teacher_layout) = teacher.storage_and_layout();
        let (storage, layout) = student.storage_and_layout();
        let (p, q) = (
            slice(host(&teacher)?, teacher_layout)?,
            slice(host(&storage)?, layout)?,
        );
        let dstudent = match self.kind {
            Divergence::ForwardKl => cpu::forward_kl_backward(p, q, v, softmaxes, &dvalue),
            kind => cpu::divergence_backward(kind, p, q, v, softmaxes, &dvalue),
        };
        Ok((
            None,
            Some(Tensor::from_vec(dstudent, student.shape(), &Device::Cpu)?),
        ))
    }
}

/// What the forward pass left for the backward pass.
fn saved<T>(cell: &OnceLock<T>) -> &T {
    cell.get()
        .expect("candle runs the forward pass when it records the operation")
}

/// A distance over rows `[M, D]`: a scalar whose gradient is `x − target` times a factor of the row.
struct Distance {
    kind: DistanceKind,
    row_factors: OnceLock<Vec<f32>>,
}

enum DistanceKind {
    RelativeSquare,
    MeanNorm,
}

impl Distance {
    fn between(x: &Tensor, target: &Tensor, kind: DistanceKind) -> Result<Tensor> {
        let op = Self {
            kind,
            row_factors: OnceLock::new(),
        };
        x.contiguous()?
            .apply_op2(&target.detach().contiguous()?, op)
    }
}

impl CustomOp2 for Distance {
    fn name(&self) -> &'static str {
        match self.kind {
            DistanceKind::RelativeSquare => "relative_mse",
            DistanceKind::MeanNorm => "mean_l2",
        }
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        target: &CpuStorage,
        target_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (m, d) = x_layout.shape().dims2()?;
        let rows = cpu::squared_errors(slice(x, x_layout)?, slice(target, target_layout)?, d);
        let (value, row_factors) = match self.kind {
            DistanceKind::RelativeSquare => {
                let total = |i: usize| rows.iter().map(|row| row[i]).sum::<f64>();
                let (error, scale) = (total(0), total(1));
                (error / scale, vec![(2. / scale) as f32; m])
            }
            DistanceKind::MeanNorm => {
                let norms = rows.iter().map(|row| row[0].sqrt());
                // A norm has no slope at zero: its subgradient 0 is taken.
                let slope = |norm: f64| {
                    if norm > 0. {
                        (1. / (norm * m as f64)) as f32
                    } else {
                        0.
                    }
                };
                (
                    norms.clone().sum::<f64>() / m as f64,
                    norms.map(slope).collect(),
                )
            }
        };
        self.row_factors.get_or_init(|| row_factors);
        Ok((CpuStorage::F32(vec![value as f32]), Shape::from(())))
    }

    fn bwd(
        &self,
        x: &Tensor,
        target: &Tensor,
        _distance: &Tensor,
        ddistance: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (_, d) = x.dims2()?;
        let upstream = ddistance.to_scalar::<f32>()?;
        let factors: Vec<f32> = saved(&self.row_factors)
            .iter()
            .map(|f| f * upstream)
            .collect();
        let (storage, layout) = x.storage_and_layout();
        let (target, target_layout) = target.storage_and_layout();
        let dx = cpu::scaled_difference(
            slice(host(&storage)?, layout)?,
            slice(host(&target)?, target_layout)?,
            d,
            &factors,
        );
        Ok((Some(Tensor::from_vec(dx, x.shape(), &Device::Cpu)?), None))
    }
}
