//! The file of a trace: it reads back as it was written, and any other content is refused.

use std::os::unix::fs::PermissionsExt;

use proptest::prelude::*;

use super::file::{Damage, parse};
use super::*;

fn write(trace: &Trace) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trace");
    let mut writer = TraceWriter::create(&path, &trace.guest).unwrap();
    trace.intervals.iter().for_each(|interval| writer.interval(interval).unwrap());
    let bytes = writer.finish(&trace.samples).unwrap();
    let written = std::fs::read(&path).unwrap();
    assert_eq!(written.len() as u64, bytes);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    written
}

/// Runs of a guest with these blocks, from arbitrary numbers.
fn runs(guest: &GuestFacts, seeds: &[(u64, u64)]) -> Vec<Range<u64>> {
    let mut pages = std::collections::BTreeSet::new();
    let blocks: Vec<_> = guest.block_ranges().collect();
    for &(start, length) in seeds {
        let block = &blocks[usize::try_from(start).unwrap() % blocks.len()];
        let start = block.start + start % (block.end - block.start);
        pages.extend(start..(start + length % 70).min(block.end));
    }
    let mut runs: Vec<Range<u64>> = Vec::new();
    for page in pages {
        match runs.last_mut() {
            Some(last) if last.end == page => last.end += 1,
            _ => runs.push(page..page + 1),
        }
    }
    runs
}

prop_compose! {
    fn facts()(
        page in 0_u32..=4, blocks in prop::collection::vec((".{1,20}", 1_u64..3000), 1..4), late in any::<bool>(),
        settings in ".{0,60}", times in any::<(u32, u32)>(), cores in 1_u32..500,
    ) -> GuestFacts {
        GuestFacts {
            page_size: PageSize::new(4096 << page).unwrap(),
            blocks: blocks.into_iter().map(|(id, pages): (String, u64)| (id.into(), pages)).collect(),
            excluded: 0,
            untouched: 1,
            rearms_late: late,
            cores,
            arming: Duration::from_nanos(times.0.into()),
            digests: Duration::from_nanos(times.1.into()),
            settings: settings.into(),
        }
    }
}

fn coded() -> impl Strategy<Value = [Coded; 3]> {
    let one = || {
        any::<(u32, u32, u32)>().prop_map(|(pages, bytes, nanos)| Coded {
            pages: pages.into(),
            compressed: u64::from(pages) / 2,
            bytes: bytes.into(),
            nanos: nanos.into(),
        })
    };
    [one(), one(), one()]
}

fn deltas() -> impl Strategy<Value = DeltaSample> {
    any::<(u32, u32, u32, u32, u32)>().prop_map(|(to_zero, equal, overflows, deltas, bytes)| {
        let [to_zero, equal, overflows, deltas, delta_bytes] =
            [to_zero, equal, overflows, deltas, bytes].map(u64::from);
        let pages = to_zero + equal + overflows + deltas;
        DeltaSample { pages, to_zero, equal, overflows, deltas, delta_bytes }
    })
}

prop_compose! {
    fn samples()(
        level in -7_i32..=19, touched in any::<u32>(), codeds in [coded(), coded(), coded()],
        costs in any::<[(u32, u32); 3]>(), deltas in prop::collection::vec([deltas(), deltas(), deltas()], 0..6),
    ) -> Samples {
        let [whole, written, alone] = codeds;
        let cost = |(pages, nanos): (u32, u32)| Cost { pages: pages.into(), nanos: nanos.into() };
        let span = |index: u64| Duration::from_millis(100 << (2 * index));
        Samples {
            zstd_level: level,
            first_written: Share { of: touched.into(), part: touched.into() },
            touched: Share { of: touched.into(), part: u64::from(touched) / 3 },
            whole,
            written,
            alone,
            read: cost(costs[0]),
            checksum: cost(costs[1]),
            delta: cost(costs[2]),
            deltas: (0..)
                .zip(deltas)
                .map(|(at, [again, rested, from_zero])| Deltas { span: span(at), again, rested, from_zero })
                .collect(),
        }
    }
}

prop_compose! {
    fn traces()(
        guest in facts(), samples in samples(),
        intervals in prop::collection::vec(
            (1_u32.., any::<u32>(), prop::collection::vec((any::<u64>(), 1_u64..200), 0..20)), 1..5),
    ) -> Trace {
        let interval = |(length, sync, seeds): (u32, u32, Vec<(u64, u64)>)| Interval {
            length: Duration::from_nanos(length.into()),
            sync: Duration::from_nanos(sync.into()),
            written: Runs::of(runs(&guest, &seeds)),
        };
        let intervals = intervals.into_iter().map(interval).collect();
        Trace { guest, intervals, samples }
    }
}

