//! What a command that migrates says: standard error and standard output, each behind an [`Outlet`], so that nobody who says
//! something waits for whoever reads it. Standard error belongs to one thread: lines of the log, notices and progress, and the bar.
//!
//! Commands that only ask say what they have to say themselves, and wait as programs do.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::fmt;
use std::io::{self, IsTerminal, LineWriter, Write};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use memferry_stages::untrusted::shown_lines;

use crate::progress::{ProgressDisplay, ProgressLines, Screen};
use memferry::events::{Event, Observer, Role};
use memferry::outlet::{Direct, Outlet, Sink};

/// Lines that may wait on each of the two.
const WAITING: usize = 512;
/// How long the last lines may take.
const LAST_WORDS: Duration = Duration::from_secs(2);

static CONSOLE: OnceLock<Console> = OnceLock::new();

struct Console {
    stderr: Outlet<Shown>,
    stdout: Outlet<String>,
}

/// What standard error shows.
enum Shown {
    Text(Vec<u8>),
    /// Begin a bar about this end.
    Bar(Role),
    /// What moves the bar.
    Event(Role, Box<Event>),
}

/// From here on nobody who says something waits.
///
/// # Errors
/// When the system gives no threads.
pub(super) fn start() -> io::Result<()> {
    let stderr = Outlet::begin("memferry-stderr", WAITING, Terminal::default())?;
    let stdout = Outlet::begin("memferry-stdout", WAITING, Stdout)?;
    drop(CONSOLE.set(Console { stderr, stdout }));
    std::panic::set_hook(Box::new(|panic| {
        let trace = Backtrace::capture();
        match trace.status() {
            BacktraceStatus::Captured => tell!("memferry: {panic}\n{trace}"),
            _ => tell!("memferry: {panic}"),
        }
    }));
    Ok(())
}

/// Says a line on standard error. Nobody may read it any more (a closed terminal, a full disk): that ends nothing, as the panic of
/// `eprintln!` would.
pub(super) fn tell(line: fmt::Arguments<'_>) {
    tell_styled(&shown_lines(&line.to_string()));
}

/// Says lines that carry colours of their own, and nothing else that is unsafe to show.
pub(super) fn tell_styled(lines: &str) {
    let line = format!("{lines}\n");
    match CONSOLE.get() {
        Some(console) => console.stderr.put(Shown::Text(line.into_bytes())),
        None => drop(Direct(io::stderr()).write_all(line.as_bytes())),
    }
}

/// Says text on standard output, after what was said on standard error before it. False if nobody takes it.
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

/// Waits until all is said, for a limited time: what has not been taken by then is lost.
pub(super) fn flush(limit: Duration) {
    if let Some(console) = CONSOLE.get() {
        console.stderr.flush(limit);
        console.stdout.flush(limit);
    }
}

/// Dropped as the program ends, it waits for what was said last.
pub(super) struct LastWords;

impl Drop for LastWords {
    fn drop(&mut self) {
        flush(LAST_WORDS);
    }
}

/// Standard error as a writer that never waits. What is written at a time stays together.
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

/// Progress of an end: a bar on a terminal, lines elsewhere.
pub(super) fn progress(watched: Role) -> Arc<dyn Observer> {
    let Some(console) = CONSOLE.get().filter(|_| io::stderr().is_terminal()) else {
        return Arc::new(ProgressLines::new(watched, LineWriter::new(Stderr)));
    };
    console.stderr.put(Shown::Bar(watched));
    Arc::new(move |role: Role, event: &Event| {
        match event {
            _ if role != watched => {}
            // It takes the bar away.
            Event::Ended(_) => console.stderr.put(Shown::Event(role, Box::new(event.clone()))),
            _ => console.stderr.offer(Shown::Event(role, Box::new(event.clone()))),
        }
    })
}

/// What standard error's thread does.
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

/// What standard output's thread does.
struct Stdout;

impl Sink<String> for Stdout {
    fn take(&mut self, text: String) {
        // A reader that has seen enough closes the pipe.
        drop(Direct(io::stdout()).write_all(text.as_bytes()));
    }

    fn dropped(&mut self, count: u64) {
        tell!("memferry: {count} lines were dropped: standard output takes them too slowly");
    }
}
