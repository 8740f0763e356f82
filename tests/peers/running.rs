//! Running guests: the same memory, written in the same way, moved while it is written.

use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::boot::{self, Pace};
use crate::end::{Compress, How};
use crate::moved::Moved;
use crate::options::Options;
use crate::qemu::{self, Qemu, Tuning};
use crate::table::{self, figure, mebibytes, milliseconds};
use crate::{Fallible, ends, image};

/// The size of the XBZRLE caches of both programs: it holds all pages that are written.
pub(crate) const CACHE_BYTES: u64 = 128 << 20;

const MEMORY_PAGES: u32 = 128 << 8;
const FIRST_PAGE: u32 = 1 << 8;
const PAGES: u32 = 100 << 8;
const MAX_BANDWIDTH: u64 = 55 << 20;
const DOWNTIME_LIMIT: Duration = Duration::from_millis(300);
/// The approximate downtime of QEMU with deltas, whatever its limit.
const TIGHT_LIMIT: Duration = Duration::from_millis(2);
/// A migration that has not ended after this time is taken never to end.
const DEADLINE: Duration = Duration::from_secs(20);
/// How long the guest writes before it is moved.
pub(crate) const WARM_UP: Duration = Duration::from_millis(1500);
/// The time limit for QEMU's guest to boot.
const PATIENCE: Duration = Duration::from_secs(20);

/// Pages per second: one dirty rate below the bandwidth, and one about twice the bandwidth.
const PACES: [(&str, u32); 2] = [("slow", 2_500), ("hot", 25_000)];

/// The contestant, its compressor, with deltas or without, and its downtime limit.
const MOVERS: [(&str, Compress, bool, Duration); 10] = [
    ("QEMU", Compress::None, false, DOWNTIME_LIMIT),
    ("QEMU", Compress::None, true, DOWNTIME_LIMIT),
    ("memferry", Compress::None, false, DOWNTIME_LIMIT),
    ("memferry", Compress::Lz4, false, DOWNTIME_LIMIT),
    ("memferry", Compress::None, true, DOWNTIME_LIMIT),
    ("memferry", Compress::Lz4, true, DOWNTIME_LIMIT),
    ("QEMU", Compress::None, true, TIGHT_LIMIT),
    ("memferry", Compress::Lz4, false, TIGHT_LIMIT),
    ("memferry", Compress::None, true, TIGHT_LIMIT),
    ("memferry", Compress::Lz4, true, TIGHT_LIMIT),
];

/// Runs and prints all comparisons that the options select. Returns how many migrations failed.
pub(crate) fn compare(options: &Options) -> Fallible<usize> {
    let (mut rows, mut failures) = (Vec::new(), 0);
    // A test has no time for the migration that never ends.
    let paces = if options.is_test { &PACES[..1] } else { &PACES[..] };
    for &(pace_name, pages_per_second) in paces {
        let pace = Pace { memory_pages: MEMORY_PAGES, first_page: FIRST_PAGE, pages: PAGES, pages_per_second };
        for (mover, compress, xbzrle, limit) in MOVERS {
            let compressed = if compress == Compress::None { "" } else { ", lz4" };
            let delta = if xbzrle { ", xbzrle" } else { "" };
            let limited = format!("limit {} ms", limit.as_millis());
            let name = format!("{pace_name}, {pages_per_second} pages/s, {limited}: {mover}{compressed}{delta}");
            if !options.wants(&format!("running, {name}")) {
                continue;
            }
            let moved = match mover {
                "QEMU" => move_qemu(pace, xbzrle, limit),
                _ => move_memferry(pace, compress, xbzrle, limit),
            };
            match moved {
                Ok(moved) => {
                    eprintln!("{name}: {} ms", milliseconds(moved.clock));
                    rows.push(line(name, &moved));
                }
                Err(error) => {
                    failures += 1;
                    eprintln!("{name}: {error}");
                }
            }
        }
    }
    if !rows.is_empty() {
        println!("### Running guests\n\n{}\n", legend());
        table::print(&["", "ended", "rounds", "MiB sent", "ms", "downtime, ms", "pages written a second"], &rows);
    }
    Ok(failures)
}

fn legend() -> String {
    format!(
        "One byte in each page of 100 MiB (of 128 MiB), page after page at a set pace, over TCP at no more than {} MiB/s, with a \
         limit of the downtime. What has not ended after {} s is cancelled. QEMU's guest is a boot sector under its \
         emulator, memferry's its workload, which writes 17 bytes a page; memferry on 2 lanes, and may hold its guest back (from 30 % on, in steps of 20 %, after two rounds without progress). XBZRLE caches hold {} MiB. \
         Downtime is what the source reports: QEMU's ends when all is sent, memferry's when the destination says that the guest runs. The last column is the pace that the guest kept while it was moved.",
        MAX_BANDWIDTH >> 20,
        DEADLINE.as_secs(),
        CACHE_BYTES >> 20,
    )
}

