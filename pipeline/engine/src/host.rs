//! How much memory this process may use. An allocation that is too large for it is refused beforehand.
//!
//! The limit is the host's memory, or less if a control group limits it: the process's own group or one above it, of
//! version 1 or 2, as mounted here.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

/// The memory that this process may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// The amount.
    pub bytes: u64,
    limit: Limit,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Limit {
    Host,
    ControlGroup,
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.limit {
            Limit::Host => write!(f, "the {} bytes that this host has", self.bytes),
            Limit::ControlGroup => {
                write!(f, "the {} bytes that the control group of this process may have", self.bytes)
            }
        }
    }
}

/// The memory that this process may use, if `bytes` is more than half of it; `None` also if the kernel does not report
/// it.
pub fn beyond_half_of_memory(bytes: u64) -> Option<Memory> {
    memory(Path::new("/")).filter(|memory| bytes > memory.bytes / 2)
}

/// The same, if `bytes` is more than all of it.
#[cfg(feature = "vm-memory")]
pub fn beyond_memory(bytes: u64) -> Option<Memory> {
    memory(Path::new("/")).filter(|memory| bytes > memory.bytes)
}

/// Reads the files below a root, which is `/` except in tests.
fn memory(root: &Path) -> Option<Memory> {
    let host = installed(root).map(|bytes| Memory { bytes, limit: Limit::Host });
    let group = group_limit(root).map(|bytes| Memory { bytes, limit: Limit::ControlGroup });
    host.into_iter().chain(group).min_by_key(|memory| memory.bytes)
}

fn installed(root: &Path) -> Option<u64> {
    let facts = fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let total = facts.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    total.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The lowest limit of the process's control groups and of all groups above them.
fn group_limit(root: &Path) -> Option<u64> {
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
    let mounts = fs::read_to_string(root.join("proc/self/mountinfo")).ok()?;
    let mounts: Vec<Mount<'_>> = mounts.lines().filter_map(Mount::parse).collect();
    groups.lines().filter_map(Group::parse).filter_map(|group| group.limit(root, &mounts)).min()
}

/// A control group of the process that may limit memory.
struct Group<'a> {
    is_version_2: bool,
    path: &'a str,
}

impl<'a> Group<'a> {
    /// A line of `/proc/self/cgroup`: `0::/path` (version 2) or `4:memory,…:/path`.
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        let is_version_2 = controllers.is_empty();
        let is_of_memory = is_version_2 || controllers.split(',').any(|name| name == "memory");
        is_of_memory.then_some(Self { is_version_2, path })
    }

    fn limit(&self, root: &Path, mounts: &[Mount<'_>]) -> Option<u64> {
        let mount = mounts.iter().find(|mount| mount.is_version_2 == self.is_version_2)?;
        let file = if self.is_version_2 { "memory.max" } else { "memory.limit_in_bytes" };
        let top = root.join(mount.at.strip_prefix('/')?);
        // In a container the mount may begin at a group below the root, or the path may name one that is not visible.
        let below = Path::new(self.path).strip_prefix(mount.of).ok().map_or_else(PathBuf::new, Path::to_path_buf);
        let limits = below.ancestors().filter_map(|group| fs::read_to_string(top.join(group).join(file)).ok());
        // "max" is no limit; version 1 writes a number larger than any host's memory.
        limits.filter_map(|limit| limit.trim().parse().ok()).min()
    }
}

/// A mounted hierarchy of control groups that may limit memory.
struct Mount<'a> {
    is_version_2: bool,
    /// The group at its root.
    of: &'a str,
    at: &'a str,
}

impl<'a> Mount<'a> {
    /// A line of `/proc/self/mountinfo`: `id parent device root mount-point options … - type source options`.
    fn parse(line: &'a str) -> Option<Self> {
        let (before, behind) = line.split_once(" - ")?;
        let (mut before, mut behind) = (before.split(' ').skip(3), behind.split(' '));
        let (of, at) = (before.next()?, before.next()?);
        let (kind, options) = (behind.next()?, behind.nth(1)?);
        let is_version_2 = kind == "cgroup2";
        let is_of_memory = is_version_2 || kind == "cgroup" && options.split(',').any(|option| option == "memory");
        is_of_memory.then_some(Self { is_version_2, of, at })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;
    const V2: &str = "30 24 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
    const V1: &str = "31 24 0:27 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                      35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                      36 31 0:33 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n";

    /// A host with 16 GiB, these groups and these limit files.
    fn host(groups: &str, mounts: &str, limits: &[(&str, &str)]) -> Option<Memory> {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("proc/meminfo", "MemFree: 1 kB\nMemTotal:       16777216 kB\n");
        write("proc/self/cgroup", groups);
        write("proc/self/mountinfo", mounts);
        limits.iter().for_each(|(path, limit)| write(&format!("sys/fs/cgroup/{path}"), limit));
        memory(root.path())
    }

    fn group(bytes: u64) -> Option<Memory> {
        Some(Memory { bytes, limit: Limit::ControlGroup })
    }

    const ALL: Option<Memory> = Some(Memory { bytes: 16 * GIB, limit: Limit::Host });

    #[test]
    fn a_page_fits_and_everything_does_not() {
        assert_eq!(beyond_half_of_memory(4096), None);
        assert!(beyond_half_of_memory(u64::MAX).is_some());
    }

    #[test]
    fn the_lowest_limit_on_the_way_to_the_root_counts() {
        let nested =
            [("a/memory.max", "1073741824\n"), ("a/b/memory.max", "max\n"), ("a/b/c/memory.max", "2147483648\n")];
        assert_eq!(host("0::/a/b/c\n", V2, &nested), group(GIB));
        assert_eq!(host("0::/a/b/c\n", V2, &nested[1..]), group(2 * GIB));
        assert_eq!(host("0::/x\n", V2, &nested), ALL, "another's");
        assert_eq!(host("0::/\n", V2, &[]), ALL);
        let words = host("0::/a\n", V2, &nested).unwrap().to_string();
        assert_eq!(words, "the 1073741824 bytes that the control group of this process may have");
    }

    #[test]
    fn version_1_counts_where_it_has_memory() {
        let limits = [
            ("memory/a/memory.limit_in_bytes", "1073741824\n"),
            ("memory/memory.limit_in_bytes", "9223372036854771712\n"),
        ];
        assert_eq!(host("4:memory:/a/b\n1:cpu:/\n0::/\n", V1, &limits), group(GIB));
        assert_eq!(host("4:memory:/\n1:cpu:/\n", V1, &limits), ALL);
        assert_eq!(host("1:cpu:/a\n", V1, &limits), ALL);
    }

    #[test]
    fn a_container_sees_its_own_group_at_the_top() {
        let mounts = V2.replace("0:26 / ", "0:26 /docker/1 ");
        assert_eq!(host("0::/docker/1/a\n", &mounts, &[("memory.max", "1073741824")]), group(GIB));
        assert_eq!(host("0::/../2\n", &mounts, &[("memory.max", "1073741824")]), group(GIB));
    }

    #[test]
    fn what_cannot_be_read_is_no_limit() {
        for (groups, mounts) in [("", V2), ("nonsense\n0:\n", "nonsense - x\n- - -\n"), ("0::/a\n", "")] {
            assert_eq!(host(groups, mounts, &[]), ALL);
        }
        assert_eq!(host("0::/a\n", V2, &[("a/memory.max", "much")]), ALL);
    }
}
