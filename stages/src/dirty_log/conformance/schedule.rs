//! Random orders of everything that may happen between guest, log, scanner and lane, one step after another.
//!
//! Pages hold one of three contents, one of them zero, so that A-B-A is frequent; only a few pages are written, so that
//! they meet. The lane's steps come late: batches wait to be read, and a read waits to be reported to the log. At the end
//! the guest is paused, pending steps finish before, during or after the last sync, and the copies must be equal.

use std::collections::VecDeque;
use std::io;

use fastrand::Rng;

use super::mirror::{Mirror, Scanner, Taken};
use super::{Breach, Case, Order, Subject, any_page, offset};
use crate::batch::CopiedBatch;
use crate::geometry::{ExtentAt, PageAt};

const CASE: Case = Case::Schedules;
const SCHEDULES: u64 = 1000;
const STEPS: u64 = 60;

pub(super) fn schedules(make: &dyn Fn() -> Subject, order: Order) -> Result<(), Breach> {
    let subject = make();
    for seed in 0..SCHEDULES {
        let mut schedule = Schedule::start(&subject, order, seed).map_err(Breach::failed(CASE))?;
        schedule.play().map_err(Breach::failed(CASE))?;
        let outcome = schedule.mirror.compare(CASE, &subject.memory);
        outcome.map_err(|breach| Breach::new(CASE, format_args!("{} (seed {seed})", breach.what)))?;
        schedule.scanner.stop().map_err(Breach::failed(CASE))?;
    }
    Ok(())
}

struct Schedule<'a> {
    subject: &'a Subject,
    scanner: Scanner,
    mirror: Mirror,
    random: Rng,
    /// The pages that are written.
    hot: Vec<PageAt>,
    extents: Vec<ExtentAt>,
    /// The extents that the scanner has still to pass in this round.
    ahead: usize,
    taken: VecDeque<Taken>,
    read: Option<CopiedBatch>,
}

impl<'a> Schedule<'a> {
    fn start(subject: &'a Subject, order: Order, seed: u64) -> io::Result<Self> {
        let scanner = Scanner::start(subject, order)?;
        let mut random = Rng::with_seed(seed);
        let hot = (0..2).map(|_| any_page(&mut random, scanner.layout())).collect();
        let extents: Vec<_> = scanner.dirty.extents().collect();
        let (mirror, ahead) = (Mirror::new(scanner.layout()), extents.len());
        Ok(Self { subject, scanner, mirror, random, hot, extents, ahead, taken: VecDeque::new(), read: None })
    }

    fn play(&mut self) -> io::Result<()> {
        for _ in 0..STEPS {
            match self.random.u64(..8) {
                0..2 => self.write(),
                2 => self.next_round()?,
                3..5 => self.take()?,
                5 => self.read()?,
                6 => self.report()?,
                _ => self.punch(),
            }
        }
        // The guest is paused from here on.
        while self.ahead > 0 {
            self.take()?;
        }
        if self.random.u64(..2) == 0 {
            self.drain()?;
        }
        self.scanner.sync()?;
        if self.random.u64(..2) == 0 {
            self.drain()?;
        }
        self.ahead = self.extents.len();
        while self.ahead > 0 {
            self.take()?;
        }
        self.drain()
    }

    fn hot(&mut self) -> PageAt {
        let at = self.random.u64(..self.hot.len() as u64);
        self.hot[usize::try_from(at).expect("small")]
    }

    /// One of three contents, identified by the first byte.
    fn write(&mut self) {
        let at = self.hot();
        let byte = u8::try_from(self.random.u64(..3)).expect("small");
        self.subject.writer.store(at.block, offset(self.scanner.layout(), at), &[byte]);
    }

    fn punch(&mut self) {
        let at = self.hot();
        self.subject.writer.punch(at.block, at.page..at.page + 1);
    }

    /// A sync, once the scanner is through.
    fn next_round(&mut self) -> io::Result<()> {
        if self.ahead > 0 {
            return Ok(());
        }
        self.ahead = self.extents.len();
        self.scanner.sync()
    }

    /// The scanner continues with the next dirty extent.
    fn take(&mut self) -> io::Result<()> {
        while self.ahead > 0 {
            self.ahead -= 1;
            if let Some(taken) = self.scanner.take(self.extents[self.ahead])? {
                self.taken.push_back(taken);
                break;
            }
        }
        Ok(())
    }

    /// The lane reads a batch: it has reported the one before.
    fn read(&mut self) -> io::Result<()> {
        self.report()?;
        if let Some(taken) = self.taken.pop_front() {
            self.read = Some(self.scanner.read(taken)?);
        }
        Ok(())
    }

    fn report(&mut self) -> io::Result<()> {
        if let Some(copy) = self.read.take() {
            self.scanner.report(&copy)?;
            self.mirror.load(&copy);
        }
        Ok(())
    }

    fn drain(&mut self) -> io::Result<()> {
        while !self.taken.is_empty() {
            self.read()?;
        }
        self.report()
    }
}
