//! Hello: the peer's version, session and features, and the number of this connection.
//!
//! ```text
//! fields of the body
//! ┌─────────┬───────────┬────────────┬───────────┬──────────┬──────────────┬────────┬───────────────┬────────┐
//! │ magic 8 │ version 2 │ session 16 │ attempt 4 │ nonce 32 │ connection 2 │ role 1 │ connections 2 │ bulk 2 │
//! ├─────────┼───────────┴─┬──────────┴───┬───────┴──────────┴──────────────┴────────┴───────────────┴────────┤
//! │ lanes 2 │ page size 4 │ features n 2 │ n times: name of a feature: length 1, UTF-8                       │
//! └─────────┴─────────────┴──────────────┴───────────────────────────────────────────────────────────────────┘
//! role: 0 bulk, 1 urgent, 2 control
//! ```
//!
//! The attempt is 1 for a new migration. A source that returns after a lost connection names a higher one, and proves that it is
//! the same source: see [`proof`](super::proof).
//!
//! The first `bulk` connections are bulk and carry the lanes ([`BulkMap`]); at most one urgent and one control connection follow
//! them. Where there is no control connection, control travels on connection 0.
//!
//! Nothing is negotiated: the source names the features that its stream cannot be read without, and the destination accepts the stream
//! or refuses it.
//!
//! Magic is checked first, then the version; nothing after an unknown version is used.

use super::error::WireError;
use super::fields::{Fields, put_list, put_name, within};
use super::identity::{ConnectionRole, Nonce, SessionId};
use super::version::{MAGIC, PROTOCOL_VERSION};
use crate::batch::Mark;
use crate::geometry::{BulkMap, MAX_LANES, PageSize};
use crate::untrusted::Untrusted;

/// The most features of a stream.
pub const MAX_FEATURES: usize = 64;
/// The longest name of a feature, in bytes of UTF-8.
pub const MAX_FEATURE_NAME: usize = 64;
/// The most bytes of a Hello's fields: more than this version needs, so that a later one can still be named.
pub(super) const MAX_FIELDS: usize = 16 << 10;

/// The most connections that are not bulk: one for urgent pages, one for control.
const MAX_OTHERS: u64 = 2;
/// By their numbers on the wire.
const ROLES: [ConnectionRole; 3] = [ConnectionRole::Bulk, ConnectionRole::Urgent, ConnectionRole::Control];

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
    /// Pages may come compressed together, as groups.
    pub const GROUPS: &str = "page-groups";
    /// Pages may come as deltas.
    pub const XBZRLE: &str = "xbzrle";
    /// Digests precede the last handshake.
    pub const VERIFY: &str = "verify";
    /// Digests are sums of page hashes, recorded as pages are sent and loaded. Without it they are hashes of the paused guest's memory.
    pub const PAGE_HASHES: &str = "page-hashes";
    /// Some pages may not travel (hinted free, unplugged, of ignored blocks): digests leave them out.
    pub const LEFT_OUT: &str = "left-out";
    /// Some blocks are ignored: both ends share their memory.
    pub const IGNORED_BLOCKS: &str = "ignored-blocks";
    /// Checkpoint marks end the epochs of a lane.
    pub const CHECKPOINTS: &str = "checkpoints";
    /// The guest may be started before all of its pages have arrived, and asks for those that it misses.
    pub const POSTCOPY: &str = "postcopy";
    /// The source returns after a lost connection: a secret follows Accept.
    pub const RECOVERY: &str = "recovery";
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
    /// [`feature::GROUPS`]
    pub groups: bool,
    /// [`feature::XBZRLE`]
    pub xbzrle: bool,
    /// [`feature::VERIFY`]
    pub verify: bool,
    /// [`feature::PAGE_HASHES`]
    pub page_hashes: bool,
    /// [`feature::LEFT_OUT`]
    pub left_out: bool,
    /// [`feature::IGNORED_BLOCKS`]
    pub ignored_blocks: bool,
    /// [`feature::CHECKPOINTS`]
    pub checkpoints: bool,
    /// [`feature::POSTCOPY`]
    pub postcopy: bool,
    /// [`feature::RECOVERY`]
    pub recovery: bool,
}

