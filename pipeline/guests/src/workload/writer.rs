//! One writer: its pages, the last write to each, and its position in its pattern.
//!
//! Every page belongs to one writer at most, so writers need no lock among themselves: a page in the regions of several
//! writers is assigned to one of them, in turn by page number. Each writer applies its pattern to its own pages.

use std::collections::VecDeque;
use std::ops::Range;

use super::machine::Machine;
use super::pattern::{Cursor, Plan};
use super::random::generator;
use super::settings::{Region, WorkloadSettings, WriterSettings};
use super::stamp::{Mark, Stamper};
use crate::balloon::Ballooned;

/// Bytes that are written to a page of free memory besides its stamp when it is taken.
const FREE_BODY: usize = 64;
/// At most one in this number of ranges of free memory is taken at a time.
const FREE_SHARE_TAKEN: u32 = 8;

/// A writer. Its expected sequences live here, outside the guest's memory.
#[derive(Debug)]
pub(super) struct Writer {
    work: Work,
    pub(super) cursor: Cursor,
    pages: Vec<u32>,
    sequences: Vec<u32>,
    stamper: Stamper,
}

/// The work of a writer on its pages.
#[derive(Debug)]
enum Work {
    /// It has no pages.
    Nothing,
    /// Writes one page after another, in a pattern.
    Pages(Plan),
    /// Takes ranges of free memory and gives them back. Holds the ranges taken, the longest held first. Its cursor
    /// counts its writes, so that no two writes are equal: a stale page from an earlier use of a range differs from the
    /// last write.
    Ranges(VecDeque<u32>),
}

/// The result of a check of pages.
#[derive(Debug, Default)]
pub(super) struct Findings {
    pub(super) written: u64,
    pub(super) checked: u64,
    pub(super) stale: u64,
    pub(super) first_stale: Option<String>,
}

impl Findings {
    pub(super) fn add(&mut self, compared: Result<(), String>) {
        self.checked += 1;
        if let Err(why) = compared {
            self.stale += 1;
            self.first_stale.get_or_insert(why);
        }
    }
}

/// The writers of a workload before the first write.
pub(super) fn writers(settings: &WorkloadSettings) -> Vec<Writer> {
    let [used, free, _] = settings.parts();
    let dealt = deal(used.end, settings.writers.iter().map(|writer| writer.region));
    let make = |((index, pages), of): ((u64, Vec<u32>), &WriterSettings)| Writer {
        work: match u32::try_from(pages.len()).expect("at most MAX_PAGES") {
            0 => Work::Nothing,
            count => Work::Pages(Plan::new(of.pattern, count)),
        },
        cursor: Cursor { random: generator(settings.seed, index), next: 0 },
        sequences: vec![0; pages.len()],
        pages,
        stamper: Stamper::new(settings.seed, of.body_bytes(settings.page_size)),
    };
    let mut writers: Vec<_> = (0..).zip(dealt).zip(&settings.writers).map(make).collect();
    if settings.free.is_some_and(|free| free.turns_per_second > 0.0) {
        writers.push(Writer {
            work: Work::Ranges(VecDeque::new()),
            cursor: Cursor { random: generator(settings.seed, writers.len() as u64), next: 0 },
            sequences: vec![0; free.len()],
            pages: free.collect(),
            stamper: Stamper::new(settings.seed, FREE_BODY),
        });
    }
    writers
}

impl Writer {
    /// Writes this number of pages; each is compared with the last write to it before it is written again.
    pub(super) fn write(&mut self, machine: &Machine, count: u32, findings: &mut Findings) {
        let plan = match &self.work {
            Work::Nothing => return,
            Work::Ranges(_) => return (0..count).for_each(|_| self.turn(machine, findings)),
            Work::Pages(plan) => plan,
        };
        for _ in 0..count {
            let index = plan.choose(&mut self.cursor) as usize;
            let (page, sequence) = (self.pages[index], self.sequences[index]);
            if sequence > 0 {
                findings.add(self.stamper.compare(machine, Mark { page, sequence }));
            }
            let sequence = sequence.checked_add(1).unwrap_or(1);
            self.stamper.write(machine, Mark { page, sequence });
            self.sequences[index] = sequence;
            findings.written += 1;
        }
    }

