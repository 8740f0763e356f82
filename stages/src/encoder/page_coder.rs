//! Chooses how pages are coded, and codes them.
//!
//! | | before the first RoundComplete | after it |
//! |---|---|---|
//! | no deltas planned | compressed, or raw | the same |
//! | deltas planned | compressed, or raw | a delta; what misses the cache or overflows: raw, or compressed, as [`super::misses`] decides |
//!
//! After DirectEnds pages are coded as before the first RoundComplete: each travels once, to memory that does not hold it.
//!
//! Pages that are compressed before deltas begin, or where none are planned, are compressed together (see
//! [`super::whole_coder`]); afterwards each page is coded alone. Pages that do not shrink are sent raw. A delta against zeros leaves
//! out zeros and no more: where misses are compressed, a larger one travels only if the page is no smaller compressed.

use std::sync::Arc;

use super::known_zero::KnownZero;
use super::misses::{Decision, OnMiss, Wire};
use super::reference::{Compared, Reference};
use super::sampler::Span;
use super::whole_coder::{Looks, WholeCoder};
use super::{DeltaPlan, EncoderPlan};
use crate::batch::{Batch, PageEncoding};
use crate::codec::Codec;
use crate::geometry::{ExtentAt, PageAt, PageSize};
use crate::tally::PageTally;

/// A delta against zeros of at most this part of its page is sent without a try of the compressor.
const SPARSE: usize = 16;

/// How a page travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Coded {
    /// Not sent: the destination holds it.
    Unchanged,
    /// Raw.
    Raw,
    /// In this encoding, as a number of bytes that is less than a page.
    As(PageEncoding, usize),
}

/// The coder of one lane's pages, with its cache and its compressor.
#[derive(Debug)]
pub(super) struct PageCoder {
    page_size: PageSize,
    /// The compressor of the first round.
    compress: Option<Codec>,
    /// Compresses pages that are sent whole, where they are compressed.
    whole: Option<WholeCoder>,
    deltas: Option<Deltas>,
}

#[derive(Debug)]
struct Deltas {
    plan: DeltaPlan,
    reference: Reference,
    /// Decides on misses, where the plan leaves it open.
    misses: Option<Decision>,
    /// Whether the first RoundComplete has passed.
    begun: bool,
}

impl PageCoder {
    /// A coder before its first round.
    pub(super) fn new(page_size: PageSize, plan: &EncoderPlan) -> Self {
        let deltas = |plan: DeltaPlan| Deltas {
            plan,
            reference: Reference::new(page_size, plan.cache_bytes),
            misses: None,
            begun: false,
        };
        let whole = plan.compress.map(|codec| WholeCoder::new(page_size, codec));
        Self { page_size, compress: plan.compress, whole, deltas: plan.delta.map(deltas) }
    }

    /// Sets the connection behind it, by which misses are decided on where the plan leaves it open.
    pub(super) fn set_wire(&mut self, wire: Wire) {
        if let Some(deltas) = self.deltas.as_mut().filter(|deltas| matches!(deltas.plan.on_miss, OnMiss::Auto(_))) {
            deltas.misses = Some(Decision::new(wire));
        }
    }

    /// Sets the pages that are known to be zero, where deltas are planned.
    pub(super) fn set_known_zero(&mut self, known_zero: Arc<KnownZero>) {
        if let Some(deltas) = &mut self.deltas {
            deltas.reference.set_known_zero(known_zero);
        }
    }

    /// The most bytes that its cache takes, with what its compressor takes.
    pub(super) fn bound_bytes(&self) -> u64 {
        self.compressor_bytes() + self.deltas.as_ref().map_or(0, |deltas| deltas.reference.bound_bytes())
    }

    /// Bytes that its cache and its compressor take now.
    pub(super) fn memory_bytes(&self) -> u64 {
        self.compressor_bytes() + self.deltas.as_ref().map_or(0, |deltas| deltas.reference.memory_bytes())
    }

    fn compressor_bytes(&self) -> u64 {
        self.whole.as_ref().map_or(0, WholeCoder::memory_bytes)
    }

    /// Limits its cache to `bytes`, where deltas are planned.
    pub(super) fn resize_cache(&mut self, bytes: u64) {
        if let Some(deltas) = self.deltas.as_mut().filter(|deltas| deltas.plan.cache_bytes != bytes) {
            deltas.plan.cache_bytes = bytes;
            deltas.reference.resize(bytes);
        }
    }

    /// Handles the end of a round: after the first one, deltas begin if they are planned, and compression ends (ARCHITECTURE.md,
    /// law 5: the round travels in band).
    pub(super) fn round_complete(&mut self) {
        if let Some(deltas) = self.deltas.as_mut().filter(|deltas| !deltas.begun) {
            deltas.begun = true;
            let is_known = deltas.misses.is_some() || !matches!(deltas.plan.on_miss, OnMiss::Auto(_));
            let codec = deltas.plan.on_miss.codec().filter(|_| is_known);
            self.whole = codec.map(|codec| WholeCoder::new(self.page_size, codec));
        }
    }

    /// Handles the switch to postcopy: deltas end, with all that is known of what the destination holds (law 6).
    pub(super) fn direct_ends(&mut self) {
        self.deltas = None;
        self.whole = self.compress.map(|codec| WholeCoder::new(self.page_size, codec));
    }

    /// Whether deltas have begun. Then pages are coded one at a time.
    pub(super) fn makes_deltas(&self) -> bool {
        self.deltas.as_ref().is_some_and(|deltas| deltas.begun)
    }

