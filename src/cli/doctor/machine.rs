//! What the machine has for zebroid.

use std::path::Path;

use super::{Check, State};
use crate::cli::arg::{cache, device};
use crate::cli::show::bytes;
use crate::hub::Hub;
use crate::op::cgroup;
use crate::op::isa::{Isa, Level, VARIABLE};
use crate::op::runtime::{free_memory, total_memory};
use crate::pipeline::device::{CPU, Device};

pub(super) fn checks() -> Vec<Check> {
    let (cache, hub) = (cache::folder(), Hub::from_env().cache);
    let mut all = vec![processor(), cores(), memory()];
    all.extend(speed());
    all.push(gpu());
    all.extend(
        [
            space("disk here", Path::new(".")),
            space("disk of the cache", &cache),
        ]
        .into_iter()
        .flatten(),
    );
    all.push(writable("cache", &cache, "ZEBROID_CACHE"));
    all.extend(kept(&cache));
    let mut hub = writable("Hugging Face", &hub, "HF_HOME");
    // Only downloads need it.
    if hub.state == State::Failure {
        hub.state = State::Warning;
    }
    all.push(hub);
    all.extend(hub_settings());
    all
}

fn processor() -> Check {
    let (here, found) = (Isa::here().level(), Isa::found());
    let found: Vec<_> = found.map(|isa| isa.level()).collect();
    let names: Vec<_> = found.iter().map(|level| level.name()).collect();
    let said = format!(
        "{}: {} kernels, of {}",
        std::env::consts::ARCH,
        here.name(),
        names.join(", ")
    );
    match (here, found.last()) {
        (Level::Portable, Some(Level::Portable)) if cfg!(target_arch = "x86_64") => Check::warning(
            "processor",
            said,
            "Use a processor with AVX2 and FMA (since 2013): without them it is slow.",
        ),
        (here, Some(widest)) if here < *widest => Check::warning(
            "processor",
            said,
            format!("Unset {VARIABLE}: it keeps the faster kernels from being used."),
        ),
        _ => Check::ok("processor", said),
    }
}

fn cores() -> Check {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let all = text
        .lines()
        .filter(|line| line.starts_with("processor"))
        .count();
    let used = rayon::current_num_threads();
    let said = match all > threads {
        true => format!("{threads} of the machine's {all}, {used} threads"),
        false => format!("{threads}, {used} threads"),
    };
    match used > threads {
        true => Check::warning(
            "cores",
            said,
            "Unset RAYON_NUM_THREADS, or set it to the number of cores: more threads than cores wait for each other.",
        ),
        false => Check::ok("cores", said),
    }
}

/// Below this not even the embedded teacher is comfortable.
const LEAST_MEMORY: usize = 256 << 20;

fn memory() -> Check {
    let (Some(free), Some(total)) = (free_memory(), total_memory()) else {
        return Check::ok("memory", "this system does not tell");
    };
    let mut said = format!("{} free of {}", bytes(free), bytes(total));
    if let Some(group) = cgroup::memory() {
        said += &format!(", limited to {} by its control group", bytes(group.limit));
    }
    match free < LEAST_MEMORY {
        true => Check::failure(
            "memory",
            said,
            "End other programs, or raise the limit of the container or service.",
        ),
        false => Check::ok("memory", said),
    }
}

/// Buffers of the measurement, and as much again.
const MEASURED_IN: usize = 1 << 30;

/// How fast memory is read and written, and matrices multiplied.
fn speed() -> Option<Check> {
    free_memory().filter(|free| *free > MEASURED_IN)?;
    let device = Device::named(CPU).ok()?;
    let said = format!(
        "{:.1} GB/s to memory, {:.0} GFLOP/s in f32",
        device.bandwidth / 1e9,
        device.f32 / 1e9
    );
    Some(Check::ok("speed", said))
}

fn gpu() -> Check {
    let (built, found) = device::accelerators();
    let driver = Path::new("/proc/driver/nvidia/version").exists();
    Check::ok("GPU", match (built.as_slice(), found) {
        (_, Some(name)) => format!("{name} is found; text is generated on the CPU (docs/gpu.md)"),
        ([], None) if driver => {
            "an NVIDIA driver is here; this binary is built without cuda (text is generated on the CPU anyway)".into()
        }
        ([], None) => "this binary is built for the CPU alone".into(),
        (built, None) => format!("built for {}, none is found", built.join(", ")),
    })
}

/// No checkpoint is written into less; into the other no large one.
const LEAST_DISK: u64 = 64 << 20;
const LITTLE_DISK: u64 = 4 << 30;

#[cfg(unix)]
fn space(name: &'static str, folder: &Path) -> Option<Check> {
    let there = existing(folder);
    let about = rustix::fs::statvfs(there).ok()?;
    let free = about.f_bavail.saturating_mul(about.f_frsize);
    let said = format!("{} free at {}", bytes(free as usize), there.display());
    let mend = "Make room there, or work in (or set ZEBROID_CACHE to) a folder on another disk.";
    Some(match free {
        0..LEAST_DISK => Check::failure(name, said, mend),
        LEAST_DISK..LITTLE_DISK => Check::warning(name, said, mend),
        _ => Check::ok(name, said),
    })
}

