//! Matrices as files have them: bf16, f16 and block-quantised rows are read where they stand.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::observer::Observer;
use super::product::{Part, Scratch, products};
use super::storage::Storage;
use crate::op::cpu::{host, slice};
use crate::op::matmul::{View, matmul};

/// Bytes that something else keeps: a mapped file, a buffer.
pub type Owner = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// `[N, K]`, row after row.
#[derive(Clone)]
pub struct Stored {
    owner: Owner,
    bytes: Range<usize>,
    storage: Storage,
    rows: usize,
    width: usize,
    row_bytes: usize,
    observer: Option<Arc<Observer>>,
}

impl fmt::Debug for Stored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Stored[{}, {}; {:?}]",
            self.rows, self.width, self.storage
        )
    }
}

/// Rows of activations up to which weights are multiplied as they are read; more of them share weights that are
/// widened a chunk at a time.
const FEW: usize = 8;
/// Bytes below which a matrix in f32 is multiplied as a whole.
const SMALL: usize = 1 << 20;
/// Rows of weights that one thread widens at a time.
const PANEL: usize = 64;
/// Rows that are widened for one product: panels, as many as make it worth its threads and still stay in the cache.
const CHUNK: usize = 16 * PANEL;

impl Stored {
    /// `rows` of `width` entries in `bytes` of `owner`.
    ///
    /// # Errors
    /// A width that is no whole number of blocks, or another number of bytes.
    pub fn new(
        owner: Owner,
        bytes: Range<usize>,
        storage: Storage,
        rows: usize,
        width: usize,
    ) -> crate::Result<Self> {
        let row_bytes = storage.row_bytes(width)?;
        let whole = (*owner).as_ref().len();
        if bytes.end > whole || Some(bytes.len()) != rows.checked_mul(row_bytes) || row_bytes == 0 {
            return Err(crate::Error::invalid(format!(
                "{rows} rows of {width} entries are not bytes {} to {} of {whole}",
                bytes.start, bytes.end
            )));
        }
        Ok(Self {
            owner,
            bytes,
            storage,
            rows,
            width,
            row_bytes,
            observer: None,
        })
    }

    /// A matrix in f32 of its own.
    pub(super) fn of_entries(entries: &[f32], rows: usize, width: usize) -> Self {
        let bytes: Vec<u8> = entries.iter().flat_map(|x| x.to_le_bytes()).collect();
        Self {
            bytes: 0..bytes.len(),
            owner: Arc::new(bytes),
            storage: Storage::F32,
            rows,
            width,
            row_bytes: 4 * width,
            observer: None,
        }
    }