fn line(name: String, moved: &Moved) -> Vec<String> {
    let running = moved.total.saturating_sub(moved.downtime);
    vec![
        name,
        if moved.completed { "yes" } else { "never" }.into(),
        moved.rounds.to_string(),
        mebibytes(moved.wire_bytes),
        milliseconds(moved.total),
        if moved.completed { milliseconds(moved.downtime) } else { "-".into() },
        figure(moved.written as f64 / running.as_secs_f64()),
    ]
}

fn move_memferry(pace: Pace, compress: Compress, xbzrle: bool, downtime_limit: Duration) -> Fallible<Moved> {
    let how = How {
        compress,
        throttles: true,
        xbzrle: xbzrle.then_some(CACHE_BYTES),
        max_bandwidth: Some(MAX_BANDWIDTH),
        downtime_limit,
        deadline: Some(DEADLINE),
        ..How::fast(2)
    };
    ends::move_workload(pace, "tcp:127.0.0.1:0", how)
}

fn move_qemu(pace: Pace, xbzrle: bool, downtime_limit: Duration) -> Fallible<Moved> {
    let folder = image::folder()?;
    let tuning = Tuning {
        max_bandwidth: MAX_BANDWIDTH,
        downtime_limit,
        deadline: DEADLINE,
        ..Tuning::fast(xbzrle.then_some("xbzrle"), 1)
    };
    let mut source = boot(folder.path(), "source", pace, &[])?;
    let mut destination = boot(folder.path(), "destination", pace, &["-incoming", "defer"])?;
    let began = Instant::now();
    while written(&mut source)? == 0 {
        if began.elapsed() > PATIENCE {
            return Err("QEMU's guest does not boot".into());
        }
        sleep(Duration::from_millis(20));
    }
    sleep(WARM_UP);
    let before = written(&mut source)?;
    let moved = qemu::migrate(&mut source, &mut destination, "tcp:127.0.0.1:0", &tuning)?;
    let after = written(&mut source)?;
    if moved.completed {
        check(&mut destination, folder.path(), pace)?;
    }
    Ok(Moved { written: u64::from(after.wrapping_sub(before)), ..moved })
}

/// A machine that boots the sector from a floppy disk.
fn boot(folder: &Path, name: &str, pace: Pace, arguments: &[&str]) -> Fallible<Qemu> {
    let floppy = folder.join("floppy");
    let mut disk = boot::sector(&pace);
    disk.resize(boot::FLOPPY_BYTES, 0);
    fs::write(&floppy, disk)?;
    let megabytes = format!("{}M", pace.memory_pages >> 8);
    let memory = format!("memory-backend-ram,id=ram,size={megabytes}");
    let drive = format!("file={},format=raw,if=floppy,readonly=on", floppy.display());
    let machine =
        ["-machine", "pc,memory-backend=ram", "-m", &megabytes, "-object", &memory, "-drive", &drive, "-boot", "a"];
    Qemu::start(folder, name, &[&machine[..], arguments].concat())
}

/// How many pages the guest has written.
fn written(qemu: &mut Qemu) -> Fallible<u32> {
    let line = format!("xp /1wx {:#x}", boot::COUNTER);
    let answer = qemu.execute("human-monitor-command", json!({ "command-line": line }))?;
    let text = answer.as_str().unwrap_or_default();
    let digits = text.trim().rsplit_once("0x").map_or("", |(_, digits)| digits);
    Ok(u32::from_str_radix(digits, 16).map_err(|_| format!("QEMU shows no word but {text:?}"))?)
}

/// The guest continues to write at its destination, and its pages are those of a guest that has written them in
/// order: going round, the byte decreases by one at one place at most.
fn check(destination: &mut Qemu, folder: &Path, pace: Pace) -> Fallible<()> {
    let before = written(destination)?;
    sleep(Duration::from_millis(200));
    if written(destination)? == before {
        return Err("QEMU's guest does not run at the destination".into());
    }
    destination.execute("stop", json!({}))?;
    let file = folder.join("memory");
    let bytes = u64::from(pace.memory_pages) * 4096;
    destination.execute("pmemsave", json!({ "val": 0, "size": bytes, "filename": file }))?;
    let memory = fs::read(&file)?;
    let first = |page: u32| memory[page as usize * 4096];
    let pages: Vec<u8> = (pace.first_page..pace.first_page + pace.pages).map(first).collect();
    let edges: Vec<_> = pages.windows(2).filter(|pair| pair[0] != pair[1]).collect();
    match edges.as_slice() {
        [] => Ok(()),
        [pair] if pair[0] == pair[1].wrapping_add(1) => Ok(()),
        edges => Err(format!("QEMU's guest has {} places where pages differ", edges.len()).into()),
    }
}
