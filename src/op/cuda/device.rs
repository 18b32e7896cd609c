//! The device, by the driver interface that candle uses: kernels are loaded from images that `build.rs` made.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex};

use candle_core::cuda_backend::cudarc::cublas::result::gemm_ex;
use candle_core::cuda_backend::cudarc::cublas::sys::{
    cublasComputeType_t, cublasGemmAlgo_t, cublasOperation_t, cudaDataType_t,
};
use candle_core::cuda_backend::cudarc::driver::result::{
    mem_get_info, memcpy_dtod_async, memcpy_dtoh_async, memcpy_htod_async, memset_d8_async,
};
use candle_core::cuda_backend::cudarc::driver::sys::{
    CUdevice_attribute, CUdeviceptr, CUfunction_attribute, CUmemPool_attribute,
    cuDeviceGetDefaultMemPool, cuMemPoolSetAttribute,
};
use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaModule, CudaStream, DevicePtr, LaunchConfig, PushKernelArg,
};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{
    CudaDevice, CudaStorage, DType, Device, Layout, Result, Shape, Storage, Tensor, bail,
};

use super::recording::{Lent, Recorder, Recording, held};
use super::{Arg, Array, Gpu, Launch, Recorded};

/// Machine code for Hopper, for Ampere and Ada, and what the driver compiles for newer ones.
const SM_90A: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernels.sm_90a.cubin"));
const SM_80: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernels.sm_80.cubin"));
const PTX: &str = include_str!(concat!(env!("OUT_DIR"), "/kernels.compute_80.ptx"));

/// What makes room on a device.
const FULL: &str = "to generate, lower --cache-memory or take a model in fewer bits (zebroid quantize); to train, zebroid plan --train says \
                    what takes how much, and --batch-size, --accumulation and --seq-len change it; nvidia-smi lists other processes";

/// Dynamic shared memory that a kernel gets unasked.
const SHARED: usize = 48 << 10;

/// Device `ordinal`, with one stream for all threads.
///
/// # Errors
/// No such device, or one older than the kernels (compute capability 8.0, Ampere).
pub fn open(ordinal: usize) -> Result<Device> {
    // Candle's `new_cuda` has a stream for each thread: work of several would not be ordered.
    let device = Device::new_cuda_with_stream(ordinal).map_err(|error| {
        let said = error.to_string();
        candle_core::Error::msg(format!("device {ordinal}: {said}{}", advice(&said)))
    })?;
    let cuda = device.as_cuda_device()?;
    let stream = cuda.cuda_stream();
    let context = stream.context();
    let (major, minor) = context.compute_capability().w()?;
    if major < 8 {
        bail!(
            "device {ordinal} ({}) has compute capability {major}.{minor}; kernels need 8.0 (Ampere) or newer",
            context.name().w()?
        );
    }
    module(context)?;
    // SAFETY: events order the uses of a tensor by several streams; all work of this device is on the one that was just made.
    #[allow(unsafe_code)]
    unsafe {
        cuda.disable_event_tracking();
    }
    keep_freed_memory(context)?;
    Ok(device)
}

/// What mends an error of the driver.
fn advice(said: &str) -> &'static str {
    const ADVICE: [(&str, &str); 5] = [
        (
            "NO_DEVICE",
            "; no GPU is there or visible: see nvidia-smi and CUDA_VISIBLE_DEVICES",
        ),
        (
            "INVALID_DEVICE",
            "; there are fewer GPUs: nvidia-smi -L lists them",
        ),
        (
            "SYSTEM_DRIVER_MISMATCH",
            "; the driver's parts are of different versions: restart the machine",
        ),
        (
            "INSUFFICIENT_DRIVER",
            "; the driver is too old: CUDA 13 wants version 580 or newer",
        ),
        (
            "OUT_OF_MEMORY",
            "; other processes have the GPU's memory: nvidia-smi lists them",
        ),
    ];
    let found = ADVICE.iter().find(|(error, _)| said.contains(error));
    found.map_or("", |(_, advice)| advice)
}

