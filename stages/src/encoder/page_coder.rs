//! One page at a time: chooses how it is coded, and codes it.
//!
//! | | before the first RoundComplete | after it |
//! |---|---|---|
//! | no deltas planned | compressed, or raw | the same |
//! | deltas planned | compressed, or raw | a delta; what misses the cache or overflows: raw, or compressed by `on_miss` |
//!
//! A page that does not shrink goes raw.

use super::reference::{Compared, Reference};
use super::{DeltaPlan, EncoderPlan};
use crate::batch::Batch;
use crate::codec::Compressor;
use crate::geometry::{PageAt, PageSize};
use crate::tally::RoundTally;
use crate::wire::PageEncoding;

/// How a page travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Coded {
    /// Not at all: the destination holds it.
    Unchanged,
    /// As it is.
    Raw,
    /// As so many bytes that were written, fewer than the page has.
    As(PageEncoding, usize),
}

/// The codec of one lane's pages, with all that it remembers of them.
#[derive(Debug)]
pub(super) struct PageCoder {
    /// Of pages that are sent whole.
    compressor: Option<Compressor>,
    deltas: Option<Deltas>,
}

#[derive(Debug)]
struct Deltas {
    plan: DeltaPlan,
    reference: Reference,
    /// Has the first RoundComplete passed?
    begun: bool,
}

impl PageCoder {
    /// A coder before its first round.
    pub(super) fn new(page_size: PageSize, plan: &EncoderPlan) -> Self {
        let deltas =
            |plan: DeltaPlan| Deltas { plan, reference: Reference::new(page_size, plan.cache_bytes), begun: false };
        Self { compressor: plan.compress.map(Compressor::new), deltas: plan.delta.map(deltas) }
    }

    /// The most bytes that its cache takes.
    pub(super) fn bound_bytes(&self) -> u64 {
        self.deltas.as_ref().map_or(0, |deltas| deltas.reference.bound_bytes())
    }

    /// Bytes that its cache takes now.
    pub(super) fn memory_bytes(&self) -> u64 {
        self.deltas.as_ref().map_or(0, |deltas| deltas.reference.memory_bytes())
    }

    /// A round has passed: after the first one deltas begin, if they are planned, and compression is over (law 5).
    pub(super) fn round_complete(&mut self) {
        if let Some(deltas) = self.deltas.as_mut().filter(|deltas| !deltas.begun) {
            deltas.begun = true;
            self.compressor = deltas.plan.on_miss.map(Compressor::new);
        }
    }

    /// Codes a page that is not zero into `out` (as long as a page), and counts how.
    pub(super) fn code(
        &mut self,
        at: PageAt,
        page: &[u8],
        batch: &Batch,
        out: &mut [u8],
        counted: &mut RoundTally,
    ) -> Coded {
        let coded = match self.compare(at, page, batch, out, counted) {
            Some(Compared::Equal) => Coded::Unchanged,
            Some(Compared::Delta(bytes)) => Coded::As(PageEncoding::Xbzrle, bytes),
            Some(Compared::Miss | Compared::Overflow) | None => self.whole(page, out),
        };
        match coded {
            Coded::Unchanged => counted.unchanged += 1,
            Coded::Raw => counted.raw += 1,
            Coded::As(PageEncoding::Xbzrle, _) => counted.xbzrle += 1,
            Coded::As(..) => counted.compressed += 1,
        }
        coded
    }

    /// A page is sent as zero. It is kept as such where deltas are made, for it was written and may be again; in the first
    /// round most zero pages never were.
    pub(super) fn zero(&mut self, at: PageAt, batch: &Batch) {
        match &mut self.deltas {
            Some(deltas) if deltas.begun => deltas.reference.will_be_zero(at, batch),
            Some(deltas) if deltas.plan.cache_first_round => deltas.reference.forget(at),
            _ => {}
        }
    }

    /// Compares a page with what the destination holds, if deltas have begun.
    fn compare(
        &mut self,
        at: PageAt,
        page: &[u8],
        batch: &Batch,
        out: &mut [u8],
        counted: &mut RoundTally,
    ) -> Option<Compared> {
        let deltas = self.deltas.as_mut()?;
        if !deltas.begun {
            if deltas.plan.cache_first_round {
                deltas.reference.will_hold(at, page, batch);
            }
            return None;
        }
        let compared = deltas.reference.compare(at, page, batch, out);
        counted.xbzrle_misses += u64::from(compared == Compared::Miss);
        counted.xbzrle_overflows += u64::from(compared == Compared::Overflow);
        Some(compared)
    }

    fn whole(&mut self, page: &[u8], out: &mut [u8]) -> Coded {
        let Some(compressor) = &mut self.compressor else { return Coded::Raw };
        match compressor.compress(page, &mut out[..page.len() - 1]) {
            Some(bytes) => Coded::As(compressor.codec().encoding(), bytes),
            None => Coded::Raw,
        }
    }
}
