//! How a report gets into its file.

use std::io::{self, Write};
use std::path::Path;

use memferry_transports::temporary::Temporary;

use crate::partial::{is_no_plain_file, open_private};

/// Writes to a temporary name beside `file` first, so that `file` is whole or as it was, and only its owner's. What is no
/// plain file (`/dev/stdout`, a pipe, a link) is written into, never replaced.
pub(crate) fn write(file: &Path, bytes: &[u8]) -> io::Result<()> {
    if is_no_plain_file(file) {
        return open_private(file)?.write_all(bytes);
    }
    let (mut written, temporary) = Temporary::create(file)?;
    written.write_all(bytes)?;
    temporary.replace()
}
