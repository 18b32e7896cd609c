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

/// The kernels of one folder of `op/`, and those of `op/cuda/`.
pub struct Emulated {
    process: Mutex<Child>,
    /// Entries by which arrays stand off from what vectors are aligned to.
    pub skew: usize,
}

impl Emulated {
    /// None where there is no compiler, which is said.
    pub fn of(op: &str, skew: usize) -> Option<Self> {
        if Command::new(COMPILER).arg("--version").output().is_err() {
            eprintln!("{COMPILER} is not here: the CUDA kernels of {op} are not tested");
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

fn build(op: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let files = [
        format!("src/op/{op}/kernel.cuh"),
        "src/op/cuda/kernel.cuh".to_owned(),
        "src/op/cuda/device.cuh".to_owned(),
        "src/op/cuda/tile.cuh".to_owned(),
        "tests/cuda/emulator.h".to_owned(),
        "tests/cuda/launch.cpp".to_owned(),
    ];
    let sources = files.map(|file| fs::read_to_string(root.join(file)).unwrap());
    let mut hasher = DefaultHasher::new();
    sources.hash(&mut hasher);
    let folder = std::env::current_exe()
        .unwrap()
        .with_file_name(format!("emulated-{op}-{:016x}", hasher.finish()));
    let program = folder.join("launch");
    if program.exists() {
        return program;
    }
    fs::create_dir_all(&folder).unwrap();
    let mut table = format!("#include \"{op}/kernel.cuh\"\n#include \"cuda/kernel.cuh\"\n");
    table += "static const Kernel KERNELS[] = {\n";
    for name in sources[..2].iter().flat_map(|source| kernels(source)) {
        table += &format!("    {{\"{name}\", call<{name}>}},\n");
    }
    table += "};\n";
    fs::write(folder.join("kernels.inc"), table).unwrap();
    // A name that appears when it is whole.
    let unfinished = folder.join(format!("launch.{}", std::process::id()));
    let compiled = Command::new(COMPILER)
        .args(["-std=c++17", "-O1", "-fsanitize=address,undefined"])
        .args(["-fno-sanitize-recover=all", "-Wall", "-Wno-unknown-pragmas"])
        .arg(format!("-I{}", folder.display()))
        .arg(format!("-I{}", root.join("tests/cuda").display()))
        .arg(format!("-I{}", root.join("src/op").display()))
        .arg(root.join("tests/cuda/launch.cpp"))
        .arg("-o")
        .arg(&unfinished)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&compiled.stderr);
    assert!(compiled.status.success(), "kernels of {op}:\n{said}");
    fs::rename(unfinished, &program).unwrap();
    program
}

/// Names of a file's kernels. What stands in a macro `KERNELS`, until it is undefined, is there once for each of its calls, which begin
/// lines, and has its names from the calls' arguments.
fn kernels(source: &str) -> Vec<String> {
    const MACRO: &str = "#define KERNELS(";
    let mut names = Vec::new();
    for (i, part) in source.split(MACRO).enumerate() {
        let (body, rest) = part.split_once("#undef KERNELS").unwrap_or(("", part));
        if i > 0 {
            let parameters = arguments(body);
            for call in body.lines().filter_map(|l| l.strip_prefix("KERNELS(")) {
                let given = arguments(call);
                let put = |part: &str| match parameters.iter().position(|p| p == part) {
                    Some(i) => given[i].clone(),
                    None => part.to_owned(),
                };
                let named = declared(body).into_iter();
                names.extend(named.map(|name| name.split("##").map(put).collect::<String>()));
            }
        }
        names.extend(declared(rest));
    }
    names
}

/// What stands in front of a closing parenthesis, between commas.
fn arguments(text: &str) -> Vec<String> {
    let list = text.split(')').next().unwrap_or_default();
    list.split(',').map(|a| a.trim().to_owned()).collect()
}

fn declared(source: &str) -> Vec<String> {
    let declared = source.split("__global__ void ").skip(1);
    let names = declared.map(|rest| rest.split('(').next().unwrap_or_default());
    names.map(str::to_owned).collect()
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
            DType::F32 => bytemuck::pod_collect_to_vec::<u8, f32>(&bytes)
                .iter()
                .map(|x| f64::from(*x))
                .collect(),
            DType::F64 => bytemuck::pod_collect_to_vec::<u8, f64>(&bytes),
            DType::BF16 => {
                let pairs = bytes.as_chunks::<2>().0.iter();
                pairs.map(|b| bf16::from_le_bytes(*b).to_f64()).collect()
            }
            DType::U8 => bytes.iter().map(|x| f64::from(*x)).collect(),
            other => panic!("no kernel leaves {other:?}"),
        };
        Tensor::from_vec(entries, shape, &Device::Cpu).unwrap()
    }
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
