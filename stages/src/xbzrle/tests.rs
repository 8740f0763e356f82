//! The encoding compared with the oracle and QEMU's vectors, and under hostile bytes.

use fastrand::Rng;
use proptest::prelude::*;

use super::naive::{self, get_uleb, put_uleb};
use super::*;

/// Every page size there is.
const SIZES: [usize; 5] = [4096, 8192, 16384, 32768, 65536];

fn bytes(random: &mut Rng, length: usize) -> Vec<u8> {
    std::iter::repeat_with(|| random.u8(..)).take(length).collect()
}

/// Encodes in both ways, which must agree, and decodes in both ways. Returns the delta, or what came instead.
fn encode_both(old: &[u8], new: &[u8]) -> Result<Vec<u8>, Encoded> {
    let [mut fast, mut slow] = [0xaa, 0x55].map(|fill| vec![fill; new.len()]);
    let result = encode_page(old, new, &mut fast);
    assert_eq!(result, naive::encode_page(old, new, &mut slow), "{} bytes", new.len());
    for (name, version) in encode::versions() {
        agrees_wherever_pages_stand(name, &version, [old, new], result, &slow);
    }
    let Encoded::Delta(bytes) = result else {
        assert_eq!(result == Encoded::Equal, old == new);
        return Err(result);
    };
    assert_eq!(fast[..bytes], slow[..bytes]);
    fast.truncate(bytes);
    let [mut one, mut two] = [old.to_vec(), old.to_vec()];
    Delta::parse(&fast, new.len()).unwrap().apply(&mut one);
    assert!(naive::apply(&fast, &mut two));
    assert!(one == new && two == new, "decoded to another page");
    Ok(fast)
}

/// Encodes with one version, from and to places at an odd offset with something else around them.
fn agrees_wherever_pages_stand(name: &str, version: &Version, pages: [&[u8]; 2], expected: Encoded, slow: &[u8]) {
    let length = slow.len();
    let offset = 1 + usize::from(pages[1][length / 2]) % 63;
    let place = |page: &[u8]| [&[0x11; 64][..offset], page, &[0x22; 64]].concat();
    let [old, new] = pages.map(place);
    let mut out = place(&vec![0xcc; length]);
    let within = offset..offset + length;
    let result = version(&old[within.clone()], &new[within.clone()], &mut out[within.clone()]);
    assert_eq!(result, expected, "{name}, {length} bytes");
    if let Encoded::Delta(bytes) = expected {
        assert_eq!(out[within][..bytes], slow[..bytes], "{name}, {length} bytes");
    }
}

/// A page of zeros, and the same with other bytes where `differs` is set.
fn pages(length: usize, differs: impl Fn(usize) -> bool) -> (Vec<u8>, Vec<u8>) {
    (vec![0; length], (0..length).map(|i| u8::from(differs(i))).collect())
}

fn encode_where(length: usize, differs: impl Fn(usize) -> bool) -> Result<Vec<u8>, Encoded> {
    let (old, new) = pages(length, differs);
    encode_both(&old, &new)
}

#[test]
fn lengths_of_runs_are_read_as_they_are_written() {
    for length in 0..=MAX_RUN {
        let mut bytes = [0xee; 3];
        let written = put_uleb(length, &mut bytes);
        assert_eq!((get_uleb(&bytes), written), (Some((length, written)), if length < 0x80 { 1 } else { 2 }));
    }
    assert_eq!(get_uleb(&[0x80, 0x80]), None);
}

#[test]
fn vectors_seen_from_qemu() {
    assert_eq!(encode_where(4096, |_| false), Err(Encoded::Equal));
    assert_eq!(encode_where(4096, |i| i == 4095).unwrap(), [0xff, 0x1f, 1, 1]);
    assert_eq!(encode_where(4096, |i| i == 0).unwrap(), [0, 1, 1]);
    for first in [4092, 4093, 4094, 4095, 4096] {
        assert_eq!(encode_where(4096, |i| i < first), Err(Encoded::Overflow), "the first {first} differ");
    }
    assert_eq!(encode_where(4096, |i| i < 4091).unwrap().len(), 4094);
    assert_eq!(encode_where(4096, |i| i >= 3).unwrap().len(), 4096, "the longest there is");
    assert_eq!(encode_where(4096, |i| i >= 2), Err(Encoded::Overflow));
    assert_eq!(encode_where(4096, |i| i % 2 == 0 && i <= 4092), Err(Encoded::Overflow));
}

