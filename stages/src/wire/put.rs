//! Encodes messages. A value out of its bounds is a mistake of this program, and an assertion.

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64;

use super::fields::{put_list, put_name};
use super::frame::{FrameHead, HEAD_BYTES};
use super::limits::CHECKSUM_BYTES;
use super::messages::{
    BitmapPart, Figure, MAX_DIGESTS, MAX_FIGURE_NAME, MAX_FIGURES, MAX_REASON, MAX_RUNS, MAX_SECTION_NAME,
    MAX_STATE_CHUNK, MAX_STRETCH_PAGES, Message, Progress, Resume, Run, StateChunk, StretchDigest,
};
use crate::geometry::{BlockInfo, MAX_BLOCK_ID, MAX_BLOCKS, MAX_LANES, PageAt};
use crate::tally::RoundTally;

impl Message {
    /// The whole frame, head included. A reason longer than [`MAX_REASON`] is cut at the end of a character.
    ///
    /// # Panics
    /// If a control message is given a lane other than 0, or a list, a name or a chunk is out of its bounds.
    #[must_use]
    pub fn encode(&self, lane: u16) -> Bytes {
        let mut frame = vec![0; HEAD_BYTES];
        self.put_fields(&mut frame);
        let checksum = xxh3_64(&frame[HEAD_BYTES..]);
        frame.extend(checksum.to_le_bytes());
        let length = u32::try_from(frame.len() - HEAD_BYTES).expect("bounded by kind");
        frame[..HEAD_BYTES].copy_from_slice(&FrameHead::new(self.kind(), lane, length).to_bytes());
        frame.into()
    }

    fn put_fields(&self, out: &mut Vec<u8>) {
        match self {
            Self::Hello(hello) => hello.put(out),
            Self::State(chunk) => put_state(out, chunk),
            Self::Blocks(blocks) => put_blocks(out, blocks),
            Self::RoundComplete(tally) => put_tally(out, tally),
            Self::Digests { block, first, stretches } => put_digests(out, *block, *first, stretches),
            Self::Go(run_state) => out.push(*run_state as u8),
            Self::End { run_state, frames } => {
                out.push(*run_state as u8);
                out.extend(frames.to_le_bytes());
            }
            Self::Checkpoint(number) => out.extend(number.to_le_bytes()),
            Self::Progress(progress) => put_progress(out, progress),
            Self::PageHashes { first, hashes } => put_page_hashes(out, *first, hashes),
            Self::Loaded { verified } => out.push(u8::from(*verified)),
            Self::Abort(reason) | Self::Refused(reason) | Self::StartFailed(reason) => put_reason(out, reason.raw()),
            Self::Heartbeat(figures) => put_list(out, figures, 0..=MAX_FIGURES, put_figure),
            Self::Secret { secret, waits_ms } => {
                out.extend(secret.bytes());
                out.extend(waits_ms.to_le_bytes());
            }
            Self::Proof(proof) => out.extend(proof.0),
            Self::Accept { waits_ms } => out.extend(waits_ms.to_le_bytes()),
            Self::Challenge { nonce, proof } => {
                out.extend(nonce.0);
                out.extend(proof.0);
            }
            Self::Resume(Resume { started, frames }) => {
                out.push(u8::from(*started));
                put_frames(out, frames);
            }
            Self::Missing(part) | Self::Received(part) => put_bitmap_part(out, part),
            Self::PageRequest(PageAt { block, page }) => {
                out.extend(block.to_le_bytes());
                out.extend(page.to_le_bytes());
            }
            Self::DirectEnds
            | Self::LaneEnds
            | Self::Settled
            | Self::Discard
            | Self::Ready
            | Self::Running
            | Self::Discarded
            | Self::Complete => {}
        }
    }
}

fn put_bitmap_part(out: &mut Vec<u8>, part: &BitmapPart) {
    out.extend(part.block.to_le_bytes());
    out.extend(part.first.to_le_bytes());
    put_list(out, &part.runs, 1..=MAX_RUNS, put_run);
}

