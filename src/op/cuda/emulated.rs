//! Kernels on the CPU, for tests: `tests/cuda/` compiled with `g++`, in a process of its own, under the sanitizers of addresses and of
//! undefined behaviour. Every launch sends its arguments there and gets the arrays back.

use std::collections::BTreeMap;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};

use candle_core::{DType, Device, Result, Shape, Tensor, bail};
use half::bf16;

use super::{Arg, Array, Gpu, Launch, Recorded};

const COMPILER: &str = "g++";

/// Shared memory of a block, in bytes, of Hopper and Ampere's largest; of all others from 8.6 on.
const LARGEST: usize = 163 << 10;
pub const SMALLER: usize = 99 << 10;

fn is_possible() -> bool {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda");
    sources.is_dir() && Command::new(COMPILER).arg("--version").output().is_ok()
}

/// The kernels of some folders of `op/`, and those of `op/cuda/`.
#[derive(Debug)]
pub struct Emulated {
    /// Of every folder: its kernels, and who runs them.
    processes: Vec<(String, Mutex<Child>)>,
    /// Entries by which arrays stand off from what vectors are aligned to.
    pub skew: usize,
    /// Bytes of shared memory that a block has.
    pub shared_memory: usize,
    /// What is not run but recorded.
    recorded: Mutex<Option<Recording>>,
}

/// Launches, with arrays that they share with who launched them.
pub type Recording = Vec<(Launch, Vec<Given>)>;

/// An argument that lasts.
#[derive(Debug)]
pub enum Given {
    Array(Entries),
    Null,
    I32(i32),
    I64(i64),
    F32(f32),
}

impl Emulated {
    /// None where there is no compiler, which is said.
    pub fn of(op: &str, skew: usize) -> Option<Self> {
        Self::of_all(&[op], skew)
    }

    pub fn of_all(ops: &[&str], skew: usize) -> Option<Self> {
        if !is_possible() {
            eprintln!(
                "{COMPILER} or tests/cuda is not here: CUDA kernels of {ops:?} are not tested"
            );
            return None;
        }
        let processes = ops.iter().map(|op| {
            let program = program(op);
            let kernels = fs::read_to_string(program.with_file_name(TABLE)).unwrap();
            let process = Command::new(program)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                // What looks for leaks stops other processes to do so, which containers forbid.
                .env("ASAN_OPTIONS", "detect_leaks=0")
                .spawn();
            (kernels, Mutex::new(process.unwrap()))
        });
        Some(Self {
            processes: processes.collect(),
            skew,
            shared_memory: LARGEST,
            recorded: Mutex::default(),
        })
    }

    fn recorder(&self) -> MutexGuard<'_, Option<Recording>> {
        self.recorded.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// What is no launch cannot be recorded.
    fn unrecorded(&self) -> Result<()> {
        match *self.recorder() {
            Some(_) => bail!("this cannot be recorded"),
            None => Ok(()),
        }
    }

    /// A tensor's entries, row after row.
    pub fn array(&self, x: &Tensor) -> Entries {
        let flat = x.flatten_all().unwrap();
        let bytes: Vec<u8> = match x.dtype() {
            DType::F32 => bytemuck::cast_slice(&flat.to_vec1::<f32>().unwrap()).to_vec(),
            DType::U32 => bytemuck::cast_slice(&flat.to_vec1::<u32>().unwrap()).to_vec(),
            DType::U8 => flat.to_vec1::<u8>().unwrap(),
            DType::BF16 => {
                let entries = flat.to_vec1::<bf16>().unwrap();
                entries.iter().flat_map(|x| x.to_le_bytes()).collect()
            }
            other => panic!("no kernel takes {other:?}"),
        };
        Entries::new(x.dtype(), bytes)
    }
}

impl Drop for Emulated {
    fn drop(&mut self) {
        for (_, child) in &mut self.processes {
            let child = child.get_mut().unwrap_or_else(|e| e.into_inner());
            // Without input it ends by itself.
            drop(child.stdin.take());
            let _ = child.wait();
        }
    }
}

/// The emulator with the kernels of an operation, compiled beside this program unless it is there.
fn program(op: &str) -> PathBuf {
    static BUILT: Mutex<BTreeMap<String, Arc<Mutex<Option<PathBuf>>>>> =
        Mutex::new(BTreeMap::new());
    let slot = BUILT
        .lock()
        .unwrap()
        .entry(op.to_owned())
        .or_default()
        .clone();
    let mut slot = slot.lock().unwrap_or_else(|e| e.into_inner());
    slot.get_or_insert_with(|| build(op)).clone()
}

