//! The source: existing images, read by position, and the commands that stop and start their writer.

use std::fs::Metadata;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use memferry_stages::dirty_log::{DirtyLog, HashLog};
use memferry_stages::geometry::BlockInfo;
use memferry_stages::memory::{FileMemory, GuestMemory, Memory, RamBlock};
use memferry_stages::untrusted::Untrusted;

use super::commands;
use super::destination::{self, FileBuilder};
use super::guard::Guard;
use super::settings::{FileGuestSettings, Image};
use super::state::{self, MAX_STATE_FILE_BYTES};
use memferry::guest::{Guest, GuestError, GuestState, RunState, SourceGuest};
use memferry::host;
use memferry_transports::{regular, whole_file};

/// A guest whose memory is in existing files. See the [module](super).
#[derive(Debug)]
pub struct FileGuest {
    settings: FileGuestSettings,
    guard_program: Option<PathBuf>,
    memory: GuestMemory,
    opened: Vec<Identity>,
    hold: Mutex<Hold>,
}

/// The identity of the file, and its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    length: u64,
}

/// Is the guest paused by memferry, and what guards that?
#[derive(Debug, Default)]
struct Hold {
    is_paused: bool,
    guard: Option<Guard>,
}

impl Hold {
    fn dismiss(&mut self) {
        if let Some(guard) = self.guard.take() {
            guard.dismiss();
        }
    }

    /// Has the guard pause the guest, or pauses it without one. A guard that is lost is ended, with the command that it
    /// ran.
    fn pause(&mut self, commands: &Commands<'_>) -> Result<(), GuestError> {
        let Some(mut guard) = self.guard.take() else { return commands.pause() };
        match guard.pause() {
            Ok(paused) => {
                self.guard = Some(guard);
                paused
            }
            Err(lost) => {
                guard.end();
                Err(GuestError::caused("the guard was lost while it ran the pause command", lost))
            }
        }
    }

    /// Has the guard resume the guest, or resumes it without one, also if the guard is lost.
    fn resume(&mut self, commands: &Commands<'_>) -> Result<(), GuestError> {
        let Some(mut guard) = self.guard.take() else { return commands.resume() };
        let Ok(resumed) = guard.resume() else {
            guard.end();
            return commands.resume();
        };
        self.guard = Some(guard);
        resumed
    }
}

/// The commands that stop and start the writer of the images.
struct Commands<'a> {
    pause: &'a [String],
    resume: &'a [String],
    timeout: Duration,
}

impl Commands<'_> {
    fn pause(&self) -> Result<(), GuestError> {
        commands::run("pause", self.pause, self.timeout)
    }

    fn resume(&self) -> Result<(), GuestError> {
        commands::run("resume", self.resume, self.timeout)
    }
}

impl FileGuest {
    /// A source over existing images, opened read-only.
    ///
    /// `guard_program` is run as `guard_program guard` before the guest is paused; it must call
    /// [`guard::main`](super::guard::main). It runs the commands. Without one this process runs them, and the guest
    /// stays paused if this process is killed after the pause.
    ///
    /// # Errors
    /// When the settings conflict or an image cannot be opened.
    pub fn source(settings: FileGuestSettings, guard_program: Option<PathBuf>) -> Result<Arc<Self>, GuestError> {
        settings.validate()?;
        let blocks = settings.images.iter().map(open).collect::<Result<_, _>>()?;
        let memory = GuestMemory::new(settings.page_size, blocks).map_err(|error| GuestError(error.to_string()))?;
        let opened = settings.images.iter().map(|image| identity(&image.path)).collect::<Result<_, _>>()?;
        let source = Self { settings, guard_program, memory, opened, hold: Mutex::default() };
        source.compare_files()?;
        Ok(Arc::new(source))
    }

    /// Builds a destination, which creates the images.
    ///
    /// # Errors
    /// When the settings conflict.
    pub fn destination(settings: FileGuestSettings) -> Result<FileBuilder, GuestError> {
        FileBuilder::new(settings)
    }

    /// Is there an available place for every file of a destination? Creates no destination.
    ///
    /// # Errors
    /// When the settings conflict, or a destination would refuse a place.
    pub fn check_destination(settings: FileGuestSettings) -> Result<(), GuestError> {
        destination::check(settings)
    }

    fn let_go(&self, hold: &mut Hold) -> Result<(), GuestError> {
        let Some(commands) = self.commands().filter(|_| hold.is_paused) else { return Ok(()) };
        hold.resume(&commands)?;
        hold.is_paused = false;
        hold.dismiss();
        Ok(())
    }

