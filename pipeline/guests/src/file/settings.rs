//! The settings of a file guest: its images, and the commands that stop and start their writer.

use std::collections::HashSet;
use std::path::PathBuf;
use std::time::Duration;

use memferry_stages::geometry::PageSize;
use memferry_stages::untrusted::Untrusted;

use memferry::guest::GuestError;

/// The settings of a file guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileGuestSettings {
    /// Its images, one RAM block each, in order.
    pub images: Vec<Image>,
    /// Small files that travel with the device state, in order: the paused writer leaves them beside its images. The
    /// source reads them after `pause`; the destination puts them into place before `start`. The ids are the same on
    /// both sides.
    pub state_files: Vec<Image>,
    /// Source: size of a page. A destination accepts any.
    pub page_size: PageSize,
    /// Source: the command, as an argument vector, that stops the writer of the images. Once it has succeeded, nothing
    /// writes them. Without one the images are assumed to have no writer.
    pub pause: Option<Vec<String>>,
    /// Source: the command that undoes `pause`, also when `pause` itself failed half-way. Required with `pause`.
    pub resume: Option<Vec<String>>,
    /// How long each command may take before it is killed.
    pub command_timeout: Duration,
    /// Destination: the command that is run when the images are in place. A process that it leaves behind must not hold
    /// its output open, which goes to memferry.
    pub start: Option<Vec<String>>,
    /// Destination: may an image replace an existing file?
    pub overwrite: bool,
}

/// One image, or one state file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Id of its RAM block, or of its section of the state: the same on both sides.
    pub id: String,
    /// The file.
    pub path: PathBuf,
}

impl Default for FileGuestSettings {
    /// No images, no commands.
    fn default() -> Self {
        Self {
            images: Vec::new(),
            state_files: Vec::new(),
            page_size: PageSize::DEFAULT,
            pause: None,
            resume: None,
            command_timeout: Duration::from_secs(30),
            start: None,
            overwrite: false,
        }
    }
}

impl FileGuestSettings {
    /// Checks everything that can be checked without accessing a file.
    ///
    /// # Errors
    /// A sentence that names the setting and says what to configure.
    pub fn validate(&self) -> Result<(), GuestError> {
        let refuse = |why: String| Err(GuestError(why));
        if self.images.is_empty() {
            return refuse("there are no images: name at least one, with an id and a path".into());
        }
        let (mut ids, mut paths) = (HashSet::new(), HashSet::new());
        for image in self.images.iter().chain(&self.state_files) {
            if !ids.insert(&image.id) {
                return refuse(format!("two files have the id {:?}", image.id));
            }
            if !paths.insert(&image.path) {
                return refuse(format!("two files have the path {}", Untrusted::from(image.path.as_path())));
            }
        }
        for (name, command) in [("pause", &self.pause), ("resume", &self.resume), ("start", &self.start)] {
            if command.as_ref().is_some_and(|argv| argv.first().is_none_or(String::is_empty)) {
                return refuse(format!("{name} names no program: write it as [\"program\", \"argument\", …]"));
            }
        }
        if self.pause.is_some() != self.resume.is_some() {
            return refuse("pause and resume belong together: give both or neither".into());
        }
        if self.command_timeout.is_zero() {
            return refuse("command_timeout is 0: a command needs time".into());
        }
        Ok(())
    }
}
