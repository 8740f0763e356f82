//! The order of a stream's messages, where it does not depend on lanes.
//!
//! ```text
//! Hello ─▶ Secret ─▶ State (setup) ─▶ Blocks ─▶ Pages, marks of each lane · State (device) · Digests ─▶ End ─▶ Go ─▶ Settled
//! ```
//!
//! In a switch to postcopy a part of the pages follows Go:
//!
//! ```text
//! Pages, marks of each lane ─▶ DirectEnds of each lane · Missing ─▶ Discard ─▶ State (device) · Missing · Digests ─▶ End ─▶ Go
//!                           ─▶ Pages, marks of each lane
//! ```
//!
//! Secret and Settled come only where recovery was agreed on. A source that returns sends Hello, Proof, and then what follows Blocks.
//!
//! Abort and Heartbeat may come at any place. Setup, device state, digests and End travel on connection 0.

use super::error::WireError;
use super::hello::Features;
use super::kind::Kind;
use super::messages::{Message, StateChunk, StatePhase, StretchDigest};
use super::reader::Incoming;
use crate::geometry::{BlockInfo, ExtentAt, Layout};
use crate::untrusted::Untrusted;

/// The start of a stream on connection 0, up to its blocks.
#[derive(Debug, Default)]
pub struct Preface {
    features: Option<Features>,
    /// Whether the secret has come.
    has_secret: bool,
    setup: Sections,
}

impl Preface {
    /// The start of a stream whose Hello was read already.
    #[must_use]
    pub fn after_hello(features: Features) -> Self {
        Self { features: Some(features), ..Self::default() }
    }

    /// Checks that this frame may come next. After Blocks the preface is over.
    ///
    /// # Errors
    /// [`WireError`] if it may not.
    pub fn check(&mut self, incoming: &Incoming) -> Result<(), WireError> {
        let message = match incoming {
            Incoming::Pages(_) => return misplaced(Kind::Pages, "no blocks came before it"),
            Incoming::Message { message, .. } => message,
        };
        match (message, self.features) {
            (Message::Hello(hello), None) if hello.attempt != 1 => {
                return misplaced(Kind::Hello, "it is of a source that returns");
            }
            (Message::Hello(hello), None) => self.features = Some(Features::from_list(&hello.features)?),
            (Message::Hello(_), Some(_)) => return misplaced(Kind::Hello, "it came twice"),
            (other, None) => return misplaced(other.kind(), "a stream begins with Hello"),
            (Message::Secret { .. }, Some(features)) if features.recovery && !self.has_secret => self.has_secret = true,
            (Message::Heartbeat(_) | Message::Abort(_), Some(_)) => {}
            (other, Some(features)) if features.recovery && !self.has_secret => {
                return misplaced(other.kind(), "the secret was agreed on and did not come before it");
            }
            (Message::State(chunk), Some(_)) => self.setup.add(StatePhase::Setup, chunk)?,
            (Message::Blocks(blocks), Some(features)) => {
                self.setup.check_complete(Kind::Blocks)?;
                check_blocks(blocks, &features)?;
            }
            (other, Some(_)) => return misplaced(other.kind(), "no blocks came before it"),
        }
        Ok(())
    }
}

fn check_blocks(blocks: &[BlockInfo], features: &Features) -> Result<(), WireError> {
    if !features.ignored_blocks && blocks.iter().any(|block| block.ignored) {
        return misplaced(Kind::Blocks, "some of them are ignored, which was not agreed on");
    }
    Ok(())
}

/// The order of the messages behind Blocks, on one connection.
#[derive(Debug)]
pub(super) struct Order {
    device: Sections,
    /// The next stretch whose digest may come, by block.
    digests: Vec<u64>,
    left_out: bool,
    recovery: bool,
    postcopy: bool,
    /// Whether Discard has come.
    discards: bool,
    /// Whether End has come.
    ended: bool,
}

impl Order {
    pub(super) fn new(layout: &Layout, features: &Features) -> Self {
        let digests = vec![0; layout.blocks().len()];
        Self {
            device: Sections::default(),
            digests,
            left_out: features.left_out,
            recovery: features.recovery,
            postcopy: features.postcopy,
            discards: false,
            ended: false,
        }
    }

    /// Checks that a frame of no lane, or of a lane without DirectEnds, may come: only Go, Settled and Abort follow End.
    pub(super) fn check_place(&self, kind: Kind) -> Result<(), WireError> {
        match kind {
            Kind::Go | Kind::Settled | Kind::Abort | Kind::Heartbeat => Ok(()),
            _ if self.ended => misplaced(kind, "it follows the end mark"),
            _ => Ok(()),
        }
    }

