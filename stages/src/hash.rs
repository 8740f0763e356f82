//! The hashes that run over all of a guest's memory: xxh3 of pages and payloads.
//!
//! `twox-hash` chooses the vector instructions at run time: with AVX2 it is nearly twice as fast as `xxhash-rust`, which chooses
//! them when it is compiled. `xxhash-rust` hashes the short heads of frames, and tests compare the two.

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
