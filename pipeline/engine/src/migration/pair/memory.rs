//! The memories of both ends, as versions of pages: what a guest writes, what travels as deltas of what.

use std::time::Duration;

use fastrand::Rng;
use memferry_stages::tally::{PageTally, RoundTally};

use crate::controller::forecast::whole;
use crate::model::guest::{Encoded, Found, Guest, Sending, own_time};

/// Pages of the guest.
pub(super) const PAGES: usize = 48;
/// Bytes of a page on the wire.
pub(super) const PAGE_BYTES: u64 = 4096;
/// Bytes of a delta.
const DELTA_BYTES: u64 = 400;

/// A page that travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) page: usize,
    pub(super) version: u32,
    /// The version that it is a delta of; `None` if it travels whole.
    pub(super) reference: Option<u32>,
}

impl Frame {
    /// Its size on the wire.
    pub(super) fn bytes(&self) -> u64 {
        if self.reference.is_some() { DELTA_BYTES } else { PAGE_BYTES }
    }
}

/// Consecutive writes of which each page has at least one: earlier ones only write pages that are written again.
const ALL_WRITTEN: u64 = 2 * PAGES as u64;

/// The source's memory, bitmap and cache. A version is the number of the write that made it.
#[derive(Clone, Debug)]
pub(super) struct SourceMemory {
    versions: Vec<u32>,
    dirty: Vec<bool>,
    /// What the destination holds, as the encoder believes (law 6).
    cache: Vec<Option<u32>>,
    /// Writes in a second of the guest's own time.
    rate: f64,
    seed: u64,
    /// The time up to which it has written, that time as the guest's own, and the guest's own time of the last sync.
    until: Duration,
    own: Duration,
    synced: Duration,
}

impl SourceMemory {
    /// A guest that has written every page once. Every bit is set (law 1).
    pub(super) fn new(rate: f64, seed: u64) -> Self {
        Self {
            versions: vec![1; PAGES],
            dirty: vec![true; PAGES],
            cache: vec![None; PAGES],
            rate,
            seed,
            until: Duration::ZERO,
            own: Duration::ZERO,
            synced: Duration::ZERO,
        }
    }

    /// The guest writes up to this moment, if it runs.
    pub(super) fn write(&mut self, now: Duration, runs: bool, throttle: u8) {
        let time = now.saturating_sub(self.until);
        self.until = now;
        if runs {
            let from = self.own;
            self.own += own_time(time, throttle);
            for (page, version) in self.writes(from, self.own) {
                self.versions[page] = version;
            }
        }
    }

    /// The writes between two moments of the guest's own time: each other one is to the next page in turn, and the ones
    /// between are to any page.
    fn writes(&self, from: Duration, to: Duration) -> impl Iterator<Item = (usize, u32)> + use<> {
        let [first, end] = [from, to].map(|moment| whole(moment.as_secs_f64() * self.rate));
        let seed = self.seed;
        (first.max(end.saturating_sub(ALL_WRITTEN))..end).map(move |number| {
            let page = match usize::try_from(number).expect("a small number") {
                even if even % 2 == 0 => even / 2 % PAGES,
                _ => Rng::with_seed(seed.wrapping_add(number)).usize(..PAGES),
            };
            (page, u32::try_from(number).expect("a small number") + 2)
        })
    }

    /// A sync: what was written since the last one becomes dirty. Returns the number of dirty pages.
    pub(super) fn sync(&mut self) -> u64 {
        let from = std::mem::replace(&mut self.synced, self.own);
        self.written(from, self.own).dirty
    }

    pub(super) fn dirty_pages(&self) -> u64 {
        self.dirty.iter().filter(|dirty| **dirty).count() as u64
    }

    /// Dirty pages that can travel as deltas.
    pub(super) fn cached_pages(&self) -> u64 {
        (0..PAGES).filter(|&page| self.dirty[page] && self.cache[page].is_some()).count() as u64
    }

    /// Takes the dirty pages among these: clears the bit, then reads (law 2).
    pub(super) fn take(&mut self, pages: impl Iterator<Item = usize>, deltas: bool) -> Vec<Frame> {
        let mut frames = Vec::new();
        for page in pages.filter(|&page| page < PAGES) {
            if std::mem::take(&mut self.dirty[page]) {
                let version = self.versions[page];
                let reference = self.cache[page].filter(|_| deltas);
                self.cache[page] = Some(version);
                frames.push(Frame { page, version, reference });
            }
        }
        frames
    }

    /// What is dirty: the pages that the destination is not to hold.
    pub(super) fn dirty(&self) -> &[bool] {
        &self.dirty
    }

    /// Sets what is dirty: the destination runs the guest, and holds the other pages.
    pub(super) fn set_dirty(&mut self, dirty: Vec<bool>) {
        self.dirty = dirty;
    }

    /// From here on nothing is known of what the destination holds (law 6).
    pub(super) fn forget(&mut self) {
        self.cache.fill(None);
    }

    /// The versions of the pages that the destination holds.
    pub(super) fn clean_versions(&self) -> Vec<Option<u32>> {
        self.versions.iter().zip(&self.dirty).map(|(version, dirty)| (!dirty).then_some(*version)).collect()
    }

    /// These pages did not arrive: they are dirty, and nothing is known of what the destination holds of them (law 6).
    pub(super) fn put_back(&mut self, pages: impl Iterator<Item = usize>) {
        for page in pages {
            self.dirty[page] = true;
            self.cache[page] = None;
        }
    }

    pub(super) fn versions(&self) -> &[u32] {
        &self.versions
    }
}

/// The same guest for a simulation, which takes all pages of a round at once.
impl Guest for SourceMemory {
    fn pages(&self) -> u64 {
        PAGES as u64
    }

    fn page_bytes(&self) -> u64 {
        PAGE_BYTES
    }

    fn send(&mut self, sending: &Sending<'_>) -> Encoded {
        let mut tally = RoundTally { round: sending.round, ..RoundTally::default() };
        count(&self.take(0..PAGES, sending.round > 1), &mut tally.pages);
        Encoded { tally, stages: Duration::ZERO }
    }

    fn look(&self, round: u32, pages: u64) -> Encoded {
        self.clone().send(&Sending { round, pages, from: None, takes: &|_| Duration::ZERO })
    }

    /// Pages that were not taken since the last sync are still dirty.
    fn written(&mut self, from: Duration, to: Duration) -> Found {
        for (page, _) in self.writes(from, to) {
            self.dirty[page] = true;
        }
        Found { dirty: self.dirty_pages(), cached: self.cached_pages() }
    }
}

/// Counts pages as an encoder does. Returns their bytes on the wire.
pub(super) fn count(frames: &[Frame], pages: &mut PageTally) -> u64 {
    let bytes = frames.iter().map(Frame::bytes).sum();
    let deltas = frames.iter().filter(|frame| frame.reference.is_some()).count() as u64;
    let all = frames.len() as u64;
    pages.all += all;
    pages.xbzrle += deltas;
    pages.raw += all - deltas;
    pages.bytes_in += all * PAGE_BYTES;
    pages.bytes_out += bytes;
    bytes
}

/// Applies a page at the destination. A delta whose reference is not there is a violation of law 6.
pub(super) fn apply(memory: &mut [u32], frame: Frame) -> Result<(), String> {
    let Frame { page, version, reference } = frame;
    if reference.is_some_and(|reference| memory[page] != reference) {
        let holds = memory[page];
        return Err(format!("law 6: page {page} is a delta of {reference:?}, and the destination holds {holds}"));
    }
    memory[page] = version;
    Ok(())
}
