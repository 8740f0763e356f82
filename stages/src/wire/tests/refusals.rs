//! Each error that a peer can make, and the error that it gets.

use futures::executor::block_on;
use xxhash_rust::xxh3::xxh3_64;

use super::samples;
use crate::batch::PageEncoding;
use crate::geometry::{BlockInfo, PageSize};
use crate::wire::frame::seal;
use crate::wire::{Features, FrameHead, FrameReader, HEAD_BYTES, Kind, Message, PagesHead, SessionId};

/// The error for the frame's body with `bytes` put at `at` of its fields, under a right checksum.
fn refusal(kind: Kind, at: usize, bytes: &[u8]) -> String {
    let sample = samples::messages().into_iter().find(|message| message.kind() == kind).expect("a sample of each kind");
    let mut body = sample.encode(0)[HEAD_BYTES..].to_vec();
    body[at..at + bytes.len()].copy_from_slice(bytes);
    decode(kind, &body[..body.len() - 8])
}

fn decode(kind: Kind, fields: &[u8]) -> String {
    let body = [fields, &xxh3_64(fields).to_le_bytes()].concat();
    Message::decode(kind, &body).expect_err("it is wrong").to_string()
}

fn head(fields: [u8; 8]) -> String {
    FrameHead::parse(&seal(fields), PageSize::DEFAULT).expect_err("it is wrong").to_string()
}

fn pages_refusal(at: usize, bytes: &[u8]) -> String {
    let (head, payload) = samples::pages();
    let mut body = head.to_bytes(2)[HEAD_BYTES..].to_vec();
    let checked = body.len() - 8;
    body[at..at + bytes.len()].copy_from_slice(bytes);
    let checksum = xxh3_64(&body[..checked]);
    body[checked..].copy_from_slice(&checksum.to_le_bytes());
    let length = u32::try_from(body.len() + payload.len()).unwrap();
    PagesHead::parse(&body, length, &samples::layout()).expect_err("it is wrong").to_string()
}

#[test]
fn heads() {
    assert_eq!(head([1, 3, 0, 0, 0, 0, 0, 0]), "the frame has the unknown flags 0x02");
    assert_eq!(
        head([77, 1, 0, 0, 0, 0, 0, 0]),
        "frames of kind 77 must be understood, and this version does not know them"
    );
    assert_eq!(head([77, 0, 0, 0, 1, 0, 16, 0]), "the frame of unknown kind 77 is 1048577 bytes long, at most 1048576");
    assert_eq!(head([10, 1, 0, 0, 18, 0, 0, 0]), "the End frame is 18 bytes long, at most 17");
    assert_eq!(head([6, 1, 64, 0, 8, 0, 0, 0]), "the LaneEnds frame is on lane 64, at most 63");
    assert_eq!(head([8, 1, 1, 0, 9, 0, 0, 0]), "the Go frame is on lane 1, control frames are on lane 0");
    let damaged = "the frame head is damaged (checksum mismatch), or this is not a memferry stream";
    for garbage in [[0; HEAD_BYTES], [0xff; HEAD_BYTES], *b"GET / HTTP/1.1\r\n"] {
        assert_eq!(FrameHead::parse(&garbage, PageSize::DEFAULT).unwrap_err().to_string(), damaged);
    }
}

#[test]
fn bodies() {
    assert_eq!(
        Message::decode(Kind::Ready, &[0; 8]).unwrap_err().to_string(),
        "the Ready frame is damaged (checksum mismatch)"
    );
    assert_eq!(
        Message::decode(Kind::Ready, &[0; 7]).unwrap_err().to_string(),
        "the frame ends inside checksum: 8 bytes are needed, 7 are left"
    );
    assert_eq!(decode(Kind::Ready, b"x"), "1 bytes follow the last field of the frame");
    assert_eq!(decode(Kind::End, &[0, 1, 2]), "the frame ends inside number of frames: 8 bytes are needed, 2 are left");
}