impl Features {
    /// All that are known.
    pub const ALL: Self = Self {
        checksum: true,
        snap: true,
        lz4: true,
        zstd: true,
        groups: true,
        xbzrle: true,
        verify: true,
        page_hashes: true,
        left_out: true,
        ignored_blocks: true,
        checkpoints: true,
        postcopy: true,
        recovery: true,
    };

    /// Whether this mark may come in a lane.
    #[must_use]
    pub fn allow(self, mark: Mark) -> bool {
        match mark {
            Mark::RoundComplete(_) | Mark::LaneEnds => true,
            Mark::Checkpoint(_) => self.checkpoints,
            Mark::DirectEnds => self.postcopy,
        }
    }

    /// The features that are used, by name.
    #[must_use]
    pub fn to_list(self) -> Vec<Untrusted> {
        let used = self.named().into_iter().filter(|&(_, used)| used);
        used.map(|(name, _)| name.into()).collect()
    }

    /// The features of a list.
    ///
    /// # Errors
    /// [`WireError::UnknownFeatures`] with the names of those that this version does not know.
    pub fn from_list(list: &[Untrusted]) -> Result<Self, WireError> {
        let mut features = Self::default();
        let mut unknown = Vec::new();
        for name in list {
            match features.by_name(name.raw()) {
                Some(used) => *used = true,
                None => unknown.push(name.clone()),
            }
        }
        if unknown.is_empty() { Ok(features) } else { Err(WireError::UnknownFeatures { names: unknown }) }
    }

    fn named(self) -> [(&'static str, bool); 13] {
        [
            (feature::CHECKSUM, self.checksum),
            (feature::SNAP, self.snap),
            (feature::LZ4, self.lz4),
            (feature::ZSTD, self.zstd),
            (feature::GROUPS, self.groups),
            (feature::XBZRLE, self.xbzrle),
            (feature::VERIFY, self.verify),
            (feature::PAGE_HASHES, self.page_hashes),
            (feature::LEFT_OUT, self.left_out),
            (feature::IGNORED_BLOCKS, self.ignored_blocks),
            (feature::CHECKPOINTS, self.checkpoints),
            (feature::POSTCOPY, self.postcopy),
            (feature::RECOVERY, self.recovery),
        ]
    }

    fn by_name(&mut self, name: &str) -> Option<&mut bool> {
        match name {
            feature::CHECKSUM => Some(&mut self.checksum),
            feature::SNAP => Some(&mut self.snap),
            feature::LZ4 => Some(&mut self.lz4),
            feature::ZSTD => Some(&mut self.zstd),
            feature::GROUPS => Some(&mut self.groups),
            feature::XBZRLE => Some(&mut self.xbzrle),
            feature::VERIFY => Some(&mut self.verify),
            feature::PAGE_HASHES => Some(&mut self.page_hashes),
            feature::LEFT_OUT => Some(&mut self.left_out),
            feature::IGNORED_BLOCKS => Some(&mut self.ignored_blocks),
            feature::CHECKPOINTS => Some(&mut self.checkpoints),
            feature::POSTCOPY => Some(&mut self.postcopy),
            feature::RECOVERY => Some(&mut self.recovery),
            _ => None,
        }
    }
}

/// The first frame of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The sender's protocol version. A reader of another version uses nothing after it.
    pub version: u16,
    /// The migration.
    pub session: SessionId,
    /// The attempt: 1 for a new migration, and one more each time the source returns after a lost connection.
    pub attempt: u32,
    /// The source's part of what both ends prove, where the attempt is not the first.
    pub nonce: Nonce,
    /// This connection's number, from 0.
    pub connection: u16,
    /// Its role: bulk if and only if its number is less than `bulk`.
    pub role: ConnectionRole,
    /// How many connections there are, of all roles.
    pub connections: u16,
    /// How many of them are bulk: 1 to `lanes`.
    pub bulk: u16,
    /// How many lanes there are. A [`BulkMap`] determines which connection carries each.
    pub lanes: u16,
    /// The page size of every block.
    pub page_size: PageSize,
    /// The names of the features that the stream uses, 1 to 64 bytes each.
    pub features: Vec<Untrusted>,
}

