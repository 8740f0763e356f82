//! Errors in what a peer, a file or a line sends: one variant for each kind, with the figures of both sides.

use std::fmt;

use super::identity::ConnectionRole;
use super::kind::Kind;
use super::version::MAGIC;
use crate::batch::PageEncoding;
use crate::geometry::{ExtentAt, MAX_LANES, PageAt};
use crate::untrusted::Untrusted;

/// Why a frame is refused. The reader adds the offset of the frame in its stream ([`FrameError`]).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    // ---- the head ----
    /// The head's checksum does not match: damage, or no memferry stream at all.
    #[error("the frame head is damaged (checksum mismatch), or this is not a memferry stream")]
    HeadChecksum,
    /// The stream begins as TLS does.
    #[error("the peer speaks TLS here: write tls: in the address at both ends, or at neither")]
    Tls,
    /// Flag bits that this version does not define.
    #[error("the frame has the unknown flags {flags:#04x}")]
    UnknownFlags {
        /// The unknown bits.
        flags: u8,
    },
    /// A kind that must be understood and is unknown.
    #[error("frames of kind {kind} must be understood, and this version does not know them")]
    UnknownKind {
        /// The kind's byte.
        kind: u8,
    },
    /// Longer than a frame of its kind may be.
    #[error("{} is {length} bytes long, at most {most}", KindName(*kind))]
    TooLong {
        /// The kind's byte; it need not be a [`Kind`].
        kind: u8,
        /// Bytes behind the head.
        length: u32,
        /// The most there may be.
        most: u32,
    },
    /// No migration has such a lane.
    #[error("the {kind} frame is on lane {lane}, at most {}", MAX_LANES - 1)]
    Lane {
        /// The frame's kind.
        kind: Kind,
        /// The lane it names.
        lane: u16,
    },
    /// A control frame that names a lane.
    #[error("the {kind} frame is on lane {lane}, control frames are on lane 0")]
    ControlLane {
        /// The frame's kind.
        kind: Kind,
        /// The lane it names.
        lane: u16,
    },

    // ---- any body ----
    /// The fields' checksum does not match.
    #[error("the {kind} frame is damaged (checksum mismatch)")]
    BodyChecksum {
        /// The frame's kind.
        kind: Kind,
    },
    /// The body ends in a field.
    #[error("the frame ends inside {field}: {needs} bytes are needed, {left} are left")]
    Short {
        /// Where it ends.
        field: &'static str,
        /// Bytes that the field needs.
        needs: usize,
        /// Bytes that there are.
        left: usize,
    },
    /// The body continues after its last field.
    #[error("{bytes} bytes follow the last field of the frame")]
    Trailing {
        /// How many.
        bytes: usize,
    },
    /// Text that is no UTF-8.
    #[error("{field} is not UTF-8")]
    Utf8 {
        /// Which text.
        field: &'static str,
    },
    /// A number, a count or a length beyond its bounds.
    #[error("{field} is {value}, it must be {least} to {most}")]
    Range {
        /// Which one.
        field: &'static str,
        /// What it is.
        value: u64,
        /// The least it may be.
        least: u64,
        /// The most it may be.
        most: u64,
    },
    /// A byte that selects one of a few choices, and matches none.
    #[error("{field} is {value}, which has no meaning in this version")]
    UnknownValue {
        /// Which byte.
        field: &'static str,
        /// What it is.
        value: u8,
    },
    /// Masks of left out pages that end with zero words, so that their count is too high.
    #[error("the left out masks of a stretch end with a zero word")]
    LeftOutPadded,

    // ---- Hello ----
    /// The peer does not speak memferry's protocol.
    #[error("a Hello begins with \"{}\" instead of \"{}\"", found.escape_ascii(), MAGIC.escape_ascii())]
    Magic {
        /// The first bytes.
        found: [u8; 8],
    },
    /// The peer speaks another version of the protocol.
    #[error(
        "the peer speaks protocol version {theirs}, this program version {ours}: use the same release on both sides"
    )]
    Version {
        /// The peer's.
        theirs: u16,
        /// [`super::PROTOCOL_VERSION`]
        ours: u16,
    },
    /// A role that does not fit the connection's number.
    #[error("connection {connection} is {role}, and the first {bulk} are bulk, no others")]
    Role {
        /// The connection's number.
        connection: u16,
        /// The role it names.
        role: ConnectionRole,
        /// How many connections are bulk.
        bulk: u16,
    },
    /// No page has this size.
    #[error("the page size is {bytes} bytes, it must be a power of two from 4096 to 65536")]
    PageSize {
        /// The peer's page size.
        bytes: u32,
    },
    /// A feature that is listed twice.
    #[error("the feature {name:?} is listed twice")]
    FeatureTwice {
        /// Its name.
        name: Untrusted,
    },
    /// Features that the stream requires, and this version does not know.
    #[error("the stream requires features that this version does not know: {}", Quoted(names))]
    UnknownFeatures {
        /// Their names.
        names: Vec<Untrusted>,
    },

    // ---- Pages ----
    /// A block that does not exist.
    #[error("pages of block {block}, there are {blocks} blocks")]
    NoBlock {
        /// The block.
        block: u32,
        /// How many there are.
        blocks: u32,
    },
    /// A part of a bitmap that does not follow the part before it, is missing, or has pages that do not exist.
    #[error("the bitmap of block {block} is wrong at extent {first}")]
    PartMisplaced {
        /// The block.
        block: u32,
        /// The extent.
        first: u32,
    },
    /// A block that both ends share: its pages never travel.
    #[error("pages of block {block}, which is ignored: its pages never travel")]
    IgnoredBlock {
        /// The block.
        block: u32,
    },
    /// An extent that does not exist.
    #[error("pages of extent {} of block {}, which has {extents} extents", at.extent, at.block)]
    NoExtent {
        /// The extent.
        at: ExtentAt,
        /// How many the block has.
        extents: u32,
    },
    /// A page is asked for that no block has.
    #[error("{0} is asked for, which does not exist")]
    NoPage(PageAt),
    /// Pages beyond the end of a block.
    #[error("pages {mask:#x} of extent {} of block {}, which has the pages {valid:#x}", at.extent, at.block)]
    BeyondBlock {
        /// The extent.
        at: ExtentAt,
        /// The frame's pages.
        mask: u64,
        /// The extent's pages.
        valid: u64,
    },
    /// Zero pages outside of the frame's pages.
    #[error("the zero pages {zero:#x} are not all among the frame's pages {mask:#x}")]
    ZeroOutside {
        /// The zero pages.
        zero: u64,
        /// The frame's pages.
        mask: u64,
    },
    /// An encoding that has no meaning.
    #[error("{page} has the unknown encoding {encoding}")]
    UnknownEncoding {
        /// The page.
        page: PageAt,
        /// The encoding's byte.
        encoding: u8,
    },
    /// A page with more or fewer bytes than its encoding can have.
    #[error("{page} has {bytes} bytes as {encoding}, which must be {least} to {most}")]
    PageBytes {
        /// The page.
        page: PageAt,
        /// Its encoding.
        encoding: PageEncoding,
        /// Its bytes in the payload.
        bytes: u32,
        /// The least there may be.
        least: u32,
        /// The most there may be.
        most: u32,
    },
    /// A page of a group without a first page.
    #[error("{page} is marked as part of a group, and no compressed page came before it")]
    NoGroup {
        /// The page.
        page: PageAt,
    },
    /// A group of more pages than one may have.
    #[error("{page} begins a group of {pages} pages, at most {most}")]
    GroupPages {
        /// Its first page.
        page: PageAt,
        /// How many it has.
        pages: usize,
        /// The most it may have.
        most: usize,
    },
    /// The pages' bytes do not add up to the payload's.
    #[error("the pages have {sum} bytes, the payload has {payload}")]
    PayloadSum {
        /// All pages together.
        sum: u64,
        /// The value in the frame.
        payload: u32,
    },
    /// The parts do not add up to the frame.
    #[error("the frame is {length} bytes long, its parts are {parts}")]
    FrameLength {
        /// Bytes behind the head.
        length: u32,
        /// Fixed part, descriptors, checksum and payload.
        parts: u64,
    },

    // ---- in context, found by code that knows the migration ----
    /// An unexpected frame.
    #[error("the {kind} frame is out of place: {why}")]
    OutOfPlace {
        /// The frame's kind.
        kind: Kind,
        /// Why not.
        why: &'static str,
    },
    /// Pages on the wrong lane.
    #[error("extent {} of block {} came on lane {lane}, it belongs to lane {right}", at.extent, at.block)]
    WrongLane {
        /// The extent.
        at: ExtentAt,
        /// The frame's lane.
        lane: u16,
        /// The extent's lane.
        right: u16,
    },
    /// A lane on a connection that does not carry it.
    #[error("lane {lane} came on connection {connection}, it belongs to connection {right}")]
    WrongConnection {
        /// The frame's lane.
        lane: u16,
        /// The connection that it came on.
        connection: u16,
        /// The connection that carries it.
        right: u16,
    },
    /// A lane that this migration does not have.
    #[error("a frame of lane {lane}, there are {lanes} lanes")]
    NoLane {
        /// The frame's lane.
        lane: u16,
        /// How many there are.
        lanes: u16,
    },
    /// A round other than the lane's.
    #[error("a frame of round {round} in lane {lane}, which is in round {current}")]
    WrongRound {
        /// The lane.
        lane: u16,
        /// The frame's round.
        round: u32,
        /// The lane's round.
        current: u32,
    },
    /// A mark whose feature Hello does not name.
    #[error("the {kind} mark in lane {lane} was not agreed on")]
    MarkNotAgreed {
        /// The kind of its frame.
        kind: Kind,
        /// The lane.
        lane: u16,
    },
    /// An encoding whose feature Hello does not name.
    #[error("{page} is coded as {encoding}, which was not agreed on")]
    NotAgreed {
        /// The page.
        page: PageAt,
        /// Its encoding.
        encoding: PageEncoding,
    },
}

/// An error with its place in the stream.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("frame at byte {offset} of {stream}: {error}")]
pub struct FrameError {
    /// Where the frame began, in bytes from the stream's start.
    pub offset: u64,
    /// Which stream: "connection 0", a file's name.
    pub stream: String,
    /// What is wrong.
    pub error: WireError,
}

/// Names that a peer chose, in quotes.
struct Quoted<'a>(&'a [Untrusted]);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, name) in self.0.iter().enumerate() {
            write!(f, "{}{name:?}", if index == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

/// A kind's byte as text.
struct KindName(u8);

impl fmt::Display for KindName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Kind::from_u8(self.0) {
            Some(kind) => write!(f, "the {kind} frame"),
            None => write!(f, "the frame of unknown kind {}", self.0),
        }
    }
}
