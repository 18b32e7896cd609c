//! What the CPU kernels share: slices out of candle storage, vectorisable exponentials, row loops.

use std::ops::Range;

use candle_core::{CpuStorage, DType, Device, Layout, Result, Storage, Tensor, bail};

/// `a · b + c`, rounded once: the same on every processor, and slow on those that cannot (x86-64 before 2013).
#[inline(always)]
pub fn fma(a: f32, b: f32, c: f32) -> f32 {
    a.mul_add(b, c)
}

/// `e^x` to about one unit in the last place, without branches: 0 below −87.7, infinite above 88.4.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // 1.5 · 2²³: adding it rounds to an integer, which the low bits of the sum then hold.
    const ROUND: f32 = 12_582_912.;
    let x = x.clamp(-88., 89.);
    let shifted = fma(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = fma(n, -0.693_359_4, x);
    let r = fma(n, 2.121_944_4e-4, r);
    let mut p = 1.987_569_1e-4;
    for c in [
        1.398_2e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        0.5,
    ] {
        p = fma(p, r, c);
    }
    let p = fma(p, r * r, r + 1.);
    let power = shifted
        .to_bits()
        .wrapping_sub(ROUND.to_bits())
        .wrapping_add(127)
        << 23;
    p * f32::from_bits(power)
}

/// Rows of a matrix by threes that stand far apart, and those that are left: read side by side they come faster from memory than one after
/// the other, and neighbours more slowly.
pub fn apart(rows: Range<usize>) -> (impl Iterator<Item = [usize; 3]>, Range<usize>) {
    let each = rows.len() / 3;
    let threes = (rows.start..rows.start + each).map(move |i| [i, i + each, i + 2 * each]);
    (threes, rows.start + 3 * each..rows.end)
}

/// The entries of a tensor, row after row.
pub fn entries(x: &Tensor) -> Result<Vec<f32>> {
    let x = x.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
    x.flatten_all()?.to_vec1()
}

/// The entries of a contiguous f32 operand of a custom operation.
pub fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => bail!("a contiguous operand is wanted, not {layout:?}"),
    }
}

/// The CPU storage of a tensor, for backward passes.
pub fn host(storage: &Storage) -> Result<&CpuStorage> {
    match storage {
        Storage::Cpu(storage) => Ok(storage),
        _ => bail!("an operand on the CPU is wanted"),
    }
}

/// A view `[B, T, C]` with entries of a row side by side; rows may lie apart (a narrowed projection).
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    entries: &'a [f32],
    strides: [usize; 2],
    /// `[B, T, C]`
    pub dims: [usize; 3],
}

impl<'a> Rows<'a> {
    pub fn of(storage: &'a CpuStorage, layout: &Layout) -> Result<Self> {
        let (b, t, c) = layout.shape().dims3()?;
        match layout.stride() {
            &[batch, row, 1] => Ok(Self {
                entries: &storage.as_slice::<f32>()?[layout.start_offset()..],
                strides: [batch, row],
                dims: [b, t, c],
            }),
            _ => bail!("an operand with a contiguous last axis is wanted, not {layout:?}"),
        }
    }

    /// `[C]`
    #[inline]
    pub fn row(&self, b: usize, t: usize) -> &'a [f32] {
        let [batch, row] = self.strides;
        &self.entries[b * batch + t * row..][..self.dims[2]]
    }
}

/// The tensor itself if its last axis is contiguous, else a copy.
pub fn with_rows(x: &Tensor) -> Result<Tensor> {
    match x.stride().last() {
        Some(1) => Ok(x.clone()),
        _ => x.force_contiguous(),
    }
}
