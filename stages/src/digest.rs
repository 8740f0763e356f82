//! Digests: one hash of each stretch, to prove that both ends hold the same memory.
//!
//! Both ends are paused when it is taken. Memory is read through [`Memory`](crate::memory::Memory), extent by extent, into a
//! scratch buffer. Zero pages are hashed from a page of zeros that stays in the cache, and pages known to be untouched are not
//! read at all. When digests differ, [`page_hashes`] of both sides find the page.

use std::io;

use crate::bitmap::DirtyBitmap;
use crate::geometry::{EXTENT_PAGES, STRETCH_BYTES, bits};
use crate::hash::{XxHash3_128, xxh3_64};
use crate::memory::{GuestMemory, ZEROS};
use crate::pool::PooledBuffer;

/// Extents of a stretch at most: masks of pages of a stretch have as many words.
pub const STRETCH_WORDS: usize = 8;
const _: () = assert!(STRETCH_BYTES == STRETCH_WORDS as u64 * 64 * 4096);

/// The pages that a digest leaves out, and those that it need not read.
#[derive(Clone, Copy, Debug, Default)]
pub struct Known<'a> {
    /// Untouched pages: hashed as zeros without being read.
    pub untouched: Option<&'a DirtyBitmap>,
    /// Pages that did not travel (hinted free, unplugged), extent by extent of the stretch: not hashed.
    pub left_out: [u64; STRETCH_WORDS],
}

/// The xxh3-128 of the pages of a stretch, one after another: holes as zeros, a partial last page padded with zeros, without
/// pages that are left out.
///
/// # Errors
/// When the memory cannot be read.
///
/// # Panics
/// If there is no such stretch, or `scratch` is smaller than an extent.
pub fn stretch_digest(
    memory: &GuestMemory,
    block: u32,
    stretch: u64,
    known: &Known<'_>,
    scratch: &mut PooledBuffer,
) -> io::Result<u128> {
    let mut hash = XxHash3_128::new();
    each_page(memory, block, stretch, known, scratch, |_, page| hash.write(page))?;
    Ok(hash.finish_128())
}

/// The xxh3-64 of each page of a stretch, to find those that differ; 0 for a page that is left out.
///
/// # Errors
/// When the memory cannot be read.
///
/// # Panics
/// As [`stretch_digest`].
pub fn page_hashes(
    memory: &GuestMemory,
    block: u32,
    stretch: u64,
    known: &Known<'_>,
    scratch: &mut PooledBuffer,
) -> io::Result<Vec<u64>> {
    let pages = memory.page_size().stretch_extents() * EXTENT_PAGES;
    let first = stretch * pages;
    let here = memory.layout().block_pages(block).min(first + pages) - first;
    let mut hashes = vec![0; usize::try_from(here).expect("a few hundred")];
    each_page(memory, block, stretch, known, scratch, |index, page| hashes[index] = xxh3_64(page))?;
    Ok(hashes)
}

