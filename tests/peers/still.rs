//! Still guests: every contestant with every image over every socket.

use std::path::Path;
use std::time::{Duration, Instant};

use memferry_tests::warm_memory;

use crate::end::{Compress, How};
use crate::floor::Sockets;
use crate::image::{Content, Image};
use crate::moved::Moved;
use crate::options::Options;
use crate::table::{self, figure, mebibytes, median, milliseconds};
use crate::{Fallible, ends, image, program, qemu};

/// A contestant whose runs, with their setup, have taken this long gets no more runs.
const ENOUGH: Duration = Duration::from_secs(3);

/// Memory that a migration takes besides the image's: processes, buffers, sockets.
const WARM_BESIDE: u64 = 256 << 20;

/// A contestant.
#[derive(Clone, Copy, Debug)]
enum Mover {
    Qemu(qemu::Tuning),
    Library { how: How },
    Program { lanes: u16 },
    Bare { sockets: Sockets },
}

#[derive(Clone, Debug)]
struct Contestant {
    name: &'static str,
    mover: Mover,
    compresses: bool,
}

/// A contestant with the medians of its runs.
struct Row {
    contestant: Contestant,
    runs: usize,
    moved: Moved,
}

/// Runs and prints all comparisons that the options select. Returns how many migrations failed.
pub(crate) fn compare(options: &Options) -> Fallible<usize> {
    println!("### Still guests of {} MiB\n", options.size >> 20);
    println!("{LEGEND}\n");
    let folder = image::folder()?;
    let has = qemu::capabilities(folder.path())?;
    let (mut failures, mut short) = (0, Vec::new());
    for content in Content::ALL {
        let asked = |&socket: &&'static str| (socket, contestants(options, &has, content, socket));
        let asked: Vec<_> = sockets(content).iter().map(asked).filter(|(_, movers)| !movers.is_empty()).collect();
        if asked.is_empty() {
            continue;
        }
        eprintln!("making an image: {}", content.name());
        let image = Image::create(folder.path(), content, options.size)?;
        for (socket, contestants) in asked {
            let rows = run_all(options, &image, folder.path(), socket, &contestants, &mut failures);
            print_rows(&image, socket, &rows);
            short.extend(in_short(&image, socket, &rows));
        }
    }
    if !short.is_empty() {
        println!("#### In short: the fastest rows that compress nothing\n");
        table::print(&SHORT_HEADS, &short);
    }
    if let Err(why) = program::find() {
        println!("skipped: `memferry send` and `recv`: {why}\n");
    }
    Ok(failures)
}

const SHORT_HEADS: [&str; 11] = [
    "",
    "GB/s: bare socket",
    "QEMU",
    "memferry",
    "×",
    "processor, µs a page: bare socket's least",
    "QEMU's least",
    "memferry",
    "×",
    "there, MiB: QEMU",
    "memferry",
];

const LEGEND: &str = "\
Medians. GB/s is guest memory by the time that the source itself reports; *clock* is that time by the bench's clock until both \
ends say that all is done. × compares with QEMU's best row of the same table that compresses as the row does: its speed, \
and the least processor time. Processor time is that of both ends added up, for each 4 KiB page of the guest, to the 10 ms of \
/proc/PID/stat; the program's is that of the whole process with its start. Peak is VmHWM, which counts the pages of the \
image that the process has touched; *there* is the private memory that the guest takes up at the destination when it is done \
(for the program: what its file takes up). memferry: one connection a lane, checksums on, digests off where not said. \
QEMU asks for huge pages for all memory, and so do the bare sockets; memferry for what comes dense. A bare socket writes the image and \
reads it into its place, and nothing else: what the kernel alone takes; with small buffers 256 KiB are asked for to send, as memferry does within a host. Before each run as much memory as it takes is touched and \
given back, so that no one pays for what the host of a virtual machine has taken away meanwhile.";

/// All images travel over TCP. Those for which the sockets dominate the cost travel over Unix sockets, too.
fn sockets(content: Content) -> &'static [&'static str] {
    match content {
        Content::Incompressible | Content::Sparse | Content::Untouched => &["tcp", "unix"],
        Content::Text | Content::Halves | Content::MostlyZero => &["tcp"],
    }
}

fn contestants(options: &Options, has: &[String], content: Content, socket: &str) -> Vec<Contestant> {
    let is_wanted = |name: &str| options.wants(&format!("{socket}, {}: {name}", content.name()));
    let mut all = floors(content, socket);
    all.extend(qemus(has, content));
    all.extend(memferries(content, socket));
    all.retain(|contestant| is_wanted(contestant.name));
    all
}

