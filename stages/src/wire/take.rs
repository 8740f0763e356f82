//! Decodes messages. Every byte comes from an untrusted peer: nothing is used before it is checked (ARCHITECTURE.md, law 8: the
//! peer is not trusted).

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64;

use super::error::WireError;
use super::fields::{Fields, within};
use super::hello::Hello;
use super::identity::Nonce;
use super::kind::Kind;
use super::limits::CHECKSUM_BYTES;
use super::messages::{
    BitmapPart, Figure, MAX_COUNT, MAX_DIGESTS, MAX_FIGURE_NAME, MAX_FIGURES, MAX_REASON, MAX_RUNS, MAX_SECTION_NAME,
    MAX_STATE_CHUNK, MAX_STRETCH_EXTENTS, MAX_STRETCH_PAGES, Message, Progress, Resume, Run, RunState, StateChunk,
    StatePhase, StretchDigest,
};
use super::proof::{Proof, Secret};
use crate::batch::RoundKind;
use crate::geometry::{BlockInfo, EXTENT_PAGES, MAX_BLOCK_ID, MAX_BLOCKS, MAX_LANES, PageAt};
use crate::tally::{PageTally, RoundTally};
use crate::untrusted::Untrusted;

/// The most extents, and so stretches, of a block.
const MAX_EXTENTS: u64 = u32::MAX as u64;

impl Message {
    /// Reads a body: the checksum of its fields first, then field after field, each within its bounds, and nothing after
    /// the last. Checks that need the migration (such as whether a block exists) are the caller's.
    ///
    /// # Errors
    /// [`WireError`] with what is wrong and the figures.
    ///
    /// # Panics
    /// For [`Kind::Pages`], which is no message.
    pub fn decode(kind: Kind, body: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new(checked_fields(kind, body)?);
        let message = take_message(kind, &mut fields)?;
        fields.end()?;
        Ok(message)
    }
}

/// A body without its checksum, which was checked.
fn checked_fields(kind: Kind, body: &[u8]) -> Result<&[u8], WireError> {
    let short = WireError::Short { field: "checksum", needs: CHECKSUM_BYTES, left: body.len() };
    let (fields, checksum) = body.split_last_chunk::<CHECKSUM_BYTES>().ok_or(short)?;
    if xxh3_64(fields) == u64::from_le_bytes(*checksum) { Ok(fields) } else { Err(WireError::BodyChecksum { kind }) }
}

fn take_message(kind: Kind, fields: &mut Fields<'_>) -> Result<Message, WireError> {
    Ok(match kind {
        Kind::Hello => Message::Hello(Hello::take(fields)?),
        Kind::State => Message::State(take_state(fields)?),
        Kind::Blocks => Message::Blocks(take_blocks(fields)?),
        Kind::Pages => panic!("Pages is no message"),
        Kind::RoundComplete => Message::RoundComplete(take_tally(fields)?),
        Kind::LaneEnds => Message::LaneEnds,
        Kind::Digests => take_digests(fields)?,
        Kind::Go => Message::Go(take_run_state(fields)?),
        Kind::Abort => Message::Abort(take_reason(fields)?),
        Kind::End => Message::End { run_state: take_run_state(fields)?, frames: fields.u64("number of frames")? },
        Kind::Checkpoint => Message::Checkpoint(fields.u64("number of a checkpoint")?),
        Kind::DirectEnds => Message::DirectEnds,
        Kind::Secret => Message::Secret {
            secret: Secret::from(fields.array("secret")?),
            waits_ms: fields.u64("milliseconds that it tries")?,
        },
        Kind::Proof => Message::Proof(Proof(fields.array("proof")?)),
        Kind::Settled => Message::Settled,
        Kind::Missing => Message::Missing(take_bitmap_part(fields)?),
        Kind::Discard => Message::Discard,
        Kind::Accept => Message::Accept { waits_ms: fields.u64("milliseconds that it waits")? },
        Kind::Ready => Message::Ready,
        Kind::Progress => Message::Progress(take_progress(fields)?),
        Kind::PageHashes => take_page_hashes(fields)?,
        Kind::Loaded => Message::Loaded { verified: fields.bool("verified byte")? },
        Kind::Running => Message::Running,
        Kind::Refused => Message::Refused(take_reason(fields)?),
        Kind::StartFailed => Message::StartFailed(take_reason(fields)?),
        Kind::Challenge => {
            Message::Challenge { nonce: Nonce(fields.array("nonce")?), proof: Proof(fields.array("proof")?) }
        }
        Kind::Resume => Message::Resume(Resume { started: fields.bool("started byte")?, frames: take_frames(fields)? }),
        Kind::Received => Message::Received(take_bitmap_part(fields)?),
        Kind::Discarded => Message::Discarded,
        Kind::PageRequest => Message::PageRequest(take_page(fields)?),
        Kind::Complete => Message::Complete,
        Kind::Heartbeat => Message::Heartbeat(fields.list("number of figures", 0..=MAX_FIGURES, take_figure)?),
    })
}