    /// Takes a range of free memory and writes all of it; or, once enough are taken, gives back the one held longest.
    fn turn(&mut self, machine: &Machine, findings: &mut Findings) {
        let (Work::Ranges(taken), Some(free)) = (&mut self.work, machine.free()) else { return };
        let first = |pages: &[u32]| *pages.first().expect("free memory has pages");
        let own = |range: u32, pages: &[u32]| {
            let Range { start, end } = free.pages(range);
            (start - first(pages)) as usize..(end - first(pages)) as usize
        };
        if taken.len() >= (free.count() / FREE_SHARE_TAKEN).max(1) as usize {
            let range = taken.pop_front().expect("at least one is taken");
            for index in own(range, &self.pages) {
                let sequence = std::mem::take(&mut self.sequences[index]);
                findings.add(self.stamper.compare(machine, Mark { page: self.pages[index], sequence }));
            }
            free.give_back(range);
            return;
        }
        let range = self.cursor.random.u32(..free.count());
        // A range that is being hinted, or is taken already, is not taken: the next turn finds another.
        if free.take(range) {
            taken.push_back(range);
            for index in own(range, &self.pages) {
                self.cursor.next = self.cursor.next.checked_add(1).unwrap_or(1);
                let sequence = self.cursor.next;
                self.stamper.write(machine, Mark { page: self.pages[index], sequence });
                self.sequences[index] = sequence;
                findings.written += 1;
            }
        }
    }

    /// Compares every page that it has ever written.
    pub(super) fn check_all(&mut self, machine: &Machine, findings: &mut Findings) {
        for (&page, &sequence) in self.pages.iter().zip(&self.sequences).filter(|(_, sequence)| **sequence > 0) {
            findings.add(self.stamper.compare(machine, Mark { page, sequence }));
        }
    }

    /// Does it have any page to write?
    pub(super) fn is_idle(&self) -> bool {
        matches!(self.work, Work::Nothing)
    }

    /// Its pages with their sequences.
    pub(super) fn sequences(&self) -> impl Iterator<Item = (u32, u32)> + use<'_> {
        self.pages.iter().copied().zip(self.sequences.iter().copied())
    }

    /// Continues where another process stopped. The sequences are those of all pages; the writer takes those of its own
    /// pages, and leaves zeros in their place.
    pub(super) fn restore(&mut self, machine: &Machine, cursor: Cursor, sequences: &mut [u32]) -> Result<(), String> {
        let counts_writes = matches!(self.work, Work::Ranges(_));
        if !counts_writes && cursor.next != 0 && cursor.next as usize >= self.pages.len() {
            return Err(format!("it is at page {} of its {}", cursor.next, self.pages.len()));
        }
        self.cursor = cursor;
        for (own, page) in self.sequences.iter_mut().zip(&self.pages) {
            *own = std::mem::take(&mut sequences[*page as usize]);
        }
        self.restore_ranges(machine)
    }

    /// The ranges that were taken are those with written pages.
    fn restore_ranges(&mut self, machine: &Machine) -> Result<(), String> {
        let (Work::Ranges(taken), Some(free)) = (&mut self.work, machine.free()) else { return Ok(()) };
        let mut sequences = &self.sequences[..];
        for range in 0..free.count() {
            let (here, rest) = sequences.split_at(free.pages(range).len());
            sequences = rest;
            let written = here.iter().filter(|&&sequence| sequence != 0).count();
            if written == here.len() && free.take(range) {
                taken.push_back(range);
            } else if written != 0 {
                return Err(format!("{written} of the {} pages of range {range} are written", here.len()));
            }
        }
        Ok(())
    }
}

/// Assigns the pages to writers with these regions.
fn deal(pages: u32, regions: impl Iterator<Item = Region>) -> Vec<Vec<u32>> {
    let bounds: Vec<_> = regions.map(|region| bound(region.from, pages)..bound(region.to, pages)).collect();
    let mut cuts: Vec<u32> = bounds.iter().flat_map(|bound| [bound.start, bound.end]).collect();
    cuts.sort_unstable();
    let mut dealt = vec![Vec::new(); bounds.len()];
    // Between two cuts every page lies in the same regions.
    for piece in cuts.windows(2).map(|cut| cut[0]..cut[1]).filter(|piece| !piece.is_empty()) {
        let candidates: Vec<_> = (0..bounds.len()).filter(|&writer| bounds[writer].contains(&piece.start)).collect();
        if !candidates.is_empty() {
            piece.for_each(|page| dealt[candidates[page as usize % candidates.len()]].push(page));
        }
    }
    dealt
}

fn bound(share: f64, pages: u32) -> u32 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of 0 to 1 of a u32")]
    let bound = (share * f64::from(pages)).round() as u32;
    bound
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_page_of_a_region_has_one_writer_whose_region_it_is_in(
            pages in 1_u32..300,
            regions in prop::collection::vec((0.0_f64..1.0, 0.0_f64..=1.0), 0..5),
        ) {
            let regions: Vec<_> = regions.iter().map(|&(a, b)| Region { from: a.min(b), to: a.max(b) }).collect();
            let dealt = deal(pages, regions.iter().copied());
            for page in 0..pages {
                let inside = |region: &Region| (bound(region.from, pages)..bound(region.to, pages)).contains(&page);
                let owners: Vec<_> = (0..regions.len()).filter(|&writer| dealt[writer].contains(&page)).collect();
                prop_assert_eq!(owners.len(), usize::from(regions.iter().any(inside)));
                prop_assert!(owners.iter().all(|&owner| inside(&regions[owner])));
            }
        }
    }
}
