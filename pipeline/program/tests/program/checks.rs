//! A configuration that `check` accepts starts, and one that it refuses is refused by the commands in the same words.

use std::fs;
use std::os::unix::fs::symlink;

use rustix::fs::{CWD, FileType, Mode, mknodat};

use crate::harness::{Scene, noise};

const WORKLOAD: &str = "[guest.workload]\nmemory = \"4 MiB\"\n[transport]\naddress = \"tcp:127.0.0.1:0\"\n";

/// An image to migrate, with both configurations written.
fn scene() -> Scene {
    let scene = Scene::new();
    scene.configure(&["ram"]);
    scene.write("from/ram", noise(300_000, 1));
    scene.write("workload.toml", WORKLOAD);
    scene
}

/// `check` and the command itself end with this code and print these words.
#[track_caller]
fn both_refuse(scene: &Scene, check: &[&str], command: &[&str], sets: &[&str], code: i32, words: &str) {
    for arguments in [check, command] {
        scene.start_with(arguments, sets).end().expect(code).says(&[words]);
    }
}

#[test]
fn what_check_refuses_the_source_refuses_in_the_same_words() {
    let scene = scene();
    let (check, send) = (["check", "send.toml"], ["send", "send.toml"]);
    let missing = "guest.file.images=[{ id = \"ram\", path = \"from/none\" }]";
    both_refuse(&scene, &check, &send, &[missing], 1, "image ram: from/none: cannot be opened: No such file");
    let cache = "an XBZRLE cache of 256 MiB is larger than the guest's memory, 300000 B; write 300000 B or less";
    both_refuse(&scene, &check, &send, &["encoder.xbzrle_cache=256 MiB"], 1, cache);
    let stored = ["transport.address=file:no/stream", "migration.after=resume"];
    let nowhere = "cannot write file:no/stream: No such file or directory: there is no folder no";
    both_refuse(&scene, &check, &send, &stored, 1, nowhere);
    symlink("nothing", scene.path("dangling")).unwrap();
    let dangling = ["transport.address=file:dangling", "migration.after=resume"];
    both_refuse(&scene, &check, &send, &dangling, 1, "it is a symbolic link that leads to nothing");
    scene.run(&["check", "send.toml"]).expect(0).says(&["# guest: 293 KiB in 74 pages"]);
}

#[test]
fn what_check_refuses_of_a_configuration_has_its_line_everywhere() {
    let scene = scene();
    let both = |sets: &[&str], words: &[&str]| {
        for command in ["check", "run", "send"] {
            scene.start_with(&[command, "workload.toml"], sets).end().expect(2).says(words);
        }
    };
    both(
        &["encoder.xbzrle_cache=5 MiB"],
        &["--set:1:", "an XBZRLE cache of 5 MiB is larger than the guest's memory, 4 MiB", "write 4 MiB or less"],
    );
    both(
        &["guest.workload.fill={ text = 0.6, random = 0.5 }"],
        &["--set:1:", "the shares add up to 1.1", "at most 1.0"],
    );
    both(&["guest.workload.fill.zero=-1"], &["a share of -1"]);
    // A size that is not specified fits every guest.
    scene.run(&["check", "workload.toml"]).expect(0).says(&["xbzrle_cache = \"4 MiB\""]);
    scene.start_with(&["check", "workload.toml"], &["encoder.xbzrle_cache=4 MiB"]).end().expect(0);
    let shared = "guest.workload.shared={ path = \"no/shared\", size = \"1 MiB\" }";
    let words = "the shared block no/shared: No such file";
    both_refuse(&scene, &["check", "workload.toml"], &["send", "workload.toml"], &[shared], 1, words);
}

#[test]
fn a_configuration_of_a_destination_is_checked_as_one() {
    let scene = scene();
    scene.run(&["check", "recv.toml"]).expect(1).says(&["image ram: to/ram: cannot be opened: No such file"]);
    let check = ["check", "recv.toml", "--for", "recv"];
    scene.run(&check).expect(0).says(&["# no figures, to/ram: No such file"]);
    let nowhere = "guest.file.images=[{ id = \"ram\", path = \"no/ram\" }]";
    scene.start_with(&check, &[nowhere]).end().expect(1).says(&["no/ram: No such file", "there is no folder no"]);
    let stream = "transport.address=file:missing";
    both_refuse(&scene, &check, &["recv", "recv.toml"], &[stream], 1, "cannot read file:missing: No such file");
    scene.write("to/ram", "mine");
    scene.run(&check).expect(1).says(&["to/ram exists: remove it, or set overwrite = true"]);
    scene.start_with(&check, &["guest.file.overwrite=true"]).end().expect(0);
    scene.run(&["check", "send.toml", "--for", "run"]).expect(2).says(&["`run` makes a copy of each file"]);
    assert_eq!(scene.read("to/ram"), b"mine");
}

/// No file in the place of a configuration can block the program or fill its memory.
#[test]
fn a_configuration_is_a_file_of_bounded_length() {
    let scene = scene();
    mknodat(CWD, scene.path("pipe"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    fs::File::create(scene.path("long.toml")).unwrap().set_len((1 << 20) + 1).unwrap();
    let refused = [
        ("pipe", "it is no regular file"),
        ("/dev/zero", "it is no regular file"),
        (".", "it is a directory"),
        ("long.toml", "it has more than 1 MiB"),
    ];
    for (name, why) in refused {
        for command in ["check", "run", "send", "recv"] {
            scene.run(&[command, name]).expect(2).says(&[name, "the configuration cannot be read: ", why]);
        }
        scene.run(&["record", name, "-o", "trace"]).expect(2).says(&[name, why]);
    }
    scene.run(&["plan", "pipe"]).expect(1).says(&["pipe: it is no regular file"]);
    scene.run(&["inspect", "pipe"]).expect(1).says(&["pipe cannot be read: it is no regular file"]);
    scene.write("bytes.toml", [0xff, 0xfe]);
    scene.run(&["check", "bytes.toml"]).expect(2).says(&["bytes.toml", "utf-8"]);
}