fn take_state(fields: &mut Fields<'_>) -> Result<StateChunk, WireError> {
    let phase = fields.choice("phase of a state section", &[StatePhase::Setup, StatePhase::Device])?;
    let end = fields.bool("end byte of a state section")?;
    let version = fields.u32("version of a state section")?;
    let name = fields.name("length of a state section's name", MAX_SECTION_NAME)?;
    let length = fields.u32("length of a state chunk")?;
    within("length of a state chunk", length.into(), 0..=MAX_STATE_CHUNK as u64)?;
    let bytes = Bytes::copy_from_slice(fields.slice("a state chunk", length as usize)?);
    Ok(StateChunk { phase, name, version, end, bytes })
}

fn take_blocks(fields: &mut Fields<'_>) -> Result<Vec<BlockInfo>, WireError> {
    let mut blocks = fields.list("number of RAM blocks", 1..=MAX_BLOCKS, take_block)?;
    if fields.is_empty() {
        return Ok(blocks);
    }
    let (mut next, last) = (0, blocks.len() as u64 - 1);
    let ignored = fields.list("number of ignored RAM blocks", 1..=blocks.len(), |fields| {
        let index = within("index of an ignored RAM block", fields.u16("an ignored RAM block")?.into(), next..=last)?;
        next = index + 1;
        Ok(index)
    })?;
    ignored.into_iter().for_each(|index| blocks[usize::try_from(index).expect("within")].ignored = true);
    Ok(blocks)
}

fn take_block(fields: &mut Fields<'_>) -> Result<BlockInfo, WireError> {
    Ok(BlockInfo {
        id: fields.name("length of a RAM block's id", MAX_BLOCK_ID)?,
        length: fields.u64("length of a RAM block")?,
        guest_address: fields.u64("guest address of a RAM block")?,
        backing_page_size: fields.u64("backing page size of a RAM block")?,
        ignored: false,
    })
}

fn take_tally(fields: &mut Fields<'_>) -> Result<RoundTally, WireError> {
    let round = fields.u32("round")?;
    within("round", round.into(), 1..=u32::MAX.into())?;
    let kind = fields.choice("kind of a round", &[RoundKind::Live, RoundKind::Paused, RoundKind::Final])?;
    let mut count = |field| fields.u64(field).and_then(|count| within(field, count, 0..=MAX_COUNT));
    Ok(RoundTally {
        round,
        kind,
        batches: count("count of batches")?,
        pages: PageTally {
            all: count("count of pages")?,
            zero: count("count of zero pages")?,
            raw: count("count of raw pages")?,
            compressed: count("count of compressed pages")?,
            xbzrle: count("count of xbzrle pages")?,
            unchanged: count("count of unchanged pages")?,
            xbzrle_misses: count("count of xbzrle misses")?,
            xbzrle_overflows: count("count of xbzrle overflows")?,
            bytes_in: count("count of bytes in")?,
            bytes_out: count("count of bytes out")?,
        },
    })
}

