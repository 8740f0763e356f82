//! What stands where a file is to be written. A file that must be whole is a
//! [`Temporary`](memferry_transports::temporary::Temporary) until it is.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Is there something at `path` that a file moved there would replace, and that is no plain file: a link, a device, a pipe?
pub(crate) fn is_no_plain_file(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|found| !found.is_file())
}

/// Opens a file to be written anew, for its owner only.
pub(crate) fn open_private(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)
}