impl Hello {
    /// The Hello of a bulk connection where all `bulk` connections are bulk, in this version of the protocol.
    #[must_use]
    pub fn bulk(
        session: SessionId,
        connection: u16,
        bulk: u16,
        lanes: u16,
        page_size: PageSize,
        features: Vec<Untrusted>,
    ) -> Self {
        Self {
            version: PROTOCOL_VERSION,
            session,
            attempt: 1,
            nonce: Nonce::default(),
            connection,
            role: ConnectionRole::Bulk,
            connections: bulk,
            bulk,
            lanes,
            page_size,
            features,
        }
    }

    /// Which bulk connection carries each lane.
    #[must_use]
    pub fn bulk_map(&self) -> BulkMap {
        BulkMap::new(self.lanes, self.bulk)
    }

    /// # Panics
    /// If a number, a list or a name is out of its bounds.
    pub(super) fn put(&self, out: &mut Vec<u8>) {
        self.check().unwrap_or_else(|error| panic!("{error}"));
        out.extend(MAGIC);
        out.extend(self.version.to_le_bytes());
        out.extend(self.session.0);
        out.extend(self.attempt.to_le_bytes());
        out.extend(self.nonce.0);
        out.extend(self.connection.to_le_bytes());
        out.push(self.role as u8);
        out.extend(self.connections.to_le_bytes());
        out.extend(self.bulk.to_le_bytes());
        out.extend(self.lanes.to_le_bytes());
        let page_size = u32::try_from(self.page_size.bytes()).expect("at most 64 KiB");
        out.extend(page_size.to_le_bytes());
        put_list(out, &self.features, 0..=MAX_FEATURES, |out, name| put_name(out, name.raw(), MAX_FEATURE_NAME));
    }

    pub(super) fn take(fields: &mut Fields<'_>) -> Result<Self, WireError> {
        let found = fields.array("magic")?;
        if found != MAGIC {
            return Err(WireError::Magic { found });
        }
        let version = fields.u16("version")?;
        if version != PROTOCOL_VERSION {
            return Err(WireError::Version { theirs: version, ours: PROTOCOL_VERSION });
        }
        let hello = Self {
            version,
            session: SessionId(fields.array("session")?),
            attempt: fields.u32("attempt")?,
            nonce: Nonce(fields.array("nonce")?),
            connection: fields.u16("connection")?,
            role: fields.choice("role of the connection", &ROLES)?,
            connections: fields.u16("number of connections")?,
            bulk: fields.u16("number of bulk connections")?,
            lanes: fields.u16("number of lanes")?,
            page_size: take_page_size(fields)?,
            features: fields.list("number of features", 0..=MAX_FEATURES, take_feature)?,
        };
        hello.check()?;
        Ok(hello)
    }

    fn check(&self) -> Result<(), WireError> {
        within("number of lanes", self.lanes.into(), 1..=MAX_LANES.into())?;
        let (bulk, connections) = (u64::from(self.bulk), u64::from(self.connections));
        within("number of bulk connections", bulk, 1..=self.lanes.into())?;
        within("number of connections", connections, bulk..=bulk + MAX_OTHERS)?;
        within("connection", self.connection.into(), 0..=connections - 1)?;
        if (self.role == ConnectionRole::Bulk) != (self.connection < self.bulk) {
            return Err(WireError::Role { connection: self.connection, role: self.role, bulk: self.bulk });
        }
        let twice = |(index, name): &(usize, &Untrusted)| self.features[..*index].contains(name);
        match self.features.iter().enumerate().find(twice) {
            Some((_, name)) => Err(WireError::FeatureTwice { name: name.clone() }),
            None => Ok(()),
        }
    }
}

fn take_page_size(fields: &mut Fields<'_>) -> Result<PageSize, WireError> {
    let bytes = fields.u32("page size")?;
    PageSize::new(bytes.into()).ok_or(WireError::PageSize { bytes })
}

fn take_feature(fields: &mut Fields<'_>) -> Result<Untrusted, WireError> {
    fields.name("length of a feature's name", MAX_FEATURE_NAME)
}
