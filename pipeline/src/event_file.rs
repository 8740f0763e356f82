//! `--events FILE`: every event as a line of JSON ([`event_json`](crate::report::event_json)), as it happens.
//!
//! An observer must not block, and a disk may: a thread of its own writes, behind a bounded queue. What finds the queue full,
//! or the disk, is left out, and the last line says how much that was; the migration goes on.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use crate::events::{Event, Observer, Role};
use crate::report::event_json::EventLine;
use crate::threads::explained;

/// Lines that may wait: about a minute of a migration, some 2 MiB.
const WAITING: usize = 1024;
/// How long the last lines may take.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// A file that is written while a migration runs.
#[derive(Debug)]
pub(crate) struct EventFile {
    name: PathBuf,
    /// What is written to; nothing where that is standard output.
    file: Option<File>,
    began: Instant,
    /// Nothing once it is closed.
    lines: Mutex<Option<SyncSender<EventLine>>>,
    lost: Arc<AtomicU64>,
    ended: Mutex<Receiver<Outcome>>,
}

/// How many events are missing, and what the system said if it failed.
#[derive(Debug)]
struct Outcome {
    lost: u64,
    error: Option<io::Error>,
}

impl EventFile {
    /// A file for its owner only, or one that is there, emptied; `-` is standard output.
    ///
    /// # Errors
    /// When it cannot be written, or is a disk.
    pub(crate) fn create(file: &Path) -> io::Result<Self> {
        if is_stdout(file) {
            return Self::begin(file, Box::new(io::stdout()));
        }
        let out = open(file)?;
        let kept = out.try_clone()?;
        Ok(Self { file: Some(kept), ..Self::begin(file, Box::new(out))? })
    }

    fn begin(file: &Path, out: Box<dyn Write + Send>) -> io::Result<Self> {
        let (lines, queue) = sync_channel(WAITING);
        let (end, ended) = sync_channel(1);
        let (began, lost) = (Instant::now(), Arc::<AtomicU64>::default());
        let writer = Writer { out, name: file.to_owned(), began, torn: false, lost: lost.clone(), error: None };
        // The receiver is gone if nobody waited long enough.
        let write = move || drop(end.send(writer.run(&queue)));
        thread::Builder::new().name("memferry-events".into()).spawn(write).map_err(explained)?;
        let (lines, ended) = (Mutex::new(Some(lines)), Mutex::new(ended));
        Ok(Self { name: file.to_owned(), file: None, began, lines, lost, ended })
    }

    pub(crate) fn is_stdout(&self) -> bool {
        is_stdout(&self.name)
    }

    /// Has it no name any more, so that nobody can read it? One that was renamed can be read.
    fn was_removed(&self) -> bool {
        let found = self.file.as_ref().and_then(|file| file.metadata().ok());
        found.is_some_and(|found| found.nlink() == 0) && !self.name.exists()
    }

    /// Writes what waits and the last line, and names what is missing, if anything is. Events after it are not written.
    pub(crate) fn close(&self) -> Option<String> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        let outcome = self.ended.lock().unwrap_or_else(PoisonError::into_inner).recv_timeout(LAST_WORDS);
        let name = self.name.display();
        match outcome {
            Ok(Outcome { lost: 0, error: None }) if self.was_removed() => {
                Some(format!("the events in {name}: the file was removed"))
            }
            Ok(Outcome { lost: 0, error: None }) => None,
            Ok(Outcome { lost, error: Some(error) }) => {
                Some(format!("the events in {name}, of which {lost} are missing: {error}"))
            }
            Ok(Outcome { lost, error: None }) => {
                Some(format!("the events in {name}, of which {lost} are missing: it takes them too slowly"))
            }
            Err(_) => Some(format!("the events in {name}: it takes no more")),
        }
    }
}

