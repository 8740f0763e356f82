//! The bytes of one frame of each kind, written down: the format cannot drift unseen.
//!
//! A line is the head, the fields or the checksum; the spaces stand between the fields.

use super::samples;
use crate::wire::Kind;

/// Hexadecimal with the spaces left out.
fn golden(text: &str) -> String {
    text.split_whitespace().collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn there_is_a_sample_of_every_kind() {
    let sampled: Vec<Kind> = samples::messages().iter().map(|message| message.kind()).collect();
    let kinds: Vec<Kind> = Kind::ALL.into_iter().filter(|&kind| kind != Kind::Pages).collect();
    assert_eq!(sampled, kinds);
}

#[test]
fn messages() {
    let golden: Vec<String> = MESSAGES.iter().map(|text| golden(text)).collect();
    let encoded: Vec<String> = samples::messages().iter().map(|message| hex(&message.encode(0))).collect();
    assert_eq!(encoded, golden);
}

#[test]
fn pages() {
    assert_eq!(hex(&samples::pages().0.to_bytes(2)), golden(PAGES));
    assert_eq!(hex(&samples::grouped_pages().0.to_bytes(0)), golden(GROUPED_PAGES));
    assert_eq!(hex(&samples::zero_pages().to_bytes(1)), golden(ZERO_PAGES));
}

/// In the order of [`samples::messages`].
const MESSAGES: [&str; 31] = [
    // Hello
    "01 01 0000 6d000000 ce98737557991175 \
         6d656d6665727279 0400 30313233343536373839616263646566 01000000 \
         0000000000000000000000000000000000000000000000000000000000000000 0100 00 0300 0200 0300 00100000 0300 0c \
         7061796c6f61642d78786833 03 6c7a34 06 78627a726c65 \
         bd7d0b680bcca2c1",
    // State
    "02 01 0000 1b000000 efedde354f4ab59a \
         01 01 07000000 03 637075 05000000 7374617465 \
         099c3ca275bf8f2d",
    // Blocks
    "03 01 0000 26000000 0cd8539f514170a7 \
         0100 03 72616d 0010080000000000 0000000001000000 0000200000000000 \
         084112387011a581",
    // RoundComplete
    "05 01 0000 65000000 29a182098180e386 \
         02000000 02 0300000000000000 0f00000000000000 0100000000000000 0200000000000000 0300000000000000 \
         0400000000000000 0500000000000000 0600000000000000 0700000000000000 00f0000000000000 \
         2823000000000000 \
         1ca4161537c98fb0",
    // LaneEnds
    "06 01 0000 08000000 13e8b92d304ec4c3 \
         c294d3380580062d",
    // Digests
    "07 01 0000 50000000 d1da5e0db073c823 \
         01000000 0600000000000000 0200 02000000000000000000000010000000 00 03000000000000000000000000000000 \
         03 0400000000000000 0000000000000000 0500000000000000 \
         008b1003752d6016",
    // Go
    "08 01 0000 09000000 8e0f4ae6edf0f30a \
         01 \
         ebce86ebd2f92ee1",
    // Abort
    "09 01 0000 13000000 50bb03779651734c \
         0900 6469736b2066756c6c \
         469479020847bbbf",
    // End
    "0a 01 0000 11000000 2827ff126cc81ae9 \
         00 1100000000000000 \
         aa30a5d68e728ef1",
    // Checkpoint
    "0b 01 0000 10000000 64f0025fd799a3c3 \
         0900000000000000 \
         9704751988af6007",
    // DirectEnds
    "0c 01 0000 08000000 4e54f6356f9b7f3d \
         c294d3380580062d",
    // Secret
    "0d 01 0000 30000000 ea3bad9910b4b99b \
         0303030303030303030303030303030303030303030303030303030303030303 60ea000000000000 \
         5ef99b3616c5871d",
    // Proof
    "0e 01 0000 28000000 ce367ddcfb1ee164 \
         0404040404040404040404040404040404040404040404040404040404040404 \
         63a409ff3a252183",
    // Settled
    "0f 01 0000 08000000 6e9cf4ad3d78ca1c \
         c294d3380580062d",
    // Missing
    "10 01 0000 1e000000 364aa5f49bba9685 \
         01000000 02000000 0100 03000000 0500000000000000 \
         a4e1062bce83a679",
    // Discard
    "11 01 0000 08000000 6e400c47515bf40b \
         c294d3380580062d",
    // Accept
    "20 01 0000 10000000 c1e0916c7491f2ee \
         e093040000000000 \
         390a2ba364a07c32",
    // Ready
    "21 01 0000 08000000 179626e73d749ae2 \
         c294d3380580062d",
    // Progress
    "22 01 0000 22000000 8be41a9ff585422a \
         0000000002000000 0200 0800000000000000 0900000000000000 \
         448ace3c1db2d5ad",
    // PageHashes
    "23 01 0000 26000000 05c5038aa6e827a6 \
         01000000 0002000000000000 0200 0a00000000000000 0b00000000000000 \
         72cf32330dfe57d4",
    // Loaded
    "24 01 0000 09000000 ac851e940026c4a8 \
         01 \
         ebce86ebd2f92ee1",
    // Running
    "25 01 0000 08000000 23bdfdfb37fc5629 \
         c294d3380580062d",
    // Refused
    "26 01 0000 17000000 2764009eed4ee6f7 \
         0d00 626c6f636b7320646966666572 \
         a705f317695df00c",
    // StartFailed
    "27 01 0000 15000000 f3774a381817ac67 \
         0b00 6e6f202f6465762f6b766d \
         70f63681c5764d88",
    // Challenge
    "28 01 0000 48000000 08d26110712c7dce \
         0505050505050505050505050505050505050505050505050505050505050505 \
         0606060606060606060606060606060606060606060606060606060606060606 \
         36c05042b394647e",
    // Resume
    "29 01 0000 1b000000 0696647326dada40 \
         01 0200 0800000000000000 0900000000000000 \
         3982b2b56fb5645f",
    // Received
    "2a 01 0000 1e000000 35d7b615337e8fff \
         01000000 02000000 0100 03000000 0500000000000000 \
         a4e1062bce83a679",
    // Discarded
    "2b 01 0000 08000000 523cd584d6a557f6 \
         c294d3380580062d",
    // PageRequest
    "2c 01 0000 14000000 163927649facbc46 \
         01000000 0102000000000000 \
         7c1aa9ce8cae0684",
    // Complete
    "2d 01 0000 08000000 417b93a748bb9b59 \
         c294d3380580062d",
    // Heartbeat
    "40 00 0000 1e000000 f5d94efdb73b641b \
         0100 0b 6c6f616465722e62757379 0c00000000000000 \
         f695826dfa7a3ada",
];

const PAGES: &str = "04 01 0200 a9100000 982c911b48599b91 \
         00000000 01000000 02000000 6d100000 1700000000000080 1200000000000000 191ac416136653ce 01 001000 03 \
         640000 05 090000 \
         8118882ef05f4023";

const GROUPED_PAGES: &str = "04 01 0000 f8240000 c488504b4b71134d \
         00000000 00000000 01000000 b4240000 6e00000000000000 0000000000000000 5859287ee59f89bb \
         03 881300 01 001000 06 000000 04 2c0100 06 000000 \
         23eb7fee788b3f08";

const ZERO_PAGES: &str = "04 01 0100 30000000 41b6dc0f5994811d \
         01000000 00000000 01000000 00000000 0100000000000000 0100000000000000 0000000000000000 \
         658061806826903a";
