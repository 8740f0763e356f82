//! Which bytes of a block differ, as a mask of one bit a byte.
//!
//! On x86-64 it is done with SSE2 instructions, elsewhere with arithmetic on 64-bit words. The instructions are worth
//! their `unsafe`: densely changed pages are encoded two to four times as fast. Wider vectors gain nothing, since memory
//! is the limit.

/// Bytes compared at a time.
pub(super) const BLOCK: usize = 64;

#[cfg(not(target_arch = "x86_64"))]
pub(super) use portable as differences;
#[cfg(target_arch = "x86_64")]
pub(super) use sse2 as differences;

#[cfg(target_arch = "x86_64")]
#[inline]
pub(super) fn sse2(old: &[u8; BLOCK], new: &[u8; BLOCK]) -> u64 {
    use std::arch::x86_64::{_mm_cmpeq_epi8, _mm_movemask_epi8, _mm_set_epi64x};

    let words = old.as_chunks().0.iter().zip(new.as_chunks().0).enumerate();
    words.fold(0, |mask, (index, (old, new))| {
        let [(old_low, old_high), (new_low, new_high)] = [halves(old), halves(new)];
        // SAFETY: these are SSE2 instructions on values, and every x86-64 processor has SSE2.
        let equal = unsafe {
            let [old, new] = [_mm_set_epi64x(old_high, old_low), _mm_set_epi64x(new_high, new_low)];
            _mm_movemask_epi8(_mm_cmpeq_epi8(old, new))
        };
        mask | u64::from(!equal.cast_unsigned() & 0xffff) << (index * 16)
    })
}

#[cfg(target_arch = "x86_64")]
#[inline]
fn halves(bytes: &[u8; 16]) -> (i64, i64) {
    let (low, high) = bytes.split_at(8);
    let word = |half: &[u8]| i64::from_le_bytes(half.try_into().expect("8 bytes"));
    (word(low), word(high))
}

#[cfg(any(test, not(target_arch = "x86_64")))]
#[inline]
pub(super) fn portable(old: &[u8; BLOCK], new: &[u8; BLOCK]) -> u64 {
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{BLOCK, differences, portable};

    fn check(old: &[u8; BLOCK], new: &[u8; BLOCK]) {
        let naive = (0..BLOCK).fold(0, |mask, i| mask | u64::from(old[i] != new[i]) << i);
        assert_eq!(differences(old, new), naive, "{old:?} {new:?}");
        assert_eq!(portable(old, new), naive, "{old:?} {new:?}");
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
