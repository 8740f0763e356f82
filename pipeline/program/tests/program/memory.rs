//! The memory bound holds for the process.

use rustix::process::Signal;

use crate::harness::{Scene, until};

const MIB: u64 = 1 << 20;
const GUEST: u64 = 48 * MIB;

/// All of its pages are touched, at both ends.
const CONFIG: &str = "\
[guest.workload]
memory = \"48 MiB\"
fill = { random = 0.5, process = 0.5 }
[[guest.workload.writers]]
pattern = \"uniform\"
pages_per_second = 4000
bytes = \"64 B\"
[transport]
address = \"tcp:127.0.0.1:0\"
[migration]
max_rounds = 5
on_deadline = \"switch-over\"
";

/// Settings under which memory is used for different things: buffers, compressors, a cache, digests, large pages.
const CASES: [&[&str]; 6] = [
    &["encoder.compress=none", "encoder.delta=none", "pipeline.lanes=1", "migration.verify=false"],
    &["encoder.xbzrle_cache=32 MiB", "pipeline.lanes=2", "pipeline.connections=2"],
    &["encoder.xbzrle_cache=4 MiB", "encoder.on_miss=compress", "encoder.compress=zstd", "pipeline.lanes=4"],
    &["encoder.delta=none", "encoder.compress=snap", "pipeline.lanes=8", "pipeline.connections=8"],
    &[
        "guest.workload.page_size=64 KiB",
        "encoder.xbzrle_cache=16 MiB",
        "pipeline.lanes=4",
        "guest.workload.writers.0.bytes=4 KiB",
    ],
    &["guest.workload.dirty_log=hash", "encoder.xbzrle_cache=8 MiB", "pipeline.checksum=false"],
];

/// No room for guest state, which these guests do not have.
const LITTLE_STATE: &str = "migration.max_state=64 KiB";

/// Asserts that the memory besides the guests' is within the reported bound.
#[track_caller]
fn check(scene: &Scene, report: &str, taken: u64, sets: &[&str]) {
    let report: serde_json::Value = serde_json::from_slice(&scene.read(report)).unwrap();
    let [bound, peak] = ["memory_bound_bytes", "memory_peak_bytes"].map(|key| report[key].as_u64().unwrap());
    println!("{sets:?}: {taken} taken, {peak} counted, {bound} allowed");
    assert!(taken <= bound && peak <= bound, "{sets:?}: {taken} taken, {peak} counted, {bound} allowed");
}

/// The peak of resident memory since the migration began, less the memory of both guests. The fill of the first guest
/// uses memory of its own, which is not the migration's.
#[test]
fn a_process_takes_no_more_than_the_bound_beside_its_guests() {
    for sets in CASES {
        let scene = Scene::new();
        scene.write("guest.toml", CONFIG);
        let run = ["run", "guest.toml", "--report", "run.html", "--report", "run.json", "--host-for", "5m"];
        let run = scene.start_with(&run, &[sets, &[LITTLE_STATE][..]].concat());
        run.until_it_says("connected to");
        run.forget_peak_memory();
        until("the report is written", || scene.path("run.json").exists());
        let taken = run.peak_memory() - 2 * GUEST;
        run.signal(Signal::INT);
        run.end().expect(0);
        check(&scene, "run.json", taken, sets);
    }
}

/// The same for a process with one end. Its guest is filled by what arrives.
#[test]
fn a_destination_takes_no_more_than_its_bound_beside_its_guest() {
    for sets in CASES {
        let scene = Scene::new();
        scene.write("recv.toml", CONFIG);
        let sets = &[sets, &[LITTLE_STATE][..]].concat();
        let (destination, address) = scene.listening(sets);
        let send = ["send", "recv.toml", "--host-for", "0s"];
        scene.start_with(&send, &[&sets[..], &[address.as_str()]].concat()).end().expect(0);
        destination.until_it_says("the guest is hosted here");
        let taken = destination.peak_memory() - GUEST;
        destination.signal(Signal::INT);
        destination.end().expect(0);
        check(&scene, "recv.json", taken, sets);
    }
}

#[test]
fn guest_state_that_is_too_large_is_refused_with_what_to_set() {
    let scene = Scene::new();
    scene.configure(&["ram"]);
    scene.write("from/ram", vec![1; 1 << 20]);
    scene.write("from/device", vec![2; 300_000]);
    for (config, folder) in [("send.toml", "from"), ("recv.toml", "to")] {
        let text = String::from_utf8(scene.read(config)).unwrap();
        let state = format!("\n[[guest.file.state_files]]\nid = \"device\"\npath = \"{folder}/device\"\n");
        let (guest, transport) = text.split_once("\n[transport]").unwrap();
        scene.write(config, format!("{guest}{state}\n[transport]{transport}"));
    }
    let (destination, address) = scene.listening(&[]);
    let source = scene.start_with(&["send", "send.toml"], &[&address, "migration.max_state=200 KiB"]);
    source.end().expect(1).says(&["300", "200 KiB are allowed", "max_state"]);
    destination.end().expect(1);
    let (destination, address) = scene.listening(&["migration.max_state=200 KiB"]);
    let source = scene.start_with(&["send", "send.toml"], &[&address]);
    destination.end().expect(1).says(&["200 KiB are allowed", "max_state"]);
    source.end().expect(1).says(&["max_state"]);
    let (destination, address) = scene.listening(&[]);
    scene.start_with(&["send", "send.toml"], &[&address]).end().expect(0);
    destination.end().expect(0);
    assert_eq!(scene.read("to/device"), vec![2; 300_000]);
}
