//! The machine that the figures are of.

use std::fs;
use std::thread::available_parallelism;

use memferry_stages::memory::MappedMemory;

use crate::Fallible;

/// One line: processor, cores, kernel, huge pages, the two programs.
pub(crate) fn describe(qemu: &str) -> String {
    let cores = available_parallelism().map_or(1, usize::from);
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

/// Touches so much memory and gives it back. A virtual machine's free memory may be taken away by its host and cost many
/// times more when it is touched again: without this, it would cost whoever comes after a pause.
pub(crate) fn warm_memory(bytes: u64) -> Fallible<()> {
    let memory = MappedMemory::anonymous(usize::try_from(bytes)?)?;
    drop(memory.advise_huge());
    (0..memory.len()).step_by(4096).for_each(|page| memory.store(page, &[1]));
    Ok(())
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
