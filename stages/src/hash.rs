//! The hashes that run over all of a guest's memory: xxh3 of pages and payloads.
//!
//! `twox-hash` takes the vectors that the processor has on which it runs: with AVX2 it is nearly twice as fast as `xxhash-rust`, which
//! chooses when it is compiled. The short heads of frames stay with the latter, and it is what the former is held against.

use twox_hash::XxHash3_64;
pub(crate) use twox_hash::XxHash3_128;

/// The xxh3-64 of a page or a payload.
pub(crate) fn xxh3_64(bytes: &[u8]) -> u64 {
    XxHash3_64::oneshot(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn both_libraries_find_the_same(bytes in prop::collection::vec(any::<u8>(), 0..20_000), step in 1..9000_usize) {
            prop_assert_eq!(xxh3_64(&bytes), xxhash_rust::xxh3::xxh3_64(&bytes));
            let mut streamed = XxHash3_128::new();
            bytes.chunks(step).for_each(|part| streamed.write(part));
            prop_assert_eq!(streamed.finish_128(), xxhash_rust::xxh3::xxh3_128(&bytes));
        }
    }
}
