//! Matrices as files have them: bf16, f16 and block-quantised rows are read where they stand.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Result, Tensor, bail};

use super::float8;
use super::observer::Observer;
use super::rows::Rows;
use super::storage::Storage;

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
    /// What every row's entries are multiplied by, `[N]`.
    scales: Option<Arc<[f32]>>,
    pub(super) observer: Option<Arc<Observer>>,
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

impl<'a> From<&'a Stored> for Rows<'a> {
    fn from(stored: &'a Stored) -> Self {
        Rows {
            bytes: stored.bytes(),
            storage: stored.storage,
            rows: stored.rows,
            width: stored.width,
            scales: stored.scales(),
        }
    }
}

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
            scales: None,
            observer: None,
        })
    }

    /// The same, every row times its scale: of 8 bits, which have few exponents.
    ///
    /// # Errors
    /// Another number of scales than of rows, a scale that is negative or no finite number, or another type.
    pub fn scaled(self, scales: Vec<f32>) -> crate::Result<Self> {
        let wrong = |what: String| Err(crate::Error::invalid(what));
        if self.storage != Storage::F8E4M3 || scales.len() != self.rows {
            return wrong(format!("{} scales for {self:?}", scales.len()));
        }
        if let Some(bad) = (scales.iter()).find(|scale| !scale.is_finite() || **scale < 0.) {
            return wrong(format!(
                "a scale of {bad}, where rows of 8 bits are multiplied by finite, positive ones"
            ));
        }
        Ok(Self {
            scales: Some(scales.into()),
            ..self
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
            scales: None,
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

    /// Of every row, where it has one.
    pub fn scales(&self) -> Option<&[f32]> {
        self.scales.as_deref()
    }

    pub(super) fn row(&self, row: usize) -> &[u8] {
        &self.bytes()[row * self.row_bytes..][..self.row_bytes]
    }

    pub fn slice(&self, from: usize, count: usize) -> Result<Self> {
        if from + count > self.rows {
            bail!("rows {from} to {} of {self:?}", from + count);
        }
        let start = self.bytes.start + from * self.row_bytes;
        Ok(Self {
            bytes: start..start + count * self.row_bytes,
            rows: count,
            scales: self.scales().map(|scales| scales[from..][..count].into()),
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
            let id = *id as usize;
            self.storage.widen(self.row(id), out);
            if let Some(scales) = self.scales() {
                float8::scale(out, &scales[id..=id]);
            }
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
        Rows::from(self).widen(0, &mut out);
        Tensor::from_vec(out, (self.rows, self.width), &Device::Cpu)
    }
}