#[test]
fn hellos() {
    let refusal = |at, bytes: &[u8]| refusal(Kind::Hello, at, bytes);
    assert_eq!(refusal(0, b"\x00emferrx"), r#"a Hello begins with "\x00emferrx" instead of "memferry""#);
    assert_eq!(
        refusal(8, &[2, 1, 0xff]),
        "the peer speaks protocol version 258, this program version 4: use the same release on both sides"
    );
    assert_eq!(refusal(62, &[3, 0]), "connection is 3, it must be 0 to 2");
    assert_eq!(refusal(62, &[2, 0]), "connection 2 is bulk, and the first 2 are bulk, no others");
    assert_eq!(refusal(64, &[1]), "connection 1 is urgent, and the first 2 are bulk, no others");
    assert_eq!(refusal(64, &[2]), "connection 1 is control, and the first 2 are bulk, no others");
    assert_eq!(refusal(64, &[3]), "role of the connection is 3, which has no meaning in this version");
    assert_eq!(refusal(65, &[5, 0]), "number of connections is 5, it must be 2 to 4");
    assert_eq!(refusal(65, &[1, 0]), "number of connections is 1, it must be 2 to 4");
    assert_eq!(refusal(67, &[4, 0]), "number of bulk connections is 4, it must be 1 to 3");
    assert_eq!(refusal(67, &[0, 0]), "number of bulk connections is 0, it must be 1 to 3");
    assert_eq!(refusal(69, &[65, 0]), "number of lanes is 65, it must be 1 to 64");
    assert_eq!(
        refusal(71, &[1, 16, 0, 0]),
        "the page size is 4097 bytes, it must be a power of two from 4096 to 65536"
    );
    assert_eq!(refusal(75, &[65, 0]), "number of features is 65, it must be 0 to 64");
    assert_eq!(refusal(77, &[0]), "length of a feature's name is 0, it must be 1 to 64");
    assert_eq!(refusal(77, &[65]), "length of a feature's name is 65, it must be 1 to 64");
    assert_eq!(refusal(78, &[0xff]), "length of a feature's name is not UTF-8");
}

#[test]
fn features() {
    let lz4 = Features { lz4: true, ..Features::default() };
    assert_eq!(Features::from_list(&["lz4".into()]), Ok(lz4));
    let unknown = ["newer", "lz4", "newest\n"].map(Into::into);
    assert_eq!(
        Features::from_list(&unknown).unwrap_err().to_string(),
        r#"the stream requires features that this version does not know: "newer", "newest\n""#
    );
    let all = Features::ALL;
    assert_eq!(Features::from_list(&all.to_list()), Ok(all));
    let mut hello = samples::hello();
    hello.features = vec!["a".into(), "b".into()];
    let mut fields = Message::Hello(hello).encode(0)[HEAD_BYTES..].to_vec();
    fields.truncate(fields.len() - 8);
    *fields.last_mut().unwrap() = b'a';
    assert_eq!(decode(Kind::Hello, &fields), r#"the feature "a" is listed twice"#);
}

#[test]
fn states_and_blocks() {
    assert_eq!(refusal(Kind::State, 0, &[2]), "phase of a state section is 2, which has no meaning in this version");
    assert_eq!(refusal(Kind::State, 1, &[9]), "end byte of a state section is 9, which has no meaning in this version");
    assert_eq!(refusal(Kind::State, 6, &[0]), "length of a state section's name is 0, it must be 1 to 255");
    assert_eq!(refusal(Kind::State, 10, &[1, 0, 16, 0]), "length of a state chunk is 1048577, it must be 0 to 1048576");
    assert_eq!(refusal(Kind::State, 10, &[6]), "the frame ends inside a state chunk: 6 bytes are needed, 5 are left");
    assert_eq!(refusal(Kind::Blocks, 0, &[0, 0]), "number of RAM blocks is 0, it must be 1 to 1024");
    assert_eq!(refusal(Kind::Blocks, 0, &[1, 4]), "number of RAM blocks is 1025, it must be 1 to 1024");
    assert_eq!(refusal(Kind::Blocks, 2, &[0]), "length of a RAM block's id is 0, it must be 1 to 255");
}

#[test]
fn ignored_blocks() {
    let block = |id: &str| BlockInfo { guest_address: 2, backing_page_size: 3, ..BlockInfo::new(id, 1) };
    let frame = Message::Blocks(vec![block("a"), block("b"), block("c")]).encode(0);
    let plain = &frame[HEAD_BYTES..frame.len() - 8];
    let refusal = |more: &[u8]| decode(Kind::Blocks, &[plain, more].concat());
    assert_eq!(refusal(&[0, 0]), "number of ignored RAM blocks is 0, it must be 1 to 3");
    assert_eq!(refusal(&[4, 0]), "number of ignored RAM blocks is 4, it must be 1 to 3");
    assert_eq!(refusal(&[1]), "the frame ends inside number of ignored RAM blocks: 2 bytes are needed, 1 are left");
    assert_eq!(refusal(&[1, 0, 2]), "the frame ends inside an ignored RAM block: 2 bytes are needed, 1 are left");
    assert_eq!(refusal(&[1, 0, 3, 0]), "index of an ignored RAM block is 3, it must be 0 to 2");
    assert_eq!(refusal(&[2, 0, 1, 0, 1, 0]), "index of an ignored RAM block is 1, it must be 2 to 2");
    assert_eq!(refusal(&[1, 0, 1, 0, 9]), "1 bytes follow the last field of the frame");
}

#[test]
fn rounds_and_digests() {
    assert_eq!(refusal(Kind::RoundComplete, 4, &[3]), "kind of a round is 3, which has no meaning in this version");
    assert_eq!(refusal(Kind::RoundComplete, 0, &[0; 4]), "round is 0, it must be 1 to 4294967295");
    assert_eq!(
        refusal(Kind::RoundComplete, 5 + 10 * 8, &[1, 0, 0, 0, 0, 0, 0, 1]),
        "count of bytes out is 72057594037927937, it must be 0 to 72057594037927936"
    );
    assert_eq!(refusal(Kind::Digests, 0, &[0, 4, 0, 0]), "block is 1024, it must be 0 to 1023");
    assert_eq!(
        refusal(Kind::Digests, 4, &[0xfe, 0xff, 0xff, 0xff, 0]),
        "first stretch is 4294967294, it must be 0 to 4294967293"
    );
    assert_eq!(refusal(Kind::Digests, 12, &[1, 16]), "number of digests is 4097, it must be 1 to 4096");
    assert_eq!(refusal(Kind::Digests, 30, &[9]), "number of left out masks is 9, it must be 0 to 8");
    assert_eq!(refusal(Kind::Digests, 47 + 16, &[0; 8]), "the left out masks of a stretch end with a zero word");
    assert_eq!(refusal(Kind::PageHashes, 12, &[1, 2]), "number of page hashes is 513, it must be 1 to 512");
    assert_eq!(refusal(Kind::PageRequest, 0, &[0, 4, 0, 0]), "block is 1024, it must be 0 to 1023");
    assert_eq!(
        refusal(Kind::PageRequest, 4, &[0, 0, 0, 0, 0x40, 0, 0, 0]),
        "page is 274877906944, it must be 0 to 274877906879"
    );
    assert_eq!(refusal(Kind::Missing, 8, &[0, 0]), "number of runs is 0, it must be 1 to 4096");
    assert_eq!(refusal(Kind::Progress, 8, &[65, 0]), "number of lanes is 65, it must be 0 to 64");
}

#[test]
fn verdicts() {
    assert_eq!(refusal(Kind::Go, 0, &[2]), "run state is 2, which has no meaning in this version");
    assert_eq!(refusal(Kind::Loaded, 0, &[2]), "verified byte is 2, which has no meaning in this version");
    assert_eq!(refusal(Kind::Abort, 0, &[1, 16]), "length of a reason is 4097, it must be 0 to 4096");
    assert_eq!(refusal(Kind::Refused, 2, &[0xc3]), "a reason is not UTF-8");
}

#[test]
fn pages() {
    assert_eq!(pages_refusal(0, &[2]), "pages of block 2, there are 2 blocks");
    assert_eq!(pages_refusal(4, &[3]), "pages of extent 3 of block 0, which has 3 extents");
    assert_eq!(pages_refusal(4, &[2]), "pages 0x8000000000000017 of extent 2 of block 0, which has the pages 0x1");
    assert_eq!(pages_refusal(8, &[0]), "round is 0, it must be 1 to 4294967295");
    assert_eq!(pages_refusal(24, &[8]), "the zero pages 0x8 are not all among the frame's pages 0x8000000000000017");
    assert_eq!(pages_refusal(24, &[2]), "the frame ends inside descriptors: 4 bytes are needed, 0 are left");
    assert_eq!(pages_refusal(24, &[0x16]), "4 bytes follow the last field of the frame");
    assert_eq!(pages_refusal(40, &[7]), "page 64 of block 0 has the unknown encoding 7");
    assert_eq!(pages_refusal(40, &[1, 1]), "page 64 of block 0 has 4097 bytes as raw, which must be 4096 to 4096");
    assert_eq!(pages_refusal(44, &[3, 0]), "page 66 of block 0 has 0 bytes as lz4, which must be 1 to 4095");
    assert_eq!(pages_refusal(44, &[4, 0, 16]), "page 66 of block 0 has 4096 bytes as zstd, which must be 1 to 4095");
    assert_eq!(pages_refusal(48, &[5, 1, 16]), "page 127 of block 0 has 4097 bytes as xbzrle, which must be 1 to 4096");
    assert_eq!(pages_refusal(12, &[0]), "the pages have 4205 bytes, the payload has 4096");
    let (head, payload) = samples::pages();
    let bytes = head.to_bytes(2);
    let parse = |length| PagesHead::parse(&bytes[HEAD_BYTES..], length, &samples::layout()).map_err(|e| e.to_string());
    assert_eq!(parse(4266), Err("the frame is 4266 bytes long, its parts are 4265".into()));
    assert!(parse(4265).is_ok());
    let refused = samples::check_payload(&head, &[&payload[1..], &[0]].concat()).unwrap_err().to_string();
    assert!(refused.starts_with("the payload is damaged (xxh3 "), "{refused}");
    let none = PagesHead { payload_hash: 0, ..head };
    assert!(samples::check_payload(&none, &payload).is_err(), "no hash is no right hash");
}

#[test]
fn groups() {
    let refusal = |pages: &[(PageEncoding, u32)]| {
        let mask = u64::MAX >> (64 - pages.len());
        let head = PagesHead { mask, zero: 0, pages: pages.to_vec(), ..samples::pages().0 };
        let (body, payload) = (head.to_bytes(2), u32::try_from(head.payload_bytes()).unwrap());
        let body = &body[HEAD_BYTES..];
        let length = u32::try_from(body.len()).unwrap() + payload;
        PagesHead::parse(body, length, &samples::layout()).map(|_| ()).map_err(|error| error.to_string())
    };
    let (raw, grouped) = ((PageEncoding::Raw, 4096), (PageEncoding::Grouped, 0));
    let first = |bytes| (PageEncoding::Lz4, bytes);
    let alone = "page 64 of block 0 is marked as part of a group, and no compressed page came before it";
    assert_eq!(refusal(&[grouped]), Err(alone.into()));
    assert_eq!(refusal(&[raw, grouped]), Err(alone.replace("64", "65")));
    assert_eq!(refusal(&[(PageEncoding::Xbzrle, 9), grouped]), Err(alone.replace("64", "65")));
    let bytes = "page 65 of block 0 has 1 bytes as grouped, which must be 0 to 0";
    assert_eq!(refusal(&[first(9), (PageEncoding::Grouped, 1)]), Err(bytes.into()));
    let pages = |most: usize, bytes| [&[first(bytes)][..], &vec![grouped; most - 1]].concat();
    assert_eq!(refusal(&pages(16, 65535)), Ok(()));
    assert_eq!(refusal(&pages(17, 9)), Err("page 64 of block 0 begins a group of 17 pages, at most 16".into()));
    assert_eq!(refusal(&pages(64, 9)), Err("page 64 of block 0 begins a group of 64 pages, at most 16".into()));
    let long = "page 64 of block 0 has 8192 bytes as lz4, which must be 1 to 8191";
    assert_eq!(refusal(&pages(2, 8192)), Err(long.into()));
    assert_eq!(refusal(&pages(2, 0)), Err(long.replace("has 8192", "has 0")));
    assert_eq!(refusal(&[first(8191), raw, (PageEncoding::Xbzrle, 5), grouped, first(4095)]), Ok(()));
    assert_eq!(
        refusal(&[first(8191), raw, first(4095), grouped]),
        Err("page 64 of block 0 has 8191 bytes as lz4, which must be 1 to 4095".into()),
        "the last page is of the second group"
    );
}

#[test]
fn a_frame_too_short_for_its_own_masks() {
    let (head, payload) = samples::pages();
    let mut bytes = [&head.to_bytes(2)[..], &payload].concat();
    for (length, needs) in [(47u32, 48), (59, 60)] {
        let head = FrameHead::new(Kind::Pages, 2, length).to_bytes();
        bytes[..HEAD_BYTES].copy_from_slice(&head);
        let mut reader = FrameReader::new(&bytes[..], "sample".into(), PageSize::DEFAULT);
        let error = block_on(reader.next()).unwrap_err().to_string();
        let why =
            format!("the frame ends inside the head of a Pages frame: {needs} bytes are needed, {length} are left");
        assert_eq!(error, format!("frame at byte 0 of sample: {why}"));
    }
}

#[test]
fn session_ids_are_random_and_print_as_hexadecimal() {
    assert_ne!(SessionId::random().unwrap(), SessionId::random().unwrap());
    assert_eq!(samples::hello().session.to_string(), "30313233343536373839616263646566");
}
