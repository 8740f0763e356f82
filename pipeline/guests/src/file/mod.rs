//! The file guest: memory images, such as the RAM files of a VM or shared-memory segments.
//!
//! Each image is a RAM block of its file's exact length. At the source the files exist, and another program may be
//! writing them. They are read by position, never mapped, and the hash log finds the written pages. Two commands of the
//! operator, `pause` and `resume`, stop and start the writer. A [`guard`] process runs them, and makes sure that the
//! writer is resumed even if this process is killed in between. At the destination files are created beside their final
//! place under temporary names, sparse where the memory is zero. They are made durable before the destination reports
//! that it is ready, and renamed into place when the guest starts.
//!
//! Device state is in files too: files that the writer leaves beside its images when it is paused can be listed as
//! `state_files`. The source reads them after the pause, and they are put into place with the images.
//!
//! An image that grows, shrinks, is removed or replaced while it is sent ends the migration with an error that names
//! it, and the writer continues. The next bitmap sync detects it in the open file, or at the latest the check of its
//! path after the pause.
//!
//! The guest owns its open files, its temporary files (removed unless they were renamed into place) and its guard.

mod commands;
mod destination;
pub mod guard;
pub mod settings;
mod source;
mod state;

pub use destination::{FileBuilder, FileDestination};
pub use settings::{FileGuestSettings, Image};
pub use source::FileGuest;

#[cfg(test)]
mod tests;