/// Freed memory stays in the pool that allocations come from, instead of going back at every synchronisation.
fn keep_freed_memory(context: &CudaContext) -> Result<()> {
    let mut pool = std::ptr::null_mut();
    let mut threshold = u64::MAX;
    // SAFETY: the pool is written by the first call before the second uses it, and the attribute is the 64 bits it is said to be.
    #[allow(unsafe_code)]
    unsafe {
        cuDeviceGetDefaultMemPool(&mut pool, context.cu_device())
            .result()
            .w()?;
        cuMemPoolSetAttribute(
            pool,
            CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
            (&raw mut threshold).cast(),
        )
        .result()
        .w()
    }
}

/// The kernels, loaded once a device.
fn module(context: &Arc<CudaContext>) -> Result<Arc<CudaModule>> {
    static LOADED: Mutex<BTreeMap<usize, Arc<CudaModule>>> = Mutex::new(BTreeMap::new());
    // Whoever panicked while it held this has left whole entries behind.
    let mut loaded = LOADED.lock().unwrap_or_else(|e| e.into_inner());
    if let Some(module) = loaded.get(&context.ordinal()) {
        return Ok(module.clone());
    }
    let capability = context.compute_capability().w()?;
    let image = match capability {
        (9, 0) => Some(SM_90A),
        (8, _) => Some(SM_80),
        _ => None,
    };
    let found = image.map(|image| context.load_module(Ptx::from_binary(image.to_vec())));
    let module = match found {
        Some(Ok(module)) => module,
        found => {
            if let Some(Err(error)) = found {
                tracing::warn!("cuda: the driver compiles the kernels itself: {error}");
            }
            let compiled = context.load_module(Ptx::from_src(PTX));
            compiled.map_err(|error| {
                candle_core::Error::msg(format!(
                    "the kernels cannot be loaded for compute capability {}.{}: {error}; they need a driver for CUDA 13 or newer",
                    capability.0, capability.1
                ))
            })?
        }
    };
    loaded.insert(context.ordinal(), module.clone());
    Ok(module)
}

/// A device that kernels are launched on; `'a` is what its views of others' entries outlive.
#[derive(Debug)]
pub struct Cuda<'a> {
    device: CudaDevice,
    module: Arc<CudaModule>,
    shared_memory: usize,
    recorder: Mutex<Option<Recorder>>,
    views: PhantomData<&'a CudaStorage>,
}

impl<'a> Cuda<'a> {
    pub fn new(device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        let context = stream.context();
        let limit = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let shared_memory = context.attribute(limit).w()?;
        Ok(Self {
            device: device.clone(),
            module: module(context)?,
            shared_memory: usize::try_from(shared_memory).unwrap_or(SHARED),
            recorder: Mutex::default(),
            views: PhantomData,
        })
    }

    /// # Errors
    /// A device of another kind.
    pub fn on(device: &Device) -> Result<Self> {
        Self::new(device.as_cuda_device()?)
    }

    /// That of a tensor.
    ///
    /// # Errors
    /// A tensor elsewhere.
    pub fn of(tensor: &'a Tensor) -> Result<Self> {
        Self::new(tensor.device().as_cuda_device()?)
    }

