//! `--events FILE`: every event as a line of JSON ([`event_json`](memferry_report::event_json)), as it happens.
//!
//! An observer must not block, and a disk or a pipe may: an [`Outlet`] writes. Events that find its queue, or the
//! disk, full are skipped. A line at that place gives their number, and so does the end. The migration continues.
//!
//! A pipe without a reader is opened by the outlet's thread: the reader may come later.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::OFlags;
use rustix::io::Errno;

use memferry::events::{Event, Observer, Role};
use memferry::outlet::{Direct, Outlet, Sink};
use memferry_report::event_json::EventLine;
use memferry_stages::untrusted::Untrusted;

/// The number of lines that may be queued: about a minute of a migration, some 2 MiB.
const WAITING: usize = 1024;
/// The time limit for the last lines.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// A file that is written while a migration runs.
#[derive(Debug)]
pub(crate) struct EventFile {
    name: PathBuf,
    /// The open file, if its state can be inspected.
    file: Option<File>,
    began: Instant,
    lines: Outlet<EventLine>,
    missing: Missing,
}

/// The missing events so far, shared by the writing thread and its owner.
#[derive(Clone, Debug, Default)]
struct Missing(Arc<Mutex<Missed>>);

#[derive(Debug, Default)]
struct Missed {
    events: u64,
    /// The first failure.
    error: Option<io::Error>,
    /// Is it a pipe without a reader?
    is_unread: bool,
}

impl Missing {
    fn so_far(&self) -> MutexGuard<'_, Missed> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl EventFile {
    /// Creates a file that only its owner can read, or empties an existing one; `-` is standard output.
    ///
    /// # Errors
    /// If it cannot be written, or is a block device.
    pub(crate) fn create(file: &Path) -> io::Result<Self> {
        if is_stdout(file) {
            return Self::begin(file, Out::Open(Box::new(Direct(io::stdout()))));
        }
        let Some(out) = open(file)? else { return Self::begin(file, Out::Unread(file.into())) };
        let kept = out.try_clone()?;
        Ok(Self { file: Some(kept), ..Self::begin(file, Out::Open(Box::new(Direct(out))))? })
    }

    fn begin(file: &Path, out: Out) -> io::Result<Self> {
        let (began, missing) = (Instant::now(), Missing::default());
        missing.so_far().is_unread = matches!(out, Out::Unread(_));
        let name = file.to_owned();
        let writer = Writer { out, name: name.clone(), began, is_torn: false, unreported: 0, missing: missing.clone() };
        let lines = Outlet::begin("memferry-events", WAITING, writer)?;
        lines.put(EventLine::started(SystemTime::now()));
        Ok(Self { name, file: None, began, lines, missing })
    }

    pub(crate) fn is_stdout(&self) -> bool {
        is_stdout(&self.name)
    }

    /// Is the file unlinked, so that nothing can read it? A renamed file can still be read.
    fn was_removed(&self) -> bool {
        let found = self.file.as_ref().and_then(|file| file.metadata().ok());
        found.is_some_and(|found| found.nlink() == 0) && !self.name.exists()
    }

    /// Writes the queued lines, and reports what is missing, if anything. Later events are not written.
    pub(crate) fn close(&self) -> Option<String> {
        let is_over = self.lines.close(LAST_WORDS);
        let (name, missing) = (Untrusted::from(self.name.as_path()), self.missing.so_far());
        let events = missing.events;
        match &missing.error {
            _ if !is_over && missing.is_unread => Some(format!("the events in {name}: nobody reads this pipe")),
            _ if !is_over => Some(format!("the events in {name}: it takes no more")),
            Some(error) => Some(format!("the events in {name}, of which {events} are missing: {error}")),
            None if events > 0 => {
                Some(format!("the events in {name}, of which {events} are missing: it takes them too slowly"))
            }
            None => self.was_removed().then(|| format!("the events in {name}: the file was removed")),
        }
    }
}

impl Observer for EventFile {
    fn event(&self, role: Role, event: &Event) {
        self.lines.put(EventLine::new(self.began.elapsed(), role, event));
    }
}

fn is_stdout(file: &Path) -> bool {
    file == Path::new("-")
}

/// Opens the target, except a pipe without a reader: that would block.
fn open(file: &Path) -> io::Result<Option<File>> {
    let is = |kind: fn(&std::fs::FileType) -> bool| file.metadata().is_ok_and(|found| kind(&found.file_type()));
    if is(FileTypeExt::is_block_device) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is a disk, and would be written over"));
    }
    let mut options = File::options();
    options.write(true).create(true).truncate(true).mode(0o600);
    match options.custom_flags(OFlags::NONBLOCK.bits().cast_signed()).open(file) {
        Err(error) if error.raw_os_error() == Some(Errno::NXIO.raw_os_error()) && is(FileTypeExt::is_fifo) => Ok(None),
        opened => opened.map(Some),
    }
}

/// The target.
enum Out {
    Open(Box<dyn Write + Send>),
    /// A pipe that had no reader at the start.
    Unread(PathBuf),
}

/// The work of the outlet's thread.
struct Writer {
    out: Out,
    name: PathBuf,
    began: Instant,
    /// Is the last line incomplete?
    is_torn: bool,
    /// The number of missing events that no line has reported yet.
    unreported: u64,
    missing: Missing,
}

