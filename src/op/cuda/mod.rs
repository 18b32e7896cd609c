//! CUDA. An operation's `cuda.rs` says which kernels of its `kernel.cuh` are launched, in what shape and with what; a [`Gpu`] does it: the
//! device itself (with the feature `cuda`), or in tests an emulator that needs `g++` only. So what decides on launches is tested
//! where there is no GPU, and the arguments are held against the kernels' own.

#[cfg(not(feature = "cuda"))]
mod absent;
#[cfg(feature = "cuda")]
mod device;
#[cfg(test)]
pub(crate) mod emulated;
#[cfg(feature = "cuda")]
mod recording;
#[cfg(all(test, feature = "cuda"))]
mod speed_tests;

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{DType, Result, bail};

use super::Documents;

#[cfg(not(feature = "cuda"))]
pub use absent::Cuda;
#[cfg(feature = "cuda")]
pub use device::{Cuda, CudaArray, open};

/// What launches kernels, one after the other.
pub trait Gpu {
    type Array: Array;
    /// Launches as [`Gpu::record`] leaves them.
    type Recording;

    /// `n` entries that a kernel is about to write.
    fn empty(&self, dtype: DType, n: usize) -> Result<Self::Array>;

    /// Entries from the host, as bytes.
    fn upload_bytes(&self, dtype: DType, bytes: &[u8]) -> Result<Self::Array>;

    fn upload(&self, entries: &[u32]) -> Result<Self::Array> {
        self.upload_bytes(DType::U32, bytemuck::cast_slice(entries))
    }

    fn upload_f32(&self, entries: &[f32]) -> Result<Self::Array> {
        self.upload_bytes(DType::F32, bytemuck::cast_slice(entries))
    }

    /// Bytes of an array from its byte `at` on, when all that was launched before has ended.
    fn read(&self, array: &Self::Array, at: usize, to: &mut [u8]) -> Result<()>;

    fn write(&self, array: &Self::Array, at: usize, bytes: &[u8]) -> Result<()>;

    /// `count` bytes of an array to another place in it, which they do not overlap.
    fn copy(&self, array: &Self::Array, from: usize, to: usize, count: usize) -> Result<()>;

    /// Zeros.
    fn clear(&self, array: &Self::Array, at: usize, count: usize) -> Result<()>;

    /// `x [M, K]`, `w [N, K]` of one type → `x wᵀ [M, N]` in f32.
    fn product(&self, x: &Self::Array, w: &Self::Array, k: usize) -> Result<Self::Array>;

    /// Bytes that nobody uses.
    fn free_memory(&self) -> Result<usize>;

    /// Bytes of shared memory that a block can have.
    fn shared_memory(&self) -> usize;

    /// Runs `work`, lets `then` have what it made, and records the same launches without running them: `work` makes arrays by
    /// [`Gpu::empty`] alone, and neither reads nor writes any itself. None where the device cannot record all of it.
    ///
    /// # Errors
    /// Those of `work` and `then`.
    fn record<T, R>(
        &self,
        work: impl Fn() -> Result<T>,
        then: impl FnOnce(&T) -> Result<R>,
    ) -> Result<Recorded<R, Self::Recording, T>>;

    /// Runs what was recorded, over the arrays as they now are.
    fn replay(&self, recording: &Self::Recording) -> Result<()>;

    /// # Errors
    /// A kernel that is not there, or that the device refuses.
    fn launch(&self, launch: &Launch, args: &[Arg<Self::Array>]) -> Result<()>;
}

/// What was made of work's result; its launches where they were recorded, and what they leave.
pub type Recorded<R, L, T> = (R, Option<(L, T)>);

/// A [`Gpu`] that may be kept, and used by any thread.
pub trait Lasting:
    Gpu<Array: fmt::Debug + Send + Sync, Recording: fmt::Debug + Send + Sync>
    + fmt::Debug
    + Send
    + Sync
    + 'static
{
}