fn place_and_damage(error: TraceError) -> (u64, Damage) {
    match error {
        TraceError::Damaged { at, what } => (at, what),
        TraceError::Io(error) => panic!("{error}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn a_trace_reads_back_as_it_was_written(trace in traces()) {
        prop_assert_eq!(parse(&write(&trace)).unwrap(), trace);
    }

    #[test]
    fn runs_are_those_that_were_put_in(guest in facts(), seeds in prop::collection::vec((any::<u64>(), 1_u64..200), 0..60)) {
        let runs = runs(&guest, &seeds);
        let kept = Runs::of(runs.clone());
        prop_assert_eq!(kept.pages(), runs.iter().map(|run| run.end - run.start).sum::<u64>());
        prop_assert_eq!(kept.runs(), runs);
    }

    #[test]
    fn a_trace_that_is_cut_off_is_refused_where_it_ends(trace in traces(), share in 0.0..1.0_f64) {
        let bytes = write(&trace);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of it")]
        let length = (bytes.len() as f64 * share) as usize;
        let (at, damage) = place_and_damage(parse(&bytes[..length]).unwrap_err());
        prop_assert!(at <= length as u64);
        prop_assert!(matches!(damage, Damage::Truncated | Damage::NoTrace), "{damage}");
    }

    #[test]
    fn no_bit_may_be_another(trace in traces(), place in any::<prop::sample::Index>(), bit in 0_u32..8) {
        let mut bytes = write(&trace);
        let place = place.index(bytes.len());
        bytes[place] ^= 1_u8 << bit;
        let (at, _) = place_and_damage(parse(&bytes).unwrap_err());
        prop_assert!(at <= place as u64, "byte {place} is reported as {at}");
    }

    /// With valid checksums: what a malicious writer would produce.
    #[test]
    fn whatever_a_section_says_it_is_read_or_refused(
        trace in traces(), which in any::<prop::sample::Index>(), place in any::<prop::sample::Index>(), bytes in prop::collection::vec(any::<u8>(), 1..12),
    ) {
        let mut sections = sections(&write(&trace));
        let which = which.index(sections.len());
        let body = &mut sections[which].1;
        if !body.is_empty() {
            let place = place.index(body.len());
            let end = (place + bytes.len()).min(body.len());
            body[place..end].copy_from_slice(&bytes[..end - place]);
        }
        match parse(&sealed(&sections)) {
            Ok(trace) => prop_assert!(trace.intervals.iter().all(|interval| interval.written.runs().iter().all(|run| trace.guest.has(run)))),
            Err(error) => _ = place_and_damage(error),
        }
    }
}

/// Kind and body of each section.
fn sections(bytes: &[u8]) -> Vec<(u32, Vec<u8>)> {
    let (mut at, mut sections) = (16, Vec::new());
    while at < bytes.len() {
        let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let length = number(at + 4) as usize;
        sections.push((number(at), bytes[at + 16..at + 16 + length].to_vec()));
        at += 16 + length;
    }
    sections
}

/// A file of these sections, each with the checksum for its position.
fn sealed(sections: &[(u32, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = b"mfytrace".to_vec();
    bytes.extend(3_u32.to_le_bytes());
    let sum = xxhash_rust::xxh3::xxh3_64(&bytes).to_le_bytes();
    bytes.extend(&sum[..4]);
    for (kind, body) in sections {
        let mut sealed = [kind.to_le_bytes(), u32::try_from(body.len()).unwrap().to_le_bytes()].concat();
        sealed.extend(body);
        let sum = xxhash_rust::xxh3::xxh3_64_with_seed(&sealed, bytes.len() as u64);
        bytes.extend(&sealed[..8]);
        bytes.extend(sum.to_le_bytes());
        bytes.extend(body);
    }
    bytes
}

fn small() -> Trace {
    let guest = GuestFacts::of_blocks(vec![("ram".into(), 100), ("rom".into(), 10)]);
    let interval = |runs: Vec<Range<u64>>| Interval {
        length: Duration::from_millis(100),
        sync: Duration::from_millis(1),
        written: Runs::of(runs),
    };
    let intervals = vec![interval(vec![0..1, 98..100, 128..138]), interval(Vec::new())];
    Trace { guest, intervals, samples: Samples::default() }
}

#[test]
fn pages_that_the_guest_has_not_are_refused() {
    for beyond in [100..101, 127..128, 99..129, 138..139, 500..501] {
        let mut trace = small();
        trace.intervals[0].written = Runs::of([beyond]);
        let (_, damage) = place_and_damage(parse(&write(&trace)).unwrap_err());
        assert_eq!(damage.to_string(), "section Interval: it names pages that the guest has not");
    }
    assert_eq!(parse(&write(&small())).unwrap(), small());
}

#[test]
fn a_section_that_is_missing_doubled_or_out_of_place_is_noticed() {
    let bytes = write(&small());
    let length = |number: usize| 16 + sections(&bytes)[number].1.len();
    let first = 16 + length(0);
    let second = first + length(1);
    let missing = [&bytes[..first], &bytes[second..]].concat();
    assert_eq!(place_and_damage(parse(&missing).unwrap_err()), (first as u64, Damage::Checksum));
    let doubled = [&bytes[..second], &bytes[first..]].concat();
    assert_eq!(place_and_damage(parse(&doubled).unwrap_err()), (second as u64, Damage::Checksum));
    let mut out_of_place = sections(&bytes);
    out_of_place.swap(0, 1);
    assert_eq!(place_and_damage(parse(&sealed(&out_of_place)).unwrap_err()), (16, Damage::Order(2)));
    let behind = [&bytes[..], b"?"].concat();
    assert_eq!(place_and_damage(parse(&behind).unwrap_err()), (bytes.len() as u64, Damage::Behind));
}

#[test]
fn what_is_no_trace_or_of_another_version_is_said_to_be_that() {
    let say = |bytes: &[u8]| parse(bytes).unwrap_err().to_string();
    assert_eq!(say(b"[guest.workload]\nmemory = \"1 GiB\""), "byte 0: this is no trace of memferry record");
    for version in [1, 9] {
        let mut bytes = write(&small());
        bytes[8] = version;
        let sum = xxhash_rust::xxh3::xxh3_64(&bytes[..12]).to_le_bytes();
        bytes[12..16].copy_from_slice(&sum[..4]);
        assert_eq!(say(&bytes), format!("byte 8: a trace of version {version}, and this program reads version 3"));
    }
}

/// The bytes of a small trace. If they change, the format has another version.
#[test]
fn the_format_is_that_of_its_version() {
    let mut trace = small();
    trace.guest.settings = "[migration]".into();
    trace.guest.arming = Duration::from_millis(1500);
    trace.samples.zstd_level = -3;
    trace.samples.touched = Share { of: 300, part: 20 };
    trace.samples.alone[2] = Coded { pages: 1, compressed: 1, bytes: 2, nanos: 3 };
    trace.samples.delta = Cost { pages: 4, nanos: 5 };
    let again = DeltaSample { pages: 14, to_zero: 2, equal: 3, overflows: 4, deltas: 5, delta_bytes: 6 };
    let from_zero = DeltaSample { pages: 1, deltas: 1, delta_bytes: 9, ..DeltaSample::default() };
    trace.samples.deltas = vec![Deltas { span: Duration::new(7, 8), again, rested: DeltaSample::default(), from_zero }];
    let bytes = write(&trace);
    assert_eq!(bytes[..12], *b"mfytrace\x03\0\0\0");
    let none = r"\x00";
    // Level, shares; the codecs; costs; deltas.
    let samples = [
        r"\x05\xac\x02\x14\x00\x00".into(),
        none.repeat(8 * 4) + r"\x01\x01\x02\x03",
        none.repeat(2 * 2) + r"\x04\x05",
        r"\x01\x07\x08\x0e\x02\x03\x04\x05\x06".to_owned() + &none.repeat(6) + r"\x01\x00\x00\x00\x01\t",
    ]
    .concat();
    let bodies = sections(&bytes).into_iter().map(|(kind, body)| (kind, body.escape_ascii().to_string()));
    let expected = [
        // Page size, blocks, pages without travel, untouched, re-arms late, cores, arming, digests, settings.
        (1, r"\x80 \x02\x03ramd\x03rom\n\x00\x00\x00\x02\x01\x80\xca\xb5\xee\x01\x00\x00\x0b[migration]"),
        // Length, sync, pages; a frame of zstd.
        (2, r"\x00\x80\xc2\xd7/\x00\xc0\x84=\r(\xb5/\xfd \x061\x00\x00\x00\x01a\x02\x1c\n"),
        (2, r"\x00\x80\xc2\xd7/\x00\xc0\x84=\x00"),
        (3, &samples),
        (4, r"\x02"),
    ];
    assert_eq!(bodies.collect::<Vec<_>>(), expected.map(|(kind, body)| (kind, body.to_owned())));
    assert_eq!(parse(&bytes).unwrap(), trace);
}

/// Each field that counts or measures a length says more than the file has.
#[test]
fn hostile_lengths_are_refused_where_they_are() {
    let sections = sections(&write(&small()));
    let at = |section: usize| 16 + sections[..section].iter().map(|(_, body)| 16 + body.len()).sum::<usize>() + 16;
    let refusal = |section: usize, from: usize, number: u64| {
        let mut sections = sections.clone();
        let body = &mut sections[section].1;
        body.truncate(from);
        body.extend(postcard::to_allocvec(&number).unwrap());
        place_and_damage(parse(&sealed(&sections)).unwrap_err())
    };
    let ends = |name| Damage::Section(name, "it ends within a value");
    for number in [100, 1 << 32, u64::MAX] {
        let length = postcard::to_allocvec(&number).unwrap().len();
        // Blocks, the name of the first one, the settings.
        for from in [2, 3, 21] {
            assert_eq!(refusal(0, from, number), ((at(0) + from + length) as u64, ends("Guest")), "byte {from}");
        }
        // Spans of deltas.
        let from = sections[3].1.len() - 1;
        assert_eq!(refusal(3, from, number), ((at(3) + from + length) as u64, ends("Samples")));
    }
    let long = sealed(&[(1, vec![1; (1 << 20) + 1])]);
    let (_, damage) = place_and_damage(parse(&long).unwrap_err());
    assert_eq!(damage, Damage::Section("Guest", "it is longer than any such section"));
}

#[test]
fn values_out_of_their_limits_are_refused() {
    let refused = |change: fn(&mut Trace), name, what| {
        let mut trace = small();
        change(&mut trace);
        assert_eq!(place_and_damage(parse(&write(&trace)).unwrap_err()).1, Damage::Section(name, what));
    };
    let long = Duration::from_secs(u64::MAX);
    refused(|trace| trace.guest.blocks.clear(), "Guest", "a guest has 1 to 1024 blocks");
    refused(|trace| trace.guest.blocks[0].0 = "x".repeat(256).into(), "Guest", "a block has a name and pages");
    refused(|trace| trace.guest.blocks[1].1 = u64::MAX, "Guest", "more pages than a guest can have");
    refused(|trace| trace.guest.untouched = u64::MAX, "Guest", "it leaves out more pages than there are");
    refused(|trace| trace.guest.cores = 0, "Guest", "a host has a core");
    refused(|trace| trace.guest.digests = Duration::MAX, "Guest", "nothing takes so long");
    refused(|trace| trace.intervals[0].sync = Duration::MAX, "Interval", "no sync takes so long");
    refused(|trace| trace.samples.zstd_level = 99, "Samples", "there is no such level of zstd");
    refused(|trace| trace.samples.touched.part = 1, "Samples", "a part is more than the whole");
    let spans =
        |spans: std::ops::Range<u64>| spans.map(|span| Deltas { span: Duration::from_secs(span), ..Deltas::default() });
    let with_deltas = |deltas: Vec<Deltas>| Trace { samples: Samples { deltas, ..Samples::default() }, ..small() };
    let vast = DeltaSample { pages: u64::MAX, equal: u64::MAX, ..DeltaSample::default() };
    for (deltas, what) in [
        (spans(1..66).collect(), "deltas of more spans than any trace has"),
        (spans(0..2).collect(), "the spans of the deltas do not ascend"),
        (vec![Deltas { span: long, ..Deltas::default() }], "no span is so long"),
        (
            vec![Deltas { span: Duration::from_secs(1), again: vast, ..Deltas::default() }],
            "more pages than a guest can have",
        ),
    ] {
        let (_, damage) = place_and_damage(parse(&write(&with_deltas(deltas))).unwrap_err());
        assert_eq!(damage, Damage::Section("Samples", what));
    }
    let mut sections = sections(&write(&small()));
    sections[0].1[0] = 0x81;
    let (at, damage) = place_and_damage(parse(&sealed(&sections)).unwrap_err());
    assert_eq!((at, damage), (34, Damage::Section("Guest", "a value cannot be decoded")));
}

/// Data that inflates to far more than it declares is not stored, and the walk ends where the pages end.
#[test]
fn a_bomb_does_not_go_off() {
    let mut sections = sections(&write(&small()));
    let mut body = postcard::to_allocvec(&(Duration::from_secs(1), Duration::ZERO, 100_u64)).unwrap();
    body.extend(zstd::bulk::compress(&vec![1; 64 << 20], 19).unwrap());
    sections[1].1 = body;
    let (_, damage) = place_and_damage(parse(&sealed(&sections)).unwrap_err());
    assert_eq!(damage.to_string(), "section Interval: it names pages that the guest has not");
}

#[test]
fn a_recording_that_is_given_up_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let trace = small();
    let writer = TraceWriter::create(&folder.path().join("trace"), &trace.guest).unwrap();
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    drop(writer);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    TraceWriter::create(folder.path(), &trace.guest).expect_err("a folder");
    let link = folder.path().join("link");
    std::os::unix::fs::symlink("/dev/full", &link).unwrap();
    TraceWriter::create(&link, &trace.guest).expect_err("a link");
    TraceWriter::create(std::path::Path::new("/dev/null"), &trace.guest).expect_err("a device");
}
