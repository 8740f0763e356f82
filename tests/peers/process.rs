//! A process of a contestant, which is killed on drop, and the resources that it used.

use std::fs;
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};

use crate::Fallible;

/// A child process.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
}

/// The resources that a process has used up to one moment.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    /// Processor time of all its threads, to the kernel's tick (mostly 10 ms).
    pub(crate) cpu: Duration,
    /// The peak of its resident memory, including the pages of mapped files that it touched.
    pub(crate) peak: u64,
    /// Its resident private memory.
    pub(crate) private: u64,
}

impl Process {
    /// Starts it.
    pub(crate) fn spawn(command: &mut Command) -> Fallible<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let child = command.spawn().map_err(|error| format!("{name}: {error}"))?;
        Ok(Self { child })
    }

    /// The child, for its pipes.
    pub(crate) fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// The resources that it used. For a process that has ended and was not waited for, the processor time only.
    pub(crate) fn usage(&self) -> Fallible<Usage> {
        let folder = format!("/proc/{}", self.child.id());
        let status = fs::read_to_string(format!("{folder}/status"))?;
        let stat = fs::read_to_string(format!("{folder}/stat"))?;
        Ok(Usage {
            cpu: processor_time(&stat).ok_or("/proc/PID/stat has no times")?,
            peak: kibibytes(&status, "VmHWM:"),
            private: kibibytes(&status, "RssAnon:"),
        })
    }

    /// Has it ended? It stays in the process table, with its resource usage, until it is waited for.
    pub(crate) fn has_ended(&self) -> Fallible<bool> {
        let id = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).ok_or("a process has a number")?;
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        Ok(waitid(WaitId::Pid(id), options)?.is_some())
    }

    /// Waits until it has ended.
    pub(crate) fn wait(&mut self) -> Fallible<ExitStatus> {
        Ok(self.child.wait()?)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may already have ended.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// User and system time, the 14th and 15th field. The second field may contain spaces, and ends with a parenthesis.
fn processor_time(stat: &str) -> Option<Duration> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
    Some(Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64))
}

/// A size of /proc/PID/status in bytes; 0 if it is missing.
fn kibibytes(status: &str, name: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) << 10
}