/// The kernel's part of the cost, if every byte travels.
fn floors(content: Content, socket: &str) -> Vec<Contestant> {
    let floor = |name, connections, send_buffer| {
        let sockets = Sockets { connections, send_buffer };
        Contestant { name, mover: Mover::Bare { sockets }, compresses: false }
    };
    let mut all = vec![
        floor("bare socket, 1 connection", 1, None),
        floor("bare socket, 2 connections", 2, None),
        floor("bare socket, 4 connections", 4, None),
    ];
    if socket == "tcp" {
        all.push(floor("bare socket, 2 connections, small buffers", 2, Some(256 << 10)));
        all.push(floor("bare socket, 4 connections, small buffers", 4, Some(256 << 10)));
    }
    all.retain(|_| content == Content::Incompressible);
    all
}

fn qemus(has: &[String], content: Content) -> Vec<Contestant> {
    let all = [
        ("QEMU", None, 1),
        ("QEMU, multifd, 2 channels", Some("multifd"), 2),
        ("QEMU, multifd, 4 channels", Some("multifd"), 4),
        ("QEMU, xbzrle", Some("xbzrle"), 1),
        ("QEMU, compress", Some("compress"), 1),
    ];
    let contestant = |(name, capability, channels): (&'static str, Option<&'static str>, u16)| Contestant {
        name,
        mover: Mover::Qemu(qemu::Tuning::fast(capability, channels)),
        compresses: capability == Some("compress"),
    };
    let is_there = |capability: Option<&str>| capability.is_none_or(|name| has.iter().any(|has| has == name));
    let offered = all.into_iter().filter(|&(_, capability, _)| is_there(capability)).map(contestant);
    offered.filter(|contestant| !contestant.compresses || content.compresses()).collect()
}

fn memferries(content: Content, socket: &str) -> Vec<Contestant> {
    let library =
        |name, how: How| Contestant { name, mover: Mover::Library { how }, compresses: how.compress != Compress::None };
    let mut all = vec![
        library("memferry, 1 lane", How::fast(1)),
        library("memferry, 2 lanes", How::fast(2)),
        library("memferry, 4 lanes", How::fast(4)),
    ];
    if socket == "tcp" && matches!(content, Content::Incompressible | Content::Sparse) {
        all.push(library("memferry, 2 lanes, digests", How { verify: true, ..How::fast(2) }));
    }
    if content.compresses() {
        all.push(library("memferry, 2 lanes, lz4", How { compress: Compress::Lz4, ..How::fast(2) }));
        all.push(library("memferry, 2 lanes, zstd", How { compress: Compress::Zstd, ..How::fast(2) }));
    }
    if program::find().is_ok() {
        let (name, mover) = ("memferry send and recv, 2 lanes", Mover::Program { lanes: 2 });
        all.push(Contestant { name, mover, compresses: false });
    }
    all
}

/// Runs the contestants in turn, so that other load on the machine affects all of them.
fn run_all(
    options: &Options,
    image: &Image,
    folder: &Path,
    socket: &str,
    contestants: &[Contestant],
    failures: &mut usize,
) -> Vec<Row> {
    let mut runs: Vec<(Vec<Moved>, Duration)> = vec![Default::default(); contestants.len()];
    for round in 0..options.runs {
        for (contestant, (runs, taken)) in contestants.iter().zip(&mut runs) {
            let has_failed = runs.len() < round;
            if has_failed || *taken > ENOUGH {
                continue;
            }
            let began = Instant::now();
            let result = run(image, folder, socket, contestant.mover);
            *taken += began.elapsed();
            let name = format!("{socket}, {}: {}", image.content().name(), contestant.name);
            match result {
                Ok(moved) => {
                    eprintln!("{name}: {} of {} ms", milliseconds(moved.clock), milliseconds(began.elapsed()));
                    runs.push(moved);
                }
                Err(error) => {
                    *failures += 1;
                    eprintln!("{name}: {error}");
                }
            }
        }
    }
    let runs = runs.into_iter().map(|(runs, _)| runs);
    let rows = contestants.iter().zip(runs).filter(|(_, runs)| !runs.is_empty());
    rows.map(|(contestant, runs)| Row { contestant: contestant.clone(), runs: runs.len(), moved: Moved::median(&runs) })
        .collect()
}

fn run(image: &Image, folder: &Path, socket: &str, mover: Mover) -> Fallible<Moved> {
    image.restore()?;
    warm_memory(usize::try_from(image.bytes() + WARM_BESIDE)?)?;
    let address = match socket {
        "tcp" => "tcp:127.0.0.1:0".to_owned(),
        _ => format!("unix:{}", folder.join("socket").display()),
    };
    match mover {
        Mover::Qemu(tuning) => qemu::move_image(image, folder, &address, &tuning),
        Mover::Library { how } => ends::move_image(image, &address, how),
        Mover::Bare { sockets } => ends::move_bare(image, &address, sockets),
        Mover::Program { lanes } => program::move_image(image, folder, &address, lanes),
    }
}

