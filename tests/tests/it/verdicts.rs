//! `memferry inspect` and a destination come to one verdict on every stream, damaged or not.

use std::path::Path;
use std::sync::Arc;

use fastrand::Rng;
use memferry::events::Outcome;
use memferry_cli::cli::inspect::Inspection;
use memferry_stages::batch::{PageEncoding, RoundKind};
use memferry_stages::codec::{Codec, Compressor};
use memferry_stages::geometry::{BlockInfo, ExtentAt, PageSize};
use memferry_stages::tally::RoundTally;
use memferry_stages::untrusted::Untrusted;
use memferry_stages::wire::messages::{Resume, RunState, StateChunk, StatePhase, StretchDigest};
use memferry_stages::wire::{Features, Hello, Message, PagesHead, Proof, SessionId};
use memferry_stages::xbzrle::{Encoded, encode_page};
use memferry_tests::TestGuest;
use memferry_tests::run::{self, destination_settings};
use memferry_transports::Transport;
use memferry_transports::file::FileTransport;
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

const PAGE: usize = 4096;
/// Pages of the guest: two stretches, and so two lanes.
const PAGES: u64 = 512 + 3;

/// The features of the sample. Without digests, so that no verdict is left to the content of memory, and without those of
/// other courses, which a precopy destination does not take.
fn features() -> Features {
    Features {
        verify: false,
        page_hashes: false,
        ignored_blocks: false,
        checkpoints: false,
        postcopy: false,
        recovery: false,
        ..Features::ALL
    }
}

fn hello(features: Vec<Untrusted>) -> Vec<u8> {
    Message::Hello(Hello::bulk(SessionId([7; 16]), 0, 1, 2, PageSize::DEFAULT, features)).encode(0).to_vec()
}

fn state(phase: StatePhase, name: &str, end: bool, bytes: &'static [u8]) -> Vec<u8> {
    Message::State(StateChunk { phase, name: name.into(), version: 1, end, bytes: bytes.into() }).encode(0).to_vec()
}

/// A frame of pages that are zero, or in these encodings.
fn pages(at: u32, round: u32, zero: u64, coded: &[(u32, PageEncoding, &[u8])]) -> Vec<u8> {
    let mask = coded.iter().fold(zero, |mask, (bit, ..)| mask | 1 << bit);
    let payload: Vec<u8> = coded.iter().flat_map(|(_, _, bytes)| bytes.iter().copied()).collect();
    let head = PagesHead {
        at: ExtentAt { block: 0, extent: at },
        round,
        mask,
        zero,
        payload_hash: 0,
        pages: coded.iter().map(|(_, encoding, bytes)| (*encoding, u32::try_from(bytes.len()).unwrap())).collect(),
    }
    .with_hash_of(&payload);
    [&head.to_bytes(if at < 8 { 0 } else { 1 })[..], &payload].concat()
}

fn page(number: u8) -> Vec<u8> {
    (0..PAGE).map(|at| b"memory that moves "[at % 18] ^ number).collect()
}

fn compressed(codec: Codec, pages: &[u8]) -> Vec<u8> {
    let mut out = vec![0; pages.len() - 1];
    let bytes = Compressor::new(codec).compress(pages, &mut out).unwrap();
    out.truncate(bytes);
    out
}

fn delta(old: &[u8], new: &[u8]) -> Vec<u8> {
    let mut out = vec![0; PAGE];
    let Encoded::Delta(bytes) = encode_page(old, new, &mut out) else { panic!("a small change") };
    out.truncate(bytes);
    out
}

