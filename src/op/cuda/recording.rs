//! Launches recorded as a CUDA graph, so that a step of decoding costs one call of the driver.
//!
//! A recording's arrays are its own: what the run before it made and let go of is lent again, in the same order, so that nothing is
//! allocated while launches are recorded. They are recorded on a stream that nothing else uses, as work that other threads launch on the
//! device's own would become part of the graph, and run on the device's own.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::ThreadId;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::sys::{
    CUgraphInstantiate_flags, CUstreamCaptureMode,
};
use candle_core::cuda_backend::cudarc::driver::{CudaContext, CudaGraph, CudaStream, result};
use candle_core::{CudaStorage, DType, Result, bail};

/// Who panicked while holding one of these has left it whole.
pub(super) fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// Memory that arrays are made of again and again.
#[derive(Debug, Default)]
pub(super) struct Library(Mutex<Vec<(DType, usize, CudaStorage)>>);

/// Memory that goes back to its library.
#[derive(Debug)]
pub(super) struct Lent {
    storage: Option<(DType, usize, CudaStorage)>,
    home: Arc<Library>,
}

impl Lent {
    pub fn storage(&self) -> &CudaStorage {
        let (_, _, storage) = self.storage.as_ref().expect("there until it is dropped");
        storage
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        held(&self.home.0).extend(self.storage.take());
    }
}

/// A thread that runs launches in order to record them, and then records them.
#[derive(Debug)]
pub(super) struct Recorder {
    thread: ThreadId,
    home: Arc<Library>,
    /// Where launches are recorded.
    stream: Option<Arc<CudaStream>>,
}

impl Recorder {
    pub fn new() -> Self {
        Self {
            thread: std::thread::current().id(),
            home: Arc::default(),
            stream: None,
        }
    }

    /// None for other threads.
    pub fn own(&self) -> Option<&Self> {
        (self.thread == std::thread::current().id()).then_some(self)
    }

    pub fn stream(&self) -> Option<&Arc<CudaStream>> {
        self.stream.as_ref()
    }

    /// `n` entries, made by `make` where there are none and nothing is recorded yet.
    pub fn lend(
        &self,
        dtype: DType,
        n: usize,
        make: impl FnOnce() -> Result<CudaStorage>,
    ) -> Result<Lent> {
        let found = {
            let mut library = held(&self.home.0);
            let place = library
                .iter()
                .position(|(d, len, _)| (*d, *len) == (dtype, n));
            place.map(|place| library.remove(place))
        };
        let storage = match (found, &self.stream) {
            (Some(found), _) => found,
            (None, None) => (dtype, n, make()?),
            (None, Some(_)) => bail!("cuda: {n} entries that the run before did not need"),
        };
        Ok(Lent {
            storage: Some(storage),
            home: self.home.clone(),
        })
    }

    /// From here on launches are recorded.
    pub fn begin(&mut self, context: &Arc<CudaContext>) -> Result<()> {
        let stream = context.new_stream().w()?;
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        stream.begin_capture(mode).w()?;
        self.stream = Some(stream);
        Ok(())
    }

    /// # Errors
    /// What the driver says to what was recorded.
    pub fn end(self) -> Result<Recording> {
        let Some(stream) = self.stream else {
            bail!("cuda: nothing was recorded");
        };
        let graph = stream.end_capture(CUgraphInstantiate_flags(0)).w()?;
        match graph {
            Some(graph) => Ok(Recording {
                graph: Mutex::new(Graph(graph)),
                _arrays: self.home,
            }),
            None => bail!("cuda: the driver has recorded nothing"),
        }
    }
}

/// Recorded launches, and the arrays that they work with.
pub struct Recording {
    graph: Mutex<Graph>,
    _arrays: Arc<Library>,
}

impl fmt::Debug for Recording {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Recording")
    }
}

struct Graph(CudaGraph);

// SAFETY: a graph may be used by any thread, by one at a time; the mutex around it sees to that.
#[allow(unsafe_code)]
unsafe impl Send for Graph {}

impl Recording {
    /// Launches all of it on `stream`.
    pub(super) fn replay(&self, stream: &CudaStream) -> Result<()> {
        let graph = held(&self.graph);
        // SAFETY: the graph and the arrays that it works with are alive; what it is launched behind is on the same stream.
        #[allow(unsafe_code)]
        unsafe {
            result::graph::launch(graph.0.cu_graph_exec(), stream.cu_stream()).w()
        }
    }
}