    /// Checks a message of no lane.
    pub(super) fn message(&mut self, message: &Message, layout: &Layout) -> Result<(), WireError> {
        let kind = message.kind();
        self.check_place(kind)?;
        match message {
            Message::State(chunk) => self.device.add(StatePhase::Device, chunk),
            Message::Digests { block, first, stretches } => self.digests(*block, *first, stretches, layout),
            Message::End { .. } => {
                self.ended = true;
                self.device.check_complete(Kind::End)
            }
            Message::Settled if !self.recovery => misplaced(kind, "recovery was not agreed on"),
            Message::Missing(_) | Message::Discard if !self.postcopy => misplaced(kind, "postcopy was not agreed on"),
            Message::Discard if self.discards => misplaced(kind, "it came twice"),
            Message::Discard => {
                self.discards = true;
                Ok(())
            }
            Message::Missing(_) | Message::Go(_) | Message::Settled | Message::Abort(_) | Message::Heartbeat(_) => {
                Ok(())
            }
            Message::Hello(_) | Message::Secret { .. } | Message::Proof(_) | Message::Blocks(_) => {
                misplaced(kind, "it belongs before the pages")
            }
            Message::RoundComplete(_) | Message::Checkpoint(_) | Message::DirectEnds | Message::LaneEnds => {
                unreachable!("{kind} belongs to a lane")
            }
            Message::Accept { .. }
            | Message::Challenge { .. }
            | Message::Resume(_)
            | Message::Received(_)
            | Message::Discarded
            | Message::PageRequest(_)
            | Message::Complete
            | Message::Ready
            | Message::Progress(_)
            | Message::PageHashes { .. }
            | Message::Loaded { .. }
            | Message::Running
            | Message::Refused(_)
            | Message::StartFailed(_) => misplaced(kind, "it belongs to the return path"),
        }
    }

    fn digests(
        &mut self,
        block: u32,
        first: u64,
        stretches: &[StretchDigest],
        layout: &Layout,
    ) -> Result<(), WireError> {
        let Some(next) = self.digests.get_mut(block as usize) else {
            return Err(WireError::NoBlock { block, blocks: layout.block_count() });
        };
        let each = layout.page_size().stretch_extents();
        let count = u64::from(layout.block_extents(block)).div_ceil(each);
        if first != *next || stretches.len() as u64 > count - first {
            return misplaced(Kind::Digests, "its stretches are not the next ones of their block");
        }
        for (stretch, digest) in (first..).zip(stretches) {
            *next += 1;
            for (extent, &mask) in (stretch * each..).zip(&digest.left_out).filter(|(_, mask)| **mask != 0) {
                let of_stretch = extent < ((stretch + 1) * each).min(layout.block_extents(block).into());
                let at = ExtentAt { block, extent: u32::try_from(extent).unwrap_or(u32::MAX) };
                if !(self.left_out && of_stretch && mask & !layout.valid_mask(at) == 0) {
                    return misplaced(Kind::Digests, "it leaves out pages that may not be");
                }
            }
        }
        Ok(())
    }
}

/// The sections of one part of the state: the chunks of one follow each other directly.
#[derive(Debug, Default)]
struct Sections {
    /// The section whose last chunk has not come.
    open: Option<(Untrusted, u32)>,
}

impl Sections {
    fn add(&mut self, part: StatePhase, chunk: &StateChunk) -> Result<(), WireError> {
        if chunk.phase != part {
            return misplaced(Kind::State, "it is of the other part");
        }
        if self.open.as_ref().is_some_and(|(name, version)| (name, *version) != (&chunk.name, chunk.version)) {
            return misplaced(Kind::State, "it came in the middle of another section");
        }
        if chunk.end {
            self.open = None;
        } else if self.open.is_none() {
            self.open = Some((chunk.name.clone(), chunk.version));
        }
        Ok(())
    }

    fn check_complete(&self, kind: Kind) -> Result<(), WireError> {
        match self.open {
            Some(_) => misplaced(kind, "the last section of state has no end"),
            None => Ok(()),
        }
    }
}

pub(crate) fn misplaced<T>(kind: Kind, why: &'static str) -> Result<T, WireError> {
    Err(WireError::OutOfPlace { kind, why })
}
