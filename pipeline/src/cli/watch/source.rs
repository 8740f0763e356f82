//! Where lines of events come from: a migration that is asked over its control API, standard input, or a file that is replayed.
//! A thread of its own reads them into a bounded queue.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;

use super::super::control::{in_words, socket};
use crate::api::client;
use crate::report::event_json::EventLine;

/// Lines that may wait to be shown.
const WAITING: usize = 256;
/// The longest line that is looked at.
const LONGEST: u64 = 1 << 20;
/// How long an answer may take to begin.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is heard.
#[derive(Debug)]
pub(super) enum Heard {
    Line(Box<EventLine>),
    /// A line that is no event known here.
    Strange,
    /// The source ended, or broke.
    End(io::Result<()>),
}

/// Opens a source by its name and begins to read. A file is replayed so many times faster than it happened, or at once.
///
/// # Errors
/// When it cannot be opened, in words.
pub(super) async fn open(name: &str, speed: Option<f64>) -> Result<Receiver<Heard>, String> {
    let is_socket = Path::new(name).metadata().is_ok_and(|found| found.file_type().is_socket());
    if name == "-" {
        Ok(listen(Box::new(io::stdin()), None))
    } else if name.starts_with("unix:") || is_socket {
        follow(name).await
    } else {
        let file = File::open(name).map_err(|error| {
            let hint = "name what --control was given, a file that --events wrote, or - for lines on standard input";
            format!("{name}: {error}; {hint}")
        })?;
        Ok(listen(Box::new(file), speed))
    }
}

/// Asks a running migration for its events.
async fn follow(name: &str) -> Result<Receiver<Heard>, String> {
    let address = socket(name)?;
    let asked = tokio::time::timeout(PATIENCE, client::events(&address)).await;
    let mut lines = asked.map_err(|_| format!("{address} does not answer"))?.map_err(in_words)?;
    let (tell, heard) = sync_channel(WAITING);
    let runtime = Handle::current();
    thread::spawn(move || {
        let end = loop {
            match runtime.block_on(lines.next()) {
                Ok(Some(line)) if tell.send(parse(line.as_bytes())).is_ok() => {}
                // Nobody listens any more.
                Ok(Some(_)) => return,
                Ok(None) => break Ok(()),
                Err(error) => break Err(io::Error::other(error)),
            }
        };
        drop(tell.send(Heard::End(end)));
    });
    Ok(heard)
}

fn parse(line: &[u8]) -> Heard {
    let line = std::str::from_utf8(line).ok().and_then(|text| EventLine::from_json(text).ok());
    line.map_or(Heard::Strange, |line| Heard::Line(Box::new(line)))
}

fn listen(input: Box<dyn Read + Send>, speed: Option<f64>) -> Receiver<Heard> {
    let (tell, heard) = sync_channel(WAITING);
    // Whoever shows it may have gone; the thread ends with the program.
    thread::spawn(move || {
        let end = read(BufReader::new(input), &tell, &Pace::new(speed));
        drop(tell.send(Heard::End(end)));
    });
    heard
}

fn read(mut input: impl BufRead, tell: &SyncSender<Heard>, pace: &Pace) -> io::Result<()> {
    let mut line = Vec::new();
    loop {
        line.clear();
        if (&mut input).take(LONGEST).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        let heard = parse(&line);
        match &heard {
            Heard::Line(line) => pace.wait_for(line.ms),
            _ if !line.ends_with(b"\n") => drop(input.skip_until(b'\n')?),
            _ => {}
        }
        if tell.send(heard).is_err() {
            return Ok(());
        }
    }
}

/// How fast a file is replayed.
#[derive(Debug)]
struct Pace {
    began: Instant,
    speed: Option<f64>,
}

impl Pace {
    /// So many times faster than it happened; 0 or nothing: at once.
    fn new(speed: Option<f64>) -> Self {
        Self { began: Instant::now(), speed: speed.filter(|speed| *speed > 0.0) }
    }

    fn wait_for(&self, ms: f64) {
        let Some(speed) = self.speed else { return };
        let at = Duration::try_from_secs_f64(ms / 1e3 / speed).unwrap_or_default();
        thread::sleep(at.saturating_sub(self.began.elapsed()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::{Event, Role};
    use crate::report::event_json::EventJson;

    fn line(event: &Event) -> String {
        EventLine::new(Duration::from_millis(5), Role::Source, event).to_json()
    }

    fn all(heard: &Receiver<Heard>) -> String {
        let sign = |heard: Heard| match heard {
            Heard::Line(line) if line.event == EventJson::Paused => 'p',
            Heard::Line(_) => 'l',
            Heard::Strange => '?',
            Heard::End(Ok(())) => '.',
            Heard::End(Err(_)) => '!',
        };
        heard.iter().map(sign).collect()
    }

    #[test]
    fn lines_are_told_apart_whatever_comes() {
        let (paused, long) = (line(&Event::Paused), "x".repeat(3 << 20));
        let last = paused.trim_end();
        let text = format!("{paused}nonsense\n{long}\n\n{paused}{{\"event\":\n{last}");
        let heard = listen(Box::new(io::Cursor::new([text.as_bytes(), &[0xff, b'\n'][..]].concat())), None);
        assert_eq!(all(&heard), "p???p??.");
        let heard = listen(Box::new(io::Cursor::new(format!("{paused}{last}"))), None);
        assert_eq!(all(&heard), "pp.");
    }

    #[tokio::test]
    async fn a_file_is_replayed_at_its_pace() {
        let folder = tempfile::tempdir().unwrap();
        let name = folder.path().join("events.jsonl");
        let at = |ms| EventLine::new(Duration::from_millis(ms), Role::Source, &Event::Paused).to_json();
        std::fs::write(&name, at(0) + &at(200)).unwrap();
        let began = Instant::now();
        assert_eq!(all(&open(name.to_str().unwrap(), Some(4.0)).await.unwrap()), "pp.");
        assert!(began.elapsed() >= Duration::from_millis(50));
        assert_eq!(all(&open(name.to_str().unwrap(), None).await.unwrap()), "pp.");
        assert!(open("/absent/events.jsonl", None).await.unwrap_err().contains("--events"));
    }
}
