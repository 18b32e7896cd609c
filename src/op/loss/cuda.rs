//! Launches of the losses over rows of logits.

use candle_core::{DType, Result};

use super::Divergence;
use crate::op::cuda::{Arg, Array, Gpu, Launch, named};

/// `logits [M, V]`, `targets [M]` → the loss of every row, and the logarithms of its softmax's sum, `[M]` in f32 both.
pub fn cross_entropy<G: Gpu>(
    gpu: &G,
    logits: &G::Array,
    targets: &G::Array,
    v: usize,
) -> Result<[G::Array; 2]> {
    let m = targets.len();
    let (loss, log_sums) = (gpu.empty(DType::F32, m)?, gpu.empty(DType::F32, m)?);
    let args = [
        logits.into(),
        targets.into(),
        (&loss).into(),
        (&log_sums).into(),
        Arg::int(v)?,
    ];
    let dtype = logits.dtype();
    Launch::rows(named("cross_entropy", dtype), m, v, dtype).run(gpu, &args)?;
    Ok([loss, log_sums])
}

/// `(softmax − onehot(target)) · dloss`, `[M, V]`.
pub fn cross_entropy_backward<G: Gpu>(
    gpu: &G,
    logits: &G::Array,
    targets: &G::Array,
    log_sums: &G::Array,
    dloss: &G::Array,
    v: usize,
) -> Result<G::Array> {
    let dtype = logits.dtype();
    let dlogits = gpu.empty(dtype, logits.len())?;
    let args = [
        logits.into(),
        targets.into(),
        log_sums.into(),
        dloss.into(),
        (&dlogits).into(),
        Arg::int(v)?,
    ];
    Launch::rows(named("cross_entropy_back", dtype), targets.len(), v, dtype).run(gpu, &args)?;
    Ok(dlogits)
}

/// A divergence between rows `[M, V]`.
#[derive(Debug, Clone, Copy)]
pub struct Diverge {
    pub kind: Divergence,
    pub temperature: f32,
    pub v: usize,
}

impl Diverge {
    fn sizes<'a, A>(self) -> Result<[Arg<'a, A>; 3]> {
        let kind = match self.kind {
            Divergence::ForwardKl => 0,
            Divergence::ReverseKl => 1,
            Divergence::Jsd => 2,
            Divergence::Tvd => 3,
        };
        let scale = 1. / self.temperature;
        Ok([Arg::int(self.v)?, scale.into(), Arg::I32(kind)])
    }

    /// The divergence of every row, `[M]`, and the logarithms of both softmaxes' sums, `[M, 2]`, in f32.
    pub fn forward<G: Gpu>(
        self,
        gpu: &G,
        teacher: &G::Array,
        student: &G::Array,
    ) -> Result<[G::Array; 2]> {
        let (m, dtype) = (student.len() / self.v, student.dtype());
        let (loss, log_sums) = (gpu.empty(DType::F32, m)?, gpu.empty(DType::F32, 2 * m)?);
        let mut args = vec![
            teacher.into(),
            student.into(),
            (&loss).into(),
            (&log_sums).into(),
        ];
        args.extend(self.sizes()?);
        Launch::rows(named("divergence", dtype), m, self.v, dtype).run(gpu, &args)?;
        Ok([loss, log_sums])
    }

    /// By the student's logits, `[M, V]`.
    pub fn backward<G: Gpu>(
        self,
        gpu: &G,
        teacher: &G::Array,
        student: &G::Array,
        log_sums: &G::Array,
        dloss: &G::Array,
    ) -> Result<G::Array> {
        let (m, dtype) = (student.len() / self.v, student.dtype());
        let dstudent = gpu.empty(dtype, student.len())?;
        let mut args = vec![
            teacher.into(),
            student.into(),
            log_sums.into(),
            dloss.into(),
            (&dstudent).into(),
        ];
        args.extend(self.sizes()?);
        Launch::rows(named("divergence_back", dtype), m, self.v, dtype).run(gpu, &args)?;
        Ok(dstudent)
    }
}
