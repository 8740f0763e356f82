//! Malicious peers and files: unexpected clients, invalid frames, files that are truncated or have one bit flipped.
//! None of them causes a panic, a hang, a guest's start or more memory than the reported bound.

use std::collections::HashMap;
use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use fastrand::Rng;
use memferry::events::{Ended, Event, Outcome, TurnedAwayKind};
use memferry::guest::Guest;
use memferry::settings::DestinationSettings;
use memferry_stages::batch::{page_hash, payload_hash};
use memferry_stages::bitmap::DirtyBitmap;
use memferry_stages::geometry::BulkMap;
use memferry_stages::geometry::{BlockInfo, LaneMap, PageSize};
use memferry_stages::loader::Direct;
use memferry_stages::loader::{LaneProgress, Loader};
use memferry_stages::memory::{GuestMemory, MappedMemory, RamBlock};
use memferry_stages::meter::Meter;
use memferry_stages::pool::BufferPool;
use memferry_stages::queue::bounded;
use memferry_stages::receiver::Receiver;
use memferry_stages::stage_id::StageId;
use memferry_stages::wire::frame::{FrameHead, HEAD_BYTES};
use memferry_stages::wire::pages::{FIXED_BYTES, MIN_HEAD_BYTES, head_bytes};
use memferry_stages::wire::reader::FrameReader;
use memferry_stages::wire::{Features, Hello, Kind, Message, PROTOCOL_VERSION, SessionId, WireDeframer};
use memferry_tests::guest::GuestCall;
use memferry_tests::run::{self, destination_settings};
use memferry_tests::{Hand, Recorder, Recording, TestGuest, migrate, sample, source_settings};
use memferry_transports::Transport;
use memferry_transports::file::FileTransport;
use memferry_transports::memory::{Direction, MemoryTransport};
use memferry_transports::tcp::TcpTransport;
use tokio_util::sync::CancellationToken;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

/// No wait here takes this long unless something hangs.
const HANG: Duration = Duration::from_secs(60);
const LENGTH: u64 = (512 << 10) + 5;

fn noise(dice: &mut Rng, count: usize) -> Vec<u8> {
    std::iter::repeat_with(|| dice.u8(..)).take(count).collect()
}

fn block_on<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async { tokio::time::timeout(10 * HANG, test).await.expect("it hangs") })
}

/// A stream with raw pages, compressed ones and deltas.
async fn recording() -> Recording {
    let guest = TestGuest::source(PageSize::DEFAULT, &[LENGTH]).paced(Duration::from_micros(200)).running(1);
    let recording = Recording::of(guest, source_settings(1, 1)).await;
    let has = |kind: Kind| recording.frames.iter().any(|frame| frame[0] == kind as u8);
    let kinds = [Kind::Hello, Kind::State, Kind::Blocks, Kind::Pages, Kind::RoundComplete, Kind::Digests, Kind::End];
    assert!(kinds.into_iter().all(has));
    recording
}

// ---- unexpected clients ----

/// The behaviour of unexpected clients on a port. Some stay connected and send nothing.
fn knock(number: usize, address: &str, dice: &mut Rng) -> Option<TcpStream> {
    // Once the real peer is connected, nothing listens any more.
    let mut client = TcpStream::connect(address).ok()?;
    let hello = hello(PROTOCOL_VERSION, SessionId([7; 16]), 0, 1, 1);
    let said = match number % 6 {
        0 => noise(dice, 64),
        1 => b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec(),
        2 => Vec::new(),
        3 => hello[..hello.len() / 2].to_vec(),
        4 => hello[..HEAD_BYTES + 1].to_vec(),
        _ => return Some(client),
    };
    // It may already have been refused.
    drop(client.write_all(&said));
    if number % 6 == 3 {
        return Some(client);
    }
    drop(client.shutdown(Shutdown::Write));
    None
}

fn hello(version: u16, session: SessionId, connection: u16, connections: u16, lanes: u16) -> Bytes {
    let features = Features { checksum: true, ..Features::default() }.to_list();
    let hello = Hello::bulk(session, connection, connections, lanes, PageSize::DEFAULT, features);
    Message::Hello(Hello { version, ..hello }).encode(0)
}

