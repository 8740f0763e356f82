//! Pages frames made by hand, for tests: valid ones, and ones that no encoder makes.

use super::pages::PagesHead;
use crate::batch::{Arrived, PageEncoding};
use crate::codec::{Codec, Compressor};
use crate::geometry::ExtentAt;
use crate::pool::BufferPool;
use crate::xbzrle::{Encoded, encode_page};

pub(crate) const PAGE: usize = 4096;

/// A frame of one extent of block 0.
#[derive(Clone, Debug)]
pub(crate) struct Frame {
    pub(crate) head: PagesHead,
    pub(crate) payload: Vec<u8>,
}

impl Frame {
    /// A frame of no pages.
    pub(crate) fn new(extent: u32, round: u32) -> Self {
        let at = ExtentAt { block: 0, extent };
        let head = PagesHead { at, round, mask: 0, zero: 0, payload_hash: 0, pages: Vec::new() };
        Self { head: head.with_hash_of(&[]), payload: Vec::new() }
    }

    /// With a zero page at `bit`.
    pub(crate) fn zero(mut self, bit: u32) -> Self {
        self.head.mask |= 1 << bit;
        self.head.zero |= 1 << bit;
        self
    }

    /// With these bytes as the page at `bit`, which comes after all the others.
    pub(crate) fn coded(mut self, bit: u32, encoding: PageEncoding, bytes: &[u8]) -> Self {
        assert_eq!(self.head.mask & !self.head.zero & (u64::MAX << bit), 0, "pages in order");
        self.head.mask |= 1 << bit;
        self.head.pages.push((encoding, u32::try_from(bytes.len()).unwrap()));
        self.payload.extend(bytes);
        self.sealed()
    }

    /// With the hash of its payload.
    pub(crate) fn sealed(mut self) -> Self {
        self.head = self.head.with_hash_of(&self.payload);
        self
    }

    pub(crate) fn raw(self, bit: u32, page: &[u8]) -> Self {
        self.coded(bit, PageEncoding::Raw, page)
    }

    /// With a compressed page, or a raw one if it does not shrink.
    pub(crate) fn compressed(self, bit: u32, codec: Codec, page: &[u8]) -> Self {
        let mut out = vec![0; PAGE - 1];
        match Compressor::new(codec).compress(page, &mut out) {
            Some(bytes) => self.coded(bit, codec.encoding(), &out[..bytes]),
            None => self.raw(bit, page),
        }
    }

    /// With these pages compressed as one group, which must shrink.
    pub(crate) fn group(self, codec: Codec, pages: &[(u32, Vec<u8>)]) -> Self {
        let whole: Vec<u8> = pages.iter().flat_map(|(_, page)| page.iter().copied()).collect();
        let mut out = vec![0; whole.len() - 1];
        let bytes = Compressor::new(codec).compress(&whole, &mut out).expect("it shrinks");
        let first = self.coded(pages[0].0, codec.encoding(), &out[..bytes]);
        pages[1..].iter().fold(first, |frame, &(bit, _)| frame.coded(bit, PageEncoding::Grouped, &[]))
    }

    /// With a delta; nothing if the pages are equal, and the page itself if the delta overflows.
    pub(crate) fn delta(self, bit: u32, old: &[u8], page: &[u8]) -> Self {
        let mut out = vec![0; PAGE];
        match encode_page(old, page, &mut out) {
            Encoded::Equal => self,
            Encoded::Delta(bytes) => self.coded(bit, PageEncoding::Xbzrle, &out[..bytes]),
            Encoded::Overflow => self.raw(bit, page),
        }
    }

    /// As a receiver hands it on, of a stream with hashes.
    pub(crate) fn arrived(&self, offset: u64) -> Arrived {
        let mut buffer = BufferPool::new(1, self.payload.len().max(1)).try_take().unwrap();
        buffer.extend(&self.payload);
        let payload = (!self.payload.is_empty()).then_some(buffer);
        Arrived { payload, ..self.head.clone().into_arrived(true, offset) }
    }

    /// Its bytes in a stream.
    pub(crate) fn bytes(&self, lane: u16) -> Vec<u8> {
        [&self.head.to_bytes(lane)[..], &self.payload].concat()
    }
}