    /// The entries of an operand from its first on, which need not be contiguous.
    pub fn view(&self, storage: &'a CudaStorage, layout: &Layout) -> Result<CudaArray<'a>> {
        self.place(storage, layout)
    }

    /// The entries of a contiguous operand.
    pub fn array(&self, storage: &'a CudaStorage, layout: &Layout) -> Result<CudaArray<'a>> {
        if !layout.is_contiguous() {
            bail!("a contiguous operand is wanted, not {layout:?}");
        }
        self.view(storage, layout)
    }

    /// The entries of a tensor from its first on, which need not be contiguous. Kernels write where they are told to, whatever else
    /// shares the storage.
    pub fn tensor_view(&self, tensor: &'a Tensor) -> Result<CudaArray<'a>> {
        let (storage, layout) = tensor.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else {
            bail!(
                "a tensor on the GPU is wanted, not on {:?}",
                tensor.device()
            );
        };
        self.place(storage, layout)
    }

    /// The entries of a contiguous tensor.
    pub fn tensor(&self, tensor: &'a Tensor) -> Result<CudaArray<'a>> {
        if !tensor.is_contiguous() {
            bail!("a contiguous tensor is wanted, not {:?}", tensor.layout());
        }
        self.tensor_view(tensor)
    }

    /// `sum += dyᵀ x`, `sum [N, K]` in f32, `dy [M, N]` and `x [M, K]` of one type, by cuBLAS.
    pub fn add_product(
        &self,
        sum: &CudaArray,
        dy: &CudaArray,
        x: &CudaArray,
        m: usize,
    ) -> Result<()> {
        let (n, k) = (dy.len / m.max(1), x.len / m.max(1));
        // cuBLAS has matrices column after column: for it this is `sumᵀ [K, N] += xᵀ dy`.
        self.gemm((x, false), (dy, true), sum, [k, n, m], 1.)
    }

    /// For cuBLAS, matrices column after column: `c [M, N] = a b + beta c` in f32, `a [M, K]` and `b [K, N]` of one type, or the transpose
    /// of what stands there.
    fn gemm(
        &self,
        (a, a_turned): (&CudaArray, bool),
        (b, b_turned): (&CudaArray, bool),
        c: &CudaArray,
        [m, n, k]: [usize; 3],
        beta: f32,
    ) -> Result<()> {
        let kind = match (a.dtype, b.dtype) {
            (DType::F32, DType::F32) => cudaDataType_t::CUDA_R_32F,
            (DType::BF16, DType::BF16) => cudaDataType_t::CUDA_R_16BF,
            types => bail!("cuda: no product of {types:?}"),
        };
        if m == 0 || n == 0 || k == 0 {
            return Ok(());
        }
        if c.dtype != DType::F32 || c.len != m * n || a.len != m * k || b.len != k * n {
            bail!(
                "cuda: a product of {m} x {k} by {k} x {n} does not fit {}, {} and {} entries",
                a.len,
                b.len,
                c.len
            );
        }
        let turned = |turned: bool| match turned {
            true => cublasOperation_t::CUBLAS_OP_T,
            false => cublasOperation_t::CUBLAS_OP_N,
        };
        let size = |n: usize| {
            i32::try_from(n)
                .map_err(|_| candle_core::Error::msg(format!("cuda: a product with {n} rows")))
        };
        let [m, n, k] = [size(m)?, size(n)?, size(k)?];
        // cuBLAS has a stream and memory of its own.
        self.unrecorded("a product by cuBLAS")?;
        self.ready()?;
        let (one, beta): (*const f32, *const f32) = (&1., &beta);
        // SAFETY: the three arrays are of the sizes that have just been checked, and alive.
        #[allow(unsafe_code)]
        unsafe {
            gemm_ex(
                *self.device.cublas_handle().handle(),
                turned(a_turned),
                turned(b_turned),
                m,
                n,
                k,
                one.cast(),
                a.at as *const _,
                kind,
                if a_turned { k } else { m },
                b.at as *const _,
                kind,
                if b_turned { n } else { k },
                beta.cast(),
                c.at as *mut _,
                cudaDataType_t::CUDA_R_32F,
                m,
                cublasComputeType_t::CUBLAS_COMPUTE_32F,
                cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
            )
            .w()
        }
    }

    /// The stream that this thread launches on, with the thread in its context.
    fn ready(&self) -> Result<Arc<CudaStream>> {
        let recorded = self.recorded(|recorder| recorder.stream().cloned());
        let stream = recorded
            .flatten()
            .unwrap_or_else(|| self.device.cuda_stream());
        stream.context().bind_to_thread().w()?;
        Ok(stream)
    }

    /// What the recorder says, if this thread records.
    fn recorded<T>(&self, ask: impl FnOnce(&Recorder) -> T) -> Option<T> {
        held(&self.recorder)
            .as_ref()
            .and_then(Recorder::own)
            .map(ask)
    }

    /// # Errors
    /// What is launched by others than our kernels, while launches are recorded.
    fn unrecorded(&self, what: &str) -> Result<()> {
        match self.recorded(|recorder| recorder.stream().is_some()) {
            Some(true) => bail!("cuda: {what} cannot be recorded"),
            _ => Ok(()),
        }
    }

    /// Where entries stand, for as long as whoever asks knows that they are there.
    fn place(&self, storage: &CudaStorage, layout: &Layout) -> Result<CudaArray<'a>> {
        let stream = self.device.cuda_stream();
        // One stream computes: nothing need be waited for when these addresses are used.
        let (start, dtype) = match &storage.slice {
            CudaStorageSlice::U8(s) => (s.device_ptr(&stream).0, DType::U8),
            CudaStorageSlice::U32(s) => (s.device_ptr(&stream).0, DType::U32),
            CudaStorageSlice::BF16(s) => (s.device_ptr(&stream).0, DType::BF16),
            CudaStorageSlice::F32(s) => (s.device_ptr(&stream).0, DType::F32),
            CudaStorageSlice::F64(s) => (s.device_ptr(&stream).0, DType::F64),
            _ => bail!("cuda: no kernel computes in the type of this operand"),
        };
        let offset = layout.start_offset() * dtype.size_in_bytes();
        Ok(CudaArray {
            at: start + offset as u64,
            dtype,
            len: layout.shape().elem_count(),
            owner: Owner::Other(PhantomData),
        })
    }
}

/// Entries in the device's memory.
#[derive(Debug)]
pub struct CudaArray<'a> {
    at: CUdeviceptr,
    dtype: DType,
    len: usize,
    owner: Owner<'a>,
}

#[derive(Debug)]
enum Owner<'a> {
    Own(CudaStorage),
    Lent(#[allow(dead_code, reason = "goes back when it is dropped")] Lent),
    Other(PhantomData<&'a CudaStorage>),
}

impl CudaArray<'_> {
    /// Where `count` bytes from byte `at` on stand.
    ///
    /// # Errors
    /// Fewer bytes.
    fn bytes(&self, at: usize, count: usize) -> Result<CUdeviceptr> {
        let all = self.len * self.dtype.size_in_bytes();
        match at.checked_add(count).is_some_and(|end| end <= all) {
            true => Ok(self.at + at as u64),
            false => bail!("cuda: {count} bytes from {at} on, of {all}"),
        }
    }

    /// # Errors
    /// Entries that belong to another.
    pub fn into_storage(self) -> Result<CudaStorage> {
        match self.owner {
            Owner::Own(storage) => Ok(storage),
            Owner::Lent(_) | Owner::Other(_) => bail!("cuda: these entries belong to another"),
        }
    }

    /// # Errors
    /// As [`CudaArray::into_storage`].
    pub fn into_tensor(self, shape: impl Into<Shape>) -> Result<Tensor> {
        let (shape, len) = (shape.into(), self.len);
        if shape.elem_count() != len {
            bail!("cuda: {len} entries are no {shape:?}");
        }
        let storage = Storage::Cuda(self.into_storage()?);
        Ok(Tensor::from_storage(
            storage,
            shape,
            BackpropOp::none(),
            false,
        ))
    }
}

impl Array for CudaArray<'_> {
    fn dtype(&self) -> DType {
        self.dtype
    }

    fn len(&self) -> usize {
        self.len
    }
}

impl<'a> Gpu for Cuda<'a> {
    type Array = CudaArray<'a>;
    type Recording = Recording;

