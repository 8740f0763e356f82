//! The payload of one frame, as its pages are coded one by one.
//!
//! As long as all pages are raw, the buffer that the detector filled is the payload, unchanged. At the first page that is
//! coded or skipped, the raw pages before it are copied in one piece, and the payload grows in a separate buffer.

use crate::pool::PooledBuffer;

/// A payload that grows page by page.
#[derive(Debug)]
pub(super) struct Payload {
    page_bytes: usize,
    /// The pages to be coded, whole, one after another.
    pages: PooledBuffer,
    /// How many of them are done.
    done: usize,
    /// The buffer for coded pages; at least as long as `pages`.
    own: PooledBuffer,
    /// Whether the payload is in `own`. Otherwise it is the part of `pages` that is done.
    apart: bool,
    /// Its bytes.
    bytes: usize,
}

impl Payload {
    /// An empty payload for the pages in a buffer.
    ///
    /// # Panics
    /// If `own` is the shorter buffer.
    pub(super) fn new(page_bytes: usize, pages: PooledBuffer, own: PooledBuffer) -> Self {
        assert!(own.capacity() >= pages.len(), "{} bytes of pages for {} of room", pages.len(), own.capacity());
        Self { page_bytes, pages, done: 0, own, apart: false, bytes: 0 }
    }

    /// The next page, and room of a page's size for its code.
    pub(super) fn next_page(&mut self) -> (&[u8], &mut [u8]) {
        let start = self.done * self.page_bytes;
        let room = &mut self.own.space()[self.bytes..self.bytes + self.page_bytes];
        (&self.pages[start..start + self.page_bytes], room)
    }

    /// All remaining pages, and at least as much room for their code.
    pub(super) fn rest(&mut self) -> (&[u8], &mut [u8]) {
        (&self.pages[self.done * self.page_bytes..], &mut self.own.space()[self.bytes..])
    }

    /// Adds the next page raw.
    pub(super) fn push_raw(&mut self) {
        if self.apart {
            let (page, room) = self.next_page();
            room.copy_from_slice(page);
        }
        self.done += 1;
        self.bytes += self.page_bytes;
    }

    /// Adds the next page as the first `bytes` of its room.
    pub(super) fn push_coded(&mut self, bytes: usize) {
        self.set_apart();
        self.done += 1;
        self.bytes += bytes;
    }

    /// Skips the next page: it is not sent, or is in the bytes of another.
    pub(super) fn leave_out(&mut self) {
        self.set_apart();
        self.done += 1;
    }

    /// The buffer with the payload, unless it is empty.
    pub(super) fn finish(mut self) -> Option<PooledBuffer> {
        if !self.apart {
            return Some(self.pages);
        }
        self.own.set_filled(self.bytes);
        (self.bytes > 0).then_some(self.own)
    }

    /// Moves the payload to the separate buffer.
    fn set_apart(&mut self) {
        if !self.apart {
            self.own.space()[..self.bytes].copy_from_slice(&self.pages[..self.bytes]);
            self.apart = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pool::BufferPool;

    const PAGE: usize = 16;

    proptest! {
        /// Each page is raw, skipped, or coded as some bytes; compared with the concatenated bytes.
        #[test]
        fn a_payload_is_its_pages_one_after_another(fates in prop::collection::vec(0..PAGE + 3, 1..20)) {
            let (given, room) = (BufferPool::new(1, 20 * PAGE), BufferPool::new(1, 20 * PAGE));
            let mut pages = given.try_take().unwrap();
            (0..fates.len()).for_each(|page| pages.extend(&[u8::try_from(page).unwrap() + 1; PAGE]));
            let original = pages.as_ptr();
            let mut payload = Payload::new(PAGE, pages, room.try_take().unwrap());
            let mut naive = Vec::<u8>::new();
            for (index, &fate) in fates.iter().enumerate() {
                let (page, coded) = payload.next_page();
                prop_assert_eq!((page, coded.len()), (&[u8::try_from(index).unwrap() + 1; PAGE][..], PAGE));
                coded.fill(0xee);
                match fate {
                    0 => payload.leave_out(),
                    1..PAGE => {
                        naive.extend(&coded[..fate]);
                        payload.push_coded(fate);
                    }
                    _ => {
                        naive.extend(page);
                        payload.push_raw();
                    }
                }
            }
            let finished = payload.finish();
            prop_assert_eq!(finished.as_deref().unwrap_or(&[]), &naive[..]);
            let all_raw = fates.iter().all(|&fate| fate >= PAGE);
            prop_assert_eq!(finished.is_some_and(|payload| payload.as_ptr() == original), all_raw);
        }
    }
}