#[test]
fn two_hundred_unexpected_clients_do_not_keep_the_real_peer_out() {
    let source = TestGuest::source(PageSize::DEFAULT, &[LENGTH]).paced(Duration::from_micros(200)).running(1);
    let destination = Arc::new(TestGuest::destination());
    let recorder = Arc::new(Recorder::default());
    let ended = block_on(async {
        let listener = TcpTransport::new("127.0.0.1", 0, Duration::ZERO).listen().await.unwrap();
        let address = listener.local_address();
        let address = address.strip_prefix("tcp:").unwrap_or(&address).to_owned();
        let port = address.rsplit(':').next().unwrap().parse().unwrap();
        let settings = DestinationSettings { hello_timeout: HANG, ..destination_settings() };
        let cancel = CancellationToken::new();
        let receiving =
            tokio::spawn(run::destination(destination.clone(), listener, settings, recorder.clone(), cancel.clone()));
        let clients = |numbers: std::ops::Range<usize>| {
            let (address, mut dice) = (address.clone(), Rng::with_seed(0x1234_5678_9abc_def1));
            let knock = move |number| knock(number, &address, &mut dice);
            tokio::task::spawn_blocking(move || numbers.filter_map(knock).collect::<Vec<_>>())
        };
        // Half of them connect before the source, the others at the same time.
        let early = clients(0..100).await.unwrap();
        let words = ["not a memferry stream", "without a word"];
        let are_said =
            |reasons: &[(String, u64)]| words.iter().all(|word| reasons.iter().any(|(why, _)| why.contains(word)));
        while !are_said(&turned_away(&recorder)) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let late = clients(100..200);
        let way = Arc::new(TcpTransport::new("127.0.0.1", port, Duration::from_secs(10)));
        let sent = run::source(source.clone(), way, source_settings(2, 2), Arc::default(), cancel).await;
        assert_eq!(sent.outcome, Outcome::Completed, "{:?}", sent.error);
        drop((early, late.await.unwrap()));
        receiving.await.unwrap()
    });
    assert_eq!(ended.outcome, Outcome::Completed, "{:?}", ended.error);
    assert!(source.bytes() == destination.bytes(), "the two memories differ");
    let reasons = turned_away(&recorder);
    let (lines, clients) = (reasons.len(), reasons.iter().map(|(_, count)| count).sum::<u64>());
    assert!(clients > 20 && lines < 20, "{clients} were turned away in {lines} events");
    let says = |word| reasons.iter().any(|(why, _)| why.contains(word));
    assert!(says("not a memferry stream") && says("without a word"), "{reasons:?}");
}

#[test]
fn connections_that_stay_silent_make_room_for_the_real_peer() {
    let source = Arc::new(TestGuest::source(PageSize::DEFAULT, &[LENGTH]));
    let destination = Arc::new(TestGuest::destination());
    let (sent, received) = block_on(async {
        let listener = TcpTransport::new("127.0.0.1", 0, Duration::ZERO).listen().await.unwrap();
        let address = listener.local_address();
        let address = address.strip_prefix("tcp:").unwrap_or(&address).to_owned();
        let port = address.rsplit(':').next().unwrap().parse().unwrap();
        // The destination would wait for them far longer than this test may take.
        let settings = DestinationSettings { hello_timeout: HANG * 10, ..destination_settings() };
        let cancel = CancellationToken::new();
        let receiving =
            tokio::spawn(run::destination(destination.clone(), listener, settings, Arc::default(), cancel.clone()));
        let silent: Vec<_> = (0..200).map(|_| TcpStream::connect(&address).unwrap()).collect();
        let way = Arc::new(TcpTransport::new("127.0.0.1", port, Duration::from_secs(10)));
        let sent = run::source(source.clone(), way, source_settings(2, 2), Arc::default(), cancel).await;
        drop(silent);
        (sent, receiving.await.unwrap())
    });
    assert_eq!(sent.outcome, Outcome::Completed, "{:?}", sent.error);
    assert_eq!(received.outcome, Outcome::Completed, "{:?}", received.error);
    assert!(source.bytes() == destination.bytes(), "the two memories differ");
}

