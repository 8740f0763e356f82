//! Metrics of the process, with the names of Prometheus's own client libraries.
//!
//! | metric | kind | meaning |
//! |---|---|---|
//! | `process_cpu_seconds_total` | counter | processor time |
//! | `process_open_fds` | gauge | open file descriptors |
//! | `process_max_fds` | gauge | the most that may be open |
//! | `process_resident_memory_bytes` | gauge | memory in RAM |
//! | `process_virtual_memory_bytes` | gauge | virtual memory |
//! | `process_start_time_seconds` | gauge | when it started, in seconds since 1970 |
//! | `process_threads` | gauge | its threads |

use metrics::{Unit, describe_gauge, gauge};
use procfs::process::{LimitValue, Process};
use procfs::{ProcResult, WithCurrentSystemInfo, boot_time_secs, ticks_per_second};

use super::float;
use memferry::bottleneck::process_time;

/// Describes the metrics to the recorder.
pub(super) fn describe() {
    describe_gauge!("process_cpu_seconds_total", Unit::Seconds, "Processor time of the process");
    describe_gauge!("process_open_fds", "Open file descriptors");
    describe_gauge!("process_max_fds", "The most file descriptors that may be open");
    describe_gauge!("process_resident_memory_bytes", Unit::Bytes, "Memory of the process in RAM");
    describe_gauge!("process_virtual_memory_bytes", Unit::Bytes, "Virtual memory of the process");
    describe_gauge!("process_start_time_seconds", Unit::Seconds, "When the process started, since 1970");
    describe_gauge!("process_threads", "Threads of the process");
}

/// Records the current figures; a figure that cannot be read is left unchanged.
pub(super) fn collect() {
    gauge!("process_cpu_seconds_total").set(process_time().as_secs_f64());
    // Without /proc there is nothing else to record.
    drop(collect_from_proc());
}

fn collect_from_proc() -> ProcResult<()> {
    let process = Process::myself()?;
    let stat = process.stat()?;
    gauge!("process_resident_memory_bytes").set(float(stat.rss_bytes().get()));
    gauge!("process_virtual_memory_bytes").set(float(stat.vsize));
    gauge!("process_start_time_seconds")
        .set(float(boot_time_secs()?) + float(stat.starttime) / float(ticks_per_second()));
    gauge!("process_threads").set(float(stat.num_threads.unsigned_abs()));
    gauge!("process_open_fds").set(float(process.fd_count()? as u64));
    gauge!("process_max_fds").set(match process.limits()?.max_open_files.soft_limit {
        LimitValue::Value(most) => float(most),
        LimitValue::Unlimited => f64::INFINITY,
    });
    Ok(())
}
