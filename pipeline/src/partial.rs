//! A file that is written beside its place and moved there when it is whole: until then the place is as it was.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// The temporary file, for its owner only. If it is dropped before it is placed, nothing is left.
#[derive(Debug)]
pub(crate) struct Partial {
    temporary: PathBuf,
    target: PathBuf,
    is_placed: bool,
}

impl Partial {
    /// Begins what will be found at `target`.
    pub(crate) fn create(target: &Path) -> io::Result<(Self, File)> {
        let mut name = target.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}.partial", std::process::id()));
        let temporary = target.with_file_name(name);
        let file = open_private(&temporary)?;
        Ok((Self { temporary, target: target.to_owned(), is_placed: false }, file))
    }

    /// Moves it to its place.
    pub(crate) fn place(mut self) -> io::Result<()> {
        fs::rename(&self.temporary, &self.target)?;
        self.is_placed = true;
        Ok(())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.is_placed {
            // It may be gone already, and nobody would look for it.
            drop(fs::remove_file(&self.temporary));
        }
    }
}

/// Is there something at `path` that a file moved there would replace, and that is no plain file: a link, a device, a pipe?
pub(crate) fn is_no_plain_file(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|found| !found.is_file())
}

/// Opens a file to be written anew, for its owner only.
pub(crate) fn open_private(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)
}
