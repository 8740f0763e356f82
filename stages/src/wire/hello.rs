//! Hello: who speaks, in which version, with which features, on which of how many connections.

use std::fmt;

use crate::geometry::PageSize;

/// First bytes of every stream's Hello body: what `file` and a port's listener recognise it by.
pub const MAGIC: [u8; 8] = *b"memferry";

/// A random number that names one migration: all its connections say the same.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SessionId(pub [u8; 16]);

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A feature, by name: what both ends must agree on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Feature {
    /// Its name, 1 to 64 bytes.
    pub name: String,
    /// Does the stream make no sense without it?
    pub required: bool,
}

/// Names of the features this version knows.
pub mod feature {
    /// Payloads carry their xxh3-64.
    pub const CHECKSUM: &str = "payload-xxh3";
    /// Pages may come compressed by this codec.
    pub const SNAP: &str = "snap";
    /// Pages may come compressed by this codec.
    pub const LZ4: &str = "lz4";
    /// Pages may come compressed by this codec.
    pub const ZSTD: &str = "zstd";
    /// Pages may come as deltas.
    pub const XBZRLE: &str = "xbzrle";
    /// Digests precede the last handshake.
    pub const VERIFY: &str = "verify";
}

/// The features a stream uses, as a set of known ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// [`feature::CHECKSUM`]
    pub checksum: bool,
    /// [`feature::SNAP`]
    pub snap: bool,
    /// [`feature::LZ4`]
    pub lz4: bool,
    /// [`feature::ZSTD`]
    pub zstd: bool,
    /// [`feature::XBZRLE`]
    pub xbzrle: bool,
    /// [`feature::VERIFY`]
    pub verify: bool,
}

/// The first frame of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The sender's protocol version. A reader of another version believes nothing behind it.
    pub version: u16,
    /// The migration.
    pub session: SessionId,
    /// This connection's number, from 0.
    pub connection: u16,
    /// How many connections there are: 1 to `lanes`.
    pub connections: u16,
    /// How many lanes there are. Lane `l` travels on connection `l mod connections`.
    pub lanes: u16,
    /// The page size of every block.
    pub page_size: PageSize,
    /// What the stream uses.
    pub features: Vec<Feature>,
}
