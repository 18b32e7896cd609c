//! The device, by the driver interface that candle uses: kernels are loaded from images that `build.rs` made.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use candle_core::cuda_backend::cudarc::cublas::result::gemm_ex;
use candle_core::cuda_backend::cudarc::cublas::sys::{
    cublasComputeType_t, cublasGemmAlgo_t, cublasOperation_t, cudaDataType_t,
};
use candle_core::cuda_backend::cudarc::driver::sys::{
    CUdeviceptr, CUfunction_attribute, CUmemPool_attribute, cuDeviceGetDefaultMemPool,
    cuMemPoolSetAttribute,
};
use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaModule, DevicePtr, LaunchConfig, PushKernelArg,
};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{
    CudaDevice, CudaStorage, DType, Device, Layout, Result, Shape, Storage, Tensor, bail,
};

use super::{Arg, Array, Gpu, Launch};

/// Machine code for Hopper, for Ampere and Ada, and what the driver compiles for newer ones.
const SM_90A: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernels.sm_90a.cubin"));
const SM_80: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernels.sm_80.cubin"));
const PTX: &str = include_str!(concat!(env!("OUT_DIR"), "/kernels.compute_80.ptx"));

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

/// A device that kernels are launched on.
#[derive(Debug)]
pub struct Cuda<'a> {
    device: &'a CudaDevice,
    module: Arc<CudaModule>,
}

impl<'a> Cuda<'a> {
    pub fn new(device: &'a CudaDevice) -> Result<Self> {
        let module = module(device.cuda_stream().context())?;
        Ok(Self { device, module })
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
        let (at, dtype) = self.place(storage, layout)?;
        let len = layout.shape().elem_count();
        Ok(CudaArray {
            at,
            dtype,
            len,
            owner: Owner::Other(std::marker::PhantomData),
        })
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
        let (at, dtype) = self.place(storage, layout)?;
        let len = layout.shape().elem_count();
        Ok(CudaArray {
            at,
            dtype,
            len,
            owner: Owner::Other(std::marker::PhantomData),
        })
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
        let kind = match (dy.dtype, x.dtype) {
            (DType::F32, DType::F32) => cudaDataType_t::CUDA_R_32F,
            (DType::BF16, DType::BF16) => cudaDataType_t::CUDA_R_16BF,
            types => bail!("cuda: no product of {types:?}"),
        };
        if m == 0 || n == 0 || k == 0 {
            return Ok(());
        }
        if sum.dtype != DType::F32 || sum.len != n * k || dy.len != m * n || x.len != m * k {
            bail!(
                "cuda: a product of {m} x {n} by {m} x {k} does not fit {} entries",
                sum.len
            );
        }
        let [rows, n, k] = [m, n, k].map(|size| size as i32);
        self.device.cuda_stream().context().bind_to_thread().w()?;
        let one: *const f32 = &1.;
        // cuBLAS has matrices column after column: for it this is `sumᵀ [K, N] += xᵀ dy`.
        // SAFETY: the three arrays are of the sizes that have just been checked, and alive.
        #[allow(unsafe_code)]
        unsafe {
            gemm_ex(
                *self.device.cublas_handle().handle(),
                cublasOperation_t::CUBLAS_OP_N,
                cublasOperation_t::CUBLAS_OP_T,
                k,
                n,
                rows,
                one.cast(),
                x.at as *const _,
                kind,
                k,
                dy.at as *const _,
                kind,
                n,
                one.cast(),
                sum.at as *mut _,
                cudaDataType_t::CUDA_R_32F,
                k,
                cublasComputeType_t::CUBLAS_COMPUTE_32F,
                cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
            )
            .w()
        }
    }

    fn place(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CUdeviceptr, DType)> {
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
        Ok((start + offset as u64, dtype))
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
    Other(std::marker::PhantomData<&'a CudaStorage>),
}

impl CudaArray<'_> {
    /// # Errors
    /// Entries that belong to another.
    pub fn into_storage(self) -> Result<CudaStorage> {
        match self.owner {
            Owner::Own(storage) => Ok(storage),
            Owner::Other(_) => bail!("cuda: these entries belong to another tensor"),
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

    fn empty(&self, dtype: DType, n: usize) -> Result<CudaArray<'a>> {
        let device = self.device;
        // SAFETY: whoever asks for these entries launches a kernel that writes all of them before any is read.
        #[allow(unsafe_code)]
        let slice = unsafe {
            match dtype {
                DType::U8 => CudaStorageSlice::U8(device.alloc(n)?),
                DType::U32 => CudaStorageSlice::U32(device.alloc(n)?),
                DType::BF16 => CudaStorageSlice::BF16(device.alloc(n)?),
                DType::F32 => CudaStorageSlice::F32(device.alloc(n)?),
                DType::F64 => CudaStorageSlice::F64(device.alloc(n)?),
                other => bail!("cuda: no kernel computes in {other:?}"),
            }
        };
        self.own(slice, dtype, n)
    }

    fn upload(&self, entries: &[u32]) -> Result<CudaArray<'a>> {
        let slice = CudaStorageSlice::U32(self.device.clone_htod(entries)?);
        self.own(slice, DType::U32, entries.len())
    }

    fn launch(&self, launch: &Launch, args: &[Arg<CudaArray<'a>>]) -> Result<()> {
        let named = |error| candle_core::Error::msg(format!("cuda: {}: {error}", launch.kernel));
        let stream = self.device.cuda_stream();
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
    fn own(&self, slice: CudaStorageSlice, dtype: DType, len: usize) -> Result<CudaArray<'a>> {
        let storage = CudaStorage {
            slice,
            device: self.device.clone(),
        };
        let (at, _) = self.place(&storage, &Layout::contiguous(len))?;
        let owner = Owner::Own(storage);
        Ok(CudaArray {
            at,
            dtype,
            len,
            owner,
        })
    }
}
