//! Files that are read whole: of bounded length, and none that could keep its reader waiting.

use std::io::{self, ErrorKind, Read};
use std::path::Path;

use crate::regular;

/// The bytes of a regular file, at most `most`.
///
/// # Errors
/// When it cannot be read, is no regular file, or is longer ([`ErrorKind::FileTooLarge`]).
pub fn read(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let file = regular::open(path)?;
    let too_long = || io::Error::new(ErrorKind::FileTooLarge, format!("it has more than {}", size(most)));
    if file.metadata()?.len() > most {
        return Err(too_long());
    }
    let mut bytes = Vec::new();
    // It may grow meanwhile.
    file.take(most.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > most { Err(too_long()) } else { Ok(bytes) }
}

fn size(bytes: u64) -> String {
    if bytes.is_multiple_of(1 << 20) { format!("{} MiB", bytes >> 20) } else { format!("{bytes} bytes") }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;

    #[test]
    fn what_is_long_or_no_file_is_refused_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, [7; 4096]).unwrap();
        assert_eq!(read(&file, 4096).unwrap(), [7; 4096]);
        let error = read(&file, 4095).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::FileTooLarge);
        let pipe = folder.path().join("pipe");
        mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR, 0).unwrap();
        let refusal = |other: &Path| read(other, 4096).unwrap_err().to_string();
        for other in [pipe.as_path(), Path::new("/dev/zero"), Path::new("/dev/null")] {
            assert_eq!(refusal(other), "it is no regular file", "{}", other.display());
        }
        assert_eq!(refusal(folder.path()), "it is a directory");
        // The kernel says of these that they have no length.
        assert!(!read(Path::new("/proc/self/maps"), 1 << 20).unwrap().is_empty());
        assert_eq!(read(Path::new("/proc/self/maps"), 10).unwrap_err().kind(), ErrorKind::FileTooLarge);
        assert_eq!(read(&folder.path().join("absent"), 1).unwrap_err().kind(), ErrorKind::NotFound);
    }
}
