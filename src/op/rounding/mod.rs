//! Stochastic rounding of f32 to bf16: up or down with the probabilities that leave the mean as it is (Gupta et al. 2015, arXiv
//! 1502.02551), so that steps smaller than half of a weight's last bit are not lost (Zamirai et al. 2020, arXiv 2010.06192).

#[cfg(any(feature = "cuda", test))]
mod cuda;
#[cfg(test)]
mod tests;

use crate::op::cpu::slice;
#[cfg(feature = "cuda")]
use crate::op::cuda::Cuda;
use crate::op::isa::vectorised;
use candle_core::{CpuStorage, DType, InplaceOp2, Layout, Result, Tensor, bail};
use half::bf16;
use rayon::prelude::*;

/// Entries a task.
const BLOCK: usize = 1 << 14;

/// Writes `from` (f32) over `to` (bf16, contiguous, of the same shape), in place: all that shares its storage sees it. Each `key` draws
/// anew; one key gives the same bits on every device.
pub fn round(from: &Tensor, to: &Tensor, key: u64) -> Result<()> {
    if from.dims() != to.dims() || (from.dtype(), to.dtype()) != (DType::F32, DType::BF16) {
        bail!(
            "rounding: {:?} {:?} does not fit into {:?} {:?}",
            from.dtype(),
            from.shape(),
            to.dtype(),
            to.shape()
        );
    }
    let from = from.contiguous()?;
    #[cfg(feature = "cuda")]
    if to.device().is_cuda() {
        let gpu = Cuda::of(to)?;
        let [from, to] = [gpu.tensor(&from)?, gpu.tensor(to)?];
        return cuda::round(&gpu, &from, &to, key);
    }
    to.inplace_op2(&from, &Round(halves(key)))
}

/// Of a key: what is mixed in before and in between.
fn halves(key: u64) -> [u32; 2] {
    [key as u32, (key >> 32) as u32]
}

/// Every bit of it depends on every bit of `x` (Wellons' `lowbias32`, github.com/skeeto/hash-prospector).
#[inline(always)]
fn mix(x: u32) -> u32 {
    let x = (x ^ (x >> 16)).wrapping_mul(0x21f0_aaad);
    let x = (x ^ (x >> 15)).wrapping_mul(0xd35a_2d97);
    x ^ (x >> 15)
}

/// `x`, entry `i` of its tensor, as bf16: what is cut off is compared with 16 random bits.
#[inline(always)]
fn rounded(x: f32, i: u32, [first, second]: [u32; 2]) -> u16 {
    let draw = mix(mix(i ^ first) ^ second) >> 16;
    match x.is_nan() {
        true => 0x7fc0,
        false => (x.to_bits().wrapping_add(draw) >> 16) as u16,
    }
}

struct Round([u32; 2]);

impl InplaceOp2 for Round {
    fn name(&self) -> &'static str {
        "round"
    }

    fn cpu_fwd(
        &self,
        to: &mut CpuStorage,
        to_layout: &Layout,
        from: &CpuStorage,
        from_layout: &Layout,
    ) -> Result<()> {
        let from = slice(from, from_layout)?;
        let to = match (to, to_layout.contiguous_offsets()) {
            (CpuStorage::BF16(entries), Some((start, end))) => &mut entries[start..end],
            _ => bail!("rounding: contiguous entries in bf16 are wanted"),
        };
        let tasks = to.par_chunks_mut(BLOCK).zip(from.par_chunks(BLOCK));
        tasks.enumerate().for_each(|(task, (to, from))| {
            let first = (task * BLOCK) as u32;
            let halves = self.0;
            vectorised!(for (i, (to, from)) in to.iter_mut().zip(from).enumerate() {
                *to = bf16::from_bits(rounded(*from, first.wrapping_add(i as u32), halves));
            })
        });
        Ok(())
    }
}
