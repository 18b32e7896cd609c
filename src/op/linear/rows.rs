//! Products of many rows of activations with rows that are widened some at a time.

use rayon::prelude::*;

use super::float8;
use super::storage::Storage;
use crate::op::matmul::{View, add_product, product};

/// Rows that one thread widens at a time.
const PANEL: usize = 64;
/// Rows that are widened for one product: panels, as many as make it worth its threads and still stay in the cache.
const CHUNK: usize = 16 * PANEL;

/// `[N, K]`, row after row, wherever they stand.
pub(super) struct Rows<'a> {
    pub bytes: &'a [u8],
    pub storage: Storage,
    pub rows: usize,
    pub width: usize,
    /// Of every row, where it has one.
    pub scales: Option<&'a [f32]>,
}

impl Rows<'_> {
    /// Rows from `first` on, as many as `out` has, in f32.
    pub fn widen(&self, first: usize, out: &mut [f32]) {
        let row_bytes = self.bytes.len() / self.rows.max(1);
        let panels = out.par_chunks_mut(PANEL * self.width).enumerate();
        panels.for_each(|(i, out)| {
            let count = out.len() / self.width;
            let bytes = &self.bytes[(first + PANEL * i) * row_bytes..][..count * row_bytes];
            self.storage.widen(bytes, out);
            if let Some(scales) = self.scales {
                float8::scale(out, &scales[first + PANEL * i..][..count]);
            }
        });
    }

    /// Chunks of rows in f32, with the first row of each.
    fn chunks(&self) -> impl Iterator<Item = (usize, Vec<f32>)> {
        (0..self.rows).step_by(CHUNK).map(|first| {
            let mut wide = vec![0.; CHUNK.min(self.rows - first) * self.width];
            self.widen(first, &mut wide);
            (first, wide)
        })
    }

    /// `x [M, K]` → `y [M, N] = x Wᵀ`.
    pub fn product(&self, x: &[f32], y: &mut [f32]) {
        let m = x.len() / self.width;
        let x = View::rows(x, m, self.width);
        for (first, wide) in self.chunks() {
            let count = wide.len() / self.width;
            let w = View::rows(&wide, count, self.width).transposed();
            let part = product(x, w);
            for (y, part) in y.chunks_mut(self.rows).zip(part.chunks(count)) {
                y[first..first + count].copy_from_slice(part);
            }
        }
    }

    /// `dy [M, N]` → `dx [M, K] = dy W`.
    pub fn back(&self, dy: &[f32]) -> Vec<f32> {
        let m = dy.len() / self.rows;
        let mut dx = vec![0.; m * self.width];
        for (first, wide) in self.chunks() {
            let count = wide.len() / self.width;
            let dy = View {
                data: &dy[first..],
                dims: [m, count],
                strides: [self.rows, 1],
            };
            let w = View::rows(&wide, count, self.width);
            add_product(&mut dx, dy, w);
        }
        dx
    }
}