fn take_digests(fields: &mut Fields<'_>) -> Result<Message, WireError> {
    let block = take_block_index(fields)?;
    let first = fields.u64("first stretch")?;
    let stretches = fields.list("number of digests", 1..=MAX_DIGESTS, take_digest)?;
    within("first stretch", first, 0..=MAX_EXTENTS - stretches.len() as u64)?;
    Ok(Message::Digests { block, first, stretches })
}

fn take_digest(fields: &mut Fields<'_>) -> Result<StretchDigest, WireError> {
    let hash = fields.u128("a digest")?;
    let words = fields.u8("number of left out masks")?;
    within("number of left out masks", words.into(), 0..=MAX_STRETCH_EXTENTS as u64)?;
    let mut left_out = [0; MAX_STRETCH_EXTENTS];
    for mask in &mut left_out[..words.into()] {
        *mask = fields.u64("a left out mask")?;
    }
    match left_out[..words.into()] {
        [.., 0] => Err(WireError::LeftOutPadded),
        _ => Ok(StretchDigest { hash, left_out }),
    }
}

fn take_page_hashes(fields: &mut Fields<'_>) -> Result<Message, WireError> {
    let first = PageAt { block: take_block_index(fields)?, page: fields.u64("first page")? };
    let hashes = fields.list("number of page hashes", 1..=MAX_STRETCH_PAGES, |fields| fields.u64("a page hash"))?;
    within("first page", first.page, 0..=MAX_EXTENTS * EXTENT_PAGES - hashes.len() as u64)?;
    Ok(Message::PageHashes { first, hashes })
}

fn take_page(fields: &mut Fields<'_>) -> Result<PageAt, WireError> {
    let block = take_block_index(fields)?;
    let page = within("page", fields.u64("page")?, 0..=MAX_EXTENTS * EXTENT_PAGES - 1)?;
    Ok(PageAt { block, page })
}

fn take_progress(fields: &mut Fields<'_>) -> Result<Progress, WireError> {
    let bytes = fields.u64("bytes loaded")?;
    Ok(Progress { bytes, frames: take_frames(fields)? })
}

fn take_frames(fields: &mut Fields<'_>) -> Result<Vec<u64>, WireError> {
    fields.list("number of lanes", 0..=MAX_LANES.into(), |fields| fields.u64("frames loaded"))
}

fn take_bitmap_part(fields: &mut Fields<'_>) -> Result<BitmapPart, WireError> {
    let block = take_block_index(fields)?;
    let first = fields.u32("first extent")?;
    let mut left = MAX_EXTENTS - u64::from(first);
    let runs = fields.list("number of runs", 1..=MAX_RUNS, |fields| {
        let extents = fields.u32("extents of a run")?;
        within("extents of a run", extents.into(), 1..=left)?;
        left -= u64::from(extents);
        Ok(Run { extents, mask: fields.u64("mask of a run")? })
    })?;
    Ok(BitmapPart { block, first, runs })
}

fn take_figure(fields: &mut Fields<'_>) -> Result<Figure, WireError> {
    let name = fields.name("length of a figure's name", MAX_FIGURE_NAME)?;
    Ok(Figure { name, value: fields.u64("value of a figure")? })
}

fn take_block_index(fields: &mut Fields<'_>) -> Result<u32, WireError> {
    let block = fields.u32("block")?;
    within("block", block.into(), 0..=MAX_BLOCKS as u64 - 1)?;
    Ok(block)
}

fn take_run_state(fields: &mut Fields<'_>) -> Result<RunState, WireError> {
    fields.choice("run state", &[RunState::Running, RunState::Paused])
}

fn take_reason(fields: &mut Fields<'_>) -> Result<Untrusted, WireError> {
    let length = fields.u16("length of a reason")?;
    within("length of a reason", length.into(), 0..=MAX_REASON as u64)?;
    fields.text("a reason", length.into())
}
