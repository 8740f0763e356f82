//! The cases with one thread and a fixed order.

use std::io;

use super::mirror::{Mirror, Scanner};
use super::{Breach, Order, Subject, all_pages, offset};
use crate::geometry::PageAt;

/// Nobody writes: a log may report a page that it was unsure of once or twice, but then it is quiet.
pub(super) fn quiet(make: &dyn Fn() -> Subject, order: Order) -> Result<(), Breach> {
    let case = "quiet";
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
    each_write_is_found("found", &subject, order, |at, byte| {
        subject.writer.store(at.block, byte, &[2]);
        true
    })
}

/// One byte is written in each page in turn behind the log's back, and marked.
pub(super) fn marked(make: &dyn Fn() -> Subject, order: Order) -> Result<(), Breach> {
    let subject = make();
    each_write_is_found("marked", &subject, order, |at, byte| {
        let stored = subject.writer.store_unseen(at.block, byte, &[2]);
        subject.logs.iter().filter(|_| stored).for_each(|log| log.mark(at.block, at.page..at.page + 1));
        stored
    })
}

/// Stopped after some rounds, written to, started again.
pub(super) fn restarted(make: &dyn Fn() -> Subject, order: Order) -> Result<(), Breach> {
    let case = "restarted";
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

/// Writes page by page with `write` (which says whether it could) at the page's first or last byte, and expects the next
/// sync to have the page.
fn each_write_is_found(
    case: &'static str,
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