/// Names the kernels, beside the program.
const TABLE: &str = "kernels.inc";

/// Under the sanitizers.
const FLAGS: [&str; 5] = [
    "-O1",
    "-fsanitize=address,undefined",
    // What the address sanitizer sees anyway, at half of the compiler's time.
    "-fno-sanitize=null,object-size,pointer-overflow,vptr",
    "-fno-sanitize-recover=all",
    "-Wno-unknown-pragmas",
];

/// What the compiler prints.
fn compile(arguments: &[&str]) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folders = ["tests/cuda", "src/op"].map(|f| format!("-I{}", root.join(f).display()));
    let mut compiler = Command::new(COMPILER);
    let compiler = compiler.arg("-std=c++17").args(folders).args(arguments);
    let output = compiler.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}:\n{said}");
    String::from_utf8(output.stdout).unwrap()
}

fn build(op: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    // With all that they include, and macros expanded: where their names stand, and whether they have changed.
    let includes = [
        "-include",
        &format!("{op}/kernel.cuh"),
        "-include",
        "cuda/kernel.cuh",
    ];
    let text = compile(&[&["-E", "-P"], &includes[..], &["-x", "c++", "/dev/null"]].concat());
    let launcher = root.join("tests/cuda/launch.cpp");
    let mut hasher = DefaultHasher::new();
    (&text, fs::read_to_string(&launcher).unwrap()).hash(&mut hasher);
    let name = format!("emulated-{op}-{:016x}", hasher.finish());
    let folder = std::env::current_exe().unwrap().with_file_name(name);
    let program = folder.join("launch");
    if program.exists() {
        return program;
    }
    fs::create_dir_all(&folder).unwrap();
    let kernels = kernels(&text).map(|name| format!("    {{\"{name}\", call<{name}>}},\n"));
    let table = format!(
        "static const Kernel KERNELS[] = {{\n{}}};\n",
        kernels.collect::<String>()
    );
    fs::write(folder.join(TABLE), table).unwrap();
    // A name that appears when it is whole.
    let unfinished = folder.join(format!("launch.{}", std::process::id()));
    let places = [
        &format!("-I{}", folder.display()),
        "-o",
        unfinished.to_str().unwrap(),
        launcher.to_str().unwrap(),
    ];
    compile(&[&FLAGS[..], &includes, &places].concat());
    fs::rename(unfinished, &program).unwrap();
    program
}

/// Names of the kernels in a preprocessed text: only they are `extern "C"` and `void`.
fn kernels(text: &str) -> impl Iterator<Item = &str> {
    let declared = text.split("extern \"C\"").skip(1);
    let functions = declared.filter_map(|rest| rest.trim_start().strip_prefix("void"));
    functions.map(|rest| rest.split('(').next().unwrap().trim())
}

/// Entries on the emulated device.
#[derive(Debug)]
pub struct Entries {
    dtype: DType,
    bytes: Arc<Mutex<Vec<u8>>>,
}

impl Clone for Entries {
    fn clone(&self) -> Self {
        Self::new(self.dtype, self.bytes().clone())
    }
}

impl Entries {
    fn new(dtype: DType, bytes: Vec<u8>) -> Self {
        let bytes = Arc::new(Mutex::new(bytes));
        Self { dtype, bytes }
    }

    /// The same place.
    fn shared(&self) -> Self {
        Self {
            dtype: self.dtype,
            bytes: self.bytes.clone(),
        }
    }

    fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// On the host, in f64.
    pub fn tensor(&self, shape: impl Into<Shape>) -> Tensor {
        let bytes = self.bytes();
        let entries: Vec<f64> = match self.dtype {
            DType::F32 => each(&bytes, |b| f64::from(f32::from_le_bytes(b))),
            DType::F64 => each(&bytes, f64::from_le_bytes),
            DType::BF16 => each(&bytes, |b| bf16::from_le_bytes(b).to_f64()),
            DType::U8 => each(&bytes, |[b]| f64::from(b)),
            other => panic!("no kernel leaves {other:?}"),
        };
        Tensor::from_vec(entries, shape, &Device::Cpu).unwrap()
    }
}

fn each<const N: usize>(bytes: &[u8], read: impl Fn([u8; N]) -> f64) -> Vec<f64> {
    let (entries, _) = bytes.as_chunks::<N>();
    entries.iter().map(|entry| read(*entry)).collect()
}

impl Array for Entries {
    fn dtype(&self) -> DType {
        self.dtype
    }

    fn len(&self) -> usize {
        self.bytes().len() / self.dtype.size_in_bytes()
    }
}

