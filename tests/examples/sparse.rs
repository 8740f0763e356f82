//! The cost of moving a large, mostly unwritten guest: two programs, a Unix socket, and the memory of each as the
//! kernel reports it.
//!
//! ```text
//! cargo run --release -p memferry-tests --example sparse [-- GIBIBYTES [PAGES]]
//! ```

use std::io::Read;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use memferry::events::{Ended, Event, Outcome};
use memferry::settings::{EncoderSettings, SourceSettings};
use memferry_stages::dirty_log::UserfaultLog;
use memferry_tests::run::{self, Running, destination_settings};
use memferry_tests::sparse::{Backing, Held, LogKind, SparseGuest, forget_peak};
use memferry_tests::{Recorder, source_settings};
use memferry_transports::Transport;
use memferry_transports::unix::UnixTransport;
use tokio_util::sync::CancellationToken;

/// 13.1 MiB of 64 GiB.
const SHARE: f64 = 0.0002;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [end, backing, log, length, pages, socket] = &arguments[..] {
        let parse = |figure: &String| figure.parse().expect("a figure");
        return one_end(end, backing, log, parse(length), parse(pages), socket);
    }
    let figure =
        |at: usize, default: u64| arguments.get(at).map_or(default, |figure| figure.parse().expect("a figure"));
    let (length, pages) = (figure(0, 64) << 30, figure(1, 1024));
    println!(
        "{} GiB of which {pages} single pages were written; {:.4} % of it are {:.1} MiB. KiB held before, at the end, and at most:",
        length >> 30,
        SHARE * 100.0,
        length as f64 * SHARE / f64::from(1 << 20)
    );
    println!(
        "{:33} {:>24} {:>17} {:>24} {:>8} {:>8} {:>6}",
        "", "resident", "page tables", "private", "bound", "peak", "s"
    );
    for backing in ["anonymous", "memfd"] {
        for log in ["software", "userfault"] {
            if log == "userfault"
                && let Err(why) = UserfaultLog::supported()
            {
                println!("skipped: {why}");
                continue;
            }
            both_ends(backing, log, length, pages);
        }
    }
}

fn both_ends(backing: &str, log: &str, length: u64, pages: u64) {
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("socket");
    let program = std::env::current_exe().expect("this program");
    let start = |end: &str| {
        let arguments = [end, backing, log, &length.to_string(), &pages.to_string()];
        let command = Command::new(&program).args(arguments).arg(&socket).stdout(Stdio::piped()).spawn();
        command.expect("it starts again")
    };
    let ends = [start("destination"), start("source")];
    for mut end in ends {
        let mut said = String::new();
        end.stdout.take().expect("piped").read_to_string(&mut said).expect("its figures");
        assert!(end.wait().expect("it ends").success(), "an end has failed");
        print!("{said}");
    }
}

fn one_end(end: &str, backing: &str, log: &str, length: u64, pages: u64, socket: &str) {
    let backing = if backing == "memfd" { Backing::Memfd } else { Backing::Anonymous };
    let log = if log == "userfault" { LogKind::Userfault } else { LogKind::Software };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("threads");
    let is_source = end == "source";
    let guest = Arc::new(if is_source {
        SparseGuest::source(backing, log, length, pages)
    } else {
        SparseGuest::destination(backing, log)
    });
    forget_peak();
    let before = Held::here().unwrap_or_default();
    let recorder = Arc::new(Recorder::default());
    let ended = runtime.block_on(run(guest.clone(), is_source, socket, recorder.clone()));
    let after = Held::here().unwrap_or_default();
    assert_eq!(ended.outcome, Outcome::Completed, "{end}: {:?}", ended.error);
    assert_eq!(ended.verified, Some(true), "{end}");
    let bound = recorder.events().iter().find_map(|(_, event)| match event {
        Event::Guest { memory_bound, .. } => Some(*memory_bound),
        _ => None,
    });
    println!(
        "{end:11} {backing:9?} {log:9?}  {:>7} {:>7} {:>7}  {:>7} {:>7}  {:>7} {:>7}  {:>8} {:>8} {:>6.2}",
        before.resident,
        after.resident,
        after.peak,
        before.tables,
        after.tables,
        before.anonymous,
        after.anonymous,
        bound.unwrap_or_default() >> 10,
        ended.memory_peak >> 10,
        ended.total.as_secs_f64(),
    );
}

fn run(guest: Arc<SparseGuest>, is_source: bool, socket: &str, recorder: Arc<Recorder>) -> Running<Ended> {
    let transport = UnixTransport::new(socket, Duration::from_secs(10));
    let cancel = CancellationToken::new();
    if is_source {
        let encoder = EncoderSettings { compress: None, xbzrle: None };
        let settings = SourceSettings { encoder, ..source_settings(2, 2) };
        return run::source(guest, Arc::new(transport), settings, recorder, cancel);
    }
    Box::pin(async move {
        let listener = transport.listen().await.expect("a socket");
        run::destination(guest, listener, destination_settings(), recorder, cancel).await
    })
}
