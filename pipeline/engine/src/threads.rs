//! Runtimes that start all their threads before anything depends on them.
//!
//! If a user's threads are limited (RLIMIT_NPROC, the limit of a control group), tokio panics when the first thread of
//! a runtime cannot start, and waits forever for any other. So all threads that will be needed are started at once, and
//! stay. If the limit is too low, the start fails with an error that names what to raise, and no thread is missing
//! later.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit};
use tokio::runtime::{Builder, Runtime};

/// Longer than any migration: an idle thread for blocking calls is not ended.
const ALWAYS: Duration = Duration::from_secs(60 * 60 * 24 * 365);
/// How long threads may take to start or to end on a busy host.
const PATIENCE: Duration = Duration::from_secs(10);
/// A trial thread needs almost no stack.
const TRIAL_STACK: usize = 64 << 10;

/// A runtime with `workers`, and `blocking` threads for calls that block. More of these are started when they are needed.
///
/// # Errors
/// When this user cannot start enough threads, with the limit to raise.
pub fn runtime(name: &str, workers: usize, blocking: usize) -> io::Result<Runtime> {
    afford(workers + blocking)?;
    let mut builder = Builder::new_multi_thread();
    builder.worker_threads(workers).thread_name(name).thread_keep_alive(ALWAYS).enable_all();
    let runtime = builder.build()?;
    let gate = Gate::default();
    for _ in 0..blocking {
        let gate = gate.clone();
        drop(runtime.spawn_blocking(move || gate.pass()));
    }
    // Another process of this user may have taken the threads.
    if gate.open_for(blocking) { Ok(runtime) } else { Err(explained(ErrorKind::WouldBlock.into())) }
}

/// Starts the given number of threads at once, and ends them.
fn afford(count: usize) -> io::Result<()> {
    let gate = Gate::default();
    let mut threads: Vec<JoinHandle<Option<PathBuf>>> = Vec::new();
    let mut refused = None;
    while threads.len() < count && refused.is_none() {
        let gate = gate.clone();
        let trial = move || {
            gate.pass();
            std::fs::read_link("/proc/thread-self").ok()
        };
        match thread::Builder::new().stack_size(TRIAL_STACK).spawn(trial) {
            Ok(thread) => threads.push(thread),
            Err(error) => refused = Some(error),
        }
    }
    gate.open_for(threads.len());
    let ended: Vec<_> = threads.into_iter().filter_map(|thread| thread.join().ok().flatten()).collect();
    // The kernel still counts a thread for a short time after it can be joined.
    let began = Instant::now();
    while ended.iter().any(|thread| Path::new("/proc").join(thread).exists()) && began.elapsed() < PATIENCE {
        thread::yield_now();
    }
    refused.map_or(Ok(()), |error| Err(explained(error)))
}

/// Blocks threads until all of them have arrived.
#[derive(Clone, Debug, Default)]
struct Gate(Arc<(Mutex<Waiting>, Condvar)>);

#[derive(Debug, Default)]
struct Waiting {
    come: usize,
    is_open: bool,
}

impl Gate {
    fn pass(&self) {
        let (waiting, changed) = &*self.0;
        let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.come += 1;
        changed.notify_all();
        drop(changed.wait_while(waiting, |waiting| !waiting.is_open).unwrap_or_else(PoisonError::into_inner));
    }

    /// Opens when the given number of threads have arrived; false if they have not in time.
    fn open_for(&self, count: usize) -> bool {
        let (waiting, changed) = &*self.0;
        let waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let missing = |waiting: &mut Waiting| waiting.come < count;
        let (mut waiting, _) =
            changed.wait_timeout_while(waiting, PATIENCE, missing).unwrap_or_else(PoisonError::into_inner);
        waiting.is_open = true;
        changed.notify_all();
        waiting.come >= count
    }
}

/// The same error; if it means that this user has too many threads and processes, with the limit to raise.
pub fn explained(error: io::Error) -> io::Error {
    if error.kind() != ErrorKind::WouldBlock {
        return error;
    }
    let limit = getrlimit(Resource::Nproc).current.map_or("unlimited".into(), |limit| limit.to_string());
    io::Error::new(
        ErrorKind::WouldBlock,
        format!(
            "the system gives this user no more threads and processes: raise RLIMIT_NPROC (ulimit -u, {limit} here), or the \
             limit of the service or container (TasksMax, pids.max)"
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_for_what_blocks_are_there_from_the_start() {
        let name = "threads-of-test";
        let runtime = runtime(name, 1, 3).unwrap();
        let task = |entry: io::Result<std::fs::DirEntry>| std::fs::read_to_string(entry.unwrap().path().join("comm"));
        let threads = || {
            let names = std::fs::read_dir("/proc/self/task").unwrap().map(task);
            names.filter(|found| found.as_ref().is_ok_and(|found| found.trim() == name)).count()
        };
        // A thread sets its name shortly after it has started.
        let began = Instant::now();
        while threads() < 4 {
            assert!(began.elapsed() < Duration::from_secs(60), "{} threads", threads());
            thread::yield_now();
        }
        drop(runtime);
    }

    #[test]
    fn only_the_lack_of_threads_is_explained() {
        let text = explained(io::Error::from_raw_os_error(11)).to_string();
        assert!(text.contains("raise RLIMIT_NPROC (ulimit -u, ") && text.contains("TasksMax"), "{text}");
        assert_eq!(explained(ErrorKind::NotFound.into()).kind(), ErrorKind::NotFound);
    }
}