impl Sink<EventLine> for Writer {
    fn take(&mut self, line: EventLine) {
        self.report_missing();
        let Err(error) = self.write(line.to_json().as_bytes()) else { return };
        self.dropped(1);
        let mut missing = self.missing.so_far();
        if missing.error.is_none() {
            tracing::warn!(
                "events cannot be written to {}: {error}; the migration continues",
                Untrusted::from(self.name.as_path())
            );
            missing.error = Some(error);
        }
    }

    fn dropped(&mut self, count: u64) {
        self.unreported += count;
        self.missing.so_far().events += count;
    }

    fn end(&mut self) {
        self.report_missing();
    }
}

impl Writer {
    /// Writes a line with the number of missing events at their place, as soon as that succeeds.
    fn report_missing(&mut self) {
        if self.unreported > 0
            && self.write(EventLine::lost(self.began.elapsed(), self.unreported).to_json().as_bytes()).is_ok()
        {
            self.unreported = 0;
        }
    }

    /// Writes a line. It reaches the file completely, or the next line begins after a newline.
    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        let (is_torn, out) = (self.is_torn, self.opened()?);
        if is_torn {
            out.write_all(b"\n")?;
        }
        self.is_torn = true;
        let out = self.opened()?;
        out.write_all(line)?;
        out.flush()?;
        self.is_torn = false;
        Ok(())
    }

    fn opened(&mut self) -> io::Result<&mut (dyn Write + Send)> {
        if let Out::Unread(pipe) = &self.out {
            let opened = File::options().write(true).open(pipe)?;
            self.missing.so_far().is_unread = false;
            self.out = Out::Open(Box::new(Direct(opened)));
        }
        match &mut self.out {
            Out::Open(out) => Ok(out.as_mut()),
            Out::Unread(_) => unreachable!("it was opened"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use memferry::samples::script;
    use memferry_report::event_json::EventJson;
    use std::os::unix::fs::PermissionsExt;
    use std::sync::mpsc::{Receiver, sync_channel};
    use std::thread;

    /// Longer than any step takes.
    const LONG: Duration = Duration::from_secs(60);

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

    /// Accepts this many bytes, then none until `room` is made.
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
    fn a_full_disk_costs_lines_and_a_line_at_their_place_says_how_many() {
        let disk = Disk(Arc::new(Mutex::new((Vec::new(), 300))));
        let file = EventFile::begin(Path::new("x"), Out::Open(Box::new(disk.clone()))).unwrap();
        let send = |times: usize| (0..times).for_each(|_| file.event(Role::Source, &Event::Paused));
        send(20);
        // Wait until the thread has reached the end of the disk and given up on all of them.
        while file.missing.so_far().events + u64::try_from(read(&disk.0.lock().unwrap().0).len()).unwrap() < 21 {
            thread::yield_now();
        }
        let missing = file.missing.so_far().events;
        disk.0.lock().unwrap().1 = 10_000;
        send(5);
        let said = file.close().unwrap();
        assert!(said.starts_with(&format!("the events in x, of which {missing} are missing: ")), "{said}");
        let lines = read(&disk.0.lock().unwrap().0);
        assert_eq!(lines.len(), 1 + 25 - usize::try_from(missing).unwrap() + 1);
        assert_eq!(lines[lines.len() - 6].event, EventJson::Lost { events: missing });
    }

    /// Accepts nothing until it is released.
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
        let file = EventFile::begin(Path::new("x"), Out::Open(Box::new(Pipe(wait, disk.clone())))).unwrap();
        // The first line is in the writer's hands, or it is one of those in the queue.
        (0..WAITING + 100).for_each(|_| file.event(Role::Source, &Event::Paused));
        drop(may);
        assert!(file.lines.flush(LONG));
        let missing = file.missing.so_far().events;
        assert!((100..=101).contains(&missing), "{missing}");
        let said = file.close().unwrap();
        assert_eq!(said, format!("the events in x, of which {missing} are missing: it takes them too slowly"));
        let lines = read(&disk.0.lock().unwrap().0);
        assert_eq!(lines.len() as u64, 1 + WAITING as u64 + 100 - missing + 1);
        assert_eq!(lines.last().unwrap().event, EventJson::Lost { events: missing });
    }

    #[test]
    fn a_pipe_is_read_whenever_its_reader_comes_and_said_to_be_lost_if_none_does() {
        let folder = tempfile::tempdir().unwrap();
        let name = folder.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &name, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        let file = EventFile::create(&name).unwrap();
        file.event(Role::Source, &Event::Paused);
        let reader = thread::spawn({
            let name = name.clone();
            move || std::fs::read(name).unwrap()
        });
        assert!(file.lines.flush(LONG));
        assert_eq!(file.close(), None);
        drop(file);
        assert_eq!(read(&reader.join().unwrap()).len(), 2);
        let file = EventFile::create(&name).unwrap();
        file.event(Role::Source, &Event::Paused);
        let said = file.close().unwrap();
        assert!(said.ends_with("pipe: nobody reads this pipe"), "{said}");
        // Release the thread.
        drop(std::fs::read(name));
    }
}
