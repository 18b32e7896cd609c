//! Modules use only what stands below them (the table in `src/lib.rs`).

use std::fs;
use std::path::Path;

/// From the top; modules of one row may not use each other.
const RANKS: &[&[&str]] = &[
    &["cli"],
    &["pipeline"],
    &["eval", "train", "convert"],
    &["generate"],
    &["checkpoint", "data"],
    &["model"],
    &["mixer"],
    &["weights", "gguf"],
    &["op"],
    &["numerics", "mapped", "watch"],
    &["error", "hash"],
];

fn rank(module: &str) -> Option<usize> {
    RANKS.iter().position(|row| row.contains(&module))
}

fn check(file: &Path, own: &str, problems: &mut Vec<String>) {
    let text = fs::read_to_string(file).unwrap();
    for (number, line) in text.lines().enumerate() {
        for (at, _) in line.match_indices("crate::") {
            let rest = &line[at + "crate::".len()..];
            let other: String = rest
                .chars()
                .take_while(|c| c.is_alphanumeric() || *c == '_')
                .collect();
            let Some(below) = rank(&other).filter(|_| other != own) else {
                continue;
            };
            if below <= rank(own).unwrap() {
                problems.push(format!(
                    "{}:{}: {own} uses {other}",
                    file.display(),
                    number + 1
                ));
            }
        }
    }
}

fn walk(folder: &Path, own: &str, problems: &mut Vec<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            // Unit tests may look anywhere for their material.
            false if path.ends_with("tests.rs") => {}
            true => walk(&path, own, problems),
            false if path.extension().is_some_and(|e| e == "rs") => check(&path, own, problems),
            false => {}
        }
    }
}

/// Files under `src` that allow unsafe code.
fn unsafe_files(folder: &Path, found: &mut Vec<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            unsafe_files(&path, found);
        } else if fs::read_to_string(&path).is_ok_and(|text| text.contains("(unsafe_code")) {
            let name = path.strip_prefix("src").unwrap();
            found.push(name.to_str().unwrap().to_owned());
        }
    }
}

#[test]
fn unsafe_code_is_where_the_map_says() {
    let map = fs::read_to_string("src/lib.rs").unwrap();
    let (_, rest) = map.split_once("# Unsafe code").unwrap();
    let (table, _) = rest.split_once("# Shape letters").unwrap();
    let rows = table.lines().filter(|line| line.starts_with("//! | `"));
    // What stands in backticks in the first column.
    let names = rows.flat_map(|row| row.split(" | ").nth(1).unwrap_or(row).split('`'));
    let mut listed: Vec<&str> = names.filter(|name| name.ends_with(".rs")).collect();
    let mut found = Vec::new();
    unsafe_files(Path::new("src"), &mut found);
    found.sort();
    listed.sort_unstable();
    assert_eq!(
        found, listed,
        "files of src/ that allow unsafe code, and those that src/lib.rs lists"
    );
    let manifest = fs::read_to_string("Cargo.toml").unwrap();
    assert!(manifest.contains("unsafe_code = \"deny\""));
}

#[test]
fn modules_use_only_what_stands_below_them() {
    let mut problems = Vec::new();
    for entry in fs::read_dir("src").unwrap() {
        let path = entry.unwrap().path();
        let own = path.file_stem().unwrap().to_str().unwrap().to_owned();
        if own == "lib" || own == "main" {
            continue;
        }
        assert!(
            rank(&own).is_some(),
            "src/{own} has no rank: add it to tests/arrows.rs and src/lib.rs"
        );
        match path.is_dir() {
            true => walk(&path, &own, &mut problems),
            false => check(&path, &own, &mut problems),
        }
    }
    assert!(
        problems.is_empty(),
        "arrows that point up:\n{}",
        problems.join("\n")
    );
}
