//! Threads that never stop writing, against a scanner and a lane that are threads too.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;

use super::mirror::{Mirror, Scanner, Taken};
use super::{Breach, Case, Order, Subject, any_page, offset};

const CASE: Case = Case::Race;
const WRITERS: u64 = 3;
const ROUNDS: u64 = 4;
const LENGTH: Duration = Duration::from_millis(100);

pub(super) fn race(make: &dyn Fn() -> Subject, order: Order) -> Result<(), Breach> {
    let subject = make();
    for seed in 0..ROUNDS {
        let mut mirror = migrate(&subject, order, seed).map_err(Breach::failed(CASE))?;
        let outcome = mirror.compare(CASE, &subject.memory);
        outcome.map_err(|breach| Breach::new(CASE, format_args!("{} (seed {seed})", breach.what)))?;
    }
    Ok(())
}

/// Migrates while the writers write; they are paused before the last sync, and the lane works on.
fn migrate(subject: &Subject, order: Order, seed: u64) -> io::Result<Mirror> {
    let scanner = Scanner::start(subject, order)?;
    let paused = AtomicBool::new(false);
    thread::scope(|scope| {
        let paused = &paused;
        let write = move |writer| write_until(paused, subject, Rng::with_seed(seed << 8 | writer));
        let writers: Vec<_> = (0..WRITERS).map(|writer| scope.spawn(move || write(writer))).collect();
        let until = Instant::now() + LENGTH;
        let mut result = Ok(Mirror::new(scanner.layout()));
        while result.is_ok() && Instant::now() < until {
            result = result.and_then(|mirror| scan(&scanner, mirror, 5));
        }
        paused.store(true, Ordering::Release);
        writers.into_iter().for_each(|writer| writer.join().expect("a writer does not panic"));
        let mirror = result.and_then(|mirror| scan(&scanner, mirror, 1));
        scanner.stop().and(mirror)
    })
}

/// A scan, and some syncs with a scan after each. The lane works beside them and is waited for at the end only.
fn scan(scanner: &Scanner, mirror: Mirror, syncs: u32) -> io::Result<Mirror> {
    let (to_lane, from_scanner) = sync_channel(4);
    thread::scope(|scope| {
        let lane = scope.spawn(move || lane(scanner, mirror, &from_scanner));
        let scanned = (0..=syncs).try_for_each(|sync| {
            if sync > 0 {
                scanner.sync()?;
            }
            scan_into(scanner, &to_lane)
        });
        drop(to_lane);
        let mirror = lane.join().expect("the lane does not panic");
        scanned.and(mirror)
    })
}

fn scan_into(scanner: &Scanner, to_lane: &SyncSender<Taken>) -> io::Result<()> {
    for at in scanner.dirty.extents() {
        if let Some(taken) = scanner.take(at)? {
            to_lane.send(taken).map_err(|_| io::Error::other("the lane has failed"))?;
        }
    }
    Ok(())
}

fn lane(scanner: &Scanner, mut mirror: Mirror, taken: &Receiver<Taken>) -> io::Result<Mirror> {
    for taken in taken {
        let copy = scanner.read(taken)?;
        scanner.report(&copy)?;
        mirror.load(&copy);
    }
    Ok(mirror)
}

/// Writes words anywhere and over and over into a few hot pages, clears pages, and releases some.
fn write_until(paused: &AtomicBool, subject: &Subject, mut random: Rng) {
    let layout = subject.memory.layout();
    let hot: Vec<_> = (0..4).map(|_| any_page(&mut random, layout)).collect();
    let zeros = vec![0; layout.page_size().bytes()];
    while !paused.load(Ordering::Acquire) {
        let choice = random.u64(..64);
        let at =
            if choice < 40 { hot[usize::try_from(choice % 4).expect("small")] } else { any_page(&mut random, layout) };
        let (start, bytes) = (offset(layout, at), layout.page_bytes(at));
        match choice {
            0 => drop(subject.writer.punch(at.block, at.page..at.page + 1)),
            1..5 => subject.writer.store(at.block, start, &zeros[..bytes]),
            _ => {
                let word = random.u64(..).to_ne_bytes();
                let word = &word[..bytes.min(8)];
                let within = random.u64(..(bytes - word.len()) as u64 + 1);
                subject.writer.store(at.block, start + usize::try_from(within).expect("small"), word);
            }
        }
    }
}