    pub(super) fn observed_by(self, observer: Arc<Observer>) -> Self {
        Self {
            observer: Some(observer),
            ..self
        }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn width(&self) -> usize {
        self.width
    }

    pub fn storage(&self) -> Storage {
        self.storage
    }

    pub fn bytes(&self) -> &[u8] {
        &(*self.owner).as_ref()[self.bytes.clone()]
    }

    pub(super) fn row(&self, row: usize) -> &[u8] {
        &self.bytes()[row * self.row_bytes..][..self.row_bytes]
    }

    pub(super) fn slice(&self, from: usize, count: usize) -> Result<Self> {
        if from + count > self.rows {
            bail!("rows {from} to {} of {self:?}", from + count);
        }
        let start = self.bytes.start + from * self.row_bytes;
        Ok(Self {
            bytes: start..start + count * self.row_bytes,
            rows: count,
            ..self.clone()
        })
    }

    /// Rows `ids` in f32, `[ids, K]`.
    ///
    /// # Errors
    /// A row that is not there.
    pub fn gather_into(&self, ids: &[u32], out: &mut [f32]) -> Result<()> {
        for (id, out) in ids.iter().zip(out.chunks_exact_mut(self.width)) {
            if *id as usize >= self.rows {
                bail!("row {id} of {self:?}");
            }
            self.storage.widen(self.row(*id as usize), out);
        }
        Ok(())
    }

    pub(super) fn gather(&self, ids: &[u32]) -> Result<Tensor> {
        let mut out = vec![0.; ids.len() * self.width];
        self.gather_into(ids, &mut out)?;
        Tensor::from_vec(out, (ids.len(), self.width), &Device::Cpu)
    }

    /// All of it in f32.
    pub fn to_tensor(&self) -> Result<Tensor> {
        let mut out = vec![0.; self.rows * self.width];
        let panels = out.par_chunks_mut(PANEL * self.width).enumerate();
        panels.for_each(|(i, out)| self.panel(i, out));
        Tensor::from_vec(out, (self.rows, self.width), &Device::Cpu)
    }

    /// Rows from `PANEL · i` on, as many as `out` has.
    fn panel(&self, i: usize, out: &mut [f32]) {
        let count = out.len() / self.width;
        let bytes = &self.bytes()[PANEL * i * self.row_bytes..][..count * self.row_bytes];
        self.storage.widen(bytes, out);
    }

    /// All entries where they stand, of a matrix in f32.
    fn entries(&self) -> Option<&[f32]> {
        let plain = self.storage == Storage::F32 && cfg!(target_endian = "little");
        plain.then(|| bytemuck::try_cast_slice(self.bytes()).ok())?
    }

    /// `x [M, K]` → `y [M, N]`.
    fn product(&self, x: &[f32]) -> Vec<f32> {
        let m = x.len() / self.width;
        let mut y = vec![0.; m * self.rows];
        let few = m <= FEW;
        match self.entries() {
            // Rows of a small matrix are too short to be worth a product each.
            Some(w) if !few || self.bytes.len() < SMALL => {
                let w = View::rows(w, self.rows, self.width).transposed();
                matmul(&mut y, View::rows(x, m, self.width), w, false, true);
            }
            _ if few => {
                let part = Part { w: self, y: &mut y };
                products(x, &mut [part], &mut Scratch::default());
            }
            _ => self.by_chunks(x, m, &mut y),
        }
        y
    }

    /// Rows from `first` on, at most [`CHUNK`], in f32, widened by all threads.
    fn chunk(&self, first: usize) -> Vec<f32> {
        let count = CHUNK.min(self.rows - first);
        let mut wide = vec![0.; count * self.width];
        let panels = wide.par_chunks_mut(PANEL * self.width).enumerate();
        panels.for_each(|(i, out)| self.panel(first / PANEL + i, out));
        wide
    }

    fn by_chunks(&self, x: &[f32], m: usize, y: &mut [f32]) {
        let x = View::rows(x, m, self.width);
        for first in (0..self.rows).step_by(CHUNK) {
            let wide = self.chunk(first);
            let count = wide.len() / self.width;
            let mut part = vec![0.; m * count];
            let w = View::rows(&wide, count, self.width).transposed();
            matmul(&mut part, x, w, false, true);
            for (y, part) in y.chunks_mut(self.rows).zip(part.chunks(count)) {
                y[first..first + count].copy_from_slice(part);
            }
        }
    }

    /// `dy [M, N]` → `dx [M, K] = dy W`.
    fn back(&self, dy: &[f32]) -> Vec<f32> {
        let m = dy.len() / self.rows;
        let mut dx = vec![0.; m * self.width];
        if let Some(w) = self.entries() {
            let w = View::rows(w, self.rows, self.width);
            matmul(&mut dx, View::rows(dy, m, self.rows), w, false, true);
            return dx;
        }
        for first in (0..self.rows).step_by(CHUNK) {
            let wide = self.chunk(first);
            let count = wide.len() / self.width;
            let dy = View {
                data: &dy[first..],
                dims: [m, count],
                strides: [self.rows, 1],
            };
            matmul(
                &mut dx,
                dy,
                View::rows(&wide, count, self.width),
                true,
                true,
            );
        }
        dx
    }
}

/// The product with a stored matrix, which itself gets no gradient.
pub(super) struct StoredLinear(pub Stored);

impl CustomOp1 for StoredLinear {
    fn name(&self) -> &'static str {
        "stored_linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice(x, layout)?;
        self.0.observer.iter().for_each(|observer| observer.add(x));
        let y = self.0.product(x);
        let mut dims = layout.dims().to_vec();
        *dims.last_mut().expect("checked to end with the inputs") = self.0.rows;
        Ok((CpuStorage::F32(y), dims.into()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        let (storage, layout) = dy.storage_and_layout();
        let dx = self.0.back(slice(host(&storage)?, layout)?);
        Ok(Some(Tensor::from_vec(dx, x.shape(), &Device::Cpu)?))
    }
}