#[test]
fn the_example_of_the_description() {
    let mut old = vec![0; 4096];
    old[1001..1025]
        .copy_from_slice(b"\x05\x06\x07\x08\x09\x0a\x0b\x0c\x0d\x0e\x0f\x10\x11\x12\x13\x68\x00\x00\x6b\x00\x6d\0\0\0");
    let mut new = old.clone();
    new[1001..1016].copy_from_slice(b"\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c\x0d\x0e\x0f");
    new[1019] = 0x67;
    new[1021] = 0x69;
    let delta = b"\xe9\x07\x0f\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c\x0d\x0e\x0f\x03\x01\x67\x01\x01\x69";
    assert_eq!(encode_both(&old, &new).unwrap(), delta);
}

#[test]
fn ranges_of_random_bytes_round_trip_as_in_qemus_test() {
    let mut random = Rng::with_seed(11);
    for _ in 0..10_000 {
        let mut old = vec![0; 4096];
        let length = random.usize(..256);
        old[1000..1000 + length].copy_from_slice(&bytes(&mut random, length));
        let mut new = old.clone();
        for _ in 0..=random.usize(..15) {
            new[1000 + random.usize(..256)] = random.u8(..);
        }
        match encode_both(&old, &new) {
            Ok(delta) => assert!(delta.len() < 4096),
            Err(other) => assert_eq!(other, Encoded::Equal),
        }
    }
}

#[test]
fn every_pair_of_run_lengths_around_a_byte_and_a_block_is_found() {
    for start in (0..4).chain(60..68).chain(124..132) {
        for length in (1..4).chain(12..20).chain(60..68).chain(124..132).chain(4000..4010) {
            let end = (start + length).min(4096);
            // Twice: a second run behind the first, and none.
            for second in [4095, start] {
                let result = encode_where(4096, |i| (start..end).contains(&i) || i == second);
                assert!(result.is_ok(), "{start}..{end} and {second}");
            }
        }
    }
}

#[test]
fn large_pages_are_pieces_with_their_lengths() {
    let delta = encode_where(16384, |i| i == 4096 + 5 || i == 16383).unwrap();
    assert_eq!(delta, [0, 0, 3, 0, 5, 1, 1, 0, 0, 4, 0, 0xff, 0x1f, 1, 1]);
    assert_eq!(encode_where(65536, |_| false), Err(Encoded::Equal));
    assert_eq!(encode_where(8192, |i| i == 8191).unwrap(), [0xff, 0x3f, 1, 1], "8 KiB is one delta");
}

#[test]
fn a_piece_that_overflows_is_one_run_and_a_page_of_them_overflows() {
    let delta = encode_where(16384, |i| i / 4096 == 1).unwrap();
    assert_eq!(delta.len(), 2 + (2 + 3 + 4096) + 2 + 2);
    assert_eq!(delta[..7], [0, 0, 0x03, 0x10, 0, 0x80, 0x20]);
    assert_eq!(encode_where(16384, |_| true), Err(Encoded::Overflow));
    assert!(encode_where(16384, |i| i >= 4096).is_ok());
    // Three pieces as one run each leave 16384 - 3 * 4101 - 2 bytes for the delta of the fourth.
    let most = 16384 - 3 * 4101 - 2 - 3;
    assert!(encode_where(16384, |i| i < 3 * 4096 || i >= 16384 - most).is_ok());
    assert_eq!(encode_where(16384, |i| i < 3 * 4096 || i >= 16384 - most - 2), Err(Encoded::Overflow));
}

