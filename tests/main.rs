//! The integration tests, but for `memory.rs`, which runs alone. Tests that need the shared reference material look for it in
//! `ZEBROID_SHARED` or `../shared`; where it is absent (`build.rs` finds out) they are counted as ignored.

mod arrows;
mod chat;
mod cli;
mod clients;
mod data;
mod eval;
mod fuzz;
mod golden;
mod hub;
mod info;
mod input;
mod kernels;
mod output;
mod packaging;
mod page;
mod pipeline;
mod processors;
mod program;
mod quantize;
mod readme;
mod recipes;
mod runs;
mod serve;
mod teach;
mod watch;

use std::path::{Path, PathBuf};

/// The shared reference folder, for tests that are ignored where it is absent.
fn shared() -> PathBuf {
    std::env::var_os("ZEBROID_SHARED").map_or_else(|| "../shared".into(), PathBuf::from)
}

/// No test that needs the shared material passes without having looked at it.
#[test]
fn tests_of_the_shared_material_are_ignored_without_it() {
    let mut files = vec![PathBuf::from("tests"), PathBuf::from("src")];
    while let Some(path) = files.pop() {
        if path.is_dir() {
            files.extend(
                std::fs::read_dir(path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            );
            continue;
        }
        // This file is the one that may look for the folder.
        if path.extension().is_none_or(|e| e != "rs") || path == Path::new("tests/main.rs") {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(
            !text.contains("var_os(\"ZEBROID_SHARED"),
            "{}: use crate::shared",
            path.display()
        );
        for test in text
            .split("#[test]")
            .skip(1)
            .filter(|test| test.contains("shared()"))
        {
            let name = test
                .lines()
                .find(|line| line.starts_with("fn "))
                .unwrap_or_default();
            assert!(
                test.contains("not(shared)"),
                "{}: {name} is not ignored",
                path.display()
            );
        }
    }
}
