//! One writer: its pages, what it wrote to each last, and where it is in its pattern.
//!
//! Every page belongs to one writer at most, so writers need no lock among themselves: a page that lies in the regions
//! of several writers is dealt to one of them, in turn by page number. Each keeps its pattern over the pages it has.

use super::machine::Machine;
use super::pattern::{Cursor, Plan};
use super::random::Random;
use super::settings::{Region, WorkloadSettings, WriterSettings};
use super::stamp::{Mark, Stamper};

/// A writer. Its expected sequences live here, outside the guest's memory.
#[derive(Debug)]
pub(super) struct Writer {
    plan: Option<Plan>,
    pub(super) cursor: Cursor,
    pages: Vec<u32>,
    sequences: Vec<u32>,
    stamper: Stamper,
}

/// What a look at pages found.
#[derive(Debug, Default)]
pub(super) struct Findings {
    pub(super) written: u64,
    pub(super) checked: u64,
    pub(super) stale: u64,
    pub(super) first_stale: Option<String>,
}

impl Findings {
    fn add(&mut self, compared: Result<(), String>) {
        self.checked += 1;
        if let Err(why) = compared {
            self.stale += 1;
            self.first_stale.get_or_insert(why);
        }
    }
}

/// The writers of a workload as they are before the first write.
pub(super) fn writers(settings: &WorkloadSettings) -> Vec<Writer> {
    let pages = u32::try_from(settings.pages()).expect("at most MAX_PAGES");
    let dealt = deal(pages, settings.writers.iter().map(|writer| writer.region));
    let make = |((index, pages), of): ((u64, Vec<u32>), &WriterSettings)| Writer {
        plan: u32::try_from(pages.len()).ok().filter(|&count| count > 0).map(|count| Plan::new(of.pattern, count)),
        cursor: Cursor { random: Random::of(settings.seed, index), next: 0 },
        sequences: vec![0; pages.len()],
        pages,
        stamper: Stamper::new(settings.seed, of.body_bytes(settings.page_size)),
    };
    (0..).zip(dealt).zip(&settings.writers).map(make).collect()
}

impl Writer {
    /// Writes so many pages; each is compared with what was last written to it before it is written again.
    pub(super) fn write(&mut self, machine: &Machine, count: u32, findings: &mut Findings) {
        let Some(plan) = &self.plan else { return };
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

    /// Compares every page that it has ever written.
    pub(super) fn check_all(&mut self, machine: &Machine, findings: &mut Findings) {
        for (&page, &sequence) in self.pages.iter().zip(&self.sequences).filter(|(_, sequence)| **sequence > 0) {
            findings.add(self.stamper.compare(machine, Mark { page, sequence }));
        }
    }

    /// Has it any page to write?
    pub(super) fn is_idle(&self) -> bool {
        self.plan.is_none()
    }

    /// Its pages with their sequences.
    pub(super) fn sequences(&self) -> impl Iterator<Item = (u32, u32)> + use<'_> {
        self.pages.iter().copied().zip(self.sequences.iter().copied())
    }

    /// Takes over where another process left off. The sequences are those of all pages; the writer picks its own, and
    /// leaves zeros behind.
    pub(super) fn restore(&mut self, cursor: Cursor, sequences: &mut [u32]) -> Result<(), String> {
        if cursor.next != 0 && cursor.next as usize >= self.pages.len() {
            return Err(format!("it is at page {} of its {}", cursor.next, self.pages.len()));
        }
        self.cursor = cursor;
        for (own, page) in self.sequences.iter_mut().zip(&self.pages) {
            *own = std::mem::take(&mut sequences[*page as usize]);
        }
        Ok(())
    }
}

/// Deals the pages to writers with these regions.
fn deal(pages: u32, regions: impl Iterator<Item = Region>) -> Vec<Vec<u32>> {
    let bounds: Vec<_> = regions.map(|region| bound(region.from, pages)..bound(region.to, pages)).collect();
    let mut dealt = vec![Vec::new(); bounds.len()];
    let mut candidates = Vec::with_capacity(bounds.len());
    for page in 0..pages {
        candidates.clear();
        candidates.extend((0..bounds.len()).filter(|&writer| bounds[writer].contains(&page)));
        if !candidates.is_empty() {
            dealt[candidates[page as usize % candidates.len()]].push(page);
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
