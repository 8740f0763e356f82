//! Regular files, opened without a wait: to open a pipe waits for its other end, and to open a device may do something to it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;

/// Opens a file for reading.
///
/// # Errors
/// When it cannot be opened, or is no regular file.
pub fn open(path: &Path) -> io::Result<File> {
    open_with(File::options().read(true), path)
}

/// Opens a file, or creates it, as `options` say, except for their custom flags.
///
/// # Errors
/// When it cannot be opened, or is no regular file.
pub fn open_with(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    match fs::metadata(path) {
        // The options determine whether it is created.
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        found => require(&found?)?,
    }
    // It may be another by now.
    let file = options.custom_flags(OFlags::NONBLOCK.bits().cast_signed()).open(path)?;
    require(&file.metadata()?)?;
    Ok(file)
}

/// Checks that it is a regular file. Devices and pipes are neither read nor replaced.
pub(crate) fn require(found: &fs::Metadata) -> io::Result<()> {
    let what = if found.is_dir() { "it is a directory" } else { "it is no regular file" };
    if found.is_file() { Ok(()) } else { Err(io::Error::new(ErrorKind::InvalidInput, what)) }
}
