//! How a report is written to its file.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use memferry_transports::temporary::{Temporary, is_no_plain_file};

/// Writes to a temporary name beside `file` first. So `file` is either complete or unchanged, and only its owner can
/// read it. A target that is not a regular file (`/dev/stdout`, a pipe, a link) is written to directly, never
/// replaced.
pub fn write(file: &Path, bytes: &[u8]) -> io::Result<()> {
    if is_no_plain_file(file) {
        let mut open = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(file)?;
        return open.write_all(bytes);
    }
    let (mut written, temporary) = Temporary::create(file)?;
    written.write_all(bytes)?;
    temporary.replace()
}
