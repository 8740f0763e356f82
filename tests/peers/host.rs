//! The machine on which the figures are measured.

use std::fs;

use memferry_stages::host::cores;

/// One line: processor, cores, kernel, huge pages, the two programs.
pub(crate) fn describe(qemu: &str) -> String {
    let cores = cores();
    let kernel = first_line("/proc/sys/kernel/osrelease");
    let huge = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    let huge = huge.split(['[', ']']).nth(1).unwrap_or("none");
    let memory = meminfo("MemTotal:") >> 20;
    format!(
        "{}, {cores} cores, {memory} GiB, Linux {kernel}, transparent huge pages: {huge}; {qemu}; memferry {}",
        processor(),
        env!("CARGO_PKG_VERSION"),
    )
}

fn processor() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    model.map_or("unknown processor", |(_, name)| name.trim()).to_owned()
}

fn first_line(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().lines().next().unwrap_or("unknown").to_owned()
}

/// A figure of /proc/meminfo, in KiB.
fn meminfo(name: &str) -> u64 {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = info.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}
