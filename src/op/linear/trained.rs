//! Matrices in bf16 that learn where they stand. Their gradients are summed up in f32 outside of candle's graph, where a gradient has the
//! type of what it is of.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, DType, Device, Layout, Result, Shape, Tensor, Var, bail};
use half::slice::HalfFloatSliceExt;

use super::gradient::WeightGradient;
use super::output;
use super::rows::Rows;
use super::storage::Storage;
use crate::op::cpu::{host, slice};
use crate::op::rounding;

/// `[N, K]`: rows of a matrix, which all that is made of it shares.
#[derive(Debug, Clone)]
pub struct Trained {
    /// Of the whole matrix, bf16.
    entries: Tensor,
    rows: Range<usize>,
    /// What activations are in.
    compute: DType,
    /// Of the whole matrix, since it was taken last.
    gradient: Arc<Mutex<Option<WeightGradient>>>,
    /// Its place in candle's graph: a variable of one entry, or no variable where no gradient is wanted.
    stand_in: Tensor,
}

impl Trained {
    /// `w`, rounded to the nearest; activations will be in `compute`.
    pub fn new(w: &Tensor, compute: DType) -> Result<Self> {
        let (rows, _) = w.dims2()?;
        if cfg!(target_endian = "big") {
            bail!("matrices are trained in bf16 on little-endian machines only");
        }
        let entries = match w.dtype() {
            DType::BF16 => w.copy()?,
            _ => w.to_dtype(DType::BF16)?,
        };
        Ok(Self {
            stand_in: Var::zeros(1, compute, w.device())?.into_inner(),
            entries: entries.contiguous()?.detach(),
            rows: 0..rows,
            compute,
            gradient: Arc::default(),
        })
    }

    /// `[N, K]` of the whole matrix, in bf16: its own storage.
    pub fn entries(&self) -> &Tensor {
        &self.entries
    }

    /// Moves to `value` (f32), rounded stochastically ([`rounding::round`]).
    pub fn round(&self, value: &Tensor, key: u64) -> Result<()> {
        rounding::round(value, &self.entries, key)
    }

    /// The gradient since the last time, in f32, of the whole matrix; none where it was in no product.
    pub fn take_gradient(&self) -> Result<Option<Tensor>> {
        let mut gradient = self.gradient.lock().unwrap_or_else(PoisonError::into_inner);
        gradient.take().map(WeightGradient::finish).transpose()
    }

    pub(super) fn dims(&self) -> (usize, usize) {
        (self.rows.len(), self.entries.dims()[1])
    }

    pub(super) fn compute(&self) -> DType {
        self.compute
    }

    pub(super) fn slice(&self, from: usize, count: usize) -> Result<Self> {
        let first = self.rows.start + from;
        if from + count > self.rows.len() {
            bail!("rows {from} to {} of {:?}", from + count, self.dims());
        }
        Ok(Self {
            rows: first..first + count,
            ..self.clone()
        })
    }

    pub(super) fn detach(&self) -> Self {
        Self {
            stand_in: self.stand_in.detach(),
            ..self.clone()
        }
    }

    /// These rows, in bf16.
    pub fn narrow(&self) -> Result<Tensor> {
        self.entries.narrow(0, self.rows.start, self.rows.len())
    }

    /// `x [.., K]` → `[.., N]`.
    pub(super) fn linear(&self, x: &Tensor) -> Result<Tensor> {
        if x.dtype() != self.compute {
            bail!(
                "linear: a matrix that is computed with in {:?} and an x in {:?}",
                self.compute,
                x.dtype()
            );
        }
        (x.contiguous()?).apply_op2(&self.stand_in, TrainedLinear(self.clone()))
    }

    /// `dy [M, N]` → `dy W [M, K]`.
    pub(super) fn back(&self, dy: &Tensor) -> Result<Tensor> {
        if self.is_widened() {
            let (m, _) = dy.dims2()?;
            let dy = dy.contiguous()?;
            let (dy, at) = dy.storage_and_layout();
            let dy = slice(host(&dy)?, at)?;
            let dx = self.with_rows(|rows| rows.back(dy))?;
            return Tensor::from_vec(dx, (m, self.dims().1), &Device::Cpu);
        }
        dy.matmul(&self.narrow()?)
    }

    /// Whether it is widened on the way into a product.
    fn is_widened(&self) -> bool {
        self.compute == DType::F32 && self.entries.device().is_cpu()
    }

    fn with_rows<R>(&self, work: impl FnOnce(Rows) -> R) -> Result<R> {
        let (storage, layout) = self.entries.storage_and_layout();
        let (rows, width) = self.dims();
        let whole = match (host(&storage)?, layout.contiguous_offsets()) {
            (CpuStorage::BF16(entries), Some((start, end))) => &entries[start..end],
            _ => bail!("contiguous entries in bf16 are wanted"),
        };
        let own = &whole[self.rows.start * width..self.rows.end * width];
        Ok(work(Rows {
            bytes: bytemuck::cast_slice(own.reinterpret_cast()),
            storage: Storage::Bf16,
            rows,
            width,
            scales: None,
        }))
    }

    /// `x Wᵀ` in the type of both.
    fn product<S: BackendStorage>(&self, x: &S, x_at: &Layout, w: &S) -> Result<S> {
        let ((n, k), first) = (self.dims(), self.rows.start);
        let m = x_at.shape().elem_count() / k;
        let x_at = Layout::contiguous_with_offset((m, k), x_at.start_offset());
        let start = self.entries.layout().start_offset() + first * k;
        let w_at = Layout::new((k, n).into(), vec![1, k], start);
        x.matmul(w, (1, m, n, k), &x_at, &w_at)
    }

    fn output(&self, x_at: &Layout) -> Shape {
        output(x_at.dims(), self.rows.len())
    }
}

struct TrainedLinear(Trained);

/// Operands: x, and what stands for the matrix.
impl CustomOp2 for TrainedLinear {
    fn name(&self) -> &'static str {
        "trained_linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_at: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let w = &self.0;
        let y = match w.is_widened() {
            true => {
                let x = slice(x, x_at)?;
                let (n, k) = w.dims();
                let mut y = vec![0.; x.len() / k * n];
                w.with_rows(|rows| rows.product(x, &mut y))?;
                CpuStorage::F32(y)
            }
            false => {
                let (storage, _) = w.entries.storage_and_layout();
                w.product(x, x_at, host(&storage)?)?
            }
        };
        Ok((y, w.output(x_at)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_at: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let w = &self.0;
        let (storage, _) = w.entries.storage_and_layout();
        let candle_core::Storage::Cuda(storage) = &*storage else {
            bail!("linear: a matrix on the device of x is wanted");
        };
        Ok((w.product(x, x_at, storage)?, w.output(x_at)))
    }

    /// `dx = dy W`; `dyᵀ x` is added to the gradient.
    fn bwd(
        &self,
        x: &Tensor,
        stand_in: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let w = &self.0;
        let ((n, k), whole) = (w.dims(), w.entries.dims2()?);
        let dy = dy.contiguous()?.reshape(((), n))?;
        if stand_in.track_op() {
            let x = x.detach().reshape(((), k))?;
            let mut gradient = w.gradient.lock().unwrap_or_else(PoisonError::into_inner);
            let sum = match gradient.take() {
                Some(sum) => sum,
                None => WeightGradient::zeros(whole, w.compute, w.entries.device())?,
            };
            gradient.insert(sum).add_product(w.rows.start, &dy, &x)?;
        }
        let dx = x.track_op().then(|| w.back(&dy)?.reshape(x.shape()));
        Ok((dx.transpose()?, None))
    }
}
