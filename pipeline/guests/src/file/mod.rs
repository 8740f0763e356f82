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

pub use destination::{FileBuilder, FileDestination};
pub use settings::{FileGuestSettings, Image};
pub use source::FileGuest;

#[cfg(test)]
mod tests;
