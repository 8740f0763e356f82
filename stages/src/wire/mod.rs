//! memferry's dialect: frames of one shape, the same bytes on every transport. [`WireFramer`] and [`WireDeframer`] are its ends
//! (see [`dialect`](crate::dialect)).
//!
//! All integers are little-endian. A connection (or a file) is frames one after another, the first is Hello:
//!
//! ```text
//! head, 16 bytes
//! ┌────────┬─────────┬────────┬──────────┬───────────────────────────────────┐
//! │ kind 1 │ flags 1 │ lane 2 │ length 4 │ seeded xxh3-64 of the 8 before  8 │
//! └────────┴─────────┴────────┴──────────┴───────────────────────────────────┘
//!   flags: bit 0 = must be understood, set in every kind but Heartbeat; all others 0
//!   lane: of Pages, RoundComplete, Checkpoint, DirectEnds and LaneEnds; 0 for all others, which are control frames
//!   length: bytes that follow the head; at most what the kind allows, checked before anything is allocated
//!
//! body of every kind but Pages; its fields: see [`messages`] and [`hello`]
//! ┌───────────────────────┬─────────────────────────────┐
//! │ fields   length - 8   │ xxh3-64 of the fields     8 │
//! └───────────────────────┴─────────────────────────────┘
//!
//! body of Pages: see [`pages`]
//! ```
//!
//! An unknown kind is skipped if its must-understand bit is clear, and is an error if it is set. Both ends must agree on a
//! feature (see [`hello`]) before a frame uses it.
//!
//! Direction: source to destination carries Hello, Secret, Proof, State, Blocks, Pages, RoundComplete, Checkpoint, DirectEnds,
//! LaneEnds, Missing, Discard, Digests, Go, Settled, Abort, End, Heartbeat; the return path carries Accept, Challenge, Resume,
//! Received, Ready, Progress, PageHashes, Discarded, Loaded, Running, Complete, Refused, StartFailed, Abort, Heartbeat. The urgent
//! connection carries Pages, and on its return path PageRequest.
//!
//! Where there is a return path, each end sends something at least every half second from Hello or Accept on, in both
//! directions on connection 0: a Heartbeat where there is nothing else. A peer that is silent for longer is stopped, hangs, or is
//! unreachable.

mod bitmap_parts;
mod deframer;
mod encoding;
pub mod error;
mod fields;
pub mod frame;
mod framer;
#[cfg(test)]
pub(crate) mod frames;
pub mod hello;
mod identity;
mod kind;
mod limits;
pub mod messages;
pub(crate) mod order;
pub mod pages;
pub mod proof;
mod put;
mod read_ahead;
pub mod reader;
mod take;
mod version;

pub use bitmap_parts::{BitmapParts, bitmap_parts};
pub use deframer::WireDeframer;
pub use error::{FrameError, WireError};
pub use frame::{FrameHead, HEAD_BYTES};
pub use framer::WireFramer;
pub use hello::{Features, Hello};
pub use identity::{ConnectionRole, Nonce, SessionId};
pub use kind::Kind;
pub use messages::Message;
pub use order::Preface;
pub use pages::PagesHead;
pub use proof::{Meeting, Proof, Prover, Secret};
pub use reader::{FrameReader, Incoming, PagesFrame, ReadError};
pub use version::PROTOCOL_VERSION;

#[cfg(test)]
mod tests;