impl Observer for EventFile {
    fn event(&self, role: Role, event: &Event) {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(lines) = lines.as_ref() else { return };
        if let Err(TrySendError::Full(_)) = lines.try_send(EventLine::new(self.began.elapsed(), role, event)) {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn is_stdout(file: &Path) -> bool {
    file == Path::new("-")
}

fn open(file: &Path) -> io::Result<File> {
    if file.metadata().is_ok_and(|found| found.file_type().is_block_device()) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is a disk, and would be written over"));
    }
    File::options().write(true).create(true).truncate(true).mode(0o600).open(file)
}

/// The thread that writes.
struct Writer {
    out: Box<dyn Write + Send>,
    name: PathBuf,
    began: Instant,
    /// Is the last line cut off?
    torn: bool,
    lost: Arc<AtomicU64>,
    /// The first failure.
    error: Option<io::Error>,
}

impl Writer {
    fn run(mut self, queue: &Receiver<EventLine>) -> Outcome {
        self.put(&EventLine::started(SystemTime::now()));
        while let Ok(line) = queue.recv() {
            self.put(&line);
        }
        let lost = self.lost.load(Ordering::Relaxed);
        if lost > 0 {
            self.put(&EventLine::lost(self.began.elapsed(), lost));
        }
        Outcome { lost, error: self.error }
    }

    /// Writes a line, or counts it as lost.
    fn put(&mut self, line: &EventLine) {
        let Err(error) = self.write(line.to_json().as_bytes()) else { return };
        self.lost.fetch_add(1, Ordering::Relaxed);
        if self.error.is_none() {
            tracing::warn!("events cannot be written to {}: {error}; the migration goes on", self.name.display());
            self.error = Some(error);
        }
    }

    /// The line reaches the file whole, or the next one begins a line of its own.
    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        if self.torn {
            self.out.write_all(b"\n")?;
        }
        self.torn = true;
        self.out.write_all(line)?;
        self.out.flush()?;
        self.torn = false;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::event_json::EventJson;
    use crate::report::tests::script;
    use std::os::unix::fs::PermissionsExt;

    fn read(text: &[u8]) -> Vec<EventLine> {
        let lines = std::str::from_utf8(text).unwrap().lines();
        lines.filter_map(|line| EventLine::from_json(line).ok()).collect()
    }

    #[test]
    fn a_file_has_every_event_in_order_for_its_owner_only() {
        let folder = tempfile::tempdir().unwrap();
        let name = folder.path().join("events.jsonl");
        let file = EventFile::create(&name).unwrap();
        script(Role::Source).iter().for_each(|event| file.event(Role::Source, event));
        assert_eq!(file.close(), None);
        file.event(Role::Source, &Event::Paused);
        let lines = read(&std::fs::read(&name).unwrap());
        assert!(matches!(lines[0].event, EventJson::Started { schema: 1, .. }));
        let events: Vec<_> = lines[1..].iter().map(|line| line.event.clone()).collect();
        assert_eq!(events, script(Role::Source).iter().map(EventJson::from).collect::<Vec<_>>());
        assert!(lines.windows(2).all(|pair| pair[0].ms <= pair[1].ms));
        assert_eq!(name.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(file.close(), None);
    }

    #[test]
    fn a_file_that_was_removed_is_lost_and_one_that_was_renamed_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let name = folder.path().join("events.jsonl");
        let file = EventFile::create(&name).unwrap();
        std::fs::rename(&name, folder.path().join("events.old")).unwrap();
        assert_eq!(file.close(), None);
        let file = EventFile::create(&name).unwrap();
        std::fs::remove_file(&name).unwrap();
        let said = file.close().unwrap();
        assert!(said.ends_with("events.jsonl: the file was removed"), "{said}");
    }

    #[test]
    fn a_file_that_is_there_is_emptied() {
        let folder = tempfile::tempdir().unwrap();
        let name = folder.path().join("events.jsonl");
        std::fs::write(&name, "old\n".repeat(10_000)).unwrap();
        assert_eq!(EventFile::create(&name).unwrap().close(), None);
        assert_eq!(std::fs::read_to_string(&name).unwrap().lines().count(), 1);
        assert!(EventFile::create(&folder.path().join("absent/events.jsonl")).is_err());
        assert!(EventFile::create(folder.path()).is_err());
    }

    /// Takes so many bytes, then none until `room` is made.
    #[derive(Clone)]
    struct Disk(Arc<Mutex<(Vec<u8>, usize)>>);

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut disk = self.0.lock().unwrap();
            let taken = bytes.len().min(disk.1 - disk.0.len());
            if taken == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            disk.0.extend_from_slice(&bytes[..taken]);
            Ok(taken)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_full_disk_costs_lines_and_the_last_line_says_how_many() {
        let disk = Disk(Arc::new(Mutex::new((Vec::new(), 300))));
        let file = EventFile::begin(Path::new("x"), Box::new(disk.clone())).unwrap();
        let tell = |times: usize| (0..times).for_each(|_| file.event(Role::Source, &Event::Paused));
        tell(20);
        // Until the thread has met the end of the disk and given up on all of them.
        while file.lost.load(Ordering::Relaxed) + u64::try_from(read(&disk.0.lock().unwrap().0).len()).unwrap() < 21 {
            thread::yield_now();
        }
        let missing = file.lost.load(Ordering::Relaxed);
        disk.0.lock().unwrap().1 = 10_000;
        tell(5);
        let said = file.close().unwrap();
        assert!(said.starts_with(&format!("the events in x, of which {missing} are missing: ")), "{said}");
        let lines = read(&disk.0.lock().unwrap().0);
        assert_eq!(lines.last().unwrap().event, EventJson::Lost { events: missing });
        assert_eq!(lines.len(), 1 + 25 - usize::try_from(missing).unwrap() + 1);
    }

    /// Takes nothing until it may.
    struct Pipe(Receiver<()>, Disk);

    impl Write for Pipe {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.recv().ok();
            self.1.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_that_takes_nothing_holds_nothing_up() {
        let disk = Disk(Arc::new(Mutex::new((Vec::new(), 10 << 20))));
        let (may, wait) = sync_channel(0);
        let file = EventFile::begin(Path::new("x"), Box::new(Pipe(wait, disk.clone()))).unwrap();
        // The first line is in the writer's hands, the queue takes the next ones.
        (0..WAITING + 100).for_each(|_| file.event(Role::Source, &Event::Paused));
        drop(may);
        let said = file.close().unwrap();
        assert_eq!(said, "the events in x, of which 100 are missing: it takes them too slowly");
        let lines = read(&disk.0.lock().unwrap().0);
        assert_eq!(lines.len(), 1 + WAITING + 1);
        assert_eq!(lines.last().unwrap().event, EventJson::Lost { events: 100 });
    }
}
