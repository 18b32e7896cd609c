//! What `packaging/` must follow of the package.

use std::fs::read_to_string;
use std::path::Path;

/// Dependencies are compiled before the sources are there: cargo wants a file for whatever the manifest names. What is copied must come
/// to the builder too.
#[test]
fn the_image_is_built_from_what_there_is() {
    // A published crate has no packaging.
    if Path::new("Cargo.toml.orig").exists() {
        return;
    }
    let recipe = read_to_string("packaging/Dockerfile").unwrap();
    let manifest: toml::Table = read_to_string("Cargo.toml").unwrap().parse().unwrap();
    for (kind, folder) in [
        ("test", "tests"),
        ("bench", "benches"),
        ("example", "examples"),
    ] {
        let targets = manifest.get(kind).and_then(|targets| targets.as_array());
        for target in targets.into_iter().flatten() {
            let path = match target.get("path") {
                Some(path) => path.as_str().unwrap().to_owned(),
                None => format!("{folder}/{}.rs", target["name"].as_str().unwrap()),
            };
            assert!(recipe.contains(&format!("> {path}")), "no {path} is made");
        }
    }
    let sent = read_to_string("packaging/Dockerfile.dockerignore").unwrap();
    let copies = recipe.lines().filter_map(|line| line.strip_prefix("COPY "));
    for copy in copies.filter(|copy| !copy.starts_with("--from")) {
        let (sources, _) = copy.rsplit_once(' ').unwrap();
        for source in sources.split(' ') {
            let known = |line: &str| match line.strip_prefix('!').map(|line| line.split_once('*')) {
                Some(Some((start, _))) => source.starts_with(start),
                Some(None) => line[1..] == *source,
                None => false,
            };
            assert!(sent.lines().any(known), "{source} is not sent");
            let exists = Path::new(source).exists();
            assert!(exists, "there is no {source}");
        }
    }
}
