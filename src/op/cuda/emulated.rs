//! Kernels on the CPU, for tests: `tests/cuda/` compiled with `g++`, in a process of its own, under the sanitizers of addresses and of
//! undefined behaviour. Every launch sends its arguments there and gets the arrays back.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Result, Shape, Tensor};
use half::bf16;

use super::{Arg, Array, Gpu, Launch};

const COMPILER: &str = "g++";

fn is_possible() -> bool {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda");
    sources.is_dir() && Command::new(COMPILER).arg("--version").output().is_ok()
}

/// The kernels of one folder of `op/`, and those of `op/cuda/`.
pub struct Emulated {
    process: Mutex<Child>,
    /// Entries by which arrays stand off from what vectors are aligned to.
    pub skew: usize,
}

impl Emulated {
    /// None where there is no compiler, which is said.
    pub fn of(op: &str, skew: usize) -> Option<Self> {
        if !is_possible() {
            eprintln!("{COMPILER} or tests/cuda is not here: CUDA kernels of {op} are not tested");
            return None;
        }
        let process = Command::new(program(op))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // What looks for leaks stops other processes to do so, which containers forbid.
            .env("ASAN_OPTIONS", "detect_leaks=0")
            .spawn();
        Some(Self {
            process: Mutex::new(process.unwrap()),
            skew,
        })
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
        Entries {
            dtype: x.dtype(),
            bytes: RefCell::new(bytes),
        }
    }
}

impl Drop for Emulated {
    fn drop(&mut self) {
        let child = self.process.get_mut().unwrap_or_else(|e| e.into_inner());
        // Without input it ends by itself.
        drop(child.stdin.take());
        let _ = child.wait();
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
    fs::write(folder.join("kernels.inc"), table).unwrap();
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
#[derive(Debug, Clone)]
pub struct Entries {
    dtype: DType,
    bytes: RefCell<Vec<u8>>,
}

impl Entries {
    /// On the host, in f64.
    pub fn tensor(&self, shape: impl Into<Shape>) -> Tensor {
        let bytes = self.bytes.borrow();
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
        self.bytes.borrow().len() / self.dtype.size_in_bytes()
    }
}

impl Gpu for Emulated {
    type Array = Entries;

    /// Entries that are not numbers.
    fn empty(&self, dtype: DType, n: usize) -> Result<Entries> {
        let bytes = RefCell::new(vec![0xff; n * dtype.size_in_bytes()]);
        Ok(Entries { dtype, bytes })
    }

    fn upload(&self, entries: &[u32]) -> Result<Entries> {
        let bytes = RefCell::new(bytemuck::cast_slice(entries).to_vec());
        let dtype = DType::U32;
        Ok(Entries { dtype, bytes })
    }

    fn launch(&self, launch: &Launch, args: &[Arg<Entries>]) -> Result<()> {
        let mut process = self.process.lock().unwrap_or_else(|e| e.into_inner());
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
                    let bytes = array.bytes.borrow();
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
                let mut bytes = array.bytes.borrow_mut();
                from.read_exact(&mut bytes).unwrap_or_else(|e| ended(e));
            }
        }
        Ok(())
    }
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
