//! The output of commands that migrate. Standard error and standard output each have an [`Outlet`], so that a writer
//! never waits for the reader. One thread owns standard error: it writes log lines, notices and progress, and the
//! bar.
//!
//! Commands that only query write their output themselves, and block as usual.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::fmt;
use std::io::{self, IsTerminal, LineWriter, Write};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use memferry_stages::untrusted::shown_lines;

use crate::progress::{ProgressDisplay, ProgressLines, Screen};
use memferry::events::{Event, Observer, Role};
use memferry::outlet::{Direct, Outlet, Sink};

/// The number of lines that may be queued on each of the two.
const WAITING: usize = 512;
/// The time limit for the last lines.
const LAST_WORDS: Duration = Duration::from_secs(2);

static CONSOLE: OnceLock<Console> = OnceLock::new();

struct Console {
    stderr: Outlet<Shown>,
    stdout: Outlet<String>,
}

/// An item for standard error.
enum Shown {
    Text(Vec<u8>),
    /// Start a progress bar for this end.
    Bar(Role),
    /// An event that updates the bar.
    Event(Role, Box<Event>),
}

/// Starts the threads. From here on writers do not block.
///
/// # Errors
/// If the system cannot create threads.
pub(super) fn start() -> io::Result<()> {
    let stderr = Outlet::begin("memferry-stderr", WAITING, Terminal::default())?;
    let stdout = Outlet::begin("memferry-stdout", WAITING, Stdout)?;
    drop(CONSOLE.set(Console { stderr, stdout }));
    std::panic::set_hook(Box::new(|panic| {
        let trace = Backtrace::capture();
        match trace.status() {
            BacktraceStatus::Captured => message!("memferry: {panic}\n{trace}"),
            _ => message!("memferry: {panic}"),
        }
    }));
    Ok(())
}

/// Writes a line to standard error. A write error (a closed terminal, a full disk) is ignored, where `eprintln!`
/// would panic.
pub(super) fn message(line: fmt::Arguments<'_>) {
    styled_message(&shown_lines(&line.to_string()));
}

/// Writes lines that contain colour codes of their own and no other unsafe text.
pub(super) fn styled_message(lines: &str) {
    let line = format!("{lines}\n");
    match CONSOLE.get() {
        Some(console) => console.stderr.put(Shown::Text(line.into_bytes())),
        None => drop(Direct(io::stderr()).write_all(line.as_bytes())),
    }
}

/// Writes text to standard output, after the earlier output on standard error. Returns false if it cannot be written.
pub(super) fn print(text: &str) -> bool {
    let text = format!("{}\n", shown_lines(text));
    match CONSOLE.get() {
        Some(console) => {
            console.stderr.flush(LAST_WORDS);
            console.stdout.put(text);
            console.stdout.flush(LAST_WORDS)
        }
        None => Direct(io::stdout()).write_all(text.as_bytes()).is_ok(),
    }
}

/// Waits until all output is written, for a limited time: the rest is lost.
pub(super) fn flush(limit: Duration) {
    if let Some(console) = CONSOLE.get() {
        console.stderr.flush(limit);
        console.stdout.flush(limit);
    }
}

/// Dropped at the end of the program, it waits for the last output.
pub(super) struct LastWords;

impl Drop for LastWords {
    fn drop(&mut self) {
        flush(LAST_WORDS);
    }
}

/// Standard error as a writer that never blocks. The bytes of one write stay together.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match CONSOLE.get() {
            Some(console) => console.stderr.put(Shown::Text(bytes.into())),
            None => Direct(io::stderr()).write_all(bytes)?,
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Shows the progress of an end: a bar on a terminal, lines elsewhere.
pub(super) fn progress(watched: Role) -> Arc<dyn Observer> {
    let Some(console) = CONSOLE.get().filter(|_| io::stderr().is_terminal()) else {
        return Arc::new(ProgressLines::new(watched, LineWriter::new(Stderr)));
    };
    console.stderr.put(Shown::Bar(watched));
    Arc::new(move |role: Role, event: &Event| {
        match event {
            _ if role != watched => {}
            // This event removes the bar.
            Event::Ended(_) => console.stderr.put(Shown::Event(role, Box::new(event.clone()))),
            _ => console.stderr.offer(Shown::Event(role, Box::new(event.clone()))),
        }
    })
}

/// The work of standard error's thread.
#[derive(Default)]
struct Terminal {
    screen: Screen,
    bar: Option<ProgressDisplay>,
}

impl Sink<Shown> for Terminal {
    fn take(&mut self, shown: Shown) {
        match shown {
            Shown::Text(text) => drop(self.screen.write(&text)),
            Shown::Bar(role) => self.bar = Some(ProgressDisplay::new(role, &self.screen)),
            Shown::Event(role, event) => self.bar.iter().for_each(|bar| bar.event(role, &event)),
        }
    }

    fn dropped(&mut self, count: u64) {
        let line = format!("memferry: {count} lines were dropped: standard error takes them too slowly\n");
        drop(self.screen.write(line.as_bytes()));
    }
}

/// The work of standard output's thread.
struct Stdout;

impl Sink<String> for Stdout {
    fn take(&mut self, text: String) {
        // A reader that has read enough closes the pipe.
        drop(Direct(io::stdout()).write_all(text.as_bytes()));
    }

    fn dropped(&mut self, count: u64) {
        message!("memferry: {count} lines were dropped: standard output takes them too slowly");
    }
}
