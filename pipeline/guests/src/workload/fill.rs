//! What the memory holds at the start.
//!
//! Pages are copied from material that is prepared once, not made byte by byte, and all cores copy: the first touch of
//! the memory is what takes the time. Zero pages are not touched at all.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use fastrand::Rng;
use memferry_stages::host::cores;
use tokio_util::sync::CancellationToken;

use super::machine::Machine;
use super::random::generator;
use super::settings::Fill;
use super::stamp::{Mark, Stamper};
use super::writer::Findings;
use crate::balloon::Ballooned;
use memferry::guest::GuestError;
use memferry_transports::whole_file;

/// Memory is dealt to the kinds of content by runs of so many bytes, or a page if that is larger.
const RUN_BYTES: usize = 64 << 10;
/// Bytes of each page of the shared block that are written besides its stamp.
const SHARED_BODY: usize = 64;
const TEXT_BYTES: usize = 4 << 20;
const RANDOM_BYTES: usize = 16 << 20;
/// The largest program of whose bytes memory is made.
const MOST_PROGRAM_BYTES: u64 = 4 << 30;

/// Fills the memory of a source, but what is unplugged of it.
pub(super) fn fill(machine: &Machine, cancel: &CancellationToken) -> Result<(), GuestError> {
    fill_shared(machine, cancel);
    let material = Material::prepare(machine)?;
    let filling = Filling { machine, material: &material, cancel, next: AtomicU32::new(0) };
    thread::scope(|scope| {
        for _ in 1..cores() {
            let helper = thread::Builder::new().spawn_scoped(scope, || filling.fill_runs());
            // Fewer threads take longer, and are no reason to fail.
            if helper.is_err() {
                break;
            }
        }
        filling.fill_runs();
    });
    if cancel.is_cancelled() {
        Err(GuestError("cancelled while the workload's memory was filled".into()))
    } else {
        Ok(())
    }
}

/// What stands in the shared block: a stamp in each page, which each end finds there.
fn fill_shared(machine: &Machine, cancel: &CancellationToken) {
    let mut stamper = Stamper::new(machine.settings().seed, SHARED_BODY);
    let pages = machine.shared().take_while(|_| !cancel.is_cancelled());
    pages.for_each(|page| stamper.write(machine, Mark { page, sequence: 1 }));
}

/// Compares the pages of the shared block with what a source puts there.
pub(super) fn check_shared(machine: &Machine, findings: &mut Findings) {
    let mut stamper = Stamper::new(machine.settings().seed, SHARED_BODY);
    machine.shared().for_each(|page| findings.add(stamper.compare(machine, Mark { page, sequence: 1 })));
}

/// Memory that is filled by several threads.
struct Filling<'a> {
    machine: &'a Machine,
    material: &'a Material,
    cancel: &'a CancellationToken,
    /// The next run.
    next: AtomicU32,
}

impl Filling<'_> {
    /// Fills runs, each as its number says, until none is left or it is cancelled.
    fn fill_runs(&self) {
        let machine = self.machine;
        let run_pages = u32::try_from((RUN_BYTES / machine.page_bytes()).max(1)).expect("small");
        while !self.cancel.is_cancelled() {
            let run = self.next.fetch_add(1, Ordering::Relaxed);
            let first = run.checked_mul(run_pages).filter(|&first| first < machine.unplugged().start);
            let Some(first) = first else { return };
            let mut random = generator(machine.settings().seed, u64::from(run));
            let source = self.material.choose(&machine.settings().fill, random.f64());
            for page in first..machine.unplugged().start.min(first + run_pages) {
                if let Some(bytes) = source.page(&mut random, page, machine.page_bytes()) {
                    machine.store(page, 0, bytes);
                    machine.mark(page);
                }
            }
        }
    }
}

/// Prepared content, as much as one kind of it needs; empty where there is no share of it.
#[derive(Debug)]
struct Material {
    text: Vec<u8>,
    random: Vec<u8>,
    process: Vec<u8>,
}

/// Where the pages of a run come from.
#[derive(Clone, Copy, Debug)]
enum Source<'a> {
    Nothing,
    /// Any place of the material.
    Anywhere(&'a [u8]),
    /// The page of the same number, as a file has its pages; from the start again where it ends.
    InOrder(&'a [u8]),
}

impl Material {
    fn prepare(machine: &Machine) -> Result<Self, GuestError> {
        let fill = machine.settings().fill;
        let mut random = generator(machine.settings().seed, u64::MAX);
        let mut noise = vec![0; if fill.random > 0.0 { RANDOM_BYTES } else { 0 }];
        random.fill(&mut noise);
        Ok(Self {
            text: if fill.text > 0.0 { text(&mut random) } else { Vec::new() },
            random: noise,
            process: if fill.process > 0.0 { own_binary(machine.page_bytes())? } else { Vec::new() },
        })
    }

    fn choose(&self, fill: &Fill, at: f64) -> Source<'_> {
        let kinds = [
            Source::Nothing,
            Source::Anywhere(&self.text),
            Source::Anywhere(&self.random),
            Source::InOrder(&self.process),
        ];
        let mut left = at;
        for (kind, share) in kinds.into_iter().zip(fill.shares()) {
            if left < share {
                return kind;
            }
            left -= share;
        }
        Source::Nothing
    }
}

impl<'a> Source<'a> {
    fn page(self, random: &mut Rng, page: u32, page_bytes: usize) -> Option<&'a [u8]> {
        match self {
            Self::Nothing => None,
            Self::Anywhere(material) => {
                let start = random.usize(..material.len() - page_bytes + 1);
                Some(&material[start..start + page_bytes])
            }
            Self::InOrder(material) => {
                material.chunks_exact(page_bytes).nth(page as usize % (material.len() / page_bytes))
            }
        }
    }
}

/// Lines of words, some far more frequent than others, and numbers.
fn text(random: &mut Rng) -> Vec<u8> {
    let mut letters =
        |from: usize| (0..from + random.usize(..8)).map(|_| b"etaoinshrdlucmfwypvbgk"[random.usize(..22)]).collect();
    let words: Vec<Vec<u8>> = (0..600).map(|_| letters(2)).collect();
    let mut text = Vec::with_capacity(TEXT_BYTES + 64);
    while text.len() < TEXT_BYTES {
        match random.u64(..12) {
            0 => text.push(b'\n'),
            1 => text.extend(format!("{} ", random.u64(..) >> 44).bytes()),
            _ => {
                let common = random.usize(..words.len()) + 1;
                text.extend(&words[random.usize(..common)]);
                text.push(b' ');
            }
        }
    }
    text
}

/// This program's binary: real bytes that every host has.
fn own_binary(page_bytes: usize) -> Result<Vec<u8>, GuestError> {
    let fail = |path: PathBuf, why: &dyn std::fmt::Display| {
        GuestError::caused(format_args!("cannot fill memory with this program's own bytes ({})", path.display()), why)
    };
    let path = PathBuf::from("/proc/self/exe");
    let bytes = whole_file::read(&path, MOST_PROGRAM_BYTES).map_err(|error| fail(path.clone(), &error))?;
    if bytes.len() < page_bytes { Err(fail(path, &"it is shorter than a page")) } else { Ok(bytes) }
}
