//! A host without further threads, and an operator who does not wait until a guest is created.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::process::{Signal, getuid};

use crate::harness::{Ended, Running, Scene, until};
use crate::reports::Report;
use crate::skip::skipped;

const NOBODY: u32 = 65534;

/// The program, run by a user who may have this many processes and threads. The limit does not apply to root.
struct Limited(Scene);

impl Limited {
    /// `None`, with the reason printed, if that is not possible.
    fn new() -> Option<Self> {
        let scene = Scene::new();
        fs::set_permissions(scene.path("."), Permissions::from_mode(0o755)).unwrap();
        fs::copy(env!("CARGO_BIN_EXE_memferry"), scene.path("memferry")).unwrap();
        scene.write(
            "run.toml",
            "[guest.workload]\nmemory = \"4 MiB\"\nwriters = [{ pattern = \"uniform\" }]\n\
             [transport]\naddress = \"tcp:localhost:0\"\n",
        );
        let limited = Self(scene);
        let why = if !getuid().is_root() {
            "only root can run a program as another user"
        } else if Command::new("prlimit").arg("--version").output().is_err() {
            "there is no prlimit here"
        } else if limited.run(1).code == 0 {
            "this system does not count a user's threads"
        } else {
            return Some(limited);
        };
        skipped(why);
        None
    }

    fn start(&self, threads: u32, arguments: &[&str]) -> Ended {
        let mut command = Command::new("prlimit");
        command.arg(format!("--nproc={threads}")).arg(self.0.path("memferry")).args(arguments);
        command.current_dir(self.0.path(".")).uid(NOBODY).gid(NOBODY);
        Running::of(command, format!("{} with {threads} threads", arguments.join(" "))).end()
    }

    fn run(&self, threads: u32) -> Ended {
        self.start(threads, &["run", "run.toml", "--host-for", "0s"])
    }
}

#[test]
fn too_few_threads_are_an_error_that_says_what_to_raise() {
    let Some(limited) = Limited::new() else { return };
    let few = limited.run(1).expect(1);
    few.says(&["raise RLIMIT_NPROC (ulimit -u, 1 here)"]);
    let (mut refused, mut done) = (0, 0);
    // From none for the control plane to enough for everything.
    for threads in (2..16).step_by(3).chain([18, 24, 32, 256]) {
        let ended = limited.run(threads);
        assert!(!ended.stderr.contains("panicked"), "{threads} threads: {ended}");
        match ended.code {
            0 => done += 1,
            _ => {
                ended.expect(1).says(&["raise RLIMIT_NPROC"]);
                refused += 1;
            }
        }
    }
    assert!(refused > 0 && done > 0, "{refused} refused, {done} done");
    // A request to a migration needs no thread.
    limited.start(1, &["cancel", "nowhere"]).expect(1).says(&["there is no such socket"]);
}

/// The memory of a program, in KiB.
fn resident(program: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{program}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
    line.trim().trim_end_matches(" kB").parse().unwrap_or(0)
}

/// A signal during the fill of the guest's memory ends the program before the fill is complete.
#[test]
fn a_cancel_does_not_wait_for_the_guest() {
    const MEMORY: u64 = 2 << 20;
    let scene = Scene::new();
    scene.write(
        "large.toml",
        "[guest.workload]\nmemory = \"2 GiB\"\nfill = { text = 1.0 }\n[transport]\naddress = \"tcp:127.0.0.1:1\"\n",
    );
    for (command, words) in [
        (&["send", "large.toml", "--report", "report.json"][..], "cancelled: before the guest was ready"),
        (&["record", "large.toml", "-o", "trace"], "not recorded: cancelled before the guest was ready"),
    ] {
        loop {
            let program = scene.start(command);
            until("memory is filled", || resident(program.id()) > MEMORY / 32);
            // The program is stopped, so what is observed stays true until it continues and receives the signal.
            program.signal(Signal::STOP);
            until("it is stopped", || {
                let stat = fs::read_to_string(format!("/proc/{}/stat", program.id())).unwrap();
                stat.contains(") T ")
            });
            if resident(program.id()) > MEMORY / 2 {
                continue;
            }
            program.signal(Signal::INT);
            program.signal(Signal::CONT);
            program.end().expect(130).says(&[words]);
            break;
        }
    }
    assert_eq!(Report::read(&scene.path("report.json")).text("status"), "cancelled");
    assert!(!scene.path("trace").exists());
}
