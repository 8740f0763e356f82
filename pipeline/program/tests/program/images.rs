//! Real files moved by two programs: they arrive unchanged, to the last byte and the last hole.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use crate::harness::{Ended, Scene, free_port, noise, sparse};
use crate::reports::Report;
use crate::skip::skipped;
use crate::writer::{COMMANDS, Writer, is_of_one_moment, number};

const IMAGES: [&str; 9] =
    ["program", "text", "process", "holes", "one-byte", "page-less-one", "page-and-one", "odd", "zeros"];
const HOLES: u64 = 64 << 20;

/// A folder with one image of each kind.
fn scene() -> Scene {
    let scene = Scene::new();
    scene.configure(&IMAGES);
    // Its first megabytes: the complete file, with its debug information, would only take longer.
    let mut program = fs::read(env!("CARGO_BIN_EXE_memferry")).unwrap();
    program.truncate((6 << 20) + 777);
    scene.write("from/program", program);
    scene.write("from/text", include_str!("../../../../Cargo.lock"));
    scene.write("from/process", process_memory(6 << 20));
    sparse(&scene.path("from/holes"), HOLES + 5, b"not a hole", &[0, 10 << 20, (40 << 20) - 3, HOLES - 5]);
    scene.write("from/one-byte", [7]);
    scene.write("from/page-less-one", noise(4095, 1));
    scene.write("from/page-and-one", noise(4097, 2));
    scene.write("from/odd", noise((10 << 20) + 123, 3));
    scene.write("from/zeros", vec![0; (1 << 20) + 1]);
    scene
}

/// The memory of this process.
fn process_memory(bytes: usize) -> Vec<u8> {
    let memory = fs::File::open("/proc/self/mem").unwrap();
    let mut kept = Vec::new();
    for line in fs::read_to_string("/proc/self/maps").unwrap().lines() {
        let (range, rest) = line.split_once(' ').unwrap();
        let (from, to) = range.split_once('-').unwrap();
        let [from, to] = [from, to].map(|address| u64::from_str_radix(address, 16).unwrap());
        let room = (bytes - kept.len()).min(usize::try_from(to - from).unwrap()).min(2 << 20);
        let mut piece = vec![0; room];
        if rest.starts_with('r') && memory.read_exact_at(&mut piece, from).is_ok() {
            kept.append(&mut piece);
        }
    }
    assert!(kept.len() > bytes / 2, "{} bytes of memory", kept.len());
    kept
}

fn blocks(file: &Path) -> u64 {
    fs::metadata(file).unwrap().blocks()
}

/// Every image arrived unchanged, sparse, accessible by its owner only, and nothing else arrived.
#[track_caller]
fn arrived(scene: &Scene, page: u64) {
    for image in IMAGES {
        let [from, to] = ["from", "to"].map(|folder| scene.path(&format!("{folder}/{image}")));
        let compared = std::process::Command::new("cmp").args([&from, &to]).output().unwrap();
        assert!(compared.status.success(), "{}", String::from_utf8_lossy(&compared.stdout));
        let [before, after] = [&from, &to].map(|file| fs::metadata(file).unwrap());
        assert_eq!(before.len(), after.len());
        assert_eq!(after.permissions().mode() & 0o777, 0o600, "{image}");
    }
    // 4 pieces, of which 2 span two pages each; the file system's overhead is less than a page each.
    assert!(blocks(&scene.path("to/holes")) <= 2 * 6 * page / 512, "{} blocks", blocks(&scene.path("to/holes")));
    assert_eq!(blocks(&scene.path("to/zeros")), 0, "zeros take no room");
    assert_eq!(scene.names("to").len(), IMAGES.len(), "{:?}", scene.names("to"));
}

/// Both programs succeeded, and their reports agree.
#[track_caller]
fn completed(scene: &Scene, source: Ended, destination: Ended) {
    source.expect(0).says(&["completed after", "bottleneck"]);
    destination.expect(0).says(&["completed after", ", verified"]);
    let [sent, received] = ["send.json", "recv.json"].map(|report| Report::read(&scene.path(report)));
    sent.is_of_a_whole_migration();
    for (report, role) in [(&sent, "send"), (&received, "recv")] {
        assert_eq!((report.text("role"), report.text("status")), (role, "completed"));
        assert_eq!(report.at("/guest"), sent.at("/guest"));
    }
    assert_eq!(received.verified(), Some(true));
    // A file cannot answer: its digests are compared when it is read.
    assert_eq!(sent.verified(), (!scene.path("stream").exists()).then_some(true));
    let ids = sent.at("/guest/blocks").as_array().unwrap().iter().map(|block| block["id"].as_str().unwrap());
    assert!(ids.eq(IMAGES));
    // The destination's receivers start after Hello and the blocks.
    let (out, taken, wire) = (sent.in_rounds("bytes_out"), received.number("wire_bytes"), sent.number("wire_bytes"));
    assert!(taken.abs_diff(wire) <= 64 << 10 && out <= wire, "{out} in rounds, {wire} sent, {taken} received");
}

/// Moves the images with the destination started first.
fn move_images(address: &str, page: u64, sets: &[&str]) {
    let scene = scene();
    let (destination, address) = scene.listening(&[&format!("transport.address={address}")]);
    let sets: Vec<_> = sets.iter().copied().chain([address.as_str()]).collect();
    let source = scene.start_with(&["send", "send.toml", "--report", "send.json"], &sets).end();
    completed(&scene, source, destination.end());
    arrived(&scene, page);
}

#[test]
fn tcp_with_one_lane() {
    move_images("tcp:127.0.0.1:0", 4096, &["pipeline.lanes=1"]);
}

#[test]
fn tcp_with_four_lanes_on_one_connection() {
    move_images("tcp:127.0.0.1:0", 4096, &["pipeline.lanes=4", "encoder.compress=zstd"]);
}

