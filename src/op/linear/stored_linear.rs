//! The product of tensors with a matrix as it is stored, and its gradient.

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Result, Shape, Tensor};

use super::output;
use super::product::{Part, Scratch, products, tiled};
use super::rows::Rows;
use super::storage::Storage;
use super::stored::Stored;
use crate::op::cpu::{host, slice};
use crate::op::isa::Isa;
use crate::op::matmul::{View, product};

/// Rows of activations up to which weights are multiplied as they are read, as tiles do any number; more of them share weights that
/// are widened a chunk at a time.
const FEW: usize = 8;
/// Bytes below which a matrix in f32 is multiplied as a whole.
const SMALL: usize = 1 << 20;

impl Stored {
    /// All entries where they stand, of a matrix in f32.
    fn entries(&self) -> Option<&[f32]> {
        let plain = self.storage() == Storage::F32 && cfg!(target_endian = "little");
        plain.then(|| bytemuck::try_cast_slice(self.bytes()).ok())?
    }

    /// `x [M, K]` → `y [M, N]`.
    fn product(&self, x: &[f32]) -> Vec<f32> {
        let m = x.len() / self.width();
        let few = m <= FEW || tiled(Isa::here(), self.storage(), self.bytes().len());
        if let Some(w) = self.entries()
            // Rows of a small matrix are too short to be worth a product each.
            && (!few || self.bytes().len() < SMALL)
        {
            let w = View::rows(w, self.rows(), self.width()).transposed();
            return product(View::rows(x, m, self.width()), w);
        }
        let mut y = vec![0.; m * self.rows()];
        match few {
            true => {
                let part = Part { w: self, y: &mut y };
                products(x, &mut [part], &mut Scratch::default());
            }
            false => Rows::from(self).product(x, &mut y),
        }
        y
    }

    /// `dy [M, N]` → `dx [M, K] = dy W`.
    pub(super) fn back(&self, dy: &[f32]) -> Vec<f32> {
        let Some(w) = self.entries() else {
            return Rows::from(self).back(dy);
        };
        let m = dy.len() / self.rows();
        let w = View::rows(w, self.rows(), self.width());
        product(View::rows(dy, m, self.rows()), w)
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
        Ok((CpuStorage::F32(y), output(layout.dims(), self.0.rows())))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        let (storage, layout) = dy.storage_and_layout();
        let dx = self.0.back(slice(host(&storage)?, layout)?);
        Ok(Some(Tensor::from_vec(dx, x.shape(), &Device::Cpu)?))
    }
}
