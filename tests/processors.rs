//! One binary for every processor: each set of instructions that can be forced here, and an old processor under an emulator.

use std::process::{Command, Output};

use crate::program::command;

const PROMPT: [&str; 7] = [
    "generate",
    "assets/teacher",
    "--prompt",
    "One day Tom",
    "--max-tokens",
    "20",
    "--json",
];

fn text(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    json["text"].as_str().unwrap().to_owned()
}

#[test]
fn every_set_of_instructions_gives_the_same_text() {
    let own = text(&command().args(PROMPT).output().unwrap());
    for isa in ["portable", "avx2", "avx512", "amx"] {
        // One that this processor lacks is said, and the widest taken.
        let forced = command().args(PROMPT).env("ZEBROID_ISA", isa).output();
        assert_eq!(text(&forced.unwrap()), own, "{isa}");
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn it_runs_on_a_processor_of_2008() {
    const EMULATOR: &str = "qemu-x86_64";
    if Command::new(EMULATOR).arg("--version").output().is_err() {
        eprintln!("{EMULATOR} is not here (Debian's qemu-user): not tested");
        return;
    }
    let own = text(&command().args(PROMPT).output().unwrap());
    let mut emulated = Command::new(EMULATOR);
    emulated
        .args(["-cpu", "Nehalem"])
        .arg(command().get_program());
    assert_eq!(text(&emulated.args(PROMPT).output().unwrap()), own);
}