    fn commands(&self) -> Option<Commands<'_>> {
        let FileGuestSettings { pause, resume, command_timeout, .. } = &self.settings;
        Some(Commands { pause: pause.as_ref()?, resume: resume.as_ref()?, timeout: *command_timeout })
    }

    /// Checks that every path still resolves to the file that was opened, with the same length.
    fn compare_files(&self) -> Result<(), GuestError> {
        for ((image, opened), block) in self.settings.images.iter().zip(&self.opened).zip(self.memory.blocks()) {
            let (path, length, now) =
                (Untrusted::from(image.path.as_path()), block.info.length, identity(&image.path)?);
            if (now.device, now.inode) != (opened.device, opened.inode) {
                return Err(GuestError(format!("image {}: another file took the place of {path}", image.id)));
            }
            if now.length != length {
                let what = format!("image {}: {path} is {} bytes long, it was {length}", image.id, now.length);
                return Err(GuestError(what));
            }
        }
        Ok(())
    }

    fn hold(&self) -> MutexGuard<'_, Hold> {
        self.hold.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Guest for FileGuest {
    fn memory(&self) -> GuestMemory {
        self.memory.clone()
    }
}

impl SourceGuest for FileGuest {
    /// Always running: a program may write the images, whether or not there is a command to stop it.
    fn run_state(&self) -> RunState {
        RunState::Running
    }

    fn dirty_logs(&self) -> Result<Vec<Arc<dyn DirtyLog>>, GuestError> {
        let bytes = HashLog::bytes_for(self.memory.layout());
        match host::beyond_half_of_memory(bytes) {
            None => Ok(vec![Arc::new(HashLog::new(self.memory.clone()))]),
            Some(host) => Err(GuestError(format!(
                "the hash log of such large images takes {bytes} bytes, more than half of {host}"
            ))),
        }
    }

    /// Announces the files that will come with the device state, by their ids.
    fn setup_state(&self) -> Result<GuestState, GuestError> {
        let announced = |file: &Image| state::section(&file.id, Vec::new());
        Ok(GuestState { sections: self.settings.state_files.iter().map(announced).collect() })
    }

    /// Checks that the images are unchanged in identity and length, and reads the files that travel with them.
    fn save(&self) -> Result<GuestState, GuestError> {
        self.compare_files()?;
        let saved = |file: &Image| Ok::<_, GuestError>(state::section(&file.id, read_whole(file)?));
        Ok(GuestState { sections: self.settings.state_files.iter().map(saved).collect::<Result<_, _>>()? })
    }

    /// Starts the guard, runs the pause command, and checks the identity and length of the images.
    fn pause(&self) -> Result<(), GuestError> {
        let Some(commands) = self.commands() else { return self.compare_files() };
        let mut hold = self.hold();
        if hold.is_paused {
            return Ok(());
        }
        let post = |program: &PathBuf| Guard::post(program, commands.pause, commands.resume, commands.timeout);
        hold.guard = self.guard_program.as_ref().map(post).transpose()?;
        hold.is_paused = true;
        let paused = hold.pause(&commands).and_then(|()| self.compare_files());
        paused.map_err(|error| match self.let_go(&mut hold) {
            Ok(()) => error,
            Err(second) => GuestError(format!("{error}; and then {second}")),
        })
    }

    /// Runs the resume command if the guest is paused by memferry. While it fails, the guard stays.
    fn resume(&self) -> Result<(), GuestError> {
        self.let_go(&mut self.hold())
    }

    /// The guest may run at the destination from here on: the guard will not resume it, and has confirmed that.
    fn committed(&self, destination: &str) -> Result<(), GuestError> {
        let mut hold = self.hold();
        let Some(mut guard) = hold.guard.take() else { return Ok(()) };
        match guard.commit(destination) {
            Ok(()) => {
                hold.guard = Some(guard);
                Ok(())
            }
            Err(lost) => {
                guard.end();
                let what = "the guard did not confirm that it leaves the guest alone, so the guest is not handed over";
                Err(GuestError::caused(what, lost))
            }
        }
    }

    /// The guest runs at the destination: ends the guard.
    fn moved(&self) {
        self.hold().dismiss();
    }
}

fn open(image: &Image) -> Result<RamBlock, GuestError> {
    let Image { id, path, .. } = image;
    let memory = regular::open(path).and_then(|file| FileMemory::of_source(file, path)).map_err(|error| {
        GuestError::caused(format_args!("image {id}: {}: cannot be opened", Untrusted::from(path.as_path())), error)
    })?;
    let info = BlockInfo {
        backing_page_size: rustix::param::page_size() as u64,
        ..BlockInfo::new(id.clone(), memory.length())
    };
    Ok(RamBlock { info, memory: Arc::new(memory), fresh: false })
}

fn identity(path: &Path) -> Result<Identity, GuestError> {
    let of = |found: Metadata| Identity { device: found.dev(), inode: found.ino(), length: found.len() };
    std::fs::metadata(path)
        .map(of)
        .map_err(|error| GuestError::caused(format_args!("the image {}", Untrusted::from(path)), error))
}

/// The content of a small file.
fn read_whole(file: &Image) -> Result<Vec<u8>, GuestError> {
    whole_file::read(&file.path, MAX_STATE_FILE_BYTES).map_err(|error| {
        let hint = if error.kind() == ErrorKind::FileTooLarge { ": make it an image" } else { "" };
        GuestError(format!("state file {}: {}: {error}{hint}", file.id, Untrusted::from(file.path.as_path())))
    })
}
