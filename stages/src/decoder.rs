//! Decodes the pages of a batch that arrived, without a place to put them.
//!
//! The loader decodes with it what it writes, and a reader that only checks a stream accepts and refuses the same bytes.

use std::fmt;

use crate::batch::{Arrived, PageEncoding, PageFault, Piece, group_pages};
use crate::codec::Decompressor;
use crate::geometry::{ExtentAt, PageSize};
use crate::xbzrle::Delta;

/// A decoder with its working memory; one for each loader.
pub struct Decoder {
    page_size: PageSize,
    decompressor: Decompressor,
    /// The pages of a group, decompressed.
    group: Vec<u8>,
    /// The hashes of the raw pages of a batch.
    hashes: Vec<u64>,
}

impl fmt::Debug for Decoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decoder").field("page_size", &self.page_size).finish_non_exhaustive()
    }
}

impl Decoder {
    /// A decoder for pages of this size.
    #[must_use]
    pub fn new(page_size: PageSize) -> Self {
        let group = vec![0; page_size.bytes() * group_pages(page_size)];
        Self { page_size, decompressor: Decompressor::default(), group, hashes: Vec::new() }
    }

    /// Checks a batch as a loader does, and writes nothing. `received` are the pages of the extent that came before; returns
    /// those that came until now.
    ///
    /// # Errors
    /// [`PageFault`] where a loader would refuse the batch.
    pub fn check(&mut self, arrived: &Arrived, payload: &[u8], received: u64) -> Result<u64, PageFault> {
        arrived.check_payload(payload, &mut self.hashes)?;
        let mut received = received | arrived.zero;
        for piece in arrived.pieces(payload) {
            match piece.encoding {
                PageEncoding::Raw => {}
                PageEncoding::Xbzrle if piece.mask & !received != 0 => {
                    return Err(PageFault::NotHeld { page: piece.page(arrived.at) });
                }
                PageEncoding::Xbzrle => drop(self.delta(arrived.at, &piece)?),
                _ => self.unpack(arrived.at, &piece)?,
            }
            received |= piece.mask;
        }
        Ok(received)
    }

    /// Decompresses a group into [`Decoder::group`].
    pub(crate) fn unpack(&mut self, at: ExtentAt, piece: &Piece<'_>) -> Result<(), PageFault> {
        let group = &mut self.group[..piece.mask.count_ones() as usize * self.page_size.bytes()];
        let unpacked = self.decompressor.decompress(piece.encoding, piece.bytes, group);
        unpacked.map_err(|error| PageFault::Undecodable { page: piece.page(at), why: error.to_string() })
    }

    /// The pages of the last group, one after another. What lies behind them is unspecified.
    pub(crate) fn group(&self) -> &[u8] {
        &self.group
    }

    /// The delta of a page, checked to its last byte.
    pub(crate) fn delta<'a>(&self, at: ExtentAt, piece: &Piece<'a>) -> Result<Delta<'a>, PageFault> {
        let page = piece.page(at);
        let delta = Delta::parse(piece.bytes, self.page_size.bytes());
        delta.map_err(|error| PageFault::Undecodable { page, why: error.to_string() })
    }
}