#[test]
fn tcp_with_four_lanes_on_four_connections() {
    if let Err(error) = std::net::TcpListener::bind("[::1]:0") {
        return skipped(format_args!("no IPv6 on this host ({error})"));
    }
    move_images("tcp:[::1]:0", 4096, &["pipeline.lanes=4", "pipeline.connections=4", "encoder.compress=none"]);
}

#[test]
fn unix_with_large_pages() {
    move_images(
        "unix:socket",
        65536,
        &["pipeline.lanes=2", "pipeline.connections=2", "guest.file.page_size=\"64 KiB\""],
    );
}

/// A source that waits for its destination, on both kinds of sockets.
#[test]
fn the_source_may_start_first() {
    for address in [format!("tcp:localhost:{}", free_port()), "unix:late".into()] {
        let scene = scene();
        let address = format!("transport.address={address}");
        let source = scene.start_with(&["send", "send.toml", "--report", "send.json"], &[&address]);
        std::thread::sleep(Duration::from_millis(150));
        let destination = scene.start_with(&["recv", "recv.toml", "--report", "recv.json"], &[&address]).end();
        completed(&scene, source.end(), destination);
        arrived(&scene, 4096);
        assert!(!scene.path("late").exists(), "the socket is removed at the end");
    }
}

#[test]
fn a_file_in_between() {
    let scene = scene();
    let sets = ["transport.address=file:stream", "migration.after=resume", "pipeline.lanes=3"];
    let source = scene.start_with(&["send", "send.toml", "--report", "send.json"], &sets).end();
    assert_eq!(fs::metadata(scene.path("stream")).unwrap().permissions().mode() & 0o777, 0o600);
    scene.run(&["inspect", "stream"]).expect(0).says(&["program", "page-and-one", "whole: the end mark is there"]);
    let (destination, _) = scene.listening(&[sets[0]]);
    completed(&scene, source, destination.end());
    arrived(&scene, 4096);
    // It can be read again; existing files are not replaced unless that is allowed.
    scene.start_with(&["recv", "recv.toml"], &[sets[0]]).end().expect(1).says(&["exists", "overwrite = true"]);
    scene.start_with(&["recv", "recv.toml"], &[sets[0], "guest.file.overwrite=true"]).end().expect(0);
    arrived(&scene, 4096);
}

#[test]
fn run_copies_images_beside_their_place() {
    let scene = Scene::new();
    scene.write("image", noise(300_001, 4));
    scene.write(
        "run.toml",
        "[guest.file]\nimages = [{ id = \"ram\", path = \"image\", copy = \"copy\" }]\n\
         [transport]\naddress = \"tcp:127.0.0.1:0\"\n",
    );
    scene.run(&["run", "run.toml", "--report", "run.json"]).expect(0);
    assert!(scene.read("image") == scene.read("copy"));
    let report = Report::read(&scene.path("run.json"));
    report.is_of_a_whole_migration();
    assert_eq!((report.text("role"), report.verified()), ("run", Some(true)));
}

/// An image that a process writes to continuously, until `pause` stops the process permanently.
#[test]
fn an_image_that_is_written_meanwhile_arrives_as_it_was_at_the_pause() {
    let scene = Scene::new();
    scene.configure(&["ram", "rest"]);
    scene.write("from/ram", noise(2 << 20, 5));
    scene.write("from/rest", noise(14 << 20, 6));
    let writer = Writer::begin(&scene, "from/ram", Duration::ZERO);
    let begun_at = number(&scene.path("from/ram"), 0);
    let (destination, address) = scene.listening(&[]);
    // A limit that a busy machine meets.
    let limits = ["migration.max_bandwidth=20 MiB/s", "migration.downtime_limit=20s"];
    let sets = [address.as_str(), COMMANDS[0], COMMANDS[1], limits[0], limits[1]];
    let source = scene.start_with(&["send", "send.toml", "--report", "send.json"], &sets).end();
    source.expect(0).says(&["verified"]);
    destination.end().expect(0);
    assert!(writer.is_stopped(), "its memory runs elsewhere");
    assert_eq!(String::from_utf8(scene.read("log")).unwrap(), "pause\n");
    assert!(number(&scene.path("from/ram"), 0) > begun_at, "it was written to meanwhile");
    for image in ["ram", "rest"] {
        assert!(scene.read(&format!("from/{image}")) == scene.read(&format!("to/{image}")), "{image} differs");
    }
    is_of_one_moment(&scene.path("to/ram"));
    let report = Report::read(&scene.path("send.json"));
    report.is_of_a_whole_migration();
    assert!(report.at("/rounds/0/dirty_after").as_u64().unwrap() > 0);
}

/// A snapshot to a file is of one moment, and the writer continues.
#[test]
fn a_snapshot_of_an_image_that_is_written_meanwhile_is_of_one_moment() {
    let scene = Scene::new();
    scene.configure(&["ram"]);
    scene.write("from/ram", noise(4 << 20, 7));
    let writer = Writer::begin(&scene, "from/ram", Duration::from_micros(20));
    let sets = [COMMANDS[0], COMMANDS[1], "transport.address=file:stream", "migration.after=resume"];
    let rounds = ["migration.max_rounds=3", "migration.on_deadline=switch-over"];
    scene.start_with(&["send", "send.toml"], &[&sets[..], &rounds].concat()).end().expect(0);
    assert_eq!(String::from_utf8(scene.read("log")).unwrap(), "pause\nresume\n");
    writer.continues(&scene.path("from/ram"));
    scene.start_with(&["recv", "recv.toml"], &[sets[2]]).end().expect(0).says(&["verified"]);
    is_of_one_moment(&scene.path("to/ram"));
}
