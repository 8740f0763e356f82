//! file

pub mod guard;
pub mod settings;

use std::path::PathBuf;
use std::sync::Arc;

use super::GuestError;

pub use settings::{FileGuestSettings, Image};

/// The guest.
#[derive(Debug)]
pub struct FileGuest {}

impl FileGuest {
    /// A source over existing images, opened read-only.
    ///
    /// `guard_program` is run as `guard_program guard -- …` before the guest is paused; it must call [`guard::main`] with
    /// what stands behind `guard`. Without one nobody resumes the guest if this process is killed after the pause.
    ///
    /// # Errors
    /// When the settings do not fit together or an image cannot be opened.
    pub fn source(settings: FileGuestSettings, guard_program: Option<PathBuf>) -> Result<Arc<Self>, GuestError> {
        settings.validate()?;
        drop(guard_program);
        todo!()
    }

    /// A destination that creates the images.
    ///
    /// # Errors
    /// When the settings do not fit together.
    pub fn destination(settings: FileGuestSettings) -> Result<Arc<Self>, GuestError> {
        settings.validate()?;
        todo!()
    }
}