    /// Prepares pages of a batch that are all sent whole, for [`PageCoder::code_whole`]: caches them and returns how they look.
    pub(super) fn pass_whole(&mut self, places: impl Iterator<Item = PageAt>, pages: &[u8], batch: &Batch) -> Looks {
        if let Some(deltas) = self.deltas.as_mut().filter(|deltas| deltas.plan.cache_first_round) {
            let pages = pages.chunks_exact(self.page_size.bytes());
            places.zip(pages).for_each(|(at, page)| deltas.reference.will_hold_first(at, page, batch));
        }
        self.whole.as_ref().map_or_else(Looks::default, |whole| whole.look(pages))
    }

    /// Codes the next of these pages, of which none is zero: see [`WholeCoder::code`].
    pub(super) fn code_whole(&mut self, pages: &[u8], looks: Looks, room: &mut [u8]) -> (Span, Option<usize>) {
        match &mut self.whole {
            Some(whole) => whole.code(pages, looks, room),
            None => (Span::raw(pages.len() / self.page_size.bytes()), None),
        }
    }

    /// The encoding of compressed pages, if any are compressed.
    pub(super) fn codec(&self) -> Option<PageEncoding> {
        self.whole.as_ref().map(WholeCoder::encoding)
    }

    /// Starts the next batch, once deltas have begun.
    pub(super) fn next_batch(&mut self) {
        if let Some(misses) = self.deltas.as_mut().and_then(|deltas| deltas.misses.as_mut()) {
            misses.next_batch();
        }
    }

    /// Codes a page that is not zero, once deltas have begun, into `out` (as long as a page), and counts how.
    pub(super) fn code(
        &mut self,
        at: PageAt,
        page: &[u8],
        batch: &Batch,
        out: &mut [u8],
        counted: &mut PageTally,
    ) -> Coded {
        let coded = match self.compare(at, page, batch, out, counted) {
            Compared::Equal => Coded::Unchanged,
            Compared::Delta(bytes) => Coded::As(PageEncoding::Xbzrle, bytes),
            Compared::DeltaOfZeros(bytes) => self.smaller(bytes, page, out, counted),
            Compared::Miss | Compared::Overflow => self.alone(page, out),
        };
        match coded {
            Coded::Unchanged => counted.unchanged += 1,
            Coded::Raw => counted.raw += 1,
            Coded::As(PageEncoding::Xbzrle, _) => counted.xbzrle += 1,
            Coded::As(..) => counted.compressed += 1,
        }
        coded
    }

    /// Handles the pages of a batch that are sent as zero, before its other pages. Until deltas begin those are sent whole, and
    /// may have no entries.
    pub(super) fn zeros(&mut self, batch: &Batch, zero: u64) {
        let Some(deltas) = &mut self.deltas else { return };
        deltas.reference.will_be_zero(batch.at, zero);
        if !deltas.begun {
            deltas.reference.will_not_be_zero(batch.at, batch.mask & !zero);
        }
    }

    /// Drops the entries of these pages.
    pub(super) fn forget(&mut self, at: ExtentAt, pages: u64) {
        if let Some(deltas) = &mut self.deltas {
            deltas.reference.forget(at, pages);
        }
    }

    /// The pages of a batch that are cached; `zero` are the zero pages, which are not.
    pub(super) fn caches(&self, mask: u64, zero: u64) -> u64 {
        match &self.deltas {
            Some(deltas) if deltas.begun || deltas.plan.cache_first_round => mask & !zero,
            _ => 0,
        }
    }

    /// Compares a page with what the destination holds.
    fn compare(&mut self, at: PageAt, page: &[u8], batch: &Batch, out: &mut [u8], counted: &mut PageTally) -> Compared {
        let deltas = self.deltas.as_mut().expect("deltas have begun");
        let compared = deltas.reference.compare(at, page, batch, out);
        counted.xbzrle_misses += u64::from(compared == Compared::Miss);
        counted.xbzrle_overflows += u64::from(compared == Compared::Overflow);
        compared
    }

    /// The smaller of a delta against zeros, which is in `out`, and the page compressed.
    fn smaller(&mut self, delta: usize, page: &[u8], out: &mut [u8], counted: &mut PageTally) -> Coded {
        if delta > page.len() / SPARSE {
            match self.alone(page, out) {
                Coded::As(codec, bytes) if bytes < delta => {
                    counted.xbzrle_overflows += 1;
                    return Coded::As(codec, bytes);
                }
                _ => self.deltas.iter().for_each(|deltas| deltas.reference.write_delta_of_zeros(page, out)),
            }
        }
        Coded::As(PageEncoding::Xbzrle, delta)
    }

    fn alone(&mut self, page: &[u8], out: &mut [u8]) -> Coded {
        let mut misses = self.deltas.as_mut().and_then(|deltas| deltas.misses.as_mut());
        let Some(whole) = self.whole.as_mut().filter(|_| misses.as_mut().is_none_or(|misses| misses.compresses()))
        else {
            return Coded::Raw;
        };
        let started = misses.as_mut().and_then(|misses| misses.starts());
        let (_, Some(bytes)) = whole.code(page, whole.look(page), out) else { return Coded::Raw };
        if let (Some(misses), Some(started)) = (misses, started) {
            misses.shrank(started, page.len() - bytes);
        }
        Coded::As(whole.encoding(), bytes)
    }
}
