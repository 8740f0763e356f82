//! The memories of both ends, as versions of pages: what a guest writes, what travels as deltas of what.

use std::time::Duration;

use fastrand::Rng;

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

/// The source's memory, bitmap and cache.
#[derive(Debug)]
pub(super) struct SourceMemory {
    versions: Vec<u32>,
    /// Written since the last sync.
    written: Vec<bool>,
    dirty: Vec<bool>,
    /// What the destination holds, as the encoder believes (law 6).
    cache: Vec<Option<u32>>,
    /// Pages a second that the guest writes while it runs.
    rate: f64,
    /// The time up to which it has written.
    until: Duration,
    rng: Rng,
}

impl SourceMemory {
    /// A guest that has written every page once. Every bit is set (law 1).
    pub(super) fn new(rate: f64, seed: u64) -> Self {
        Self {
            versions: vec![1; PAGES],
            written: vec![false; PAGES],
            dirty: vec![true; PAGES],
            cache: vec![None; PAGES],
            rate,
            until: Duration::ZERO,
            rng: Rng::with_seed(seed),
        }
    }

    /// The guest writes up to this moment, if it runs. `share` of its time it is not throttled.
    pub(super) fn write(&mut self, now: Duration, runs: bool, share: f64) {
        let time = now.saturating_sub(self.until).as_secs_f64();
        self.until = now;
        let mut writes = if runs { time * self.rate * share } else { 0.0 };
        // More writes than pages only write them again.
        writes = writes.min(4.0 * PAGES as f64);
        while writes >= 1.0 || self.rng.f64() < writes {
            writes -= 1.0;
            let page = self.rng.usize(..PAGES);
            self.versions[page] += 1;
            self.written[page] = true;
        }
    }

    /// A sync: what was written becomes dirty. Returns the number of dirty pages.
    pub(super) fn sync(&mut self) -> u64 {
        for page in 0..PAGES {
            self.dirty[page] |= std::mem::take(&mut self.written[page]);
        }
        self.dirty_pages()
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
