//! Finds which bytes of a block differ, as a mask of one bit for each byte.
//!
//! The encoder is written once over [`Compare`]. A comparer for a set of instructions is a value that exists only where the
//! processor has them, so that its method is safe. Their speed justifies the `unsafe`: sparse deltas of pages in the cache are
//! encoded a third faster than with SSE2 and several times as fast as with words; out of cache, memory is the limit.

/// Bytes compared at a time.
pub(super) const BLOCK: usize = 64;

/// A way to compare blocks.
pub(super) trait Compare: Copy {
    /// A bit for each byte that differs, the first byte's the lowest.
    fn differences(self, old: &[u8; BLOCK], new: &[u8; BLOCK]) -> u64;
}

/// Arithmetic on 64-bit words, which every processor has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Words;

impl Compare for Words {
    #[inline(always)]
    fn differences(self, old: &[u8; BLOCK], new: &[u8; BLOCK]) -> u64 {
        /// All but the highest bit of each byte.
        const LOW: u64 = 0x7f7f_7f7f_7f7f_7f7f;
        /// Gathers the lowest bits of the bytes of a word in its highest byte.
        const GATHER: u64 = 0x0102_0408_1020_4080;

        if old == new {
            return 0;
        }
        let words = old.as_chunks().0.iter().zip(new.as_chunks().0).enumerate();
        words.fold(0, |mask, (index, (old, new))| {
            let change = u64::from_le_bytes(*old) ^ u64::from_le_bytes(*new);
            let changed = (((change & LOW) + LOW) | change) & !LOW;
            mask | ((changed >> 7).wrapping_mul(GATHER) >> 56) << (index * 8)
        })
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86_64::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use std::arch::x86_64::{
        _mm256_cmpeq_epi8, _mm256_loadu_si256, _mm256_movemask_epi8, _mm512_cmpneq_epi8_mask, _mm512_loadu_si512,
    };

    use super::{BLOCK, Compare};

    /// A block at once. Exists only on a processor that has AVX-512BW.
    #[derive(Clone, Copy, Debug)]
    pub(in super::super) struct Avx512(());

    impl Avx512 {
        /// Asks the processor; the answer is cached by the standard library.
        #[inline]
        pub(in super::super) fn detect() -> Option<Self> {
            std::arch::is_x86_feature_detected!("avx512bw").then_some(Self(()))
        }
    }

    impl Compare for Avx512 {
        #[inline(always)]
        fn differences(self, old: &[u8; BLOCK], new: &[u8; BLOCK]) -> u64 {
            // SAFETY: the processor has AVX-512BW, since this value exists; both loads are of a whole block.
            unsafe {
                let [old, new] = [old, new].map(|block| _mm512_loadu_si512(block.as_ptr().cast()));
                _mm512_cmpneq_epi8_mask(old, new)
            }
        }
    }

    /// Half a block at once. Exists only on a processor that has AVX2.
    #[derive(Clone, Copy, Debug)]
    pub(in super::super) struct Avx2(());

    impl Avx2 {
        /// Asks the processor; the answer is cached by the standard library.
        #[inline]
        pub(in super::super) fn detect() -> Option<Self> {
            std::arch::is_x86_feature_detected!("avx2").then_some(Self(()))
        }
    }

    impl Compare for Avx2 {
        #[inline(always)]
        fn differences(self, old: &[u8; BLOCK], new: &[u8; BLOCK]) -> u64 {
            let half = |at: usize| {
                // SAFETY: the processor has AVX2, since this value exists; both loads end at the block's end at the latest.
                let equal = unsafe {
                    let [old, new] = [old, new].map(|block| _mm256_loadu_si256(block.as_ptr().add(at).cast()));
                    _mm256_movemask_epi8(_mm256_cmpeq_epi8(old, new))
                };
                u64::from(!equal.cast_unsigned())
            };
            half(0) | half(BLOCK / 2) << (BLOCK / 2)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check_by(compare: impl Compare, old: &[u8; BLOCK], new: &[u8; BLOCK]) {
        let naive = (0..BLOCK).fold(0, |mask, i| mask | u64::from(old[i] != new[i]) << i);
        assert_eq!(compare.differences(old, new), naive, "{old:?} {new:?}");
    }

    /// Every comparer that this processor has.
    fn check(old: &[u8; BLOCK], new: &[u8; BLOCK]) {
        check_by(Words, old, new);
        #[cfg(target_arch = "x86_64")]
        {
            Avx2::detect().into_iter().for_each(|avx2| check_by(avx2, old, new));
            Avx512::detect().into_iter().for_each(|avx512| check_by(avx512, old, new));
        }
    }

    #[test]
    fn every_change_of_every_byte_is_one_bit() {
        for at in 0..BLOCK {
            for (background, change) in (0..=255).flat_map(|change| [(0, change), (0x80, change), (0xff, change)]) {
                let old = [background; BLOCK];
                let mut new = old;
                new[at] ^= change;
                check(&old, &new);
            }
        }
    }

    proptest! {
        #[test]
        fn masks_are_those_of_a_loop(old: [u8; BLOCK], new: [u8; BLOCK], keep: u64) {
            let mixed = std::array::from_fn(|i| if keep >> i & 1 == 0 { new[i] } else { old[i] });
            check(&old, &mixed);
            check(&old, &old);
        }
    }
}
