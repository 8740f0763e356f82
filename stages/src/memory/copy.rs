//! Copying pages out of and into memory that others write at the same time.
//!
//! The kernel [`copy_unless_zero`] copies a page and tests it for zero in one pass: each byte of the guest is loaded once
//! (ARCHITECTURE.md, law 3: what is compared, hashed or encoded is one copy). Nothing is stored before the first byte that is not
//! zero, so a zero page costs a read-only sweep. Testing the finished copy would cost as much again. It is written once over a
//! vector type; the widest one that the processor has is used.
//!
//! `unsafe` is worth it here: guest memory changes under the reader, so no reference to it may exist, and a volatile load
//! through a raw pointer is the only access that the compiler neither splits, repeats nor invents.

/// Alignment in bytes that [`copy_unless_zero`] requires on the guest's side, and unit of its length.
pub(super) const UNIT: usize = 128;

/// Copies `into.len()` bytes from `from` unless they are all zero: then nothing is written and the answer is true.
///
/// # Safety
/// `from` is valid for reads of `into.len()` bytes, which no Rust reference covers.
///
/// # Panics
/// If `from` or the length is no multiple of [`UNIT`].
pub(super) unsafe fn copy_unless_zero(from: *const u8, into: &mut [u8]) -> bool {
    assert!(from.addr().is_multiple_of(UNIT) && into.len().is_multiple_of(UNIT), "unaligned page");
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2; the rest is the caller's promise and the assertion.
        return unsafe { avx2::copy_unless_zero(from, into) };
    }
    // SAFETY: the caller's promise and the assertion.
    unsafe { copy_unless_zero_by::<u64>(from, into) }
}

/// Prefetches the page at this address, which is read next. The processor's own prefetching does not cross from one page to the
/// next: without this, each page begins with a wait for its translation and its first lines.
#[inline(always)]
pub(super) fn expect(page: *const u8) {
    #[cfg(target_arch = "x86_64")]
    for line in 0..8 {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch has no visible effect, and accepts every address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(page.wrapping_add(line * 64).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = page;
}

/// A vector: the unit that the kernel moves.
trait Vector: Copy {
    const BYTES: usize;
    /// One volatile load.
    ///
    /// # Safety
    /// `from` is aligned to `BYTES` and valid for reads of as many.
    unsafe fn load(from: *const u8) -> Self;
    /// # Safety
    /// `to` is valid for writes of `BYTES` bytes; it need not be aligned.
    unsafe fn store(self, to: *mut u8);
    fn or(self, other: Self) -> Self;
    fn is_zero(self) -> bool;
}

/// # Safety
/// As [`copy_unless_zero`], whose assertion holds.
#[inline(always)]
unsafe fn copy_unless_zero_by<V: Vector>(from: *const u8, into: &mut [u8]) -> bool {
    let (to, length) = (into.as_mut_ptr(), into.len());
    let mut at = 0;
    while at < length {
        // SAFETY: `at` is a multiple of four vectors below the length, and so are alignment and length.
        let four = unsafe { load_four::<V>(from.add(at)) };
        if !(four[0].or(four[1])).or(four[2].or(four[3])).is_zero() {
            into[..at].fill(0);
            // SAFETY: as above; `to` covers the whole length.
            unsafe { store_four(four, to.add(at)) };
            at += 4 * V::BYTES;
            break;
        }
        at += 4 * V::BYTES;
        if at == length {
            return true;
        }
    }
    while at < length {
        // SAFETY: as above.
        unsafe { store_four(load_four::<V>(from.add(at)), to.add(at)) };
        at += 4 * V::BYTES;
    }
    false
}

/// # Safety
/// `from` is aligned to one vector and valid for reads of four.
#[inline(always)]
unsafe fn load_four<V: Vector>(from: *const u8) -> [V; 4] {
    // SAFETY: the caller's promise.
    std::array::from_fn(|i| unsafe { V::load(from.add(i * V::BYTES)) })
}

/// # Safety
/// `to` is valid for writes of four vectors.
#[inline(always)]
unsafe fn store_four<V: Vector>(four: [V; 4], to: *mut u8) {
    for (i, vector) in four.into_iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { vector.store(to.add(i * V::BYTES)) };
    }
}

impl Vector for u64 {
    const BYTES: usize = 8;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<Self>().read_volatile() }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut u8) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<Self>().write_unaligned(self) }
    }

    #[inline(always)]
    fn or(self, other: Self) -> Self {
        self | other
    }

    #[inline(always)]
    fn is_zero(self) -> bool {
        self == 0
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{__m256i, _mm256_or_si256, _mm256_storeu_si256, _mm256_testz_si256};

    use super::Vector;

    /// # Safety
    /// As [`super::copy_unless_zero`], whose assertion holds, on a processor that has AVX2.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn copy_unless_zero(from: *const u8, into: &mut [u8]) -> bool {
        // SAFETY: the caller's promise.
        unsafe { super::copy_unless_zero_by::<Wide>(from, into) }
    }

    /// 32 bytes. Exists only inside [`copy_unless_zero`], which has checked that the processor has AVX2.
    #[derive(Clone, Copy)]
    struct Wide(__m256i);

    impl Vector for Wide {
        const BYTES: usize = 32;

        #[inline(always)]
        unsafe fn load(from: *const u8) -> Self {
            // SAFETY: the caller's promise.
            Self(unsafe { from.cast::<__m256i>().read_volatile() })
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut u8) {
            // SAFETY: the caller's promise, on a processor that has AVX2.
            unsafe { _mm256_storeu_si256(to.cast(), self.0) }
        }

        #[inline(always)]
        fn or(self, other: Self) -> Self {
            // SAFETY: the processor has AVX2.
            Self(unsafe { _mm256_or_si256(self.0, other.0) })
        }

        #[inline(always)]
        fn is_zero(self) -> bool {
            // SAFETY: the processor has AVX2.
            unsafe { _mm256_testz_si256(self.0, self.0) == 1 }
        }
    }
}

