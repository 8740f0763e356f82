//! The mark that a write leaves in a page, so that a stale page is found without a digest.
//!
//! ```text
//! 0        4          8              16                                                    page size
//! ┌────────┬──────────┬──────────────┬──────────────────┬─────────────────┬────────────────┐
//! │ page   │ sequence │ check        │ as it was        │ body            │ as it was      │
//! │ u32 le │ u32 le   │ u64 le       │                  │ changed by this │                │
//! └────────┴──────────┴──────────────┴──────────────────┴─────────────────┴────────────────┘
//! ```
//!
//! The place and the bytes of the body, and the check, follow from page, sequence and seed alone. So the expected
//! sequence of a page determines these bytes, and no other state of the page is stored.

use fastrand::Rng;

use super::machine::Machine;
use super::random::generator;
use super::settings::STAMP_BYTES;
/// One write of one page, as the mark it leaves there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    /// Number of the page, over all blocks.
    pub(super) page: u32,
    /// How often the page has been written, this write included; never 0.
    pub(super) sequence: u32,
}

/// Makes marks and compares pages with them; one for each writer.
#[derive(Debug)]
pub(super) struct Stamper {
    seed: u64,
    body: Box<[u8]>,
    found: Box<[u8]>,
}

impl Stamper {
    /// For writes that change `body_bytes` besides the stamp.
    pub(super) fn new(seed: u64, body_bytes: usize) -> Self {
        Self { seed, body: vec![0; body_bytes].into(), found: vec![0; body_bytes].into() }
    }

    /// Writes the mark into its page, and marks the page as written after that.
    pub(super) fn write(&mut self, machine: &Machine, mark: Mark) {
        let (stamp, place) = self.expect(machine, mark);
        machine.store(mark.page, place, &self.body);
        machine.store(mark.page, 0, &stamp);
        machine.mark(mark.page);
    }

    /// Does the page hold the mark? If not, describes its content.
    pub(super) fn compare(&mut self, machine: &Machine, mark: Mark) -> Result<(), String> {
        let (stamp, place) = self.expect(machine, mark);
        let mut found = [0; STAMP_BYTES];
        machine.load(mark.page, 0, &mut found);
        if found != stamp {
            return Err(format!(
                "{}: {}, expected sequence {}",
                machine.place(mark.page),
                self.describe(found),
                mark.sequence
            ));
        }
        machine.load(mark.page, place, &mut self.found);
        if self.found != self.body {
            let Mark { sequence, .. } = mark;
            return Err(format!(
                "{}: the stamp is that of sequence {sequence}, the bytes are not",
                machine.place(mark.page)
            ));
        }
        Ok(())
    }

    /// The stamp, and the place of the body, whose bytes are stored in `self.body`.
    fn expect(&mut self, machine: &Machine, mark: Mark) -> ([u8; STAMP_BYTES], usize) {
        let mut random = self.random(mark);
        let check = random.u64(..);
        let room = machine.page_bytes() - STAMP_BYTES - self.body.len();
        let place = STAMP_BYTES + random.usize(..room + 1);
        random.fill(&mut self.body);
        let mut stamp = [0; STAMP_BYTES];
        stamp[..4].copy_from_slice(&mark.page.to_le_bytes());
        stamp[4..8].copy_from_slice(&mark.sequence.to_le_bytes());
        stamp[8..].copy_from_slice(&check.to_le_bytes());
        (stamp, place)
    }

    /// Describes a stamp, if the bytes are one.
    fn describe(&self, stamp: [u8; STAMP_BYTES]) -> String {
        let [page, sequence, low, high] =
            [0, 4, 8, 12].map(|at| u32::from_le_bytes([stamp[at], stamp[at + 1], stamp[at + 2], stamp[at + 3]]));
        let check = u64::from(high) << 32 | u64::from(low);
        if self.random(Mark { page, sequence }).u64(..) == check {
            format!("holds sequence {sequence} of page {page}")
        } else {
            "holds no stamp".into()
        }
    }

    fn random(&self, mark: Mark) -> Rng {
        generator(self.seed, u64::from(mark.page) << 32 | u64::from(mark.sequence))
    }
}
