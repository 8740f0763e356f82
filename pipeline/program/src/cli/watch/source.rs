//! Sources of event lines: a running migration over its control API, standard input, or a replayed file. A thread
//! reads them into a bounded queue.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;

use super::super::control::{in_words, socket};
use crate::api::client::{self, ClientError};
use memferry::threads::explained;
use memferry_report::event_json::EventLine;
use memferry_stages::untrusted::shown;

/// The number of lines that may be queued for display.
const WAITING: usize = 256;
/// The longest line that an event can have, in bytes.
const LONGEST: usize = 1 << 20;
/// The time limit for an answer to begin.
const PATIENCE: Duration = Duration::from_secs(10);

/// An item from a source.
#[derive(Debug)]
pub(super) enum Heard {
    Line(Box<EventLine>),
    /// A line that is not a known event.
    Strange,
    /// The source ended or failed.
    End(Result<(), Broken>),
}

/// Why there are no more lines.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    #[error("{name} holds no lines of events: the one that begins at byte {offset} is longer than {LONGEST} bytes")]
    Endless { name: String, offset: u64 },
    #[error("the events in {name} broke off at byte {offset}: {error}")]
    Read { name: String, offset: u64, error: io::Error },
    #[error("the events broke off: {0}")]
    Asked(#[from] ClientError),
}

/// Opens a source by its name and begins to read. A file is replayed at this multiple of its original speed, or at
/// once.
///
/// # Errors
/// If it cannot be opened, in words.
pub(super) async fn open(name: &str, speed: Option<f64>) -> Result<Receiver<Heard>, String> {
    let is_socket = Path::new(name).metadata().is_ok_and(|found| found.file_type().is_socket());
    if name == "-" {
        listen("standard input", Box::new(io::stdin()), None)
    } else if name.starts_with("unix:") || is_socket {
        follow(name).await
    } else {
        let file = File::open(name).map_err(|error| {
            let hint = "name what --control was given, a file that --events wrote, or - for lines on standard input";
            format!("{}: {error}; {hint}", shown(name))
        })?;
        listen(&shown(name), Box::new(file), speed)
    }
}

/// Requests the events of a running migration.
async fn follow(name: &str) -> Result<Receiver<Heard>, String> {
    let address = socket(name)?;
    let asked = tokio::time::timeout(PATIENCE, client::events(&address)).await;
    let mut lines = asked.map_err(|_| format!("{address} does not answer"))?.map_err(in_words)?;
    let (sender, heard) = sync_channel(WAITING);
    let runtime = Handle::current();
    in_background(move || {
        let end = loop {
            match runtime.block_on(lines.next()) {
                Ok(Some(line)) if sender.send(parse(line.as_bytes())).is_ok() => {}
                // The receiver is gone.
                Ok(Some(_)) => return,
                Ok(None) => break Ok(()),
                Err(error) => break Err(error.into()),
            }
        };
        drop(sender.send(Heard::End(end)));
    })?;
    Ok(heard)
}

/// Runs a reader on a thread of its own, which ends with the program: the receiver of its lines may be gone.
fn in_background(read: impl FnOnce() + Send + 'static) -> Result<(), String> {
    let started = thread::Builder::new().name("memferry-lines".into()).spawn(read);
    started.map(drop).map_err(|error| explained(error).to_string())
}

fn parse(line: &[u8]) -> Heard {
    let line = std::str::from_utf8(line).ok().and_then(|text| EventLine::from_json(text).ok());
    line.map_or(Heard::Strange, |line| Heard::Line(Box::new(line)))
}

fn listen(name: &str, input: Box<dyn Read + Send>, speed: Option<f64>) -> Result<Receiver<Heard>, String> {
    let (sender, heard) = sync_channel(WAITING);
    let name = name.to_owned();
    in_background(move || {
        let end = read(name, BufReader::new(input), &sender, &Pace::new(speed));
        drop(sender.send(Heard::End(end)));
    })?;
    Ok(heard)
}

fn read(name: String, mut input: impl BufRead, sender: &SyncSender<Heard>, pace: &Pace) -> Result<(), Broken> {
    let (mut line, mut offset) = (Vec::new(), 0);
    loop {
        line.clear();
        let most = LONGEST as u64 + 1;
        match (&mut input).take(most).read_until(b'\n', &mut line) {
            Ok(0) => return Ok(()),
            Ok(_) if line.len() > LONGEST => return Err(Broken::Endless { name, offset }),
            Ok(bytes) => offset += bytes as u64,
            Err(error) => return Err(Broken::Read { name, offset, error }),
        }
        let heard = parse(&line);
        if let Heard::Line(line) = &heard {
            pace.wait_for(line.ms);
        }
        if sender.send(heard).is_err() {
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
    /// The multiple of the original speed; 0 or `None`: at once.
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
    use memferry::events::{Event, Role};
    use memferry_report::event_json::EventJson;

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
    fn lines_are_distinguished_whatever_comes() {
        let (paused, long) = (line(&Event::Paused), "x".repeat(LONGEST - 1));
        let last = paused.trim_end();
        let text = format!("{paused}nonsense\n{long}\n\n{paused}{{\"event\":\n{last}");
        let heard =
            listen("x", Box::new(io::Cursor::new([text.as_bytes(), &[0xff, b'\n'][..]].concat())), None).unwrap();
        assert_eq!(all(&heard), "p???p??.");
        let heard = listen("x", Box::new(io::Cursor::new(format!("{paused}{last}"))), None).unwrap();
        assert_eq!(all(&heard), "pp.");
    }

    #[tokio::test]
    async fn a_line_without_an_end_is_reported_with_its_place() {
        let broken = |heard: Receiver<Heard>| match heard.iter().last() {
            Some(Heard::End(Err(broken))) => broken.to_string(),
            other => panic!("{other:?}"),
        };
        let paused = line(&Event::Paused);
        let text = io::Cursor::new(paused.clone()).chain(io::repeat(b'x'));
        let error = format!("x holds no lines of events: the one that begins at byte {} is longer", paused.len());
        assert!(broken(listen("x", Box::new(text), None).unwrap()).starts_with(&error));
        let error = broken(open("/dev/zero", None).await.unwrap());
        assert!(error.starts_with("/dev/zero holds no lines of events: the one that begins at byte 0 "), "{error}");
        let error = broken(open("/", None).await.unwrap());
        assert!(error.starts_with("the events in / broke off at byte 0: "), "{error}");
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
