//! How a report gets into its file.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Writes to a temporary name beside `file` first, so that `file` is whole or as it was, and only its owner's. What is no
/// plain file (`/dev/stdout`, a pipe, a link) is written into, never replaced.
pub(super) fn write(file: &Path, bytes: &[u8]) -> io::Result<()> {
    if file.symlink_metadata().is_ok_and(|found| !found.is_file()) {
        return write_private(file, bytes);
    }
    let mut name = file.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.partial", std::process::id()));
    let partial = file.with_file_name(name);
    let written = write_private(&partial, bytes).and_then(|()| fs::rename(&partial, file));
    if written.is_err() {
        drop(fs::remove_file(&partial));
    }
    written
}

fn write_private(file: &Path, bytes: &[u8]) -> io::Result<()> {
    OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(file)?.write_all(bytes)
}
