//! `[guest.…]`: what is moved.

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
    /// RAM blocks it is cut into.
    pub blocks: u32,
    /// Unit of the dirty bitmap.
    pub page_size: Size,
    /// Where the memory comes from.
    pub backing: Backing,
    /// How writes are found.
    pub dirty_log: LogChoice,
    /// Start of every random sequence.
    pub seed: u64,
    /// What the memory holds at the start.
    pub fill: Fill,
    /// The share of the memory that is unplugged: its end. It never travels.
    pub unplugged: f64,
    /// Memory that is free, and hinted so while it is migrated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free: Option<FreeTable>,
    /// A block more, in a file that both ends have. It never travels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shared: Option<SharedSettings>,
    /// Who writes to it.
    pub writers: Vec<WriterTable>,
}

/// `[guest.workload.free]`
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct FreeTable {
    /// The share of the memory that is free, behind what is in use and before what is unplugged.
    pub share: f64,
    /// How often a second a range of it is taken and written, or given back; 0 is never.
    #[serde(default)]
    pub turns_per_second: f64,
    /// What is taken at a time.
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
    /// Which pages come next.
    pub pattern: Pattern,
    /// How many a second; 0 is as many as it can.
    #[serde(default = "WriterTable::default_pages_per_second")]
    pub pages_per_second: f64,
    /// Bytes changed in a page by one write.
    #[serde(default = "WriterTable::default_bytes")]
    pub bytes: Size,
    /// The part of memory it writes to: from and to, as shares.
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
    /// Source: a command that pauses whoever writes the images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause: Option<Vec<String>>,
    /// Source: a command that lets it go on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resume: Option<Vec<String>>,
    /// Destination: a command that starts what lives on the images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<Vec<String>>,
    /// How long a command may take.
    #[serde(default = "FileTable::default_command_timeout")]
    pub command_timeout: Time,
    /// Destination: may images that exist be replaced?
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
    /// Name of its RAM block, or of its part of the state: the same at both ends.
    pub id: String,
    /// The file.
    pub path: PathBuf,
    /// With `run`: the file that the destination makes.
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