impl Gpu for Emulated {
    type Array = Entries;
    type Recording = Recording;

    /// Entries that are not numbers.
    fn empty(&self, dtype: DType, n: usize) -> Result<Entries> {
        Ok(Entries::new(dtype, vec![0xff; n * dtype.size_in_bytes()]))
    }

    fn upload_bytes(&self, dtype: DType, bytes: &[u8]) -> Result<Entries> {
        assert!(bytes.len().is_multiple_of(dtype.size_in_bytes()));
        self.unrecorded()?;
        Ok(Entries::new(dtype, bytes.to_vec()))
    }

    fn read(&self, array: &Entries, at: usize, to: &mut [u8]) -> Result<()> {
        self.unrecorded()?;
        to.copy_from_slice(&array.bytes()[at..][..to.len()]);
        Ok(())
    }

    fn write(&self, array: &Entries, at: usize, bytes: &[u8]) -> Result<()> {
        self.unrecorded()?;
        array.bytes()[at..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn copy(&self, array: &Entries, from: usize, to: usize, count: usize) -> Result<()> {
        assert!(from.abs_diff(to) >= count);
        array.bytes().copy_within(from..from + count, to);
        Ok(())
    }

    fn clear(&self, array: &Entries, at: usize, count: usize) -> Result<()> {
        array.bytes()[at..][..count].fill(0);
        Ok(())
    }

    fn product(&self, x: &Entries, w: &Entries, k: usize) -> Result<Entries> {
        self.unrecorded()?;
        if x.dtype != w.dtype || k == 0 || !(x.len() + w.len()).is_multiple_of(k) {
            bail!(
                "a product of {} and {} entries in rows of {k}",
                x.len(),
                w.len()
            );
        }
        let wide = |x: &Entries| x.tensor(x.len()).to_vec1::<f64>();
        let (x, w) = (wide(x)?, wide(w)?);
        let dot = |x: &[f64], w: &[f64]| x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>() as f32;
        let rows = x.chunks_exact(k);
        let y: Vec<f32> = rows
            .flat_map(|x| w.chunks_exact(k).map(move |w| dot(x, w)))
            .collect();
        self.upload_f32(&y)
    }

    fn free_memory(&self) -> Result<usize> {
        Ok(1 << 20)
    }

    fn shared_memory(&self) -> usize {
        self.shared_memory
    }

    fn record<T, R>(
        &self,
        work: impl Fn() -> Result<T>,
        then: impl FnOnce(&T) -> Result<R>,
    ) -> Result<Recorded<R, Recording, T>> {
        let found = then(&work()?)?;
        *self.recorder() = Some(Vec::new());
        let made = work();
        let recording = self.recorder().take().unwrap();
        Ok((found, made.ok().map(|made| (recording, made))))
    }

    fn replay(&self, recording: &Recording) -> Result<()> {
        for (launch, args) in recording {
            let args = args.iter().map(|given| match given {
                Given::Array(array) => Arg::Array(array),
                Given::Null => Arg::Null,
                Given::I32(x) => Arg::I32(*x),
                Given::I64(x) => Arg::I64(*x),
                Given::F32(x) => Arg::F32(*x),
            });
            let args: Vec<Arg<Entries>> = args.collect();
            self.launch(launch, &args)?;
        }
        Ok(())
    }

    fn launch(&self, launch: &Launch, args: &[Arg<Entries>]) -> Result<()> {
        if let Some(recording) = self.recorder().as_mut() {
            let args = args.iter().map(|arg| match arg {
                Arg::Array(array) => Given::Array(array.shared()),
                Arg::Null => Given::Null,
                Arg::I32(x) => Given::I32(*x),
                Arg::I64(x) => Given::I64(*x),
                Arg::F32(x) => Given::F32(*x),
            });
            recording.push((launch.clone(), args.collect()));
            return Ok(());
        }
        let entry = format!("\"{}\"", launch.kernel);
        let found = self.processes.iter().find(|(all, _)| all.contains(&entry));
        let (_, process) = found.unwrap_or_else(|| panic!("no kernel {}", launch.kernel));
        let mut process = process.lock().unwrap_or_else(|e| e.into_inner());
        let ended = |error: std::io::Error| -> ! {
            panic!("{launch:?}: the emulator has ended and says why above: {error}")
        };
        let mut to = BufWriter::new(process.stdin.as_mut().unwrap());
        let mut send = |bytes: &[u8]| to.write_all(bytes).unwrap_or_else(|e| ended(e));
        let size = |n: usize| (n as u64).to_le_bytes();
        send(&size(launch.kernel.len()));
        send(launch.kernel.as_bytes());
        launch.grid.iter().for_each(|n| send(&size(*n)));
        send(&size(launch.threads as usize));
        send(&size(launch.shared));
        send(&size(args.len()));
        for arg in args {
            match arg {
                Arg::Array(array) => {
                    let bytes = array.bytes();
                    let kind = array.dtype.as_str();
                    send(&size(kind.len()));
                    send(kind.as_bytes());
                    send(&size(self.skew * array.dtype.size_in_bytes()));
                    send(&size(bytes.len()));
                    send(&bytes);
                }
                scalar => {
                    let (kind, bytes) = match scalar {
                        Arg::I32(x) => ("int", i64::from(*x).to_le_bytes()),
                        Arg::I64(x) => ("long long", x.to_le_bytes()),
                        Arg::F32(x) => ("float", u64::from(x.to_bits()).to_le_bytes()),
                        _ => ("null", [0; 8]),
                    };
                    send(&size(kind.len()));
                    send(kind.as_bytes());
                    send(&bytes);
                }
            }
        }
        to.flush().unwrap_or_else(|e| ended(e));
        drop(to);
        let from = process.stdout.as_mut().unwrap();
        for arg in args {
            if let Arg::Array(array) = arg {
                let mut bytes = array.bytes();
                from.read_exact(&mut bytes).unwrap_or_else(|e| ended(e));
            }
        }
        Ok(())
    }
}

/// `--check`: the first kernel that leaves something that is no number is named.
#[test]
fn a_kernel_that_leaves_no_number_is_named() {
    let Some(gpu) = Emulated::of("linear", 1) else {
        return;
    };
    for dtype in [DType::F32, DType::BF16] {
        let array = |entries: &[f32]| {
            let x = Tensor::new(entries, &Device::Cpu).unwrap();
            gpu.array(&x.to_dtype(dtype).unwrap())
        };
        let launch = Launch::elements("add_scaled", 300, 1);
        let check = |entries: &[f32]| {
            let left = array(entries);
            launch.check(&gpu, &[Arg::Array(&left), Arg::Null, Arg::F32(1.)])
        };
        let mut entries = vec![f32::INFINITY; 300];
        check(&entries).unwrap();
        entries[270] = f32::NAN;
        entries[290] = f32::NAN;
        let said = check(&entries).unwrap_err().to_string();
        assert!(said.contains("after add_scaled entry 270 of 300"), "{said}");
    }
}

#[test]
fn a_kernel_for_larger_devices_is_named() {
    let Some(mut gpu) = Emulated::of("linear", 0) else {
        return;
    };
    gpu.shared_memory = SMALLER;
    let launch = |shared| Launch {
        shared,
        ..Launch::elements("add_scaled", 1, 1)
    };
    let x = gpu.upload_f32(&[1.]).unwrap();
    let run = |shared| {
        launch(shared).run(
            &gpu,
            &[(&x).into(), (&x).into(), Arg::long(1), Arg::F32(1.)],
        )
    };
    run(SMALLER).unwrap();
    let said = run(SMALLER + 1).unwrap_err().to_string();
    assert!(
        said.contains(
            "add_scaled needs 100 KiB of shared memory, where a block of this device has 99"
        ),
        "{said}"
    );
}

#[test]
fn the_emulator_sees_faults() {
    if !is_possible() {
        eprintln!("{COMPILER} or tests/cuda is not here: the emulator is not tested");
        return;
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda/faults.cpp");
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("faults");
    let places = ["-o", program.to_str().unwrap(), source.to_str().unwrap()];
    compile(&[&FLAGS[..], &places].concat());
    let run = |fault: Option<&str>| {
        let mut command = Command::new(&program);
        let output = command.args(fault).env("ASAN_OPTIONS", "detect_leaks=0");
        let output = output.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.success(), said)
    };
    let (fine, said) = run(None);
    assert!(fine, "{said}");
    for (fault, report) in [
        ("forgotten barrier", "a wrong neighbour"),
        ("divergent barrier", "a barrier that not all threads reach"),
        ("half a warp", "a barrier that not all threads reach"),
        ("different collectives", "different collectives"),
        ("outside of its own mask", "its own mask leaves out"),
        ("behind the array", "heap-buffer-overflow"),
        ("behind shared memory", "heap-buffer-overflow"),
        ("misaligned vector", "misaligned address"),
        ("misaligned copy", "not aligned to 16 bytes"),
        ("unwritten shared memory", "not a number"),
        ("copy not waited for", "an early copy"),
    ] {
        let (fine, said) = run(Some(fault));
        assert!(!fine && said.contains(report), "{fault}: {said}");
    }
}