    fn empty(&self, dtype: DType, n: usize) -> Result<CudaArray<'a>> {
        let lent = self.recorded(|recorder| recorder.lend(dtype, n, || self.alloc(dtype, n)));
        let (at, owner) = match lent {
            Some(lent) => {
                let lent = lent?;
                (self.start(lent.storage())?, Owner::Lent(lent))
            }
            None => {
                let storage = self.alloc(dtype, n)?;
                (self.start(&storage)?, Owner::Own(storage))
            }
        };
        Ok(CudaArray {
            at,
            dtype,
            len: n,
            owner,
        })
    }

    fn upload_bytes(&self, dtype: DType, bytes: &[u8]) -> Result<CudaArray<'a>> {
        let array = self.empty(dtype, bytes.len() / dtype.size_in_bytes())?;
        self.write(&array, 0, bytes)?;
        Ok(array)
    }

    fn read(&self, array: &CudaArray<'a>, at: usize, to: &mut [u8]) -> Result<()> {
        let from = array.bytes(at, to.len())?;
        let stream = self.ready()?;
        // SAFETY: so many bytes of the array are there; they have arrived when the stream has come to its end.
        #[allow(unsafe_code)]
        unsafe {
            memcpy_dtoh_async(to, from, stream.cu_stream()).w()?;
        }
        stream.synchronize().w()
    }

    fn write(&self, array: &CudaArray<'a>, at: usize, bytes: &[u8]) -> Result<()> {
        let to = array.bytes(at, bytes.len())?;
        let stream = self.ready()?;
        // SAFETY: there is room for so many bytes; memory that is not pinned has been read when this returns.
        #[allow(unsafe_code)]
        unsafe {
            memcpy_htod_async(to, bytes, stream.cu_stream()).w()
        }
    }

    fn copy(&self, array: &CudaArray<'a>, from: usize, to: usize, count: usize) -> Result<()> {
        let (from, to) = (array.bytes(from, count)?, array.bytes(to, count)?);
        let stream = self.ready()?;
        // SAFETY: both are places of so many bytes in one array, which do not overlap.
        #[allow(unsafe_code)]
        unsafe {
            memcpy_dtod_async(to, from, count, stream.cu_stream()).w()
        }
    }

    fn clear(&self, array: &CudaArray<'a>, at: usize, count: usize) -> Result<()> {
        let at = array.bytes(at, count)?;
        let stream = self.ready()?;
        // SAFETY: so many bytes of the array are there.
        #[allow(unsafe_code)]
        unsafe {
            memset_d8_async(at, 0, count, stream.cu_stream()).w()
        }
    }

    fn product(&self, x: &CudaArray<'a>, w: &CudaArray<'a>, k: usize) -> Result<CudaArray<'a>> {
        let [m, n] = [x, w].map(|matrix| matrix.len / k.max(1));
        let y = self.empty(DType::F32, m * n)?;
        // cuBLAS has matrices column after column: for it this is `yᵀ [N, M] = w xᵀ`.
        let [left, right] = [(w, true), (x, false)];
        self.gemm(left, right, &y, [n, m, k], 0.)?;
        Ok(y)
    }

    fn free_memory(&self) -> Result<usize> {
        self.ready()?;
        Ok(mem_get_info().w()?.0)
    }

    fn shared_memory(&self) -> usize {
        self.shared_memory
    }

    fn record<T, R>(
        &self,
        work: impl Fn() -> Result<T>,
        then: impl FnOnce(&T) -> Result<R>,
    ) -> Result<Recorded<R, Recording, T>> {
        *held(&self.recorder) = Some(Recorder::new());
        let found = work().and_then(|made| then(&made));
        let found = found.inspect_err(|_| *held(&self.recorder) = None)?;
        let context = self.device.cuda_stream().context().clone();
        let begun = match held(&self.recorder).as_mut() {
            Some(recorder) => recorder.begin(&context),
            None => Ok(()),
        };
        let made = begun.and_then(|()| work());
        let recorder = held(&self.recorder).take();
        // What was begun has to end, whatever came of it.
        let recording = recorder.map_or_else(|| bail!("cuda: no recorder"), Recorder::end);
        match made.and_then(|made| Ok((recording?, made))) {
            Ok(recorded) => Ok((found, Some(recorded))),
            Err(error) => {
                tracing::warn!("cuda: a step of decoding is not recorded: {error}");
                Ok((found, None))
            }
        }
    }

    fn replay(&self, recording: &Recording) -> Result<()> {
        recording.replay(&*self.ready()?)
    }

    fn launch(&self, launch: &Launch, args: &[Arg<CudaArray<'a>>]) -> Result<()> {
        let named = |error| candle_core::Error::msg(format!("cuda: {}: {error}", launch.kernel));
        let stream = self.ready()?;
        let function = self.module.load_function(&launch.kernel).map_err(named)?;
        if launch.shared > SHARED {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function
                .set_attribute(attribute, launch.shared as i32)
                .map_err(named)?;
        }
        let mut builder = stream.launch_builder(&function);
        for arg in args {
            match arg {
                Arg::Array(array) => builder.arg(&array.at),
                Arg::Null => builder.arg(&0u64),
                Arg::I32(x) => builder.arg(x),
                Arg::I64(x) => builder.arg(x),
                Arg::F32(x) => builder.arg(x),
            };
        }
        let size = |n: usize| {
            let size = u32::try_from(n);
            size.map_err(|_| candle_core::Error::msg(format!("cuda: {launch:?} is too large")))
        };
        let [x, y, z] = launch.grid;
        let config = LaunchConfig {
            grid_dim: (size(x)?, size(y)?, size(z)?),
            block_dim: (launch.threads, 1, 1),
            shared_mem_bytes: size(launch.shared)?,
        };
        // SAFETY: the arguments are those of the kernel, in number, kind and type, which the emulated tests hold against its
        // declaration; the arrays are alive, or were freed after this launch on the same stream.
        #[allow(unsafe_code)]
        unsafe {
            builder.launch(config).map_err(named)?;
        }
        Ok(())
    }
}