fn put_state(out: &mut Vec<u8>, chunk: &StateChunk) {
    assert!(chunk.bytes.len() <= MAX_STATE_CHUNK, "a chunk of {} bytes, at most {MAX_STATE_CHUNK}", chunk.bytes.len());
    out.reserve_exact(chunk.bytes.len() + chunk.name.len() + 11 + CHECKSUM_BYTES);
    out.extend([chunk.phase as u8, u8::from(chunk.end)]);
    out.extend(chunk.version.to_le_bytes());
    put_name(out, chunk.name.raw(), MAX_SECTION_NAME);
    out.extend(u32::try_from(chunk.bytes.len()).expect("at most MAX_STATE_CHUNK").to_le_bytes());
    out.extend_from_slice(&chunk.bytes);
}

fn put_blocks(out: &mut Vec<u8>, blocks: &[BlockInfo]) {
    put_list(out, blocks, 1..=MAX_BLOCKS, put_block);
    let ignored: Vec<u16> = (0..).zip(blocks).filter(|(_, block)| block.ignored).map(|(index, _)| index).collect();
    if !ignored.is_empty() {
        put_list(out, &ignored, 1..=MAX_BLOCKS, |out, index| out.extend(index.to_le_bytes()));
    }
}

fn put_block(out: &mut Vec<u8>, block: &BlockInfo) {
    put_name(out, block.id.raw(), MAX_BLOCK_ID);
    for number in [block.length, block.guest_address, block.backing_page_size] {
        out.extend(number.to_le_bytes());
    }
}

fn put_tally(out: &mut Vec<u8>, tally: &RoundTally) {
    out.extend(tally.round.to_le_bytes());
    out.push(tally.kind as u8);
    let counts = [
        tally.batches,
        tally.pages.all,
        tally.pages.zero,
        tally.pages.raw,
        tally.pages.compressed,
        tally.pages.xbzrle,
        tally.pages.unchanged,
        tally.pages.xbzrle_misses,
        tally.pages.xbzrle_overflows,
        tally.pages.bytes_in,
        tally.pages.bytes_out,
    ];
    for count in counts {
        out.extend(count.to_le_bytes());
    }
}

fn put_digests(out: &mut Vec<u8>, block: u32, first: u64, stretches: &[StretchDigest]) {
    out.extend(block.to_le_bytes());
    out.extend(first.to_le_bytes());
    put_list(out, stretches, 1..=MAX_DIGESTS, |out, digest| {
        out.extend(digest.hash.to_le_bytes());
        let words = digest.left_out.iter().rposition(|&mask| mask != 0).map_or(0, |last| last + 1);
        out.push(u8::try_from(words).expect("at most 8"));
        for mask in &digest.left_out[..words] {
            out.extend(mask.to_le_bytes());
        }
    });
}

fn put_page_hashes(out: &mut Vec<u8>, first: PageAt, hashes: &[u64]) {
    out.extend(first.block.to_le_bytes());
    out.extend(first.page.to_le_bytes());
    put_list(out, hashes, 1..=MAX_STRETCH_PAGES, |out, hash| out.extend(hash.to_le_bytes()));
}

fn put_progress(out: &mut Vec<u8>, progress: &Progress) {
    out.extend(progress.bytes.to_le_bytes());
    put_frames(out, &progress.frames);
}

fn put_frames(out: &mut Vec<u8>, frames: &[u64]) {
    put_list(out, frames, 0..=MAX_LANES.into(), |out, frames| out.extend(frames.to_le_bytes()));
}

fn put_run(out: &mut Vec<u8>, run: &Run) {
    out.extend(run.extents.to_le_bytes());
    out.extend(run.mask.to_le_bytes());
}

fn put_figure(out: &mut Vec<u8>, figure: &Figure) {
    put_name(out, figure.name.raw(), MAX_FIGURE_NAME);
    out.extend(figure.value.to_le_bytes());
}

fn put_reason(out: &mut Vec<u8>, reason: &str) {
    let reason = &reason[..reason.floor_char_boundary(MAX_REASON)];
    out.extend(u16::try_from(reason.len()).expect("at most MAX_REASON").to_le_bytes());
    out.extend(reason.as_bytes());
}