/// The frames of a short stream with everything in it.
fn sample(features: Features) -> Vec<Vec<u8>> {
    use PageEncoding::{Grouped, Lz4, Snap, Xbzrle, Zstd};
    let mut changed = page(1);
    (changed[100], changed[2000]) = (0, 0);
    let lz4 = compressed(Codec::Lz4, &page(1));
    let zstd = compressed(Codec::Zstd { level: 1 }, &[page(2), page(3)].concat());
    let snap = compressed(Codec::Snap, &[7; PAGE]);
    let delta = delta(&page(1), &changed);
    let kind = |round| if round == 2 { RoundKind::Final } else { RoundKind::Live };
    let complete = |lane, round| Message::RoundComplete(RoundTally::new(round, kind(round))).encode(lane).to_vec();
    let over = |lane| Message::LaneEnds.encode(lane).to_vec();
    let digest = StretchDigest { hash: 1, left_out: [0; 8] };
    let digests = |first| Message::Digests { block: 0, first, stretches: vec![digest] }.encode(0).to_vec();
    vec![
        hello(features.to_list()),
        state(StatePhase::Setup, "board", true, b"two fans"),
        Message::Blocks(vec![BlockInfo::new("ram0", PAGES * PAGE as u64)]).encode(0).to_vec(),
        pages(0, 1, 1, &[(1, Lz4, &lz4), (2, Zstd, &zstd), (3, Grouped, &[])]),
        pages(8, 1, 0b1, &[(2, Snap, &snap)]),
        complete(0, 1),
        complete(1, 1),
        state(StatePhase::Device, "devices", false, b"one "),
        state(StatePhase::Device, "devices", true, b"and two"),
        pages(0, 2, 0b100, &[(1, Xbzrle, &delta)]),
        complete(0, 2),
        complete(1, 2),
        over(0),
        over(1),
        digests(0),
        digests(1),
        Message::End { run_state: RunState::Running, frames: 3 }.encode(0).to_vec(),
    ]
}

/// Whether a destination starts its guest from a file of these bytes.
async fn is_received(path: &Path) -> Result<(), String> {
    let guest = Arc::new(TestGuest::destination());
    let listener = FileTransport::new(path).listen().await.unwrap();
    let (recorder, cancel) = (Arc::default(), CancellationToken::new());
    let ended = run::destination(guest.clone(), listener, destination_settings(), recorder, cancel).await;
    assert_eq!(guest.runs(), ended.outcome == Outcome::Completed, "{:?}", ended.error);
    if guest.runs() { Ok(()) } else { Err(ended.error.unwrap_or_default()) }
}

/// The verdicts on many streams.
struct Judge {
    runtime: Runtime,
    dir: tempfile::TempDir,
    taken: usize,
    refused: usize,
    differ: Vec<String>,
}

impl Judge {
    fn new() -> Self {
        let (runtime, dir) = (Runtime::new().unwrap(), tempfile::tempdir().unwrap());
        Self { runtime, dir, taken: 0, refused: 0, differ: vec![] }
    }

    fn judge(&mut self, stream: &[u8], what: impl FnOnce() -> String) {
        let path = self.dir.path().join("stream");
        std::fs::write(&path, stream).unwrap();
        let received = self.runtime.block_on(is_received(&path));
        let inspection = self.runtime.block_on(Inspection::of(stream, "stream"));
        match (&received, inspection.is_whole()) {
            (Ok(()), true) => self.taken += 1,
            (Err(_), false) => self.refused += 1,
            _ => self.differ.push(format!("{}: a destination says {received:?}, inspect says:{inspection}", what())),
        }
    }

    /// How many were taken and refused.
    fn verdicts(self) -> (usize, usize) {
        assert!(self.differ.is_empty(), "{} verdicts differ, such as {}", self.differ.len(), self.differ[0]);
        (self.taken, self.refused)
    }
}

#[test]
fn on_a_stream_cut_at_any_byte() {
    let (stream, mut judge) = (sample(features()).concat(), Judge::new());
    (0..=stream.len()).for_each(|length| judge.judge(&stream[..length], || format!("cut at {length}")));
    assert_eq!(judge.verdicts(), (1, stream.len()));
}

#[test]
fn on_a_stream_with_a_bit_flipped() {
    let (mut stream, mut judge, mut dice) = (sample(features()).concat(), Judge::new(), Rng::with_seed(14));
    for at in (0..stream.len()).step_by(3) {
        let bit = 1 << dice.u32(..8);
        stream[at] ^= bit;
        judge.judge(&stream, || format!("bits {bit:#x} of byte {at}"));
        stream[at] ^= bit;
    }
    assert_eq!(judge.verdicts(), (0, stream.len().div_ceil(3)));
}