impl<'a> Cuda<'a> {
    fn alloc(&self, dtype: DType, n: usize) -> Result<CudaStorage> {
        let device = &self.device;
        // Nothing cannot be allocated.
        let count = n.max(1);
        // SAFETY: whoever asks for these entries launches a kernel that writes all of them before any is read.
        #[allow(unsafe_code)]
        let slice = unsafe {
            match dtype {
                DType::U8 => device.alloc(count).map(CudaStorageSlice::U8),
                DType::U32 => device.alloc(count).map(CudaStorageSlice::U32),
                DType::BF16 => device.alloc(count).map(CudaStorageSlice::BF16),
                DType::F32 => device.alloc(count).map(CudaStorageSlice::F32),
                DType::F64 => device.alloc(count).map(CudaStorageSlice::F64),
                other => bail!("cuda: no kernel computes in {other:?}"),
            }
        };
        let slice = slice.map_err(|error| {
            let (said, bytes) = (error.to_string(), count * dtype.size_in_bytes());
            match said.contains("OUT_OF_MEMORY") {
                true => candle_core::Error::msg(format!(
                    "the device is out of memory at {bytes} bytes more: {FULL}"
                )),
                false => error,
            }
        })?;
        Ok(CudaStorage {
            slice,
            device: device.clone(),
        })
    }

    /// Where a storage's entries begin.
    fn start(&self, storage: &CudaStorage) -> Result<CUdeviceptr> {
        Ok(self.place(storage, &Layout::contiguous(0))?.at)
    }
}
