//! Kernels for CUDA whose plain reference is a loop in f64: programs that hold them to it, on the emulator.

use std::path::Path;
use std::process::Command;

/// Builds and runs `tests/cuda/NAME.cpp` under the sanitizers of addresses and of undefined behaviour.
fn hold(name: &str) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda");
    let room = tempfile::tempdir().unwrap();
    let program = room.path().join(name);
    let mut compiler = Command::new("g++");
    compiler
        .args(["-std=c++17", "-O1", "-fsanitize=address,undefined"])
        .args(["-fno-sanitize-recover=all", "-Wno-unknown-pragmas"])
        // What the address sanitizer sees anyway, at half of the compiler's time.
        .arg("-fno-sanitize=null,object-size,pointer-overflow,vptr")
        .args([format!("-I{}", folder.display()), "-o".to_owned()])
        .args([&program, &folder.join(name).with_extension("cpp")]);
    let Ok(compiled) = compiler.output() else {
        eprintln!("g++ is not here: {name}.cpp is not run");
        return;
    };
    let said = String::from_utf8_lossy(&compiled.stderr);
    assert!(compiled.status.success(), "{said}");
    let run = Command::new(&program)
        // What looks for leaks stops other processes to do so, which containers forbid.
        .env("ASAN_OPTIONS", "detect_leaks=0")
        .output()
        .unwrap();
    let [said, errors] = [&run.stdout, &run.stderr].map(|text| String::from_utf8_lossy(text));
    assert!(run.status.success(), "{said}{errors}");
}

#[test]
fn decoding_kernels_equal_loops() {
    hold("decode");
}

#[test]
fn a_state_is_carried_on() {
    hold("ssd");
}
