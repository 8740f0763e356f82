//! When watching is over before the migration is: a signal comes, the terminal is gone, or nobody reads any more.
//!
//! A thread waits for that. What shows the migration is asked to end, and left behind if it does not: it may wait for room on a
//! terminal that takes nothing, or ask a terminal for keys that is not there any more.

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

/// How long what shows the migration may take to end.
const GRACE: Duration = Duration::from_millis(500);

/// True from the moment on when it is to end. Whoever has not ended soon after it is left behind: the program ends.
///
/// # Errors
/// When the system refuses.
pub(super) fn when_over() -> io::Result<Arc<AtomicBool>> {
    let (signalled, signal) = UnixStream::pair()?;
    for number in [&[SIGINT, SIGTERM][..], &heeded(&[SIGHUP])].concat() {
        low_level::pipe::register(number, signal.try_clone()?)?;
    }
    let is_over = Arc::<AtomicBool>::default();
    let tell = is_over.clone();
    let wait = move || {
        wait(&signalled);
        tell.store(true, Ordering::Relaxed);
        thread::sleep(GRACE);
        // The terminal may take nothing: only what needs no room on it is undone. It fails where there is none.
        drop(crossterm::terminal::disable_raw_mode());
        low_level::exit(i32::from(DONE));
    };
    thread::Builder::new().name("memferry-leave".into()).spawn(wait)?;
    Ok(is_over)
}

/// Waits for a signal, or until the terminal or the reader is gone.
fn wait(signalled: &UnixStream) {
    let (stdin, stdout) = (io::stdin(), io::stdout());
    // Keys come from standard input where that is a terminal, else from the terminal that controls this process.
    let terminal = (!stdin.is_terminal() && stdout.is_terminal()).then(|| File::open("/dev/tty").ok()).flatten();
    let mut ends: Vec<BorrowedFd<'_>> = vec![stdout.as_fd()];
    ends.extend(stdin.is_terminal().then_some(stdin.as_fd()));
    ends.extend(terminal.as_ref().map(AsFd::as_fd));
    let mut watched = vec![PollFd::new(signalled, PollFlags::IN)];
    // Asked for nothing, they tell of their end only.
    watched.extend(ends.iter().map(|end| PollFd::new(end, PollFlags::empty())));
    while poll(&mut watched, None) == Err(Errno::INTR) {}
}
