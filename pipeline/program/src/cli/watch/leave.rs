//! Ends watching before the migration ends: on a signal, or when the terminal or the reader of the output is gone.
//!
//! A thread waits for that. The display is asked to end. If it does not end soon, the program exits without it: the
//! display may block on a terminal that accepts no output, or poll for keys on a terminal that is gone.

use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::low_level;

use crate::cli::signals::heeded;
use crate::cli::verdict::DONE;

/// How long the display may take to end.
const GRACE: Duration = Duration::from_millis(500);

/// A flag that becomes true when watching is to end. If the display does not end soon after, the program exits
/// without it.
///
/// # Errors
/// If the system refuses.
pub(super) fn when_over() -> io::Result<Arc<AtomicBool>> {
    let (signalled, signal) = UnixStream::pair()?;
    for number in [&[SIGINT, SIGTERM][..], &heeded(&[SIGHUP])].concat() {
        low_level::pipe::register(number, signal.try_clone()?)?;
    }
    let is_over = Arc::<AtomicBool>::default();
    let flag = is_over.clone();
    let wait = move || {
        wait(&signalled);
        flag.store(true, Ordering::Relaxed);
        thread::sleep(GRACE);
        // The terminal may accept no output: only what needs none is restored. Without a terminal this fails.
        drop(crossterm::terminal::disable_raw_mode());
        low_level::exit(i32::from(DONE));
    };
    thread::Builder::new().name("memferry-leave".into()).spawn(wait)?;
    Ok(is_over)
}

/// Waits for a signal, or until the terminal or the reader is gone.
fn wait(signalled: &UnixStream) {
    let (stdin, stdout) = (io::stdin(), io::stdout());
    // Keys are read from standard input if that is a terminal, else from the controlling terminal.
    let terminal = (!stdin.is_terminal() && stdout.is_terminal()).then(|| File::open("/dev/tty").ok()).flatten();
    let mut ends: Vec<BorrowedFd<'_>> = vec![stdout.as_fd()];
    ends.extend(stdin.is_terminal().then_some(stdin.as_fd()));
    ends.extend(terminal.as_ref().map(AsFd::as_fd));
    let mut watched = vec![PollFd::new(signalled, PollFlags::IN)];
    // With no events requested, poll reports only hang-ups and errors.
    watched.extend(ends.iter().map(|end| PollFd::new(end, PollFlags::empty())));
    while poll(&mut watched, None) == Err(Errno::INTR) {}
}
