//! `[guest.…]`: the guest to move.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::seconds;
use memferry::values::{Size, Time};
use memferry_guests::SharedSettings;
use memferry_guests::workload::{Backing, Fill, LogChoice, Pattern};

/// `[guest.workload]`
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct WorkloadTable {
    /// Bytes of memory.
    pub memory: Size,
    /// RAM blocks into which it is divided.
    pub blocks: u32,
    /// Unit of the dirty bitmap.
    pub page_size: Size,
    /// How the memory is allocated.
    pub backing: Backing,
    /// How writes are detected.
    pub dirty_log: LogChoice,
    /// Seed of every random sequence.
    pub seed: u64,
    /// The content of the memory at the start.
    pub fill: Fill,
    /// The share of the memory that is unplugged, at its end. It never travels.
    pub unplugged: f64,
    /// Memory that is free, and hinted as free during the migration.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free: Option<FreeTable>,
    /// An additional block, in a file that both ends have. It never travels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shared: Option<SharedSettings>,
    /// The writers of the memory.
    pub writers: Vec<WriterTable>,
}

/// `[guest.workload.free]`
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct FreeTable {
    /// The share of the memory that is free: it follows the memory in use and precedes the unplugged memory.
    pub share: f64,
    /// How many times per second a range of it is allocated and written, or freed; 0 is never.
    #[serde(default)]
    pub turns_per_second: f64,
    /// The size of such a range.
    #[serde(default = "FreeTable::default_range")]
    pub range: Size,
}

impl FreeTable {
    fn default_range() -> Size {
        Size(256 << 10)
    }
}

/// `[[guest.workload.writers]]`
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct WriterTable {
    /// The order in which pages are written.
    pub pattern: Pattern,
    /// Writes per second; 0 is unlimited.
    #[serde(default = "WriterTable::default_pages_per_second")]
    pub pages_per_second: f64,
    /// Bytes changed in a page by one write.
    #[serde(default = "WriterTable::default_bytes")]
    pub bytes: Size,
    /// The part of the memory that it writes: from and to, as shares.
    #[serde(default = "WriterTable::default_region")]
    pub region: [f64; 2],
}

impl WriterTable {
    fn default_pages_per_second() -> f64 {
        10_000.0
    }

    fn default_bytes() -> Size {
        Size(64)
    }

    fn default_region() -> [f64; 2] {
        [0.0, 1.0]
    }
}

/// `[guest.file]`
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct FileTable {
    /// The images: one RAM block each.
    pub images: Vec<ImageTable>,
    /// Small files that the source reads after `pause`, and that are in place at the destination before `start`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub state_files: Vec<ImageTable>,
    /// Unit of the dirty bitmap.
    #[serde(default = "default_page_size")]
    pub page_size: Size,
    /// Source: a command that pauses the process that writes the images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause: Option<Vec<String>>,
    /// Source: a command that resumes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resume: Option<Vec<String>>,
    /// Destination: a command that starts the process that uses the images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<Vec<String>>,
    /// The time limit for a command.
    #[serde(default = "FileTable::default_command_timeout")]
    pub command_timeout: Time,
    /// Destination: may existing images be replaced?
    #[serde(default)]
    pub overwrite: bool,
}

impl FileTable {
    fn default_command_timeout() -> Time {
        seconds(10)
    }
}

/// One memory image, or one state file.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ImageTable {
    /// The name of its RAM block, or of its part of the state: the same at both ends.
    pub id: String,
    /// The file.
    pub path: PathBuf,
    /// With `run`: the file that the destination creates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy: Option<PathBuf>,
}

impl Default for WorkloadTable {
    fn default() -> Self {
        Self {
            memory: Size(1 << 30),
            blocks: 1,
            page_size: default_page_size(),
            backing: Backing::Anonymous,
            dirty_log: LogChoice::Auto,
            seed: 1,
            fill: Fill::default(),
            unplugged: 0.0,
            free: None,
            shared: None,
            writers: Vec::new(),
        }
    }
}

fn default_page_size() -> Size {
    Size(4096)
}