/// Copies any bytes out. Each aligned word of 8 bytes is loaded at once.
///
/// # Safety
/// `from` is valid for reads of `into.len()` bytes, which no Rust reference covers.
pub(super) unsafe fn load(from: *const u8, into: &mut [u8]) {
    let (head, words) = split(from.addr(), into.len());
    for (i, byte) in into[..head].iter_mut().enumerate() {
        // SAFETY: within the length that the caller promised.
        *byte = unsafe { from.add(i).read_volatile() };
    }
    let (middle, tail) = into[head..].split_at_mut(words * 8);
    for (i, word) in middle.chunks_exact_mut(8).enumerate() {
        // SAFETY: within the length, and aligned since `head` bytes were skipped.
        let value = unsafe { from.add(head + 8 * i).cast::<u64>().read_volatile() };
        word.copy_from_slice(&value.to_ne_bytes());
    }
    for (i, byte) in tail.iter_mut().enumerate() {
        // SAFETY: within the length.
        *byte = unsafe { from.add(head + 8 * words + i).read_volatile() };
    }
}

/// Copies any bytes in. Each aligned word of 8 bytes is stored at once.
///
/// # Safety
/// `to` is valid for writes of `bytes.len()` bytes, which no Rust reference covers.
pub(super) unsafe fn store(to: *mut u8, bytes: &[u8]) {
    let (head, words) = split(to.addr(), bytes.len());
    for (i, byte) in bytes[..head].iter().enumerate() {
        // SAFETY: within the length that the caller promised.
        unsafe { to.add(i).write_volatile(*byte) };
    }
    let (middle, tail) = bytes[head..].split_at(words * 8);
    for (i, word) in middle.chunks_exact(8).enumerate() {
        let value = u64::from_ne_bytes(word.try_into().expect("8 bytes"));
        // SAFETY: within the length, and aligned since `head` bytes were skipped.
        unsafe { to.add(head + 8 * i).cast::<u64>().write_volatile(value) };
    }
    for (i, byte) in tail.iter().enumerate() {
        // SAFETY: within the length.
        unsafe { to.add(head + 8 * words + i).write_volatile(*byte) };
    }
}

/// Copies bytes into memory that has no other users meanwhile. Short runs, as in deltas, take two stores that overlap and
/// no call.
///
/// # Safety
/// `to` is valid for writes of `bytes.len()` bytes, which no Rust reference covers and no other thread accesses meanwhile.
#[inline(always)]
pub(super) unsafe fn put(to: *mut u8, bytes: &[u8]) {
    match bytes.len() {
        1 => {
            // SAFETY: one byte, as the caller promised.
            unsafe { to.write(bytes[0]) }
        }
        4..8 => {
            // SAFETY: at least as many bytes as the type has, as the caller promised.
            unsafe { put_ends::<[u8; 4]>(to, bytes) }
        }
        8..=16 => {
            // SAFETY: as above.
            unsafe { put_ends::<[u8; 8]>(to, bytes) }
        }
        // SAFETY: the caller's promise.
        length => unsafe { to.copy_from_nonoverlapping(bytes.as_ptr(), length) },
    }
}

