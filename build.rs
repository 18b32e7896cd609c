//! Tells tests whether the shared reference material is there: those that need it are counted as ignored where
//! it is not. With the feature `cuda`, compiles the kernels.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, thread};

fn main() {
    let folder =
        std::env::var_os("ZEBROID_SHARED").map_or_else(|| "../shared".into(), PathBuf::from);
    let golden = folder.join("golden");
    println!("cargo::rustc-check-cfg=cfg(shared)");
    println!("cargo::rerun-if-env-changed=ZEBROID_SHARED");
    println!("cargo::rerun-if-changed=build.rs");
    // A folder that is not there may not be named: cargo would build everything anew each time.
    if golden.is_dir() {
        println!("cargo::rerun-if-changed={}", golden.display());
        println!("cargo::rustc-cfg=shared");
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_some() {
        compile_kernels();
    }
}

/// Every `src/op/*/kernel.cuh` in one image: machine code of Hopper and of Ampere, and what drivers compile for others.
fn compile_kernels() {
    println!("cargo::rerun-if-changed=src/op");
    println!("cargo::rerun-if-env-changed=NVCC");
    println!("cargo::rerun-if-env-changed=CUDA_HOME");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo says where"));
    let entries = fs::read_dir("src/op").expect("src/op is there");
    let kernels = entries.filter_map(|entry| Some(entry.ok()?.path().join("kernel.cuh")));
    let mut kernels: Vec<PathBuf> = kernels.filter(|path| path.is_file()).collect();
    kernels.sort();
    let include = |path: &PathBuf| {
        let path = path.strip_prefix("src/op").expect("listed from there");
        format!("#include \"{}\"\n", path.display())
    };
    let source = out.join("kernels.cu");
    fs::write(&source, kernels.iter().map(include).collect::<String>()).expect("OUT_DIR is ours");
    let images = [
        ("sm_90a.cubin", ["-arch=sm_90a", "-cubin"]),
        ("sm_80.cubin", ["-arch=sm_80", "-cubin"]),
        ("compute_80.ptx", ["-arch=compute_80", "-ptx"]),
    ];
    thread::scope(|scope| {
        for (image, flags) in images {
            let (source, image) = (&source, out.join(format!("kernels.{image}")));
            scope.spawn(move || nvcc(source, &image, &flags));
        }
    });
}

/// Ends the build with what the compiler says, where it says anything bad.
fn nvcc(source: &Path, image: &Path, flags: &[&str]) {
    let nvcc = match (env::var_os("NVCC"), env::var_os("CUDA_HOME")) {
        (Some(nvcc), _) => PathBuf::from(nvcc),
        (_, Some(home)) => Path::new(&home).join("bin/nvcc"),
        _ => "nvcc".into(),
    };
    let mut command = Command::new(&nvcc);
    command
        .args(["-std=c++17", "-O3", "-Isrc/op"])
        .args(flags)
        .arg(source)
        .arg("-o")
        .arg(image);
    let output = command.output().unwrap_or_else(|error| {
        panic!(
            "the feature `cuda` needs CUDA's compiler, and {} does not start: {error}. Install the CUDA toolkit 13 and put nvcc on PATH, or say \
             where it is by NVCC or CUDA_HOME.",
            nvcc.display()
        )
    });
    let said = String::from_utf8_lossy(&output.stderr);
    let kernels = flags.join(" ");
    assert!(
        output.status.success(),
        "nvcc {kernels}, kernels of src/op:\n{said}"
    );
}
