//! Files that change during a migration, and files that do not fit in memory.

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::harness::{Scene, noise, sparse};
use crate::writer::{COMMANDS, Writer};

fn shrink(image: &Path) {
    fs::File::options().write(true).open(image).unwrap().set_len(4096).unwrap();
}

fn grow(image: &Path) {
    fs::File::options().append(true).open(image).unwrap().write_all(b"more").unwrap();
}

fn remove(image: &Path) {
    fs::remove_file(image).unwrap();
}

fn replace(image: &Path) {
    let other = image.with_extension("new");
    fs::write(&other, "another").unwrap();
    fs::rename(other, image).unwrap();
}

/// One of two images changes in the middle of the first round: both ends report which one and how, and the writer of
/// the other image was never paused.
#[test]
fn an_image_that_changes_while_it_is_sent_is_named_at_both_ends_and_nobody_is_paused_for_it() {
    type Change = fn(&Path);
    let changes: [(Change, &str); 4] = [
        (shrink, "from/rest: it was cut short, from 4194304 bytes to 4096"),
        (grow, "from/rest: it grew, from 4194304 bytes to 4194308"),
        (remove, "from/rest: it was removed or replaced"),
        (replace, "from/rest: it was removed or replaced"),
    ];
    for (change, words) in changes {
        let scene = Scene::new();
        scene.configure(&["ram", "rest"]);
        scene.write("from/ram", noise(2 << 20, 1));
        scene.write("from/rest", noise(4 << 20, 2));
        let writer = Writer::begin(&scene, "from/ram", Duration::from_micros(100));
        let (destination, address) = scene.listening(&["guest.file.start=[\"touch\", \"started\"]"]);
        // A limit that is never met: rounds continue until the image changes.
        let rounds =
            ["migration.downtime_limit=1ns", "migration.max_downtime=1ns", "migration.max_rounds=1_000_000_000"];
        let ends = [address.as_str(), COMMANDS[0], COMMANDS[1], "migration.max_bandwidth=6 MiB/s"];
        let sets = [&ends[..], &rounds[..]].concat();
        let source = scene.start_with(&["send", "send.toml"], &sets);
        source.until_it_says("RAM block");
        change(&scene.path("from/rest"));
        source.end().expect(1).says(&[words]);
        destination.end().expect(1).says(&[words]);
        assert!(!scene.path("log").exists(), "the writer was paused in vain");
        writer.continues(&scene.path("from/ram"));
        assert_eq!(scene.names("to"), [""; 0]);
        assert!(!scene.path("started").exists());
    }
}

/// Both ends may use 128 MiB of private memory; the image has 192 MiB of noise, and is 4 GiB long.
#[test]
fn a_file_larger_than_memory_is_moved_in_bounded_memory() {
    const LIMIT: u64 = 128 << 20;
    const PIECE: u64 = 64 << 20;
    let scene = Scene::new().limited(LIMIT);
    scene.configure(&["ram"]);
    sparse(&scene.path("from/ram"), 4 << 30, &noise(64 << 20, 3), &[0, (1 << 30) - 1000, (4 << 30) - PIECE]);
    let (destination, address) = scene.listening(&[]);
    let sets = [address.as_str(), "encoder.compress=none", "encoder.xbzrle_cache=16 MiB", "pipeline.lanes=2"];
    let source = scene.start_with(&["send", "send.toml"], &sets);
    source.end().expect(0).says(&["completed after", ", verified"]);
    destination.end().expect(0);
    let [from, to] = ["from/ram", "to/ram"].map(|name| scene.path(name));
    let compared = Command::new("cmp").args([&from, &to]).output().unwrap();
    assert!(compared.status.success(), "{}", String::from_utf8_lossy(&compared.stdout));
    assert!(fs::metadata(&to).unwrap().blocks() * 512 < 4 * PIECE, "holes stay holes");
}
