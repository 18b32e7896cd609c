//! Control groups: the memory that a container or a service manager leaves to this process.

use std::path::Path;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// In bytes.
    pub limit: usize,
    /// Of it what is not taken; pages of files count as free, since they can be dropped.
    pub left: usize,
}

/// Files of a group, by version: the limit, what is taken, and of that (in `memory.stat`) pages of files.
struct Files {
    limit: &'static str,
    used: &'static str,
    pages: [&'static str; 2],
}

const V1: Files = Files {
    limit: "memory.limit_in_bytes",
    used: "memory.usage_in_bytes",
    pages: ["total_inactive_file", "total_active_file"],
};
const V2: Files = Files {
    limit: "memory.max",
    used: "memory.current",
    pages: ["inactive_file", "active_file"],
};

/// Version 1 writes the largest number of whole pages where there is no limit.
const NONE: usize = 1 << 60;

/// The group with the least room, where one is limited.
pub fn memory() -> Option<Memory> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    memory_in(Path::new("/sys/fs/cgroup"), &groups)
}

/// `groups`: lines of `NUMBER:CONTROLLERS:PATH`; version 2 names no controllers.
fn memory_in(root: &Path, groups: &str) -> Option<Memory> {
    let tightest = |line: &str| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        let (root, files) = match controllers {
            "" => (root.to_owned(), V2),
            some if some.split(',').any(|c| c == "memory") => (root.join("memory"), V1),
            _ => return None,
        };
        // Groups above limit those inside of them. A container may see its own as the root.
        let folder = root.join(path.trim_start_matches('/'));
        let folders = folder.ancestors().take_while(|f| f.starts_with(&root));
        folders.filter_map(|f| files.read(f)).min_by_key(|m| m.left)
    };
    groups.lines().filter_map(tightest).min_by_key(|m| m.left)
}

impl Files {
    fn read(&self, folder: &Path) -> Option<Memory> {
        let text = |name: &str| std::fs::read_to_string(folder.join(name)).ok();
        let number = |name: &str| -> Option<usize> { text(name)?.trim().parse().ok() };
        let limit = number(self.limit).filter(|limit| *limit < NONE)?;
        let stat = text("memory.stat").unwrap_or_default();
        let pages = stat.lines().filter_map(|line| {
            let (name, bytes) = line.split_once(' ')?;
            let counted = self.pages.contains(&name);
            bytes.parse::<usize>().ok().filter(|_| counted)
        });
        let taken = number(self.used)?.saturating_sub(pages.sum());
        Some(Memory {
            limit,
            left: limit.saturating_sub(taken),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tightest_group_counts() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let found = |groups: &str| memory_in(root.path(), groups);
        write("a/memory.max", "1000\n");
        write("a/memory.current", "900\n");
        write(
            "a/memory.stat",
            "anon 600\ninactive_file 200\nactive_file 100\n",
        );
        write("a/b/memory.max", "max\n");
        write("a/b/memory.current", "10\n");
        let tight = Memory {
            limit: 1000,
            left: 400,
        };
        assert_eq!(found("0::/a/b\n"), Some(tight));
        write("a/b/memory.max", "300\n");
        assert_eq!(
            found("0::/a/b\n"),
            Some(Memory {
                limit: 300,
                left: 290
            })
        );
        assert_eq!(found("0::/elsewhere\n"), None);
        write("memory/c/memory.limit_in_bytes", "9223372036854771712\n");
        write("memory/c/memory.usage_in_bytes", "5\n");
        assert_eq!(found("3:cpu:/c\n2:memory:/c\n"), None);
        write("memory/c/memory.limit_in_bytes", "50\n");
        assert_eq!(
            found("3:cpu:/c\n2:memory:/c\n"),
            Some(Memory {
                limit: 50,
                left: 45
            })
        );
    }
}
