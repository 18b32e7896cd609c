//! Modules use only what stands below them (the table in `src/lib.rs`), and files of a folder do not use each other in
//! circles.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Modules and their ranks, as the map says them.
fn ranks() -> BTreeMap<String, usize> {
    let map = fs::read_to_string("src/lib.rs").unwrap();
    let mut ranks = BTreeMap::new();
    for row in map.lines().filter_map(|line| line.strip_prefix("//! | ")) {
        let mut cells = row.split(" | ");
        let (Some(Ok(rank)), Some(names)) = (cells.next().map(str::parse), cells.next()) else {
            continue;
        };
        let names = names.split("[`").skip(1);
        let names = names.filter_map(|name| Some(name.split_once("`]")?.0.to_owned()));
        ranks.extend(names.map(|name| (name, rank)));
    }
    assert!(ranks.len() > 10, "{ranks:?}");
    ranks
}

/// The words that follow `prefix` (a path with its last `::`) in a text: one, or those of a group in braces.
fn followers(text: &str, prefix: &str) -> BTreeSet<String> {
    let word = |text: &str| -> String {
        let word = text
            .chars()
            .take_while(|c| c.is_alphanumeric() || *c == '_');
        word.collect()
    };
    let mut found = BTreeSet::new();
    for (at, _) in text.match_indices(prefix) {
        let before = text[..at].chars().next_back();
        // Another, longer path.
        if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') {
            continue;
        }
        let rest = &text[at + prefix.len()..];
        let Some(group) = rest.strip_prefix('{') else {
            found.insert(word(rest));
            continue;
        };
        let (mut depth, mut item) = (0, String::new());
        for c in group.chars() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => {
                    found.insert(word(item.trim()));
                    item.clear();
                    continue;
                }
                _ => {}
            }
            item.push(c);
        }
        found.insert(word(item.trim()));
    }
    found
}

/// Code without comments and without its unit tests, which may look anywhere for their material.
fn code(file: &Path) -> String {
    let text = fs::read_to_string(file).unwrap();
    let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
    let lines = text.lines().map(|line| line.split("//").next().unwrap());
    lines.collect::<Vec<_>>().join("\n")
}

fn is_test(path: &Path) -> bool {
    let name = path.file_stem().unwrap().to_str().unwrap();
    name == "tests" || name.ends_with("_tests") || name == "laws"
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

/// Every file of code under a path.
fn files(path: &Path) -> Vec<PathBuf> {
    match path.is_dir() {
        true => entries(path).iter().flat_map(|path| files(path)).collect(),
        false => {
            let is_code = path.extension().is_some_and(|e| e == "rs") && !is_test(path);
            is_code.then(|| path.to_owned()).into_iter().collect()
        }
    }
}

#[test]
fn modules_use_only_what_stands_below_them() {
    let ranks = ranks();
    let mut problems = Vec::new();
    for path in entries(Path::new("src")) {
        let own = path.file_stem().unwrap().to_str().unwrap().to_owned();
        if own == "lib" || own == "main" {
            continue;
        }
        let rank = ranks.get(&own);
        let rank = rank.unwrap_or_else(|| panic!("src/{own} has no rank in src/lib.rs"));
        for file in files(&path) {
            for other in followers(&code(&file), "crate::") {
                if other != own && ranks.get(&other).is_some_and(|below| below <= rank) {
                    problems.push(format!("{}: {own} uses {other}", file.display()));
                }
            }
        }
    }
    let problems = problems.join("\n");
    assert!(problems.is_empty(), "arrows that point up:\n{problems}");
}

/// What a module of `folder` uses of its siblings.
fn siblings(folder: &Path, module: &Path, names: &BTreeSet<String>) -> BTreeSet<String> {
    let own = module.file_stem().unwrap().to_str().unwrap();
    let inside = folder.strip_prefix("src").unwrap();
    let inside = inside
        .iter()
        .map(|part| format!("{}::", part.to_str().unwrap()));
    let full = format!("crate::{}", inside.collect::<String>());
    let mut found = BTreeSet::new();
    for file in files(module) {
        let text = code(&file);
        found.extend(followers(&text, &full));
        // From a file beside them; folders say what they use of the outside by its full path, or by `super::super`.
        let up = match module.is_dir() {
            true => "super::super::",
            false => "super::",
        };
        found.extend(followers(&text, up));
    }
    found.retain(|name| names.contains(name) && name != own);
    found
}

fn circle(at: &str, uses: &BTreeMap<String, BTreeSet<String>>, way: &mut Vec<String>) -> bool {
    if way.iter().any(|passed| passed == at) {
        way.push(at.to_owned());
        return true;
    }
    way.push(at.to_owned());
    let round = uses[at].iter().any(|next| circle(next, uses, way));
    if !round {
        way.pop();
    }
    round
}

fn check_circles(folder: &Path, problems: &mut Vec<String>) {
    let modules = entries(folder).into_iter().filter(|path| {
        let name = path.file_stem().unwrap().to_str().unwrap();
        (path.is_dir() || path.extension().is_some_and(|e| e == "rs"))
            && !is_test(path)
            && !["mod", "lib", "main"].contains(&name)
    });
    let modules: Vec<PathBuf> = modules.collect();
    let name = |path: &PathBuf| path.file_stem().unwrap().to_str().unwrap().to_owned();
    let names: BTreeSet<String> = modules.iter().map(name).collect();
    let uses = modules
        .iter()
        .map(|path| (name(path), siblings(folder, path, &names)));
    let uses: BTreeMap<String, BTreeSet<String>> = uses.collect();
    for name in &names {
        let mut way = Vec::new();
        if circle(name, &uses, &mut way) {
            problems.push(format!("{}: {}", folder.display(), way.join(" → ")));
            break;
        }
    }
    let folders = modules.iter().filter(|path| path.is_dir());
    folders.for_each(|folder| check_circles(folder, problems));
}

#[test]
fn files_of_a_folder_do_not_use_each_other_in_circles() {
    let mut problems = Vec::new();
    check_circles(Path::new("src"), &mut problems);
    assert!(problems.is_empty(), "circles:\n{}", problems.join("\n"));
}

#[test]
fn what_a_path_names_is_found() {
    let text = "use crate::{a, b::{c, d}, e};\nlet x = crate::f::g();\nuse supercrate::h;";
    let found = followers(text, "crate::");
    assert_eq!(found.into_iter().collect::<Vec<_>>(), ["a", "b", "e", "f"]);
    let uses = [("a", "b"), ("b", "c"), ("c", "b")];
    let uses = uses.map(|(from, to)| (from.to_owned(), BTreeSet::from([to.to_owned()])));
    let mut way = Vec::new();
    assert!(circle("a", &BTreeMap::from(uses), &mut way));
    assert_eq!(way, ["a", "b", "c", "b"]);
}

/// Files under `src` that allow unsafe code.
fn unsafe_files(folder: &Path) -> Vec<String> {
    let all = files(folder).into_iter();
    let unsafe_ones = all.filter(|file| fs::read_to_string(file).unwrap().contains("(unsafe_code"));
    let named = unsafe_ones.map(|file| {
        let name = file.strip_prefix("src").unwrap();
        name.to_str().unwrap().to_owned()
    });
    named.collect()
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
    let mut found = unsafe_files(Path::new("src"));
    found.sort();
    listed.sort_unstable();
    assert_eq!(
        found, listed,
        "files of src/ that allow unsafe code, and those that src/lib.rs lists"
    );
    let manifest = fs::read_to_string("Cargo.toml").unwrap();
    assert!(manifest.contains("unsafe_code = \"deny\""));
}