fn each_page(
    memory: &GuestMemory,
    block: u32,
    stretch: u64,
    known: &Known<'_>,
    scratch: &mut PooledBuffer,
    mut use_page: impl FnMut(usize, &[u8]),
) -> io::Result<()> {
    assert!(stretch < memory.layout().block_stretches(block), "block {block} has no stretch {stretch}");
    let (layout, size) = (memory.layout(), memory.page_size());
    for ((position, at), left_out) in (0..).zip(layout.stretch_extents(block, stretch)).zip(known.left_out) {
        let pages = layout.valid_mask(at) & !left_out;
        let untouched = known.untouched.map_or(0, |untouched| untouched.peek(at));
        let to_read = pages & !untouched;
        let zero = match to_read {
            0 => 0,
            mask => memory.block(block).memory.read_extent(size, at.first_page(), mask, scratch)?,
        };
        let zero = zero | untouched;
        let mut read = scratch.chunks_exact(size.bytes());
        for bit in bits(pages) {
            let is_zero = zero & (1 << bit) != 0;
            let index = (position * u64::BITS + bit) as usize;
            use_page(index, if is_zero { &ZEROS[..size.bytes()] } else { read.next().expect("it was read") });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use xxhash_rust::xxh3::xxh3_128;

    use super::*;
    use crate::geometry::{BlockInfo, PageSize};
    use crate::memory::{MappedMemory, RamBlock};
    use crate::pool::BufferPool;

    /// Two stretches and a bit, every third page zero.
    fn guest(size: PageSize) -> (GuestMemory, Arc<MappedMemory>, Vec<u8>) {
        let length = 2 * usize::try_from(size.stretch_bytes()).unwrap() + 3 * size.bytes() + 77;
        let mut bytes = vec![0; length.next_multiple_of(size.bytes())];
        for (page, chunk) in bytes[..length].chunks_mut(size.bytes()).enumerate().filter(|(page, _)| page % 3 != 0) {
            chunk.fill(u8::try_from(page % 251).unwrap() + 1);
        }
        let memory = Arc::new(MappedMemory::anonymous(length).unwrap());
        memory.store(0, &bytes[..length]);
        let info = BlockInfo::new("ram", length as u64);
        let block = RamBlock { info, memory: memory.clone(), fresh: false };
        (GuestMemory::new(size, vec![block]).unwrap(), memory, bytes)
    }

    #[test]
    fn a_digest_is_the_hash_of_the_bytes() {
        for size in [4096, 32768, 65536].map(|bytes| PageSize::new(bytes).unwrap()) {
            let (guest, _, bytes) = guest(size);
            let mut scratch = BufferPool::new(1, size.extent_bytes()).try_take().unwrap();
            let stretches = bytes.chunks(usize::try_from(size.stretch_bytes()).unwrap());
            assert_eq!(guest.layout().block_stretches(0), 3);
            for (stretch, bytes) in (0..).zip(stretches) {
                let digest = stretch_digest(&guest, 0, stretch, &Known::default(), &mut scratch).unwrap();
                assert_eq!(digest, xxh3_128(bytes), "stretch {stretch} of {size:?} pages");
                let hashes: Vec<_> = bytes.chunks(size.bytes()).map(xxh3_64).collect();
                assert_eq!(page_hashes(&guest, 0, stretch, &Known::default(), &mut scratch).unwrap(), hashes);
            }
        }
    }

    #[test]
    fn untouched_pages_are_zeros_without_being_read_and_others_are_left_out() {
        let size = PageSize::DEFAULT;
        let (guest, memory, mut bytes) = guest(size);
        let mut scratch = BufferPool::new(1, size.extent_bytes()).try_take().unwrap();
        let untouched = DirtyBitmap::empty(guest.layout());
        untouched.set_range(0, 512 + 60..512 + 70);
        let mut known = Known { untouched: Some(&untouched), ..Known::default() };
        known.left_out[7] = 1 << 63;
        let digest = stretch_digest(&guest, 0, 1, &known, &mut scratch).unwrap();
        let start = 512 * 4096;
        bytes[start + 60 * 4096..start + 70 * 4096].fill(0);
        assert_eq!(digest, xxh3_128(&bytes[start..start + 511 * 4096]));
        memory.store((512 + 65) * 4096, &[9]);
        memory.store((512 + 511) * 4096, &[9]);
        assert_eq!(stretch_digest(&guest, 0, 1, &known, &mut scratch).unwrap(), digest);
        let hashes = page_hashes(&guest, 0, 1, &known, &mut scratch).unwrap();
        assert_eq!((hashes.len(), hashes[511], hashes[65]), (512, 0, xxh3_64(&[0; 4096])));
        memory.store((512 + 71) * 4096, &[9]);
        assert_ne!(stretch_digest(&guest, 0, 1, &known, &mut scratch).unwrap(), digest);
    }
}
