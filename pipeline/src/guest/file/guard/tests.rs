//! The guard, with processes that are killed. The last two are run by the others as processes of their own.

use std::env;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, getsid, kill_process};
use tempfile::TempDir;

use crate::guest::Guest;
use crate::guest::file::FileGuest;
use crate::guest::file::tests::{log, logged};

const GUARD_ARGUMENTS: &str = "MEMFERRY_TEST_GUARD_ARGUMENTS";
const SOURCE_FOLDER: &str = "MEMFERRY_TEST_SOURCE_FOLDER";
const PATIENCE: Duration = Duration::from_secs(60);

/// A guard program: this test program as [`acts_as_guard`], by a script that leaves its process number in `guard`.
fn guard_program(folder: &Path) -> PathBuf {
    let script = folder.join("guard.sh");
    let text = format!(
        "#!/bin/sh\n[ \"$1\" = guard ] || exit 9\nshift\necho $$ > '{}'\n{GUARD_ARGUMENTS}=\"$(printf '%s\\n' \"$@\")\" \
         exec '{}' --exact guest::file::guard::tests::acts_as_guard --ignored --nocapture\n",
        folder.join("guard").display(),
        env::current_exe().unwrap().display(),
    );
    fs::write(&script, text).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o700)).unwrap();
    script
}

fn guard_pid(folder: &Path) -> i32 {
    fs::read_to_string(folder.join("guard")).unwrap().trim().parse().unwrap()
}

/// Does the process run, and is not merely waiting to be collected?
fn is_alive(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z ") && !stat.contains(") X "))
}

fn until(what: &str, fine: impl Fn() -> bool) {
    let begin = Instant::now();
    while !fine() {
        assert!(begin.elapsed() < PATIENCE, "waited in vain: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// A source that lives in a process of its own, paused, and committed if `commit`.
fn source_process(folder: &Path, commit: bool) -> Child {
    let child = Command::new(env::current_exe().unwrap())
        .args(["--exact", "guest::file::guard::tests::acts_as_source", "--ignored", "--nocapture"])
        .env(SOURCE_FOLDER, folder)
        .env("MEMFERRY_TEST_COMMIT", if commit { "yes" } else { "no" })
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    until("the source is paused", || folder.join("is-there").exists());
    assert_eq!(log(folder), "pause");
    child
}

#[test]
fn a_source_killed_between_pause_and_go_is_resumed_by_its_guard() {
    let folder = TempDir::new().unwrap();
    let mut source = source_process(folder.path(), false);
    let guard = guard_pid(folder.path());
    assert!(is_alive(guard));
    let guard_id = Pid::from_raw(guard).unwrap();
    assert_eq!(getsid(Some(guard_id)).unwrap(), guard_id, "the guard has a session of its own");
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        kill_process(guard_id, signal).unwrap();
    }
    source.kill().unwrap();
    source.wait().unwrap();
    until("the guard resumes the guest", || log(folder.path()) == "pause resume");
    until("the guard ends", || !is_alive(guard));
}

#[test]
fn a_source_killed_after_it_committed_stays_paused() {
    let folder = TempDir::new().unwrap();
    let mut source = source_process(folder.path(), true);
    assert!(!is_alive(guard_pid(folder.path())), "the guard is gone when committed has returned");
    source.kill().unwrap();
    source.wait().unwrap();
    assert_eq!(log(folder.path()), "pause");
}

#[test]
fn resuming_dismisses_the_guard_and_a_guest_dropped_paused_is_resumed_by_it() {
    let folder = TempDir::new().unwrap();
    let program = guard_program(folder.path());
    let source = FileGuest::source(logged(folder.path(), ""), Some(program)).unwrap();
    source.pause().unwrap();
    source.resume().unwrap();
    assert!(!is_alive(guard_pid(folder.path())));
    assert_eq!(log(folder.path()), "pause resume");
    source.pause().unwrap();
    drop(source);
    until("the guard resumes the guest", || log(folder.path()) == "pause resume pause resume");
}

#[test]
fn without_the_guard_that_was_asked_for_nothing_is_paused() {
    let folder = TempDir::new().unwrap();
    for (program, words) in [("/no/such/guard", "No such file"), ("/bin/false", "cannot be started")] {
        let source = FileGuest::source(logged(folder.path(), ""), Some(program.into())).unwrap();
        let error = source.pause().unwrap_err().to_string();
        assert!(error.contains("guard") && error.contains(words), "{error}");
    }
    assert_eq!(log(folder.path()), "");
}

#[test]
#[ignore = "the guard process of other tests"]
fn acts_as_guard() {
    let arguments: Vec<_> = env::var(GUARD_ARGUMENTS).unwrap().lines().map(str::to_owned).collect();
    assert_eq!(format!("{:?}", super::main(&arguments)), format!("{:?}", ExitCode::SUCCESS));
}

#[test]
#[ignore = "the source process of other tests"]
fn acts_as_source() {
    let folder = PathBuf::from(env::var(SOURCE_FOLDER).unwrap());
    let source = FileGuest::source(logged(&folder, ""), Some(guard_program(&folder))).unwrap();
    source.pause().unwrap();
    if env::var("MEMFERRY_TEST_COMMIT").unwrap() == "yes" {
        source.committed();
    }
    fs::write(folder.join("is-there"), "").unwrap();
    thread::sleep(PATIENCE);
}
