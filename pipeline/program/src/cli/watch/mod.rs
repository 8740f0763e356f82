//! `memferry watch`: a live view of a running or recorded migration.
//!
//! Reads lines of events ([`source`]), folds them into a [`model`], and draws that on the terminal ([`view`]). If
//! standard output is not a terminal, it writes a line for each event ([`words`]). The terminal is restored on every
//! exit.

mod leave;
mod model;
mod source;
#[cfg(test)]
mod tests;
mod view;
mod words;

use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Duration;

use crossterm::event::{self, KeyCode, KeyEventKind, KeyModifiers};
use memferry_stages::untrusted::shown;
use ratatui::DefaultTerminal;

use super::verdict::{DONE, FAILED};
use model::Model;
use source::{Broken, Heard};
use view::Theme;
use words::EventLines;

/// The time between two frames.
const FRAME: Duration = Duration::from_millis(100);
/// The most lines that are entered between two polls for keys.
const LINES: usize = 1000;

/// How watching ended.
#[derive(Debug)]
enum Outcome {
    /// The migration has ended, or the lines have.
    Over,
    /// The user quit.
    Quit,
    /// The source of lines failed.
    Broke(Broken),
}

/// Watches a source until it ends or the user quits, and returns the exit code.
///
/// # Errors
/// If the terminal or the system fails.
pub(super) async fn watch(name: &str, speed: Option<f64>) -> io::Result<u8> {
    let stop = leave::when_over()?;
    let on_screen = io::stdout().is_terminal() && std::env::var_os("TERM").is_some_and(|term| term != "dumb");
    let heard = match source::open(name, speed.or(on_screen.then_some(1.0))).await {
        Ok(heard) => heard,
        Err(why) => {
            message!("memferry: {why}");
            return Ok(FAILED);
        }
    };
    let name = if name == "-" { "standard input".into() } else { shown(name).into_owned() };
    let show = move || if on_screen { show(&name, &heard, &stop) } else { print(&name, &heard, &stop) };
    tokio::task::spawn_blocking(show).await.map_err(io::Error::other)?
}

/// Watches on a terminal.
fn show(name: &str, heard: &Receiver<Heard>, stop: &AtomicBool) -> io::Result<u8> {
    let mut model = Model::default();
    let outcome = {
        let mut screen = Screen::open()?;
        match until_the_end(&mut screen, &mut model, heard, stop) {
            // A terminal that is gone can neither be drawn on nor polled.
            Err(_) if stop.load(Ordering::Relaxed) => Outcome::Quit,
            outcome => outcome?,
        }
    };
    Ok(conclude(name, &model, outcome))
}

fn until_the_end(
    screen: &mut Screen,
    model: &mut Model,
    heard: &Receiver<Heard>,
    stop: &AtomicBool,
) -> io::Result<Outcome> {
    loop {
        let over = enter(model, heard);
        screen.draw(model)?;
        if let Some(over) = over {
            return Ok(over);
        }
        if stop.load(Ordering::Relaxed) || wants_to_quit()? {
            return Ok(Outcome::Quit);
        }
    }
}

/// Enters the queued lines; returns a result once there are no more to come.
fn enter(model: &mut Model, heard: &Receiver<Heard>) -> Option<Outcome> {
    for _ in 0..LINES {
        match heard.try_recv() {
            Ok(Heard::Line(line)) => model.take(&line),
            Ok(Heard::Strange) => model.strange += 1,
            Ok(Heard::End(Err(error))) => return Some(Outcome::Broke(error)),
            Ok(Heard::End(Ok(()))) | Err(TryRecvError::Disconnected) => return Some(Outcome::Over),
            Err(TryRecvError::Empty) => break,
        }
    }
    model.is_over().then_some(Outcome::Over)
}

/// Waits for the next frame, or for a key before it. A resize is drawn at once.
fn wants_to_quit() -> io::Result<bool> {
    if !event::poll(FRAME)? {
        return Ok(false);
    }
    let event::Event::Key(key) = event::read()? else { return Ok(false) };
    let control_c = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
    Ok(key.kind == KeyEventKind::Press && (control_c || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc)))
}

/// The terminal in raw mode. Dropped, it is restored; on a panic it is restored before the message is printed.
struct Screen {
    terminal: DefaultTerminal,
    theme: Theme,
}

impl Screen {
    fn open() -> io::Result<Self> {
        let colours = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Ok(Self { terminal: ratatui::try_init()?, theme: Theme { colours } })
    }

    fn draw(&mut self, model: &Model) -> io::Result<()> {
        self.terminal.draw(|frame| view::draw(frame, model, self.theme)).map(drop)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // The terminal may be gone.
        drop(ratatui::try_restore());
    }
}

/// Watches without a terminal: a line for each event.
fn print(name: &str, heard: &Receiver<Heard>, stop: &AtomicBool) -> io::Result<u8> {
    let (mut model, mut lines) = (Model::default(), EventLines::default());
    loop {
        let outcome = match heard.recv_timeout(FRAME) {
            Ok(Heard::Line(line)) => {
                model.take(&line);
                // A reader that has read enough closes the pipe.
                let written = lines.line(&line).map_or(Ok(()), |text| writeln!(io::stdout(), "{text}"));
                match written {
                    Ok(()) if model.is_over() => Outcome::Over,
                    Ok(()) => continue,
                    Err(_) => Outcome::Quit,
                }
            }
            Ok(Heard::Strange) => {
                model.strange += 1;
                continue;
            }
            Ok(Heard::End(end)) => end.map_or_else(Outcome::Broke, |()| Outcome::Over),
            Err(_) if stop.load(Ordering::Relaxed) => Outcome::Quit,
            Err(_) => continue,
        };
        return Ok(code(name, &model, &outcome));
    }
}

/// The summary that stays on the terminal.
fn conclude(name: &str, model: &Model, outcome: Outcome) -> u8 {
    if let Some(ended) = &model.shown().1.ended {
        drop(writeln!(io::stdout(), "{}", words::printable(&words::verdict(ended))));
    }
    code(name, model, &outcome)
}

fn code(name: &str, model: &Model, outcome: &Outcome) -> u8 {
    match outcome {
        Outcome::Quit => DONE,
        Outcome::Over if model.shown().1.ended.is_some() => DONE,
        Outcome::Over if model.ms == 0.0 && model.strange > 0 => {
            message!("memferry: {name} holds no events of a migration");
            FAILED
        }
        Outcome::Over => {
            message!(
                "memferry: the events of {name} ended before the migration did: the program that wrote them may be gone"
            );
            FAILED
        }
        Outcome::Broke(broken) => {
            message!("memferry: {broken}");
            FAILED
        }
    }
}
