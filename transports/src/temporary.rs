//! A file that is written beside its place, and moved there when it is complete.
//!
//! Takes a path and gives an open file with another name in the same directory, for the owner only. Owns that name: either
//! [`complete`](Temporary::complete) renames it, or it is removed by
//! [`give_up`](Temporary::give_up), whichever comes first and never both.

use std::fs::{self, File, OpenOptions};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, ErrorKind};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::retry::in_context;

/// The temporary file beside the path that it will have.
#[derive(Debug)]
pub(crate) struct Temporary {
    path: PathBuf,
    target: PathBuf,
}

impl Temporary {
    /// A temporary file for what `path` shall hold.
    pub(crate) fn create(path: &Path) -> io::Result<(File, Self)> {
        let target = target_of(path)?;
        loop {
            let path = beside(&target);
            match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path) {
                Ok(file) => return Ok((file, Self { path, target })),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(in_context(&error, &format!("cannot create {}", path.display()))),
            }
        }
    }

    /// Where the file is until it is complete.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Flushes the file and gives it its name. An error if it was given up, even meanwhile: the system lets either the rename
    /// or the removal find the temporary name, never both.
    pub(crate) fn complete(&self, file: &File) -> io::Result<()> {
        file.sync_all()?;
        fs::rename(&self.path, &self.target)?;
        // The rename stands: whoever looks finds a whole file, so this must not be told as a failure.
        if let Err(error) = sync_directory(&self.target) {
            tracing::warn!(path = %self.target.display(), %error, "the file is in place, but a power failure may undo that");
        }
        Ok(())
    }

    /// Removes the file, unless it has its name already.
    pub(crate) fn give_up(&self) {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                tracing::warn!(path = %self.path.display(), %error, "the unfinished stream could not be removed");
            }
            _ => {}
        }
    }
}

/// Where the stream goes in the end: the path, or what a symbolic link there leads to.
fn target_of(path: &Path) -> io::Result<PathBuf> {
    match fs::symlink_metadata(path) {
        Ok(_) => {
            let target = fs::canonicalize(path)?;
            require_regular(&fs::metadata(&target)?)?;
            Ok(target)
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(path.to_owned()),
        Err(error) => Err(error),
    }
}

/// Only regular files are read and replaced: not a device, not a pipe that nobody writes.
pub(crate) fn require_regular(found: &fs::Metadata) -> io::Result<()> {
    let what = if found.is_dir() { "it is a directory" } else { "it is no regular file" };
    if found.is_file() { Ok(()) } else { Err(io::Error::new(ErrorKind::InvalidInput, what)) }
}

/// A name in the same directory that nobody has.
fn beside(target: &Path) -> PathBuf {
    let mut name = target.as_os_str().to_owned();
    name.push(format!(".partial-{:016x}", RandomState::new().hash_one(std::process::id())));
    name.into()
}

fn sync_directory(of: &Path) -> io::Result<()> {
    let parent = of.parent().filter(|parent| !parent.as_os_str().is_empty());
    match File::open(parent.unwrap_or(Path::new(".")))?.sync_all() {
        // Some file systems have no such thing.
        Err(error) if error.kind() == ErrorKind::InvalidInput => Ok(()),
        done => done,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_that_was_given_up_is_never_renamed_and_the_other_way_round() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("stream");
        let (file, temporary) = Temporary::create(&path).expect("created");
        temporary.give_up();
        temporary.complete(&file).expect_err("given up");
        assert_eq!(fs::read_dir(directory.path()).expect("a directory").count(), 0);

        let (file, temporary) = Temporary::create(&path).expect("created");
        temporary.complete(&file).expect("complete");
        temporary.give_up();
        assert!(path.exists());
    }
}
