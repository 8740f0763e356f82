//! The file guest: memory images, such as the RAM files of a VM or shared-memory segments.
//!
//! Each image is a RAM block of its file's true length. At the source the files exist; somebody may be writing them.
//! They are read by position, never mapped, and the hash log finds what was written. What stops and starts the writer
//! are two commands of the operator's, `pause` and `resume`. A [`guard`] process runs them, and sees that the writer goes on
//! even if this process is killed in between. At the destination files are created beside their place under temporary names,
//! sparse where the memory is zero; they are made durable before the destination says that it is ready, and renamed into
//! place when the guest starts.
//!
//! Device state is in files too: what the writer leaves beside its images when it is paused may be named as
//! `state_files`. The source reads them after the pause, and they take their places with the images.
//!
//! An image that grows, shrinks, is removed or replaced while it is sent ends the migration with an error that names it, and
//! the writer goes on: the next bitmap sync sees it in the open file, or at the latest the look at its path after the pause.
//!
//! It owns its open files, its temporary files (removed unless they took their place) and its guard.

mod commands;
mod destination;
pub mod guard;
pub mod settings;
mod source;
mod state;

use std::path::PathBuf;
use std::sync::Arc;

use memferry_stages::dirty_log::{DirtyLog, HashLog};
use memferry_stages::geometry::{BlockInfo, PageSize};
use memferry_stages::memory::GuestMemory;

use self::destination::Destination;
use self::source::Source;
use memferry::guest::{Guest, GuestError, GuestState, RunState};
use memferry::host;

pub use settings::{FileGuestSettings, Image};

/// A guest whose memory is in files. See the [module](self).
#[derive(Debug)]
pub struct FileGuest {
    side: Side,
}

#[derive(Debug)]
enum Side {
    Source(Source),
    Destination(Destination),
}

impl FileGuest {
    /// A source over existing images, opened read-only.
    ///
    /// `guard_program` is run as `guard_program guard` before the guest is paused; it must call [`guard::main`]. It runs the
    /// commands. Without one this process runs them, and nobody resumes the guest if this process is killed after the pause.
    ///
    /// # Errors
    /// When the settings do not fit together or an image cannot be opened.
    pub fn source(settings: FileGuestSettings, guard_program: Option<PathBuf>) -> Result<Arc<Self>, GuestError> {
        Ok(Arc::new(Self { side: Side::Source(Source::new(settings, guard_program)?) }))
    }

    /// A destination that creates the images.
    ///
    /// # Errors
    /// When the settings do not fit together.
    pub fn destination(settings: FileGuestSettings) -> Result<Arc<Self>, GuestError> {
        Ok(Arc::new(Self { side: Side::Destination(Destination::new(settings)?) }))
    }

    /// Is there a place for every file of a destination, which may be taken? Makes no destination.
    ///
    /// # Errors
    /// When the settings do not fit together, or [`Guest::build`] would refuse a place.
    pub fn check_destination(settings: FileGuestSettings) -> Result<(), GuestError> {
        destination::check(settings)
    }

    fn as_source(&self) -> Result<&Source, GuestError> {
        match &self.side {
            Side::Source(source) => Ok(source),
            Side::Destination(_) => Err(GuestError("these images are a destination's".into())),
        }
    }

    fn as_destination(&self) -> Result<&Destination, GuestError> {
        match &self.side {
            Side::Destination(destination) => Ok(destination),
            Side::Source(_) => Err(GuestError("these images are a source's".into())),
        }
    }
}

impl Guest for FileGuest {
    /// # Panics
    /// At a destination, before [`Guest::build`] has returned.
    fn memory(&self) -> GuestMemory {
        match &self.side {
            Side::Source(source) => source.memory().clone(),
            Side::Destination(destination) => destination.memory().expect("build comes before memory"),
        }
    }

    /// Always running at a source: somebody may write the images, whether or not there is a command to stop them. At a
    /// destination nothing is known of what runs.
    fn run_state(&self) -> RunState {
        match self.side {
            Side::Source(_) => RunState::Running,
            Side::Destination(_) => RunState::Paused,
        }
    }

    fn dirty_logs(&self) -> Result<Vec<Arc<dyn DirtyLog>>, GuestError> {
        let memory = self.as_source()?.memory();
        let bytes = HashLog::bytes_for(memory.layout());
        match host::beyond_half_of_memory(bytes) {
            None => Ok(vec![Arc::new(HashLog::new(memory.clone()))]),
            Some(host) => Err(GuestError(format!(
                "the hash log of such large images takes {bytes} bytes, more than half of {host}"
            ))),
        }
    }

    fn pause(&self) -> Result<(), GuestError> {
        self.as_source()?.pause()
    }

    /// Does nothing unless the guest was paused by [`Guest::pause`].
    fn resume(&self) -> Result<(), GuestError> {
        self.as_source()?.resume()
    }

    fn setup_state(&self) -> Result<GuestState, GuestError> {
        Ok(self.as_source()?.setup_state())
    }

    /// What is in the state files.
    fn save(&self) -> Result<GuestState, GuestError> {
        self.as_source()?.save()
    }

    fn committed(&self, destination: &str) -> Result<(), GuestError> {
        self.as_source()?.committed(destination)
    }

    fn moved(&self) {
        if let Side::Source(source) = &self.side {
            source.moved();
        }
    }

    fn build(&self, page_size: PageSize, blocks: &[BlockInfo], setup: &GuestState) -> Result<(), GuestError> {
        self.as_destination()?.build(page_size, blocks, setup)
    }

    fn prepare(&self, state: &GuestState) -> Result<(), GuestError> {
        self.as_destination()?.prepare(state)
    }

    fn start(&self, run_state: RunState) -> Result<(), GuestError> {
        self.as_destination()?.start(run_state)
    }
}

#[cfg(test)]
mod tests;