/// Copies as many bytes as `T` has from the start, and as many up to the end.
///
/// # Safety
/// As [`put`], and `bytes` has as many bytes as `T` at least and twice as many at most.
#[inline(always)]
unsafe fn put_ends<T: Copy>(to: *mut u8, bytes: &[u8]) {
    let behind = bytes.len() - size_of::<T>();
    // SAFETY: both ends lie within the bytes here and there, and `T` is read and written as bytes.
    unsafe {
        let (first, last) = (bytes.as_ptr().cast::<T>(), bytes.as_ptr().add(behind).cast::<T>());
        to.cast::<T>().write_unaligned(first.read_unaligned());
        to.add(behind).cast::<T>().write_unaligned(last.read_unaligned());
    }
}

/// How many single bytes stand before the first aligned word, and how many whole words follow.
fn split(address: usize, length: usize) -> (usize, usize) {
    let head = (address.wrapping_neg() % 8).min(length);
    (head, (length - head) / 8)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A simple version of the kernel.
    fn naive(from: &[u8], into: &mut [u8]) -> bool {
        let zero = from.iter().all(|&byte| byte == 0);
        if !zero {
            into.copy_from_slice(from);
        }
        zero
    }

    #[repr(align(128))]
    struct Page([u8; 65536]);

    fn page() -> Box<Page> {
        Box::new(Page([0; 65536]))
    }

    /// Every kernel on one page, into buffers that hold something else, at an odd address.
    fn agree(page: &[u8]) {
        let mut expected = vec![0xaa; page.len()];
        let zero = naive(page, &mut expected);
        let kernels: [unsafe fn(*const u8, &mut [u8]) -> bool; 2] = [copy_unless_zero, copy_unless_zero_by::<u64>];
        for kernel in kernels {
            let mut buffer = vec![0xaa; page.len() + 1];
            // SAFETY: the page is aligned and as long as the buffer; only shared references to it exist.
            assert_eq!(unsafe { kernel(page.as_ptr(), &mut buffer[1..]) }, zero);
            assert!(buffer[1..] == expected);
        }
    }

    #[test]
    fn one_byte_is_found_wherever_it_stands() {
        let mut page = page();
        for shift in 12..=16 {
            let bytes = 1 << shift;
            agree(&page.0[..bytes]);
            // Every position of a small page; of the others enough to meet each vector and each lane of it.
            for at in (0..bytes).step_by(if shift == 12 { 1 } else { 37 }) {
                page.0[at] = 0x80;
                agree(&page.0[..bytes]);
                page.0[at] = 0;
            }
        }
    }

    proptest! {
        #[test]
        fn kernels_copy_what_the_naive_one_copies(spots in prop::collection::vec((0..8192usize, any::<u8>()), 0..40)) {
            let mut page = page();
            for (at, byte) in spots {
                page.0[at] = byte;
            }
            agree(&page.0[..8192]);
        }

        #[test]
        fn loads_and_stores_move_exactly_their_bytes(start in 0..40usize, bytes in prop::collection::vec(any::<u8>(), 0..70)) {
            let mut memory = vec![0xee_u8; 128];
            let end = start + bytes.len();
            let pointer = memory.as_mut_ptr();
            let mut back = vec![0; bytes.len()];
            // SAFETY: start + length is at most 110, and the vector is not touched in between.
            unsafe {
                store(pointer.add(start), &bytes);
                load(pointer.add(start), &mut back);
            }
            prop_assert_eq!(&back, &bytes);
            let mut put_memory = vec![0xee_u8; 128];
            // SAFETY: as above.
            unsafe { put(put_memory.as_mut_ptr().add(start), &bytes) };
            for memory in [memory, put_memory] {
                prop_assert_eq!(&memory[start..end], &bytes[..]);
                prop_assert!(memory[..start].iter().chain(&memory[end..]).all(|&byte| byte == 0xee));
            }
        }
    }
}