/// Changes a page in one of many ways: words, bytes, runs around the lengths that matter, regular patterns, amounts
/// near what overflows.
fn change(page: &mut [u8], random: &mut Rng) {
    let length = page.len();
    match random.usize(..8) {
        0 => flip(page, (0..=random.usize(..8)).map(|_| random.usize(..length))),
        1 => (0..=random.usize(..64)).for_each(|_| {
            let word = random.usize(..length / 8) * 8;
            flip(page, word..word + 8);
        }),
        2 => {
            let (step, first) = (2 + random.usize(..6), random.usize(..length));
            flip(page, (first..length).step_by(step));
        }
        3 => {
            let start = random.usize(..length);
            flip(page, start..length);
        }
        4 => (0..=random.usize(..3)).for_each(|_| {
            let around = [1, 8, 16, 64, 0x80, 4096 - 4, length - 4][random.usize(..7)];
            let (start, end) = (random.usize(..length), (around + random.usize(..5)).saturating_sub(2));
            flip(page, start..(start + end).min(length));
        }),
        5 => {
            let (mut at, longest) = (0, 1 + random.usize(..200));
            while at < length {
                let run = 1 + random.usize(..longest);
                flip(page, at..(at + run).min(length));
                at += run + 1 + random.usize(..longest);
            }
        }
        6 => {
            // Runs of one byte, as many as nearly fill a page.
            let runs = (length / 3 - 3 + random.usize(..6)).min(length / 2 - 1);
            let first = random.usize(..length - 2 * runs);
            flip(page, (0..runs).map(|run| first + 2 * run));
        }
        _ => {
            let piece = random.usize(..length / 4096) * 4096;
            let bytes = bytes(random, 4096);
            page[piece..piece + 4096].copy_from_slice(&bytes);
        }
    }
}

fn flip(page: &mut [u8], bytes: impl IntoIterator<Item = usize>) {
    bytes.into_iter().for_each(|at| page[at] ^= 0x5a);
}

#[test]
fn the_fast_encoder_agrees_with_the_oracle_on_many_pages() {
    let mut random = Rng::with_seed(0x2545_f491_4f6c_dd1d);
    let mut seen = [0_u32; 3];
    for (size, pairs) in SIZES.into_iter().zip([40_000, 8_000, 4_000, 2_000, 1_000]) {
        let old = bytes(&mut random, size);
        let mut new = old.clone();
        for _ in 0..pairs {
            new.copy_from_slice(&old);
            (0..=random.usize(..3)).for_each(|_| change(&mut new, &mut random));
            match encode_both(&old, &new) {
                Ok(_) => seen[0] += 1,
                Err(Encoded::Overflow) => seen[1] += 1,
                Err(_) => seen[2] += 1,
            }
        }
    }
    assert!(seen.iter().all(|&count| count > 30), "deltas, overflows, equal pages: {seen:?}");
}

/// Short buffers stand for pages here: they reach every overflow test far more often than pages do.
#[test]
fn the_fast_encoder_agrees_with_the_oracle_on_millions_of_short_buffers() {
    let (mut random, versions) = (Rng::with_seed(0x9e37_79b9_7f4a_7c15), encode::versions());
    let [mut old, mut new, mut fast, mut slow] = [[0_u8; 256]; 4];
    for _ in 0..2_000_000 {
        let length = 8 * (1 + random.usize(..20));
        // Bytes that differ come in spells: the chance of a turn is drawn for each buffer.
        let (turn, mut differs) = (random.u64(..) & 7, random.u64(..) & 1 == 0);
        for at in 0..length {
            let draw = random.u64(..);
            differs ^= draw & 7 <= turn;
            old[at] = draw.to_le_bytes()[2];
            new[at] = old[at] ^ if differs { 1 << (draw >> 32 & 7) } else { 0 };
        }
        let expected = naive::encode_page(&old[..length], &new[..length], &mut slow[..length]);
        for (name, version) in &versions {
            let result = version(&old[..length], &new[..length], &mut fast[..length]);
            assert_eq!(result, expected, "{name}");
            if let Encoded::Delta(bytes) = result {
                assert_eq!(fast[..bytes], slow[..bytes], "{name}");
            }
        }
    }
}

#[test]
#[should_panic(expected = "different lengths")]
fn pages_of_two_sizes_are_our_own_mistake() {
    encode_page(&[0; 4096], &[0; 4096], &mut [0; 4095]);
}

#[test]
#[should_panic(expected = "multiple of 8")]
fn odd_pages_are_our_own_mistake() {
    encode_page(&[0; 4095], &[0; 4095], &mut [0; 4095]);
}

/// Parses hostile bytes: no panic, all runs within the page, and agreement with the oracle.
fn parse_hostile(bytes: &[u8], page_bytes: usize) -> Result<(), DeltaError> {
    let mut naive_page = vec![0x11; page_bytes];
    let naive = naive::apply(bytes, &mut naive_page);
    let parsed = Delta::parse(bytes, page_bytes);
    assert_eq!(naive, parsed.is_ok(), "{parsed:?} of {bytes:02x?}");
    let delta = parsed?;
    let mut end = 0;
    delta.each_run(|offset, new| {
        assert!(offset >= end && !new.is_empty(), "runs in order");
        end = offset + new.len();
    });
    assert!(end <= page_bytes);
    let mut page = vec![0x11; page_bytes];
    delta.apply(&mut page);
    assert!(page == naive_page);
    Ok(())
}