impl<G> Lasting for G where
    G: Gpu<Array: fmt::Debug + Send + Sync, Recording: fmt::Debug + Send + Sync>
        + fmt::Debug
        + Send
        + Sync
        + 'static
{
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
    ///
    /// # Errors
    /// Those of [`Gpu::launch`]; a device whose blocks have too little shared memory; after [`check_all`], entries that are no numbers.
    pub fn run<G: Gpu>(&self, gpu: &G, args: &[Arg<G::Array>]) -> Result<()> {
        if self.grid.contains(&0) {
            return Ok(());
        }
        let most = gpu.shared_memory();
        if self.shared > most {
            bail!(
                "cuda: {} needs {} KiB of shared memory, where a block of this device has {} (the kernels of training want more than devices of \
                 compute capability 8.6, 8.9 and 12.0 have, for heads or states of more than 64 entries): --weights bf16 needs less where \
                 kernels are named f32; else choose --device cpu, or a device of capability 8.0, 9.0 or 10.0",
                self.kernel,
                self.shared.div_ceil(1 << 10),
                most >> 10,
            );
        }
        gpu.launch(self, args)?;
        match CHECKED.load(Ordering::Relaxed) {
            true => self.check(gpu, args),
            false => Ok(()),
        }
    }

    /// # Errors
    /// Names the kernel, if one of its arrays now has an entry that is no number.
    fn check<G: Gpu>(&self, gpu: &G, args: &[Arg<G::Array>]) -> Result<()> {
        for (i, arg) in args.iter().enumerate() {
            let Arg::Array(array) = arg else { continue };
            let (n, dtype) = (array.len(), array.dtype());
            if n == 0 || !matches!(dtype, DType::F32 | DType::BF16) {
                continue;
            }
            let found = gpu.upload(&[u32::MAX])?;
            let kernel = named("first_nan", dtype);
            let launch = Self::elements(kernel, n, 1);
            gpu.launch(&launch, &[(*array).into(), (&found).into(), Arg::long(n)])?;
            let mut first = [0; 4];
            gpu.read(&found, 0, &mut first)?;
            match u32::from_le_bytes(first) {
                u32::MAX => {}
                first => bail!(
                    "cuda: after {} entry {first} of {n} in argument {} of {} ({}) is no number: it has left that, or was given it (a broken \
                     weight)",
                    self.kernel,
                    i + 1,
                    args.len(),
                    dtype.as_str()
                ),
            }
        }
        Ok(())
    }
}

static CHECKED: AtomicBool = AtomicBool::new(false);

/// From now on what every kernel leaves is looked at: the first to leave something that is no number is named.
pub fn check_all() {
    CHECKED.store(true, Ordering::Relaxed);
}

static RECORDED: AtomicBool = AtomicBool::new(false);

/// From now on steps of decoding are recorded, and played again where they are alike.
pub fn record_steps() {
    RECORDED.store(true, Ordering::Relaxed);
}

/// Whether steps are recorded: not while every launch is looked at.
pub fn records_steps() -> bool {
    RECORDED.load(Ordering::Relaxed) && !CHECKED.load(Ordering::Relaxed)
}

/// Where the new tokens of a pass stand in the memory of their sequences, for one layer. Tokens of a sequence follow each other.
#[derive(Debug)]
pub struct Places<'a, A> {
    /// Pages and states of all sequences, in bytes.
    pub memory: &'a A,
    /// Bytes by which places in it are counted, and those before the layer in a page or a state.
    pub unit: usize,
    pub layer_at: usize,
    /// Where every sequence's pages begin, `[S, width]`, and its state, `[S]`.
    pub pages: &'a A,
    pub states: &'a A,
    /// Of every token its sequence, and the positions up to it, `[N]`.
    pub owners: &'a A,
    pub lengths: &'a A,
    /// A sequence's tokens are those from its entry to the next, `[S + 1]`.
    pub ends: &'a A,
}

impl<A: Array> Places<'_, A> {
    pub fn sequences(&self) -> usize {
        self.ends.len() - 1
    }

    /// Pages that a row of the table has room for.
    pub fn width(&self) -> usize {
        self.pages.len() / self.sequences().max(1)
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

/// Those that there are, an array each.
pub fn upload_each<G: Gpu, const N: usize>(
    gpu: &G,
    vectors: Option<&[Vec<f32>; N]>,
) -> Result<Option<[G::Array; N]>> {
    let Some(vectors) = vectors else {
        return Ok(None);
    };
    let arrays = vectors.iter().map(|entries| gpu.upload_f32(entries));
    Ok(arrays.collect::<Result<Vec<_>>>()?.try_into().ok())
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
