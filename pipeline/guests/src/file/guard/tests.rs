//! The guard, with processes that are killed. The last two tests are run by the others as separate processes.

use std::env;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::process::{Pid, Signal, getsid, kill_process};
use tempfile::TempDir;

use super::line::{Answer, Line, Orders, Request};
use super::watch::{Left, Watch};
use crate::file::FileGuest;
use crate::file::tests::{log, logged};
use memferry::guest::SourceGuest;

const SOURCE_FOLDER: &str = "MEMFERRY_TEST_SOURCE_FOLDER";
const SOURCE_STOPS: &str = "MEMFERRY_TEST_SOURCE_STOPS";
const SOURCE_TIMEOUT_MS: &str = "MEMFERRY_TEST_SOURCE_TIMEOUT_MS";
const PATIENCE: Duration = Duration::from_secs(60);
/// A pause command that has begun, and ends when the test permits it.
const SLOW_PAUSE: &str = "until [ -e let-go ]; do sleep 0.01; done; echo paused >> log";

/// A guard program: this test program as [`acts_as_guard`], run by a script that writes its process id to `guard`.
fn guard_program(folder: &Path) -> PathBuf {
    let script = folder.join("guard.sh");
    let text = format!(
        "#!/bin/sh\n[ \"$*\" = guard ] || exit 9\ncd '{0}'\necho $$ > guard\n\
         exec '{1}' --exact file::guard::tests::acts_as_guard --ignored --nocapture\n",
        folder.display(),
        env::current_exe().unwrap().display(),
    );
    fs::write(&script, text).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o700)).unwrap();
    script
}

fn guard_pid(folder: &Path) -> Pid {
    let number = fs::read_to_string(folder.join("guard")).unwrap().trim().parse().unwrap();
    Pid::from_raw(number).unwrap()
}

/// Does the process run? A zombie does not.
fn is_alive(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_pid()));
    stat.is_ok_and(|stat| !stat.contains(") Z ") && !stat.contains(") X "))
}

