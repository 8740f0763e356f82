//! The cases with one thread and a fixed order.

use std::io;

use super::mirror::{Mirror, Scanner};
use super::{Breach, Case, Order, Subject, all_pages, offset};
use crate::bitmap::DirtyBitmap;
use crate::geometry::PageAt;

/// No writes: a log may report an uncertain page once or twice, but is quiet then.
pub(super) fn quiet(make: &dyn Fn() -> Subject, order: Order) -> Result<(), Breach> {
    let case = Case::Quiet;
    let subject = make();
    fill(&subject, 1);
    let (scanner, mut mirror) = begin(&subject, order).map_err(Breach::failed(case))?;
    for _ in 0..3 {
        pass(&scanner, &mut mirror).map_err(Breach::failed(case))?;
    }
    scanner.sync().map_err(Breach::failed(case))?;
    match scanner.dirty.count() {
        0 => mirror.compare(case, &subject.memory),
        count => Err(Breach::new(case, format_args!("{count} pages are dirty that nobody wrote"))),
    }
}

/// One byte is written in each page in turn.
pub(super) fn found(make: &dyn Fn() -> Subject, order: Order) -> Result<(), Breach> {
    let subject = make();
    each_write_is_found(Case::Found, &subject, order, |at, byte| {
        subject.writer.store(at.block, byte, &[2]);
        true
    })
}

/// One byte is written in each page in turn, unseen by the log, and marked.
pub(super) fn marked(make: &dyn Fn() -> Subject, order: Order) -> Result<(), Breach> {
    let subject = make();
    each_write_is_found(Case::Marked, &subject, order, |at, byte| {
        let stored = subject.writer.store_unseen(at.block, byte, &[2]);
        subject.logs.iter().filter(|_| stored).for_each(|log| log.mark(at.block, at.page..at.page + 1));
        stored
    })
}

/// Stopped after some rounds, written to, started again.
pub(super) fn restarted(make: &dyn Fn() -> Subject, order: Order) -> Result<(), Breach> {
    let case = Case::Restarted;
    let subject = make();
    let (scanner, mut mirror) = begin(&subject, order).map_err(Breach::failed(case))?;
    pass(&scanner, &mut mirror).map_err(Breach::failed(case))?;
    fill(&subject, 3);
    scanner.sync().map_err(Breach::failed(case))?;
    scanner.stop().map_err(Breach::failed(case))?;
    fill(&subject, 4);
    each_write_is_found(case, &subject, order, |at, byte| {
        subject.writer.store(at.block, byte, &[5]);
        true
    })
}

/// Pages that a sync has found leave the bitmap unread, as with free-page hints: the log is armed for that first, and finds the
/// next write to each. Skipped for a log that does not see stores.
pub(super) fn unread(make: &dyn Fn() -> Subject, order: Order) -> Result<(), Breach> {
    let case = Case::Unread;
    let subject = make();
    if !subject.logs.iter().all(|log| log.sees_stores()) {
        return Ok(());
    }
    let scanner = Scanner::start(&subject, order).map_err(Breach::failed(case))?;
    let layout = subject.memory.layout();
    for round in 1..4 {
        // In the first round everything is dirty, and nothing was ever read.
        scanner.sync().map_err(Breach::failed(case))?;
        scanner.arm_unread(&scanner.dirty).map_err(Breach::failed(case))?;
        scanner.dirty.extents().for_each(|at| _ = scanner.dirty.take(at));
        let written = |at: &PageAt| !(at.page + round).is_multiple_of(3);
        // The same byte as before in some of them: it is the store that must be seen.
        all_pages(layout).filter(written).for_each(|at| subject.writer.store(at.block, offset(layout, at), &[1]));
        scanner.sync().map_err(Breach::failed(case))?;
        if let Some(lost) = all_pages(layout).filter(written).find(|&at| !scanner.dirty.is_set(at)) {
            return Err(Breach::new(
                case,
                format_args!("{lost} left the bitmap unread, was written, and was not found"),
            ));
        }
    }
    scanner.stop().map_err(Breach::failed(case))
}

/// Excluded pages are neither reported nor read, and the others are found.
pub(super) fn left_out(make: &dyn Fn() -> Subject, order: Order) -> Result<(), Breach> {
    let case = Case::LeftOut;
    let subject = make();
    let scanner = Scanner::start(&subject, order).map_err(Breach::failed(case))?;
    let (layout, out) = (subject.memory.layout(), DirtyBitmap::empty(subject.memory.layout()));
    all_pages(layout).filter(|at| at.page % 5 < 2).for_each(|at| _ = out.set(at));
    scanner.logs.iter().try_for_each(|log| log.leave_out(&out)).map_err(Breach::failed(case))?;
    out.extents().for_each(|at| _ = scanner.dirty.take_mask(at, out.peek(at)));
    let mut mirror = Mirror::new(layout);
    scanner.send_all(&mut mirror).map_err(Breach::failed(case))?;
    for at in all_pages(layout).filter(|&at| !out.is_set(at)) {
        subject.writer.store(at.block, offset(layout, at), &[3]);
    }
    for _ in 0..2 {
        scanner.sync().map_err(Breach::failed(case))?;
        if let Some(reported) = all_pages(layout).find(|&at| out.is_set(at) && scanner.dirty.is_set(at)) {
            return Err(Breach::new(case, format_args!("{reported} is left out, and was reported")));
        }
        scanner.send_all(&mut mirror).map_err(Breach::failed(case))?;
    }
    // Excluded pages have no writer: they are still zero, and were never sent.
    all_pages(layout).filter(|&at| out.is_set(at)).for_each(|at| mirror.clear(at));
    mirror.compare(case, &subject.memory)?;
    scanner.stop().map_err(Breach::failed(case))
}

/// Writes page by page with `write` (which returns whether it could) at the page's first or last byte, and expects the next
/// sync to have the page.
fn each_write_is_found(
    case: Case,
    subject: &Subject,
    order: Order,
    write: impl Fn(PageAt, usize) -> bool,
) -> Result<(), Breach> {
    let (scanner, mut mirror) = begin(subject, order).map_err(Breach::failed(case))?;
    let layout = subject.memory.layout();
    for at in all_pages(layout) {
        let last = layout.page_bytes(at) - 1;
        if !write(at, offset(layout, at) + if at.page % 2 == 0 { 0 } else { last }) {
            return Ok(());
        }
        scanner.sync().map_err(Breach::failed(case))?;
        if !scanner.dirty.is_set(at) {
            return Err(Breach::new(case, format_args!("{at} was written and the next sync did not find it")));
        }
        scanner.send_all(&mut mirror).map_err(Breach::failed(case))?;
    }
    mirror.compare(case, &subject.memory)?;
    scanner.stop().map_err(Breach::failed(case))
}

/// Starts the logs and sends everything once.
fn begin(subject: &Subject, order: Order) -> io::Result<(Scanner, Mirror)> {
    let scanner = Scanner::start(subject, order)?;
    let mut mirror = Mirror::new(scanner.layout());
    scanner.send_all(&mut mirror)?;
    Ok((scanner, mirror))
}

fn pass(scanner: &Scanner, mirror: &mut Mirror) -> io::Result<()> {
    scanner.sync()?;
    scanner.send_all(mirror)
}

/// Writes something into two pages of three.
fn fill(subject: &Subject, byte: u8) {
    let layout = subject.memory.layout();
    for at in all_pages(layout).filter(|at| at.page % 3 != 0) {
        subject.writer.store(at.block, offset(layout, at), &[byte]);
    }
}