impl Moved {
    /// The median of each figure.
    fn median(runs: &[Self]) -> Self {
        let spent = |end: fn(&Self) -> crate::moved::Spent| crate::moved::Spent {
            cpu: median(runs.iter().map(|run| end(run).cpu)),
            peak: median(runs.iter().map(|run| end(run).peak)),
            grown: median(runs.iter().map(|run| end(run).grown)),
        };
        Self {
            completed: runs.iter().all(|run| run.completed),
            total: median(runs.iter().map(|run| run.total)),
            clock: median(runs.iter().map(|run| run.clock)),
            wire_bytes: median(runs.iter().map(|run| run.wire_bytes)),
            rounds: median(runs.iter().map(|run| run.rounds)),
            downtime: median(runs.iter().map(|run| run.downtime)),
            written: median(runs.iter().map(|run| run.written)),
            source: spent(|run| run.source),
            destination: spent(|run| run.destination),
            arrived: median(runs.iter().map(|run| run.arrived)),
        }
    }
}

impl Row {
    /// Gigabytes of guest memory per second.
    fn rate(&self, image: &Image) -> f64 {
        image.bytes() as f64 / self.moved.total.as_secs_f64() / 1e9
    }

    /// Microseconds of processor time per page, both ends added up.
    fn cost(&self, image: &Image) -> f64 {
        let cpu = self.moved.source.cpu + self.moved.destination.cpu;
        cpu.as_secs_f64() * 1e6 / (image.bytes() / 4096) as f64
    }

    fn is_qemu(&self) -> bool {
        matches!(self.contestant.mover, Mover::Qemu(_))
    }

    fn is_bare(&self) -> bool {
        matches!(self.contestant.mover, Mover::Bare { .. })
    }
}

/// The highest speed and the lowest cost of QEMU's rows with compression, or of those without.
fn marks(image: &Image, rows: &[Row], compresses: bool) -> Option<(f64, f64)> {
    best(image, rows.iter().filter(|row| row.is_qemu() && row.contestant.compresses == compresses))
}

fn best<'a>(image: &Image, rows: impl Iterator<Item = &'a Row> + Clone) -> Option<(f64, f64)> {
    let rate = rows.clone().map(|row| row.rate(image)).reduce(f64::max)?;
    Some((rate, rows.map(|row| row.cost(image)).reduce(f64::min)?))
}

fn print_rows(image: &Image, socket: &str, rows: &[Row]) {
    let allocated = mebibytes(image.allocated());
    println!("#### {}, over {socket} (the image takes up {allocated} MiB)\n", image.content().name());
    let heads = [
        "",
        "runs",
        "GB/s",
        "×",
        "ms",
        "clock",
        "wire MiB",
        "processor, µs a page",
        "×",
        "peak MiB: source",
        "destination",
        "there",
    ];
    let line = |row: &Row| {
        let (rate, cost, moved) = (row.rate(image), row.cost(image), &row.moved);
        let (times, share) = match marks(image, rows, row.contestant.compresses) {
            Some((mark_rate, mark_cost)) => (figure(rate / mark_rate), figure(cost / mark_cost)),
            None => ("-".into(), "-".into()),
        };
        vec![
            row.contestant.name.into(),
            row.runs.to_string(),
            figure(rate),
            times,
            milliseconds(moved.total),
            milliseconds(moved.clock),
            mebibytes(moved.wire_bytes),
            figure(cost),
            share,
            mebibytes(moved.source.peak),
            mebibytes(moved.destination.peak),
            mebibytes(moved.arrived),
        ]
    };
    table::print(&heads, &rows.iter().map(line).collect::<Vec<_>>());
}

/// The line of the last table: the library's fastest row beside QEMU's.
fn in_short(image: &Image, socket: &str, rows: &[Row]) -> Option<Vec<String>> {
    let (mark_rate, mark_cost) = marks(image, rows, false)?;
    let fastest = |of: fn(&Mover) -> bool| {
        let rows = rows.iter().filter(|row| of(&row.contestant.mover) && !row.contestant.compresses);
        rows.max_by(|a, b| a.rate(image).total_cmp(&b.rate(image)))
    };
    let theirs = fastest(|mover| matches!(mover, Mover::Qemu(_)))?;
    let ours = fastest(|mover| matches!(mover, Mover::Library { .. }))?;
    let (rate, cost) = (ours.rate(image), ours.cost(image));
    let floor = best(image, rows.iter().filter(|row| row.is_bare()));
    let (floor_rate, floor_cost) = floor.map_or(("-".into(), "-".into()), |(rate, cost)| (figure(rate), figure(cost)));
    Some(vec![
        format!("{}, {socket}", image.content().name()),
        floor_rate,
        figure(mark_rate),
        figure(rate),
        figure(rate / mark_rate),
        floor_cost,
        figure(mark_cost),
        figure(cost),
        figure(cost / mark_cost),
        mebibytes(theirs.moved.arrived),
        mebibytes(ours.moved.arrived),
    ])
}
