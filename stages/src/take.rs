//! Taking pages from the bitmap: the one way by which bits leave it to be sent.
//!
//! ```text
//! scanner, word by word ────────▶ ┌───────────┐ bits of the bitmap: clear
//!                                 │ PageTaker │ logs: re-arm          ──▶ Batch: read it, send it
//! page that is asked for,         │           │ in flight: record
//! on a blocking thread ─────────▶ └───────────┘
//! ```
//!
//! Both callers get law 2 (clear, then re-arm, then read) from the same function: a page is read only after its batch was returned.
//! A bit is cleared by one atomic operation, so of two callers that want a page exactly one gets it, and that one sends it.
//!
//! A page that is asked for overtakes what waits in the lanes. Law 4 (a page keeps its lane while pages may still change) allows
//! that only where each page is sent at most once. So an [`UrgentTaker`] exists only once nothing is in flight, and from then on every
//! round must be [`Final`](RoundKind::Final).

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::batch::{Batch, RoundKind};
use crate::bitmap::{DirtyBitmap, locate};
use crate::dirty_log::DirtyLog;
use crate::geometry::{ExtentAt, PageAt, bits};
use crate::in_flight::InFlight;

/// Takes pages from a bitmap. Clones share all but the untouched pages, of which each holds its own handle.
#[derive(Clone, Debug)]
pub struct PageTaker {
    bitmap: Arc<DirtyBitmap>,
    untouched: Option<Arc<DirtyBitmap>>,
    logs: Vec<Arc<dyn DirtyLog>>,
    in_flight: Arc<InFlight>,
    rounds: Arc<Mutex<Rounds>>,
}

/// Locked once a round, never for a page.
#[derive(Debug, Default)]
struct Rounds {
    /// The round that is scanned.
    open: Option<RoundKind>,
    /// Whether there is an [`UrgentTaker`].
    urgent: bool,
}

/// Why no page may be taken urgently.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UrgentRefused {
    /// A round is scanned.
    #[error("a round is scanned ({0:?}): its pages are not all sent")]
    RoundOpen(RoundKind),
    /// Pages are on their way, which an urgent page must not overtake.
    #[error("{0} pages are in flight")]
    InFlight(u64),
}

impl PageTaker {
    /// A taker of the pages of `bitmap`.
    ///
    /// `untouched` are pages that were still untouched after the `logs` were armed: the first batch that takes one marks it so.
    /// If a sync may come before the first scan, it needs them too
    /// ([`BitmapSync::with_untouched`](crate::bitmap_sync::BitmapSync::with_untouched)).
    #[must_use]
    pub fn new(
        bitmap: Arc<DirtyBitmap>,
        untouched: Option<Arc<DirtyBitmap>>,
        logs: Vec<Arc<dyn DirtyLog>>,
        in_flight: Arc<InFlight>,
    ) -> Self {
        Self { bitmap, untouched, logs, in_flight, rounds: Arc::default() }
    }

    /// From here on pages may be taken urgently, and every round of this taker is final. Called between rounds; `round` is the
    /// number of the round that follows.
    ///
    /// # Errors
    /// [`UrgentRefused`] where a page could overtake an earlier version of itself.
    pub fn open_urgent(&self, round: u32) -> Result<UrgentTaker, UrgentRefused> {
        let mut rounds = self.rounds();
        if let Some(kind) = rounds.open {
            return Err(UrgentRefused::RoundOpen(kind));
        }
        match self.in_flight.pages() {
            0 => {}
            pages => return Err(UrgentRefused::InFlight(pages)),
        }
        rounds.urgent = true;
        Ok(UrgentTaker { taker: self.clone(), round })
    }

    pub(crate) fn bitmap(&self) -> &DirtyBitmap {
        &self.bitmap
    }

    pub(crate) fn in_flight(&self) -> &InFlight {
        &self.in_flight
    }

    /// A round begins.
    ///
    /// # Panics
    /// If pages are taken urgently and the round is not final.
    pub(crate) fn begin_round(&mut self, kind: RoundKind) {
        // No bit is ever added to them: once all are reported, the bitmap can be dropped.
        drop(self.untouched.take_if(|untouched| untouched.is_empty()));
        let mut rounds = self.rounds();
        assert!(kind.is_final() || !rounds.urgent, "pages are taken urgently, and the round is {kind:?}");
        rounds.open = Some(kind);
    }

    /// The round is in the lanes.
    pub(crate) fn end_round(&self) {
        self.rounds().open = None;
    }

    /// Takes at most `most` dirty pages of an extent: clear, then re-arm (law 2). The caller records them in flight.
    ///
    /// # Errors
    /// When a log cannot be re-armed; the bits are set again.
    pub(crate) fn take(&self, at: ExtentAt, most: u32, round: u32, kind: RoundKind) -> io::Result<Option<Batch>> {
        let mask = if most >= u64::BITS {
            self.bitmap.take(at)
        } else {
            let some = bits(self.bitmap.peek(at)).take(most as usize).fold(0, |mask, bit| mask | 1 << bit);
            self.bitmap.take_mask(at, some)
        };
        self.taken(at, mask, round, kind)
    }

    /// Re-arms the logs for bits that were cleared.
    fn taken(&self, at: ExtentAt, mask: u64, round: u32, kind: RoundKind) -> io::Result<Option<Batch>> {
        if mask == 0 {
            return Ok(None);
        }
        let untouched = self.untouched.as_ref().map_or(0, |untouched| untouched.take_mask(at, mask));
        for log in &self.logs {
            log.rearm(at, mask).inspect_err(|_| _ = self.bitmap.set_mask(at, mask))?;
        }
        Ok(Some(Batch { at, mask, untouched, round, kind }))
    }

    fn rounds(&self) -> MutexGuard<'_, Rounds> {
        self.rounds.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes pages that are asked for, on any thread, while a scanner takes the others. It ends, and its thread is joined, before what
/// is in flight is put back.
#[derive(Debug)]
pub struct UrgentTaker {
    taker: PageTaker,
    round: u32,
}

/// The answer to a page that is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UrgentPage {
    /// The page is the caller's, to be read and sent; it is in flight until
    /// [`InFlight::acknowledge_urgent`].
    Taken(Batch),
    /// Somebody else took it and sends it, or has sent it, or it never travels.
    AlreadyTaken,
}

impl UrgentTaker {
    /// Takes a page: clear, then re-arm (law 2). It must not be read before.
    ///
    /// # Errors
    /// When a log cannot be re-armed; the bit is set again.
    ///
    /// # Panics
    /// If there is no such page.
    pub fn take(&self, page: PageAt) -> io::Result<UrgentPage> {
        let (at, mask) = locate(page);
        let mask = self.taker.bitmap.take_mask(at, mask);
        let Some(batch) = self.taker.taken(at, mask, self.round, RoundKind::Final)? else {
            return Ok(UrgentPage::AlreadyTaken);
        };
        self.taker.in_flight.record_urgent(&batch);
        Ok(UrgentPage::Taken(batch))
    }
}

#[cfg(test)]
mod tests;
