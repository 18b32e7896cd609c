//! CUDA. An operation's `cuda.rs` says which kernels of its `kernel.cuh` are launched, in what shape and with what; a [`Gpu`] does it: the
//! device itself (with the feature `cuda`), or in tests an emulator that needs `g++` only. So what decides on launches is tested
//! where there is no GPU, and the arguments are held against the kernels' own.

#[cfg(feature = "cuda")]
mod device;
#[cfg(test)]
pub(crate) mod emulated;
#[cfg(all(test, feature = "cuda"))]
mod speed_tests;

use candle_core::{DType, Result, bail};

use super::Documents;

#[cfg(feature = "cuda")]
pub use device::{Cuda, CudaArray, open};

/// What launches kernels, one after the other.
pub trait Gpu {
    type Array: Array;

    /// `n` entries that a kernel is about to write.
    fn empty(&self, dtype: DType, n: usize) -> Result<Self::Array>;

    /// Entries from the host.
    fn upload(&self, entries: &[u32]) -> Result<Self::Array>;

    /// # Errors
    /// A kernel that is not there, or that the device refuses.
    fn launch(&self, launch: &Launch, args: &[Arg<Self::Array>]) -> Result<()>;
}

/// Entries of one type in the memory of a [`Gpu`], side by side.
pub trait Array {
    fn dtype(&self) -> DType;
    fn len(&self) -> usize;

    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// An argument of a kernel.
#[derive(Debug)]
pub enum Arg<'a, A> {
    Array(&'a A),
    /// A pointer to nothing.
    Null,
    I32(i32),
    I64(i64),
    F32(f32),
}

impl<'a, A> Arg<'a, A> {
    /// A size as a kernel's `int`.
    ///
    /// # Errors
    /// One that is too large for it.
    pub fn int(n: usize) -> Result<Self> {
        match i32::try_from(n) {
            Ok(n) => Ok(Self::I32(n)),
            Err(_) => bail!("cuda: a size of {n} where kernels count up to {}", i32::MAX),
        }
    }

    /// A count as a kernel's `long long`.
    pub fn long(n: usize) -> Self {
        Self::I64(n as i64)
    }

    pub fn or_null(array: Option<&'a A>) -> Self {
        array.map_or(Self::Null, Self::Array)
    }
}

impl<'a, A> From<&'a A> for Arg<'a, A> {
    fn from(array: &'a A) -> Self {
        Self::Array(array)
    }
}

impl<A> From<f32> for Arg<'_, A> {
    fn from(x: f32) -> Self {
        Self::F32(x)
    }
}

/// A kernel and the shape that it is launched in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    pub kernel: String,
    pub grid: [usize; 3],
    /// Of a block: whole warps.
    pub threads: u32,
    /// Bytes of dynamic shared memory.
    pub shared: usize,
}

/// Threads of a block, where nothing speaks for another number.
const THREADS: usize = 256;

/// Bytes that a thread reads or writes at once.
const PACK: usize = 16;

/// Blocks that share rows or entries among them where each leaves a partial sum: some for each multiprocessor of the largest devices, and
/// the same everywhere, so that sums do not depend on the device.
const PARTS: usize = 512;

impl Launch {
    /// A thread for every `per_thread` of `n` entries.
    pub fn elements(kernel: impl Into<String>, n: usize, per_thread: usize) -> Self {
        Self {
            kernel: kernel.into(),
            grid: [n.div_ceil(THREADS * per_thread), 1, 1],
            threads: THREADS as u32,
            shared: 0,
        }
    }

    /// A block for each of `rows` rows, of as many threads as its `n` entries can use.
    pub fn rows(kernel: impl Into<String>, rows: usize, n: usize, dtype: DType) -> Self {
        let useful = n.div_ceil(pack(dtype)).next_multiple_of(32);
        Self {
            kernel: kernel.into(),
            grid: [rows, 1, 1],
            threads: useful.clamp(32, 2 * THREADS) as u32,
            shared: 0,
        }
    }

    /// Launches, unless there is nothing to do.
    pub fn run<G: Gpu>(&self, gpu: &G, args: &[Arg<G::Array>]) -> Result<()> {
        match self.grid.contains(&0) {
            true => Ok(()),
            false => gpu.launch(self, args),
        }
    }
}

/// Entries that a thread reads or writes at once.
pub fn pack(dtype: DType) -> usize {
    PACK / dtype.size_in_bytes()
}

/// How many partial sums are left of so many rows or blocks.
pub fn parts(rows: usize) -> usize {
    rows.min(PARTS)
}

/// The kernel of a type of storage.
pub fn named(kernel: &str, dtype: DType) -> String {
    format!("{kernel}_{}", dtype.as_str())
}

/// Where the document of every position begins, `[B, T]`.
pub fn starts<G: Gpu>(gpu: &G, documents: Option<&Documents>) -> Result<Option<G::Array>> {
    let upload = |documents: &Documents| {
        let rows = (0..documents.batch()).flat_map(|b| documents.row(b));
        gpu.upload(&rows.copied().collect::<Vec<u32>>())
    };
    documents.map(upload).transpose()
}

/// `parts [R, N]` in f32 → their sum over rows, `[N]`.
pub fn sum_rows<G: Gpu>(gpu: &G, parts: &G::Array, n: usize, dtype: DType) -> Result<G::Array> {
    let sum = gpu.empty(dtype, n)?;
    let args = [
        parts.into(),
        (&sum).into(),
        Arg::int(parts.len() / n.max(1))?,
        Arg::int(n)?,
    ];
    Launch::elements(named("sum_rows", dtype), n, 1).run(gpu, &args)?;
    Ok(sum)
}
