//! A block in a file that both ends of a migration have: an ignored block of the guests in this crate.

use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memferry_stages::geometry::BlockInfo;
use memferry_stages::memory::MappedMemory;
use memferry_stages::untrusted::Untrusted;
use memferry_transports::regular;
use serde::{Deserialize, Serialize};

use memferry::guest::GuestError;
use memferry::values::size;

/// A block in a file.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct SharedSettings {
    /// The file. Its path does not travel: the destination has a path of its own, and opens no file that a peer names.
    /// A source creates it if it does not exist.
    pub path: PathBuf,
    /// Its length, whole pages.
    #[serde(rename = "size", with = "size")]
    pub bytes: u64,
}

impl SharedSettings {
    /// The block from the length that a source sent (0 for none), in a file that this end names.
    ///
    /// # Errors
    /// An error text, if a block was sent and no file is configured for it.
    pub(super) fn that_came(bytes: u64, file: Option<&Path>) -> Result<Option<Self>, String> {
        match (bytes, file) {
            (0, _) => Ok(None),
            (bytes, Some(path)) => Ok(Some(Self { path: path.to_owned(), bytes })),
            (bytes, None) => Err(format!("a shared block of {bytes} bytes came, and no file for it is named here")),
        }
    }

    /// The length to send to a destination, 0 for no block.
    pub(super) fn bytes_of(shared: Option<&Self>) -> u64 {
        shared.map_or(0, |shared| shared.bytes)
    }

    /// The block, at this address.
    pub(super) fn block_info(&self, guest_address: u64) -> BlockInfo {
        BlockInfo {
            guest_address,
            backing_page_size: rustix::param::page_size() as u64,
            ignored: true,
            ..BlockInfo::new("shared", self.bytes)
        }
    }

    /// Could a source map the file? Creates none.
    pub(super) fn check(&self) -> Result<(), GuestError> {
        let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        match self.path.try_exists() {
            Ok(true) => self.map(true).map(drop),
            Ok(false) => folder.metadata().map(drop).map_err(|error| self.failed(error)),
            Err(error) => Err(self.failed(error)),
        }
    }

    fn failed(&self, error: std::io::Error) -> GuestError {
        GuestError::caused(format_args!("the shared block {}", Untrusted::from(self.path.as_path())), error)
    }

    /// Maps the file. A file of another length is refused, and not changed.
    pub(super) fn map(&self, is_destination: bool) -> Result<Arc<MappedMemory>, GuestError> {
        let Self { path, bytes } = self;
        let failed = |error| self.failed(error);
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        let file = match regular::open_with(&mut options, path) {
            Err(error) if error.kind() == ErrorKind::NotFound && !is_destination => {
                let file = regular::open_with(options.create_new(true).mode(0o600), path).map_err(failed)?;
                file.set_len(*bytes).map_err(failed)?;
                file
            }
            opened => opened.map_err(failed)?,
        };
        let length = file.metadata().map_err(failed)?.len();
        if length != *bytes {
            let what = format!("the shared block has {bytes} bytes, and {} has {length}", path.display());
            return Err(GuestError(what));
        }
        MappedMemory::file(file).map(Arc::new).map_err(failed)
    }
}