fn until(what: &str, fine: impl Fn() -> bool) {
    let begin = Instant::now();
    while !fine() {
        assert!(begin.elapsed() < PATIENCE, "waited in vain: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// How far a source in a separate process gets.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Stops {
    /// It is being paused, by a command that does not end before the file `let-go` exists.
    InPause,
    /// The same, and the command may take no longer than [`SOURCE_TIMEOUT_MS`].
    InPauseTooLong,
    Paused,
    Committed,
    Moved,
}

/// A source process that has got this far. Its standard error, and so its guard's, is `stderr`.
fn source_process(folder: &Path, stops: Stops, stderr: impl Into<Stdio>) -> Child {
    source_process_within(Duration::ZERO, folder, stops, stderr)
}

/// The same, with a time limit for [`Stops::InPauseTooLong`].
fn source_process_within(timeout: Duration, folder: &Path, stops: Stops, stderr: impl Into<Stdio>) -> Child {
    let child = Command::new(env::current_exe().unwrap())
        .args(["--exact", "file::guard::tests::acts_as_source", "--ignored", "--nocapture"])
        .env(SOURCE_FOLDER, folder)
        .env(SOURCE_STOPS, format!("{stops:?}"))
        .env(SOURCE_TIMEOUT_MS, timeout.as_millis().to_string())
        .stdout(Stdio::null())
        .stderr(stderr)
        .spawn()
        .unwrap();
    if stops == Stops::InPause {
        until("the pause command runs", || log(folder) == "pause");
    } else if stops == Stops::InPauseTooLong {
        until("the pause command runs, or is over", || !log(folder).is_empty());
    } else {
        until("the source has come so far", || folder.join("is-there").exists());
        assert_eq!(log(folder), "pause");
    }
    child
}

/// Kills the source. Returns the text on its standard error once the guard has ended, too.
fn killed(mut source: Child, guard: Pid) -> String {
    source.kill().unwrap();
    source.wait().unwrap();
    let mut said = String::new();
    source.stderr.take().map(|mut stderr| stderr.read_to_string(&mut said).unwrap());
    until("the guard ends", || !is_alive(guard));
    said
}

#[test]
fn a_source_killed_between_pause_and_go_is_resumed_by_its_guard() {
    let folder = TempDir::new().unwrap();
    let source = source_process(folder.path(), Stops::Paused, Stdio::piped());
    let guard = guard_pid(folder.path());
    assert_eq!(getsid(Some(guard)).unwrap(), guard, "the guard has a session of its own");
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        kill_process(guard, signal).unwrap();
    }
    let said = killed(source, guard);
    assert_eq!(log(folder.path()), "pause resume");
    assert!(said.contains("memferry guard: ") && said.contains("the guest was resumed"), "{said}");
}

#[test]
fn a_source_killed_while_it_is_paused_is_resumed_when_the_pause_has_ended() {
    let folder = TempDir::new().unwrap();
    let mut source = source_process(folder.path(), Stops::InPause, Stdio::null());
    source.kill().unwrap();
    source.wait().unwrap();
    assert_eq!(log(folder.path()), "pause");
    fs::write(folder.path().join("let-go"), "").unwrap();
    until("the guard resumes the guest", || log(folder.path()) == "pause paused resume");
    until("the guard ends", || !is_alive(guard_pid(folder.path())));
}

#[test]
fn a_pause_that_takes_too_long_is_ended_before_the_guest_is_resumed() {
    // On a busy machine the time may be over before the source is killed.
    let mut timeout = Duration::from_millis(500);
    let folder = loop {
        let folder = TempDir::new().unwrap();
        let source = source_process_within(timeout, folder.path(), Stops::InPauseTooLong, Stdio::null());
        let guard = guard_pid(folder.path());
        let is_in_time = log(folder.path()) == "pause";
        killed(source, guard);
        if is_in_time {
            break folder;
        }
        timeout *= 2;
    };
    assert_eq!(log(folder.path()), "pause resume");
    fs::write(folder.path().join("let-go"), "").unwrap();
    thread::sleep(Duration::from_millis(100));
    assert_eq!(log(folder.path()), "pause resume", "nothing of the pause command is left");
}

#[test]
fn a_source_killed_after_it_committed_stays_paused_and_the_guard_says_where_to_look() {
    let folder = TempDir::new().unwrap();
    let source = source_process(folder.path(), Stops::Committed, Stdio::piped());
    let guard = guard_pid(folder.path());
    assert!(is_alive(guard));
    let said = killed(source, guard);
    assert_eq!(log(folder.path()), "pause");
    for words in ["memferry guard: ", "tcp:there:1", "paused here", "resume it here: [\"sh\", "] {
        assert!(said.contains(words), "{words:?} is missing: {said}");
    }
}

#[test]
fn a_guard_has_nothing_to_say_of_a_guest_that_moved() {
    let folder = TempDir::new().unwrap();
    let source = source_process(folder.path(), Stops::Moved, Stdio::piped());
    let guard = guard_pid(folder.path());
    assert!(!is_alive(guard), "the guard is gone when moved has returned");
    assert_eq!(killed(source, guard), "");
    assert_eq!(log(folder.path()), "pause");
}

#[test]
fn a_guard_whose_standard_error_is_stuck_resumes_first_and_speaks_when_somebody_reads() {
    let folder = TempDir::new().unwrap();
    let (mut reader, writer) = io::pipe().unwrap();
    fill(&writer);
    let source = source_process(folder.path(), Stops::Paused, writer);
    let guard = guard_pid(folder.path());
    let mut source = source;
    source.kill().unwrap();
    source.wait().unwrap();
    until("the guard resumes the guest", || log(folder.path()) == "pause resume");
    let mut said = Vec::new();
    reader.read_to_end(&mut said).unwrap();
    assert!(String::from_utf8_lossy(&said).ends_with("the guest was resumed\n"));
    until("the guard ends", || !is_alive(guard));
}

/// Fills a pipe completely, so that it blocks its writers.
fn fill(pipe: &io::PipeWriter) {
    fcntl_setfl(pipe, OFlags::WRONLY | OFlags::NONBLOCK).unwrap();
    let mut pipe_end = pipe;
    for piece in [&[b' '; 4096][..], b" "] {
        while pipe_end.write(piece).is_ok() {}
    }
    fcntl_setfl(pipe, OFlags::WRONLY).unwrap();
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

/// The destination refuses after Go: the guest is resumed.
#[test]
fn a_committed_guest_is_resumed_if_that_is_asked_for() {
    let folder = TempDir::new().unwrap();
    let source = FileGuest::source(logged(folder.path(), ""), Some(guard_program(folder.path()))).unwrap();
    source.pause().unwrap();
    source.committed("tcp:there:1").unwrap();
    source.resume().unwrap();
    assert_eq!(log(folder.path()), "pause resume");
    assert!(!is_alive(guard_pid(folder.path())));
}

#[test]
fn a_guard_killed_in_the_pause_leaves_no_command_behind_that_pauses_later() {
    let folder = TempDir::new().unwrap();
    let settings = logged(folder.path(), &format!("cd '{}'; {SLOW_PAUSE}", folder.path().display()));
    let source = FileGuest::source(settings, Some(guard_program(folder.path()))).unwrap();
    thread::scope(|scope| {
        let pausing = scope.spawn(|| source.pause());
        until("the pause command runs", || log(folder.path()) == "pause");
        kill_process(guard_pid(folder.path()), Signal::KILL).unwrap();
        until("the guard is gone", || !is_alive(guard_pid(folder.path())));
        fs::write(folder.path().join("let-go"), "").unwrap();
        let error = pausing.join().unwrap().unwrap_err().to_string();
        assert!(error.contains("the guard was lost while it ran the pause command"), "{error}");
    });
    assert_eq!(log(folder.path()), "pause paused resume");
}

#[test]
fn without_a_guard_that_answers_nothing_is_committed_and_the_guest_is_resumed_all_the_same() {
    let folder = TempDir::new().unwrap();
    let source = FileGuest::source(logged(folder.path(), ""), Some(guard_program(folder.path()))).unwrap();
    source.pause().unwrap();
    kill_process(guard_pid(folder.path()), Signal::KILL).unwrap();
    let error = source.committed("tcp:there:1").unwrap_err().to_string();
    assert!(error.contains("the guest is not handed over"), "{error}");
    source.resume().unwrap();
    assert_eq!(log(folder.path()), "pause resume");
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

/// The behaviour of a guard whose line is driven by the test.
fn watched(folder: &Path, play: impl FnOnce(&mut Line)) -> Option<Left> {
    let settings = logged(folder, "");
    let orders =
        Orders { pause: settings.pause.unwrap(), resume: settings.resume.unwrap(), timeout: settings.command_timeout };
    let (ours, theirs) = UnixStream::pair().unwrap();
    thread::scope(|scope| {
        let guard = scope.spawn(move || Watch::new(orders).run_to_end(&mut Line::new(theirs)));
        let mut line = Line::new(ours);
        play(&mut line);
        drop(line);
        guard.join().unwrap()
    })
}

#[track_caller]
fn is_paused(line: &mut Line) {
    line.send(&Request::Pause).unwrap();
    assert!(matches!(line.receive().unwrap(), Some(Answer::Started(_))));
    assert_eq!(line.receive().unwrap(), Some(Answer::Done));
}

fn commit() -> Request {
    Request::Commit { destination: "tcp:there:1\u{1b}[2J".into() }
}

/// Waits until the guard has answered, and reads none of the answer.
fn until_answered(line: &Line) {
    poll(&mut [PollFd::new(line.socket(), PollFlags::IN)], None).unwrap();
}

#[test]
fn go_has_not_left_before_the_answer_to_commit_is_read_so_the_guest_is_resumed() {
    let folder = TempDir::new().unwrap();
    let left = watched(folder.path(), |line| {
        is_paused(line);
        line.send(&commit()).unwrap();
        until_answered(line);
    });
    assert!(left.unwrap().words.ends_with("the guest was resumed"));
    assert_eq!(log(folder.path()), "pause resume");
}

#[test]
fn go_may_have_left_from_when_the_answer_to_commit_is_read_so_the_guest_is_not_resumed() {
    let folder = TempDir::new().unwrap();
    let left = watched(folder.path(), |line| {
        is_paused(line);
        line.send(&commit()).unwrap();
        assert_eq!(line.receive().unwrap(), Some(Answer::Done));
    });
    let words = left.unwrap().words;
    assert!(words.contains(r"tcp:there:1\u{1b}[2J") && !words.contains('\u{1b}'), "{words}");
    assert_eq!(log(folder.path()), "pause");
}

#[test]
fn half_a_request_is_none() {
    let folder = TempDir::new().unwrap();
    let left = watched(folder.path(), |line| {
        is_paused(line);
        line.socket().write_all(br#"{"Commit":{"destination":"tcp:"#).unwrap();
    });
    assert!(left.unwrap().succeeded);
    assert_eq!(log(folder.path()), "pause resume");
    assert_eq!(watched(folder.path(), |line| line.send(&Request::Dismiss).unwrap()), None);
    assert_eq!(watched(folder.path(), |_| {}), None);
}

#[test]
#[ignore = "the guard process of other tests"]
fn acts_as_guard() {
    assert_eq!(format!("{:?}", super::main()), format!("{:?}", ExitCode::SUCCESS));
}

#[test]
#[ignore = "the source process of other tests"]
fn acts_as_source() {
    let folder = PathBuf::from(env::var(SOURCE_FOLDER).unwrap());
    let stops = env::var(SOURCE_STOPS).unwrap();
    let is = |stop: Stops| stops == format!("{stop:?}");
    let slowly = format!("cd '{}'; {SLOW_PAUSE}", folder.display());
    let is_slow = is(Stops::InPause) || is(Stops::InPauseTooLong);
    let mut settings = logged(&folder, if is_slow { &slowly } else { "" });
    if is(Stops::InPauseTooLong) {
        let timeout = env::var(SOURCE_TIMEOUT_MS).unwrap().parse().unwrap();
        settings.command_timeout = Duration::from_millis(timeout);
    }
    let source = FileGuest::source(settings, Some(guard_program(&folder))).unwrap();
    let paused = source.pause();
    if is_slow {
        thread::sleep(PATIENCE);
    }
    paused.unwrap();
    if is(Stops::Committed) || is(Stops::Moved) {
        source.committed("tcp:there:1").unwrap();
    }
    if is(Stops::Moved) {
        source.moved();
    }
    fs::write(folder.join("is-there"), "").unwrap();
    thread::sleep(PATIENCE);
}