/// Without hashes a damaged payload is noticed where it cannot be decoded, and only there.
#[test]
fn on_a_payload_with_a_bit_flipped_where_there_are_no_hashes() {
    let frames = sample(Features { checksum: false, ..features() });
    let mut judge = Judge::new();
    for place in [3, 4, 9] {
        let end = frames[..=place].concat().len();
        for at in end - 40..end {
            let mut stream = frames.concat();
            stream[at] ^= 0x10;
            judge.judge(&stream, || format!("byte {at} of frame {place}"));
        }
    }
    let (taken, refused) = judge.verdicts();
    assert!(taken > 0 && refused > 0, "{taken} were taken and {refused} refused");
}

#[test]
fn on_a_stream_with_two_frames_swapped() {
    let (frames, mut judge) = (sample(features()), Judge::new());
    for one in 0..frames.len() {
        for other in one + 1..frames.len() {
            let mut swapped = frames.clone();
            swapped.swap(one, other);
            judge.judge(&swapped.concat(), || format!("frames {one} and {other} swapped"));
        }
    }
    let (taken, refused) = judge.verdicts();
    assert!(taken > 0 && refused > 4 * taken, "{taken} were taken and {refused} refused");
}

#[test]
fn on_a_stream_with_a_frame_too_many_or_too_few() {
    let (frames, mut judge) = (sample(features()), Judge::new());
    for place in 0..frames.len() {
        let mut repeated = frames.clone();
        repeated.insert(place, frames[place].clone());
        judge.judge(&repeated.concat(), || format!("frame {place} repeated"));
        repeated.remove(place);
        repeated.push(frames[place].clone());
        judge.judge(&repeated.concat(), || format!("frame {place} again at the end"));
        // Whether a guest can be built without its setup is the guest's affair.
        if place != 1 {
            repeated.truncate(frames.len());
            repeated.remove(place);
            judge.judge(&repeated.concat(), || format!("frame {place} left out"));
        }
    }
    let (taken, refused) = judge.verdicts();
    assert!(taken > 0 && refused > 4 * taken, "{taken} were taken and {refused} refused");
}

#[test]
fn on_what_was_not_agreed() {
    let (frames, mut judge) = (sample(features()), Judge::new());
    let none = Features { checksum: true, ..Features::default() };
    for missing in features().to_list() {
        let named = features().to_list().into_iter().filter(|name| *name != missing).collect();
        judge.judge(&[&hello(named)[..], &frames[1..].concat()].concat(), || format!("{missing} is not named"));
    }
    judge.judge(&[&hello(none.to_list())[..], &frames[1..].concat()].concat(), || "nothing is named".into());
    let unknown = ["of a later version".into()].into_iter().chain(features().to_list()).collect();
    judge.judge(&[&hello(unknown)[..], &frames[1..].concat()].concat(), || "an unknown feature".into());
    let ignored = BlockInfo { ignored: true, ..BlockInfo::new("ram1", PAGE as u64) };
    let blocks = Message::Blocks(vec![BlockInfo::new("ram0", PAGES * PAGE as u64), ignored]).encode(0);
    judge.judge(&[&frames[..2].concat(), &blocks[..], &frames[3..].concat()].concat(), || "an ignored block".into());
    // The five encodings besides raw, nothing, the unknown one, and the block; hashes and left out pages are not missed.
    assert_eq!(judge.verdicts(), (2, 8));
}

#[test]
fn on_messages_that_a_file_does_not_hold() {
    let (frames, mut judge) = (sample(features()), Judge::new());
    let messages = [
        Message::Abort("disk full".into()),
        Message::Go(RunState::Running),
        Message::Accept { waits_ms: 0 },
        Message::Secret { secret: [1; 32].into(), waits_ms: 1 },
        Message::Proof(Proof([2; 32])),
        Message::Settled,
        Message::Resume(Resume::default()),
        Message::Ready,
        Message::Running,
        Message::Loaded { verified: true },
        Message::Heartbeat(vec![]),
    ];
    for message in messages {
        for place in [1, 2, 3, 9, frames.len()] {
            let mut frames = frames.clone();
            frames.insert(place, message.encode(0).to_vec());
            judge.judge(&frames.concat(), || format!("{} before frame {place}", message.kind()));
        }
    }
    assert_eq!(judge.verdicts(), (5, 50), "a Heartbeat is passed over");
}