#[cfg(not(unix))]
fn space(_: &'static str, _: &Path) -> Option<Check> {
    None
}

/// The folder, or the nearest one above that is there.
fn existing(folder: &Path) -> &Path {
    let mut above = folder.ancestors().filter(|f| !f.as_os_str().is_empty());
    above.find(|f| f.exists()).unwrap_or(Path::new("."))
}

/// A folder in which files are to be kept, and the variable that names another.
fn writable(name: &'static str, folder: &Path, variable: &str) -> Check {
    let there = existing(folder);
    let tried = match there.is_dir() {
        true => tempfile::tempfile_in(there)
            .map(drop)
            .map_err(|e| e.to_string()),
        false => Err("not a folder".into()),
    };
    match tried {
        Ok(()) => Check::ok(name, folder.display()),
        Err(error) => Check::failure(
            name,
            format!("{} cannot be written to: {error}", there.display()),
            format!(
                "Make {} writable, or set {variable} to a folder that is.",
                there.display()
            ),
        ),
    }
}

/// Nothing of the cache is removed by itself; more than this is worth a look.
const LARGE_CACHE: u64 = 20 << 30;

/// What the cache holds: tokens of texts (`data-..`), and what was computed of teachers.
fn kept(cache: &Path) -> Option<Check> {
    const NAME: &str = "kept there";
    let entries = std::fs::read_dir(cache).ok()?.flatten();
    let (tokens, others): (Vec<_>, Vec<_>) =
        entries.partition(|entry| entry.file_name().to_string_lossy().starts_with("data-"));
    let size = |all: &[std::fs::DirEntry]| all.iter().map(|entry| size(&entry.path())).sum();
    let (tokens, others): (u64, u64) = (size(&tokens), size(&others));
    let said = format!(
        "{} of tokenised texts, {} of other results",
        bytes(tokens as usize),
        bytes(others as usize)
    );
    Some(match tokens + others > LARGE_CACHE {
        false => Check::ok(NAME, said),
        true => Check::warning(
            NAME,
            said,
            format!(
                "What is no longer needed may go, all of it is made anew when it is: rm -r {}/data-*",
                cache.display()
            ),
        ),
    })
}

/// Of a file, or of all files in a folder.
fn size(path: &Path) -> u64 {
    match std::fs::symlink_metadata(path) {
        Ok(about) if about.is_dir() => {
            let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
            entries.map(|entry| size(&entry.path())).sum()
        }
        Ok(about) => about.len(),
        Err(_) => 0,
    }
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// What is set of how the hub is asked; a token is not shown.
fn hub_settings() -> Option<Check> {
    const NAME: &str = "HF settings";
    let token = variable("HF_TOKEN").map(|_| "HF_TOKEN is set".to_owned());
    let named = |name: &str| variable(name).map(|value| format!("{name}={value}"));
    let set = token.into_iter().chain(
        ["HF_ENDPOINT", "HF_HUB_OFFLINE"]
            .into_iter()
            .filter_map(named),
    );
    let set: Vec<String> = set.collect();
    if set.is_empty() {
        return None;
    }
    let said = set.join(", ");
    let endpoint = variable("HF_ENDPOINT").unwrap_or("https://".into());
    Some(
        match endpoint.starts_with("http://") || endpoint.starts_with("https://") {
            true => Check::ok(NAME, said),
            false => Check::failure(
                NAME,
                said,
                "Set HF_ENDPOINT to an address that begins with https://, or unset it.",
            ),
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_counted() {
        let root = tempfile::tempdir().unwrap();
        assert!(kept(&root.path().join("nothing")).is_none());
        std::fs::create_dir(root.path().join("data-1")).unwrap();
        for (name, len) in [
            ("data-1/0.tokens", 3 << 20),
            ("teacher.safetensors", 1 << 20),
        ] {
            std::fs::write(root.path().join(name), vec![0; len]).unwrap();
        }
        let found = kept(root.path()).unwrap().found;
        assert_eq!(
            found,
            "3.0 MiB of tokenised texts, 1.0 MiB of other results"
        );
    }

    #[test]
    fn folders_are_tried_where_they_would_be_made() {
        let root = tempfile::tempdir().unwrap();
        let inside = root.path().join("a/b");
        assert_eq!(writable("cache", &inside, "X").state, State::Ok);
        assert!(!inside.exists() && existing(&inside) == root.path());
        std::fs::write(root.path().join("file"), "").unwrap();
        let check = writable("cache", &root.path().join("file/b"), "X");
        assert_eq!(check.state, State::Failure);
        assert!(check.mend.unwrap().contains("set X to a folder"));
    }
}