/// Deltas to damage, with the size of their page.
fn samples() -> Vec<(Vec<u8>, usize)> {
    let few = |i: usize| i % 1500 == 7 || (200..340).contains(&(i % 4096));
    SIZES.into_iter().map(|size| (encode_where(size, few).unwrap(), size)).collect()
}

#[test]
fn a_delta_cut_anywhere_is_an_error_or_ends_between_runs() {
    for (delta, size) in samples() {
        for length in 0..delta.len() {
            let result = parse_hostile(&delta[..length], size);
            assert!(result.is_err() || size <= MAX_RUN, "a cut page of {size} bytes was taken");
        }
        let mut longer = delta.clone();
        longer.push(0);
        assert!(parse_hostile(&longer, size).is_err());
    }
}

#[test]
fn a_delta_with_any_bit_flipped_stays_within_its_page() {
    for (delta, size) in samples() {
        let mut refused = 0;
        for bit in 0..delta.len() * 8 {
            let mut damaged = delta.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            refused += usize::from(parse_hostile(&damaged, size).is_err());
        }
        assert!(refused > 0 && refused < delta.len() * 8, "only lengths can be seen to be wrong");
    }
}

#[test]
fn each_way_to_be_wrong_has_its_error_and_place() {
    let wrong: [(&[u8], DeltaError); 9] = [
        (&[], DeltaError::Empty),
        (&[0], DeltaError::Truncated { at: 0 }),
        (&[0, 1, 9, 1], DeltaError::Truncated { at: 3 }),
        (&[0, 2, 9], DeltaError::Truncated { at: 2 }),
        (&[0x80, 0x80, 1, 9], DeltaError::Length { at: 0 }),
        (&[1, 0, 9], DeltaError::EmptyRun { at: 1 }),
        (&[0, 1, 9, 0, 1, 9], DeltaError::EmptyRun { at: 3 }),
        (&[0xff, 0x1f, 2, 9, 9], DeltaError::BeyondPage { at: 2, end: 4097, limit: 4096 }),
        (&[0xff, 0x7f, 1, 9], DeltaError::BeyondPage { at: 2, end: 0x4000, limit: 4096 }),
    ];
    for (bytes, error) in wrong {
        assert_eq!(parse_hostile(bytes, 4096), Err(error), "{bytes:02x?}");
    }
    let pieces: [(&[u8], DeltaError); 5] = [
        (&[0; 8], DeltaError::Empty),
        (&[0; 7], DeltaError::Truncated { at: 6 }),
        (&[3, 0, 0, 1], DeltaError::Truncated { at: 0 }),
        (&[0, 0, 0, 0, 0, 0, 3, 0, 0, 1, 9, 7], DeltaError::Trailing { at: 11, bytes: 1 }),
        (&[4, 0, 0xff, 0x1f, 2, 9, 0, 0, 0, 0, 0, 0], DeltaError::BeyondPage { at: 4, end: 4097, limit: 4096 }),
    ];
    for (bytes, error) in pieces {
        assert_eq!(parse_hostile(bytes, 16384), Err(error), "{bytes:02x?}");
    }
}

#[test]
#[should_panic(expected = "another page size")]
fn a_delta_is_applied_to_its_page_size_only() {
    Delta::parse(&[0, 1, 9], 4096).unwrap().apply(&mut [0; 8192]);
}

proptest! {
    #[test]
    fn any_two_pages_encode_alike(
        size in prop::sample::select(&SIZES[..]),
        runs in prop::collection::vec((any::<prop::sample::Index>(), 1..300_usize, any::<u8>()), 0..24),
    ) {
        let old = vec![7; size];
        let mut new = old.clone();
        for (start, length, byte) in runs {
            let start = start.index(size);
            new[start..(start + length).min(size)].fill(byte);
        }
        let _checked = encode_both(&old, &new);
    }

    #[test]
    fn random_bytes_never_leave_the_page(
        size in prop::sample::select(&SIZES[..]),
        bytes in prop::collection::vec(prop_oneof![0..4_u8, any::<u8>()], 0..200),
    ) {
        let _checked = parse_hostile(&bytes, size);
    }
}