/// The reasons for refusals, and their number, for each event.
fn turned_away(recorder: &Recorder) -> Vec<(String, u64)> {
    let why = |event| if let Event::TurnedAway { why, count, .. } = event { Some((why, count)) } else { None };
    recorder.events().into_iter().filter_map(|(_, event)| why(event)).collect()
}

#[test]
fn a_peer_that_cannot_be_taken_hears_why_and_the_wait_continues() {
    let lanes = |lanes: u16| {
        resealed(&hello(PROTOCOL_VERSION, SessionId([1; 16]), 0, 1, 1), |fields| {
            fields[69..71].copy_from_slice(&lanes.to_le_bytes())
        })
    };
    let mine = SessionId([9; 16]);
    let cases: [(Vec<u8>, &[&str]); 9] = [
        (hello(PROTOCOL_VERSION + 1, mine, 0, 1, 1).to_vec(), &["protocol version 5", "version 4", "same release"]),
        (lanes(0), &["number of lanes is 0"]),
        (lanes(u16::MAX), &["number of lanes is 65535"]),
        (hello(PROTOCOL_VERSION, mine, 0, 1, 64).to_vec(), &["64 lanes", "at most 8"]),
        (Message::Ready.encode(0).to_vec(), &["not Hello"]),
        // The first connection of a migration of two is accepted, then one that contradicts it, then the same again.
        // One that is refused between them leaves the first time to be counted.
        (hello(PROTOCOL_VERSION, mine, 0, 2, 2).to_vec(), &[]),
        (Message::Ready.encode(0).to_vec(), &["not Hello"]),
        (hello(PROTOCOL_VERSION, mine, 1, 3, 3).to_vec(), &["contradicts"]),
        (hello(PROTOCOL_VERSION, mine, 0, 2, 2).to_vec(), &["connection 0", "there already"]),
    ];
    let source = TestGuest::source(PageSize::DEFAULT, &[LENGTH]).running(1);
    let destination = Arc::new(TestGuest::destination());
    let recorder = Arc::new(Recorder::default());
    block_on(async {
        let transport = MemoryTransport::new(64 << 10);
        let listener = transport.listen().await.unwrap();
        let settings = DestinationSettings { max_lanes: 8, hello_timeout: HANG, ..destination_settings() };
        let cancel = CancellationToken::new();
        let receiving =
            tokio::spawn(run::destination(destination.clone(), listener, settings, recorder.clone(), cancel.clone()));
        let mut kept = Vec::new();
        for (said, words) in cases {
            let before = transport.faults().delivered(Direction::ToDestination);
            let mut hand = Hand::connect(&transport).await;
            hand.send(&said).await;
            if words.is_empty() {
                // It is read before the next one connects.
                while transport.faults().delivered(Direction::ToDestination) < before + said.len() as u64 {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                kept.push(hand);
                continue;
            }
            let heard = hand.hear().await;
            let Some(Message::Refused(why)) = heard else { panic!("{heard:?} instead of {words:?}") };
            assert!(words.iter().all(|word| why.contains(word)), "{why:?}");
        }
        assert!(!receiving.is_finished());
        let sent =
            run::source(source.clone(), Arc::new(transport), source_settings(2, 2), Arc::default(), cancel).await;
        assert_eq!(sent.outcome, Outcome::Completed, "{:?}", sent.error);
        assert_eq!(receiving.await.unwrap().outcome, Outcome::Completed);
    });
    assert!(source.bytes() == destination.bytes(), "the two memories differ");
    // Each peer heard its reason above. Of a kind the first is reported at once, and the others are counted; which of them comes first
    // is not certain, for they are greeted side by side.
    let mut counts = HashMap::new();
    for (_, event) in recorder.events() {
        if let Event::TurnedAway { kind, count, .. } = event {
            *counts.entry(kind).or_insert(0) += count;
        }
    }
    let expected = [
        (TurnedAwayKind::Version, 1),
        (TurnedAwayKind::Protocol, 4),
        (TurnedAwayKind::Unfit, 1),
        (TurnedAwayKind::Contradicts, 2),
        // The first connection of the migration of two, once another was complete.
        (TurnedAwayKind::Busy, 1),
    ];
    assert_eq!(counts, HashMap::from(expected));
}

#[test]
fn a_guest_that_is_larger_than_the_host_is_refused_before_anything_is_allocated() {
    let huge = |index: u64| BlockInfo { guest_address: index << 49, ..BlockInfo::new(format!("ram{index}"), 1 << 49) };
    let destination = Arc::new(TestGuest::destination());
    let ended = block_on(async {
        let transport = MemoryTransport::new(64 << 10);
        let listener = transport.listen().await.unwrap();
        let receiving = run::destination(
            destination.clone(),
            listener,
            destination_settings(),
            Arc::default(),
            CancellationToken::new(),
        );
        let source = async {
            let mut hand = Hand::connect(&transport).await;
            hand.send(&hello(PROTOCOL_VERSION, SessionId([5; 16]), 0, 1, 1)).await;
            hand.hear_until(Kind::Accept).await.expect("it accepts the stream");
            hand.send_message(Message::Blocks((0..1000).map(huge).collect())).await;
            let Some(Message::Refused(why)) = hand.hear().await else { panic!("not refused") };
            assert!(why.contains("the guest is too large"), "{why}");
        };
        tokio::join!(receiving, source).0
    });
    assert_eq!(ended.outcome, Outcome::Failed);
    assert!(destination.calls().is_empty(), "{:?}", destination.calls());
}

// ---- invalid frames ----

/// A control frame with changed fields and valid checksums.
fn resealed(frame: &[u8], change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut fields = frame[HEAD_BYTES..frame.len() - 8].to_vec();
    change(&mut fields);
    let checksum = xxh3_64(&fields).to_le_bytes();
    let body = [&fields[..], &checksum].concat();
    [&with_length(frame, body.len())[..], &body].concat()
}

/// A frame's head with a changed length and a valid checksum.
fn with_length(frame: &[u8], length: usize) -> [u8; HEAD_BYTES] {
    let mut head = *frame.first_chunk::<HEAD_BYTES>().unwrap();
    head[4..8].copy_from_slice(&u32::try_from(length).unwrap().to_le_bytes());
    sealed(head)
}

/// A head with a valid checksum.
fn sealed(mut head: [u8; HEAD_BYTES]) -> [u8; HEAD_BYTES] {
    let checksum = xxh3_64_with_seed(&head[..8], u64::from_le_bytes(*b"mferry-1"));
    head[8..].copy_from_slice(&checksum.to_le_bytes());
    head
}

/// A Pages frame with one byte changed before or in its payload, and valid checksums.
fn pages_resealed(frame: &[u8], dice: &mut Rng) -> Vec<u8> {
    let mut body = frame[HEAD_BYTES..].to_vec();
    let before_payload = head_bytes(body.first_chunk::<FIXED_BYTES>().unwrap());
    let payload = before_payload < body.len() && dice.usize(..2) == 0;
    let at = if payload {
        before_payload + dice.usize(..body.len() - before_payload)
    } else {
        dice.usize(..before_payload - 8)
    };
    body[at] = dice.u64(..).to_le_bytes()[0];
    let before_payload = head_bytes(body.first_chunk::<FIXED_BYTES>().unwrap()).min(body.len());
    let hash = hash_of_parts(&body[FIXED_BYTES..], &body[before_payload..]).to_le_bytes();
    body[32..40].copy_from_slice(&hash);
    let checksum = xxh3_64(&body[..before_payload - 8]).to_le_bytes();
    body[before_payload - 8..before_payload].copy_from_slice(&checksum);
    [&frame[..HEAD_BYTES], &body].concat()
}

/// The hash of a payload whose parts have the bytes that these descriptors name, as far as it has them.
fn hash_of_parts(descriptors: &[u8], mut payload: &[u8]) -> u64 {
    let lengths = descriptors.chunks_exact(4).map(|it| u32::from_le_bytes([it[1], it[2], it[3], 0]) as usize);
    let mut parts = Vec::new();
    for length in lengths.filter(|length| *length > 0) {
        let (part, rest) = payload.split_at(length.min(payload.len()));
        if !part.is_empty() {
            parts.push(page_hash(part));
        }
        payload = rest;
    }
    payload_hash(parts.into_iter().take(64))
}

/// The possible changes of a frame by a malicious peer. The flag says whether the reader must refuse it.
fn hostile(frame: &[u8], dice: &mut Rng) -> (Vec<u8>, bool) {
    let mut bytes = frame.to_vec();
    let kind = Kind::from_u8(frame[0]).unwrap();
    match dice.usize(..8) {
        // Damage.
        0 | 1 => {
            let at = dice.usize(..bytes.len());
            bytes[at] ^= 1 << dice.usize(..8);
            (bytes, true)
        }
        // Truncation.
        2 => {
            bytes.truncate(1 + dice.usize(..bytes.len() - 1));
            (bytes, true)
        }
        // Noise.
        3 => {
            let count = 1 + dice.usize(..200);
            (noise(dice, count), true)
        }
        // A random head with a valid checksum.
        4 => {
            let mut head = [0; HEAD_BYTES];
            head[..8].copy_from_slice(&dice.u64(..).to_le_bytes());
            head[0] = dice.u64(..).to_le_bytes()[0] % 48;
            head[1] &= 1;
            bytes[..HEAD_BYTES].copy_from_slice(&sealed(head));
            (bytes, false)
        }
        // A random length, with a valid checksum.
        5 => {
            let length = usize::try_from(dice.u64(..) >> (32 + dice.usize(..31))).unwrap() & 0xffff_ffff;
            bytes[..HEAD_BYTES].copy_from_slice(&with_length(frame, length));
            (bytes, false)
        }
        // A random field, with valid checksums.
        _ if kind == Kind::Pages => (pages_resealed(frame, dice), false),
        _ => {
            let bytes = resealed(frame, |fields| {
                if !fields.is_empty() {
                    let at = dice.usize(..fields.len());
                    fields[at] = dice.u64(..).to_le_bytes()[0];
                }
                fields.truncate(fields.len() - dice.usize(..2).min(fields.len()));
            });
            (bytes, false)
        }
    }
}

/// A receiver and a loader of one lane: their result for a stream.
async fn read(memory: &GuestMemory, stream: &[u8], pool: &BufferPool) -> Result<(), String> {
    let reader = FrameReader::new(stream, "the stream".into(), PageSize::DEFAULT);
    let lanes = LaneMap::new(1, PageSize::DEFAULT);
    let (receiver_meter, loader_meter) = (Meter::start(StageId::receiver(0)), Meter::start(StageId::loader(0)));
    let features = Features { ignored_blocks: false, ..Features::ALL };
    let deframer = WireDeframer::new(0, BulkMap::new(1, 1), reader, memory.layout().clone(), lanes, features);
    let receiver = Receiver::new(0, deframer, pool.clone(), receiver_meter);
    let received = Arc::new(DirtyBitmap::filled(memory.layout()));
    let sink = Direct::new(memory.clone(), received);
    let loader = Loader::new(0, sink, Arc::new(LaneProgress::default()), loader_meter);
    let ((frames, arrived), (control, said), (loaded_out, loaded)) = (bounded(4), bounded(64), bounded(64));
    let (received, loading) = tokio::join!(receiver.run(vec![Some(frames)], control), loader.run(arrived, loaded_out));
    drop((said, loaded));
    match (received, loading) {
        (Ok(()), Ok(())) => Ok(()),
        (Err(error), Ok(())) => Err(error.to_string()),
        (Err(echo), Err(error)) if echo.is_closed() => Err(error.to_string()),
        (_, Err(error)) => Err(error.to_string()),
    }
}

#[test]
fn a_hostile_frame_is_refused_at_its_first_byte_or_does_no_harm() {
    let memory = Arc::new(MappedMemory::anonymous(usize::try_from(LENGTH).unwrap()).unwrap());
    let info = TestGuest::source(PageSize::DEFAULT, &[LENGTH]).memory().layout().blocks()[0].clone();
    let memory = GuestMemory::new(PageSize::DEFAULT, vec![RamBlock { info, memory, fresh: true }]).unwrap();
    let pool = BufferPool::new(6, PageSize::DEFAULT.extent_bytes());
    let recording = block_on(recording());
    let (count, mut dice) = (sample::count(10_000), Rng::with_seed(sample::seed()));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut refused = 0;
    for number in 0..count {
        let frame = &recording.frames[dice.usize(..recording.frames.len())];
        let (bytes, must_fail) = hostile(frame, &mut dice);
        let reading = async { tokio::time::timeout(HANG, read(&memory, &bytes, &pool)).await.expect("it hangs") };
        match runtime.block_on(reading) {
            Ok(()) => assert!(!must_fail, "frame {number} was taken: {bytes:02x?}"),
            Err(error) => {
                assert!(
                    error.contains("at byte 0") || error.contains("begins at byte 0"),
                    "frame {number}: {error}: {bytes:02x?}"
                );
                refused += 1;
            }
        }
    }
    assert!(refused * 100 > count * 65, "{refused} of {count} were refused");
    assert!(pool.peak_bytes() <= pool.bound_bytes());
}

/// Sends a malicious source's frames to a destination. The source disconnects when it receives Loaded, or at the end
/// of the stream.
async fn receive(stream: &[u8]) -> (Ended, Arc<TestGuest>, u64) {
    let guest = Arc::new(TestGuest::destination());
    let transport = MemoryTransport::new(64 << 10);
    let listener = transport.listen().await.unwrap();
    let recorder = Arc::new(Recorder::default());
    let cancel = CancellationToken::new();
    let receiving = run::destination(guest.clone(), listener, destination_settings(), recorder.clone(), cancel);
    let sending = async {
        let mut hand = Hand::connect(&transport).await;
        hand.send(stream).await;
        hand.fall_silent().await;
        drop(hand.hear_until(Kind::Loaded).await);
    };
    let (ended, ()) = tokio::join!(receiving, sending);
    let bound = recorder.events().into_iter().find_map(|(_, event)| match event {
        Event::Guest { memory_bound, .. } => Some(memory_bound),
        _ => None,
    });
    (ended, guest, bound.unwrap_or(0))
}

#[test]
fn a_destination_survives_hostile_streams() {
    let recording = block_on(recording());
    let first = recording.first(Kind::Blocks) + 1;
    let (count, mut dice) = (sample::count(300), Rng::with_seed(sample::seed()));
    for number in 0..count {
        let place = first + dice.usize(..recording.frames.len() - first);
        let (bytes, must_fail) = hostile(&recording.frames[place], &mut dice);
        let before = recording.frames[..place].concat();
        let stream = [&before[..], &bytes, &recording.frames[place + 1..].concat()].concat();
        let (ended, guest, bound) = block_on(receive(&stream));
        let error = ended.error.unwrap_or_default();
        assert_eq!(ended.outcome, Outcome::Failed, "stream {number}: {error}");
        assert!(!guest.was_called(GuestCall::Start), "stream {number}: {error}");
        assert!(!must_fail || error.contains("byte"), "stream {number}: {error}");
        assert!(ended.memory_peak <= bound, "stream {number}: {} of {bound} bytes", ended.memory_peak);
    }
}

// ---- files ----

/// Receives from a file of these bytes.
async fn receive_file(bytes: &[u8], dir: &std::path::Path) -> (Ended, Arc<TestGuest>) {
    let path = dir.join("stream");
    std::fs::write(&path, bytes).unwrap();
    let guest = Arc::new(TestGuest::destination());
    let listener = FileTransport::new(&path).listen().await.unwrap();
    let (recorder, cancel) = (Arc::default(), CancellationToken::new());
    (run::destination(guest.clone(), listener, destination_settings(), recorder, cancel).await, guest)
}

#[track_caller]
fn refused((ended, guest): (Ended, Arc<TestGuest>), what: &str, words: &[&str]) {
    let error = ended.error.unwrap_or_default();
    assert_eq!(ended.outcome, Outcome::Failed, "{what}: {error}");
    assert!(words.iter().any(|word| error.contains(word)), "{what}: {error}");
    assert!(!guest.was_called(GuestCall::Start) && !guest.runs(), "{what}: {error}");
}

#[test]
fn a_file_that_is_whole_is_taken() {
    block_on(async {
        let (recording, dir) = (recording().await, tempfile::tempdir().unwrap());
        let (ended, guest) = receive_file(&recording.bytes(), dir.path()).await;
        assert_eq!((ended.outcome, ended.error), (Outcome::Completed, None));
        assert!(guest.runs());
    });
}

#[test]
fn a_file_cut_short_anywhere_starts_nothing() {
    block_on(async {
        let (recording, dir) = (recording().await, tempfile::tempdir().unwrap());
        let all = recording.bytes();
        let mut ends: Vec<_> = (0..40).map(|cut| all.len() * cut / 40).collect();
        // Between two frames, and one byte before the end.
        let mut end = 0;
        let borders = recording.frames.iter().map(|frame| {
            end += frame.len();
            end
        });
        let borders: Vec<_> = borders.collect();
        ends.extend(borders.iter().rev().skip(1).step_by(borders.len().div_ceil(19)));
        ends.push(all.len() - 1);
        for end in ends {
            let received = receive_file(&all[..end], dir.path()).await;
            let words = ["byte", "before its end mark", "closed without a word"];
            refused(received, &format!("cut at byte {end} of {}", all.len()), &words);
        }
    });
}

#[test]
fn a_file_with_one_bit_flipped_anywhere_starts_nothing() {
    let (recording, dir) = (block_on(recording()), tempfile::tempdir().unwrap());
    let (count, mut dice) = (sample::count(300), Rng::with_seed(sample::seed()));
    for number in 0..usize::try_from(count).unwrap() {
        let frame = number % recording.frames.len();
        let mut frames = recording.frames.clone();
        let mut damaged = frames[frame].to_vec();
        // Head, fields and payload in turn.
        let at = match number / recording.frames.len() % 3 {
            0 => dice.usize(..HEAD_BYTES),
            1 => HEAD_BYTES + dice.usize(..(damaged.len() - HEAD_BYTES).min(MIN_HEAD_BYTES)),
            _ => dice.usize(..damaged.len()),
        };
        damaged[at] ^= 1 << dice.usize(..8);
        frames[frame] = damaged.into();
        let received = block_on(receive_file(&frames.concat(), dir.path()));
        let kind = FrameHead::parse(recording.frames[frame].first_chunk().unwrap(), PageSize::DEFAULT).unwrap().kind;
        refused(received, &format!("byte {at} of frame {frame}, of kind {kind}"), &["byte"]);
    }
}

#[test]
fn a_file_that_continues_behind_its_end_mark_starts_nothing() {
    block_on(async {
        let (recording, dir) = (recording().await, tempfile::tempdir().unwrap());
        let behind = [vec![0], recording.frames[recording.first(Kind::State)].to_vec(), recording.bytes()];
        for behind in behind {
            let stream = [recording.bytes(), behind].concat();
            refused(
                receive_file(&stream, dir.path()).await,
                "something behind the end mark",
                &["byte", "unexpected message", "behind", "part"],
            );
        }
    });
}

#[test]
fn another_page_size_is_refused_with_both_figures() {
    let source = TestGuest::source(PageSize::new(8192).unwrap(), &[LENGTH]).running(1);
    let destination = Arc::new(TestGuest::destination());
    let ends = block_on(async {
        // A source with a different page size is refused at Hello by a destination with a fixed one, and receives the
        // error.
        let transport = MemoryTransport::new(64 << 10);
        let listener = transport.listen().await.unwrap();
        let settings = DestinationSettings { page_size: Some(PageSize::DEFAULT), ..destination_settings() };
        let cancel = CancellationToken::new();
        let never = CancellationToken::new();
        let receiving = run::destination(destination.clone(), listener, settings, Arc::default(), cancel.clone());
        let sending = async {
            let ended =
                run::source(source.clone(), Arc::new(transport), source_settings(1, 1), Arc::default(), never).await;
            cancel.cancel();
            ended
        };
        tokio::join!(sending, receiving)
    });
    let error = ends.0.error.unwrap();
    assert!(error.contains("8192") && error.contains("4096"), "{error}");
    assert_eq!(ends.1.outcome, Outcome::Cancelled, "the wait continued");
    source.wait_for_writes();
    // A destination without a fixed page size accepts it.
    let ends = block_on(migrate(
        source.clone(),
        destination.clone(),
        Arc::new(MemoryTransport::new(64 << 10)),
        source_settings(1, 1),
        CancellationToken::new(),
    ));
    assert_eq!(ends.source.outcome, Outcome::Completed, "{:?}", ends.source.error);
}
