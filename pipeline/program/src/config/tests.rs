//! The messages for a faulty configuration.

use super::*;
use insta::assert_snapshot;
use memferry::settings::{DestinationSettings, Mode, PostcopyAfter, SourceSettings, StallStep};
use std::time::Duration;

const GOOD: &str = r#"
[guest.workload]
memory = "64 MiB"

[transport]
address = "tcp:127.0.0.1:0"
"#;

fn refused(text: &str) -> String {
    parse("run.toml", text, &[], Purpose::Run).unwrap_err().to_string()
}

fn with(extra: &str) -> String {
    refused(&format!("{GOOD}\n{extra}"))
}

fn set(sets: &[&str]) -> Result<Config, String> {
    let sets: Vec<String> = sets.iter().map(|&set| set.to_owned()).collect();
    parse("run.toml", GOOD, &sets, Purpose::Run).map_err(|error| error.to_string())
}

#[test]
fn a_program_of_its_own_has_the_defaults_of_the_file() {
    let config = set(&[]).unwrap();
    assert_eq!(config.source(), SourceSettings::default());
    assert_eq!(config.destination(), DestinationSettings::default());
}

#[test]
fn a_peer_timeout_leaves_room_for_heartbeats() {
    let short = with("[migration]\npeer_timeout = \"1900ms\"");
    assert!(short.contains("run.toml:9:16") && short.contains("a peer_timeout of 1s 900ms is too short"), "{short}");
    assert!(short.contains("at least \"2s\""), "{short}");
    let config = set(&["migration.peer_timeout=2s"]).unwrap();
    assert_eq!([config.source().peer_timeout, config.destination().peer_timeout], [Duration::from_secs(2); 2]);
}

#[test]
fn postcopy_needs_answers_and_memory_that_only_its_guest_maps() {
    let file = "[guest.workload]\nmemory = \"64 MiB\"\n\n[transport]\naddress = \"file:/tmp/x\"\n\n[migration]\nafter = \"pause\"\nmode = \"hybrid\"\n";
    assert_snapshot!(refused(file), @r#"
    error: mode "hybrid" needs a destination that answers, and file:/tmp/x has none
     --> run.toml:9:8
      |
    9 | mode = "hybrid"
      |        ^^^^^^^^
      |
      = help: write mode = "precopy", or an address of tcp: or unix:
    "#);
    let images = "[guest.file]\nimages = [{ id = \"ram\", path = \"/a\", copy = \"/b\" }]\n\n[transport]\naddress = \"tcp:127.0.0.1:0\"\n\n[migration]\nmode = \"postcopy\"\n";
    assert_snapshot!(refused(images), @r#"
    error: mode "postcopy" with a guest of files: images are read by another program, whose access to a page that is missing nobody sees
     --> run.toml:8:8
      |
    8 | mode = "postcopy"
      |        ^^^^^^^^^^
      |
      = help: write mode = "precopy"
    "#);
    assert_snapshot!(with("[migration]\nmode = \"hybrid\"\n[pipeline]\nchecksum = false"), @r#"
    error: mode "hybrid" without checksums: a damaged page would reach a guest that runs
     --> run.toml:9:8
      |
    9 | mode = "hybrid"
      |        ^^^^^^^^
      |
      = help: write checksum = true, or mode = "precopy"
    "#);
    assert_snapshot!(with("[migration]\nmode = \"hybrid\"\nrecovery = { attempts = 0 }"), @r#"
    error: mode "hybrid" without recovery: a lost connection would lose the guest
     --> run.toml:9:8
      |
    9 | mode = "hybrid"
      |        ^^^^^^^^
      |
      = help: write recovery.attempts = 10, or mode = "precopy"
    "#);
    assert_snapshot!(with("[migration]\npostcopy_after = 3"), @r#"
    error: mode "precopy" does not switch to postcopy later
     --> run.toml:9:18
      |
    9 | postcopy_after = 3
      |                  ^
      |
      = help: write mode = "hybrid", or leave it out
    "#);
    assert_snapshot!(with("[migration]\nmode = \"hybrid\"\npostcopy_after = 0"), @r"
    error: 0 rounds
      --> run.toml:10:18
       |
    10 | postcopy_after = 0
       |                  ^
       |
       = help: write 1 or more
    ");
    assert_snapshot!(with("[migration]\nmode = \"hybrid\"\npostcopy_after = \"soon\""), @r#"
    error: "soon" is not a length of time
      --> run.toml:10:18
       |
    10 | postcopy_after = "soon"
       |                  ^^^^^^
       |
       = help: write a number of rounds such as 3, or "10s"
    "#);
    assert_snapshot!(with("[migration]\nmode = \"postcopi\""), @r#"
    error: unknown value `postcopi`
     --> run.toml:9:8
      |
    9 | mode = "postcopi"
      |        ^^^^^^^^^^
      |
      = help: did you mean `postcopy`? it is one of `precopy`, `hybrid`, `postcopy`
    "#);
    assert_snapshot!(with("[convergence]\non_stall = [\"postcopy\"]"), @r#"
    error: mode "precopy" does not switch to postcopy later
     --> run.toml:9:12
      |
    9 | on_stall = ["postcopy"]
      |            ^^^^^^^^^^^^
      |
      = help: write mode = "hybrid", or leave it out
    "#);
}

#[test]
fn postcopy_is_set_by_its_keys() {
    let sets =
        ["migration.mode=hybrid", "migration.postcopy_after=10s", "convergence.on_stall=[\"throttle\", \"postcopy\"]"];
    let settings = set(&sets).unwrap().source();
    assert_eq!(
        (settings.mode, settings.postcopy_after),
        (Mode::Hybrid, Some(PostcopyAfter::Time(Duration::from_secs(10))))
    );
    assert_eq!(settings.convergence.on_stall, [StallStep::Throttle, StallStep::Postcopy]);
    let rounds = set(&["migration.mode=hybrid", "migration.postcopy_after=3", "migration.postcopy.background=false"]);
    let settings = rounds.unwrap().source();
    assert_eq!((settings.postcopy_after, settings.postcopy.background), (Some(PostcopyAfter::Rounds(3)), false));
    assert_eq!(set(&["migration.mode=postcopy"]).unwrap().source().mode, Mode::Postcopy);
}

#[test]
fn typos_are_answered_with_the_nearest_word() {
    assert_snapshot!(with("[encoder]\ncompres = \"lz4\""), @r#"
    error: unknown key `compres`
     --> run.toml:9:1
      |
    9 | compres = "lz4"
      | ^^^^^^^
      |
      = help: did you mean `compress`? the keys here are `compress`, `compress_level`, `delta`, `on_miss`, `xbzrle_cache`, `cache_first_round`
    "#);
    assert_snapshot!(with("[encoder]\ncompress = \"lz5\""), @r#"
    error: unknown value `lz5`
     --> run.toml:9:12
      |
    9 | compress = "lz5"
      |            ^^^^^
      |
      = help: did you mean `lz4`? it is one of `none`, `snap`, `lz4`, `zstd`
    "#);
    assert_snapshot!(with("[[guest.workload.writers]]\npattern = { hotspot = { pages = 0.1, writes = 0.9 } }"), @r#"
    error: unknown value `hotspot`
     --> run.toml:9:13
      |
    9 | pattern = { hotspot = { pages = 0.1, writes = 0.9 } }
      |             ^^^^^^^
      |
      = help: did you mean `hot-spot`? it is one of `sequential`, `uniform`, `zipf`, `hot-spot`
    "#);
    assert_snapshot!(with("[migrations]\nverify = true"), @r#"
    error: unknown key `migrations`
     --> run.toml:8:2
      |
    8 | [migrations]
      |  ^^^^^^^^^^
      |
      = help: did you mean `migration`? the keys here are `guest`, `encoder`, `pipeline`, `transport`, `migration`, `convergence`
    "#);
}

#[test]
fn units_are_answered_with_examples() {
    assert_snapshot!(with("[encoder]\nxbzrle_cache = \"64 MiBB\""), @r#"
    error: "64 MiBB" is not a size
     --> run.toml:9:16
      |
    9 | xbzrle_cache = "64 MiBB"
      |                ^^^^^^^^^
      |
      = help: write a size such as "64 MiB" or "4 KiB"
    "#);
    assert_snapshot!(with("[migration]\ndowntime_limit = 300"), @r#"
    error: 300 has no unit
     --> run.toml:9:18
      |
    9 | downtime_limit = 300
      |                  ^^^
      |
      = help: write a length of time such as "300ms", "10s" or "1m 30s"
    "#);
    assert_snapshot!(with("[migration]\nmax_bandwidth = \"1 GiB\""), @r#"
    error: "1 GiB" is not a rate
     --> run.toml:9:17
      |
    9 | max_bandwidth = "1 GiB"
      |                 ^^^^^^^
      |
      = help: write a rate such as "100 MiB/s" or "1 Gbit/s", or "unlimited"
    "#);
    assert_snapshot!(with("[migration]\nmax_bandwidth = \"1 B/s\""), @r#"
    error: 1 B/s is too slow to move a guest
     --> run.toml:9:17
      |
    9 | max_bandwidth = "1 B/s"
      |                 ^^^^^^^
      |
      = help: write "64 KiB/s" or more, or "unlimited"
    "#);
    assert_snapshot!(with("[pipeline]\nlanes = \"two\""), @r#"
    error: this is the string "two"
     --> run.toml:9:9
      |
    9 | lanes = "two"
      |         ^^^^^
      |
      = help: write a whole number from 0 to 65535, without quotes
    "#);
}

#[test]
fn what_is_missing_is_named_with_an_example() {
    assert_snapshot!(refused(""), @r#"
    error: there is no table `guest`
    --> run.toml
     = help: write a table [guest.workload], [guest.file] or [guest.kvm]
    "#);
    assert_snapshot!(refused("[guest.workload]\n[transport]\nconnect_timeout = \"1s\""), @r#"
    error: `address` is missing in `transport`
     --> run.toml:2:1
      |
    2 | [transport]
      | ^^^^^^^^^^^
      |
      = help: write address = "tcp:127.0.0.1:7777", "unix:/run/memferry.sock" or "file:/var/tmp/guest.memferry"
    "#);
    assert_snapshot!(with("[[guest.workload.writers]]\nbytes = 3"), @r#"
    error: `pattern` is missing in `guest.workload.writers.0`
     --> run.toml:8:1
      |
    8 | [[guest.workload.writers]]
      | ^^^^^^^^^^^^^^^^^^^^^^^^^^
      |
      = help: write pattern = "sequential", "uniform", { zipf = { exponent = 1.1 } } or { hot-spot = { pages = 0.1, writes = 0.9 } }
    "#);
}

#[test]
fn what_cannot_be_together_is_refused() {
    assert_snapshot!(with("[pipeline]\nlanes = 2\nconnections = 3"), @r#"
    error: 3 connections for 2 lanes
      --> run.toml:10:15
       |
    10 | connections = 3
       |               ^
       |
       = help: write a number from 1 to 2, or more lanes: a lane travels on one connection
    "#);
    assert_snapshot!(with("[encoder]\nxbzrle_cache = 0"), @r#"
    error: an XBZRLE cache of 0 B holds no pages
     --> run.toml:9:16
      |
    9 | xbzrle_cache = 0
      |                ^
      |
      = help: write "256 MiB", at least 16 KiB here, or delta = "none"
    "#);
    assert_snapshot!(with("[encoder]\ncompress = \"none\"\non_miss = \"compress\""), @r#"
    error: pages cannot be compressed on a miss where `compress` is "none"
      --> run.toml:10:11
       |
    10 | on_miss = "compress"
       |           ^^^^^^^^^^
       |
       = help: delete it, or choose a compressor: compress = "lz4"
    "#);
    assert_snapshot!(with("[encoder]\ncompress_level = 3"), @r#"
    error: only zstd has levels
     --> run.toml:9:18
      |
    9 | compress_level = 3
      |                  ^
      |
      = help: delete it, or write compress = "zstd"
    "#);
    assert_snapshot!(with("[migration]\nafter = \"resume\"\ndowntime_limit = \"0s\""), @r#"
    error: `after` is for files: with a destination that answers the guest always moves
     --> run.toml:9:9
      |
    9 | after = "resume"
      |         ^^^^^^^^
      |
      = help: delete it

    error: this must be longer than nothing
      --> run.toml:10:18
       |
    10 | downtime_limit = "0s"
       |                  ^^^^
       |
       = help: write "300ms"
    "#);
    assert_snapshot!(with("[guest.file]\nimages = []"), @r#"
    error: one of several variants has to be chosen here
     --> run.toml:2:1
      |
    2 | [guest.workload]
      | ^^^^^^^^^^^^^^^^
      |
      = help: keep one of the tables and delete the others
    "#);
    assert_snapshot!(with("[[guest.workload.writers]]\npattern = { hot-spot = { pages = 0.1, writes = 1.9 } }\nbytes = 5000"), @r#"
    error: a write of 5000 B in a page of 4 KiB
      --> run.toml:10:9
       |
    10 | bytes = 5000
       |         ^^^^
       |
       = help: write a size of at most 4096 bytes

    error: a share of 1.9
     --> run.toml:9:48
      |
    9 | pattern = { hot-spot = { pages = 0.1, writes = 1.9 } }
      |                                                ^^^
      |
      = help: write a share above 0, at most 1.0
    "#);
}

#[test]
fn memory_that_does_not_travel_is_checked_key_by_key() {
    let refusals: [(&str, &[&str]); 3] = [
        (
            "[guest.workload.free]\nshare = 1.0\nrange = \"5 KiB\"",
            &["a share of 1, beside 0 that is unplugged", "ranges of 5 KiB", "whole pages of 4 KiB"],
        ),
        ("[guest.workload.free]\nrange = \"64 KiB\"", &["share"]),
        ("[guest.workload.shared]\npath = \"target/shared\"\nsize = \"1 KiB\"", &["1 KiB"]),
    ];
    for (table, words) in refusals {
        let text = with(table);
        assert!(words.iter().all(|word| text.contains(word)), "{words:?}:\n{text}");
    }
    let text = refused(
        "[guest.workload]\nmemory = \"64 MiB\"\nunplugged = 1.0\n[guest.workload.shared]\npath = \"x\"\nsize = \"1 MiB\"\n\
         [transport]\naddress = \"file:x.memferry\"\n[migration]\nafter = \"resume\"\n",
    );
    for word in ["run.toml:3:", "a share of 1", "run.toml:10:", "a snapshot would lack the shared block"] {
        assert!(text.contains(word), "{word:?} is missing:\n{text}");
    }
}

#[test]
fn a_file_has_one_connection_and_says_what_follows() {
    assert_snapshot!(refused("[guest.workload]\n[pipeline]\nconnections = 2\n[transport]\naddress = \"file:/var/tmp/guest.memferry\""), @r#"
    error: 2 connections, and file:/var/tmp/guest.memferry carries at most 1
     --> run.toml:3:15
      |
    3 | connections = 2
      |               ^
      |
      = help: write connections = 1; all lanes share it

    error: a file moves no guest by itself, and `after` does not define what becomes of the source
     --> run.toml:5:11
      |
    5 | address = "file:/var/tmp/guest.memferry"
      |           ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
      |
      = help: write after = "resume" (a snapshot) or after = "pause" (a move) in [migration]
    "#);
}

#[test]
fn images_are_distinguished() {
    assert_snapshot!(refused("[guest.file]\npage_size = 5000\npause = [\"true\"]\nimages = [{ id = \"a\", path = \"x\" }, { id = \"a\", path = \"y\", copy = \"x\" }]\n[transport]\naddress = \"tcp:localhost:7777\""), @r#"
    error: a page of 5000 B cannot be
     --> run.toml:2:13
      |
    2 | page_size = 5000
      |             ^^^^
      |
      = help: write "4 KiB", "8 KiB", "16 KiB", "32 KiB" or "64 KiB"

    error: `run` makes a copy of each file, and this one names no place for it
     --> run.toml:4:30
      |
    4 | images = [{ id = "a", path = "x" }, { id = "a", path = "y", copy = "x" }]
      |                              ^^^
      |
      = help: write copy = "x.copy" beside its path

    error: two files have the id "a"
     --> run.toml:4:44
      |
    4 | images = [{ id = "a", path = "x" }, { id = "a", path = "y", copy = "x" }]
      |                                            ^^^
      |
      = help: name them apart

    error: x stands here twice
     --> run.toml:4:68
      |
    4 | images = [{ id = "a", path = "x" }, { id = "a", path = "y", copy = "x" }]
      |                                                                    ^^^
      |
      = help: name another file

    error: `pause` without `resume`
     --> run.toml:3:9
      |
    3 | pause = ["true"]
      |         ^^^^^^^^
      |
      = help: write both, or neither: a guest that is paused needs a command that resumes it
    "#);
}

#[test]
fn a_stream_does_not_take_the_name_of_an_image() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("ram");
    std::fs::write(&image, "memory").unwrap();
    let stream = folder.path().join(".").join("ram");
    let text = format!(
        "[guest.file]\nimages = [{{ id = \"ram\", path = {image:?} }}]\n[transport]\naddress = \"file:{}\"\n\
         [migration]\nafter = \"resume\"\n",
        stream.display()
    );
    let error = parse("run.toml", &text, &[], Purpose::Send).unwrap_err().to_string();
    assert!(error.contains("is a file of the guest, and the stream would replace it"), "{error}");
}

#[test]
fn what_is_no_toml_is_shown_where_it_breaks() {
    assert_snapshot!(with("x = ["), @r#"
    error: this is no TOML: unclosed array, expected `]`
     --> run.toml:8:6
      |
    8 | x = [
      |      ^
    "#);
}

#[test]
fn a_wrong_set_is_shown_as_it_was_given() {
    assert_snapshot!(set(&["pipeline.lanes=two"]).unwrap_err(), @r#"
    error: this is the string "two"
     --> --set:1:1
      |
    1 | pipeline.lanes=two
      | ^^^^^^^^^^^^^^^^^^
      |
      = help: write a whole number from 0 to 65535, without quotes
    "#);
    assert_snapshot!(set(&["transport.address=tpc:x"]).unwrap_err(), @r#"
    error: "tpc:x" is no address: there is no transport "tpc"
     --> --set:1:1
      |
    1 | transport.address=tpc:x
      | ^^^^^^^^^^^^^^^^^^^^^^^
      |
      = help: write tls:HOST:PORT, tcp:HOST:PORT, unix:/PATH or file:/PATH
    "#);
    assert_snapshot!(set(&["encoder.compres=lz4"]).unwrap_err(), @r#"
    error: unknown key `compres`
     --> --set:1:1
      |
    1 | encoder.compres=lz4
      | ^^^^^^^^^^^^^^^^^^^
      |
      = help: did you mean `compress`? the keys here are `compress`, `compress_level`, `delta`, `on_miss`, `xbzrle_cache`, `cache_first_round`
    "#);
    assert_snapshot!(set(&["pipeline"]).unwrap_err(), @r#"
    error: there is no = in it
     --> --set:1:1
      |
    1 | pipeline
      | ^^^^^^^^
      |
      = help: write --set table.key=value, as in --set pipeline.lanes=4
    "#);
}

#[test]
fn sets_change_the_file_and_may_choose_another_variant() {
    let config = set(&["pipeline.lanes=4", "encoder.compress = none", "migration.downtime_limit=1s"]).unwrap();
    assert_eq!(config.pipeline.lanes, 4);
    assert_eq!(config.encoder.compress, tables::Compress::None);
    assert_eq!(config.migration.downtime_limit.to_string(), "1s");
}

#[test]
fn what_is_not_said_has_a_default() {
    let config = set(&[]).unwrap();
    assert_eq!((config.pipeline.lanes, config.pipeline.connections, config.pipeline.checksum), (2, 1, true));
    assert_eq!(config.migration, tables::MigrationTable::default());
    assert_eq!(config.encoder, tables::EncoderTable::default());
}

#[test]
fn a_checked_configuration_reads_back_as_it_is_printed() {
    let config = set(&["migration.max_bandwidth=100 MB/s", "guest.workload.blocks=2"]).unwrap();
    let printed = toml::to_string(&config).unwrap();
    assert_eq!(parse("printed", &printed, &[], Purpose::Run).unwrap(), config);
}

#[test]
fn recovery_reaches_both_ends_and_is_off_where_it_cannot_be() {
    let config = set(&["migration.recovery.attempts=3", "migration.recovery.give_up=2m"]).unwrap();
    let expected = RecoverySettings { attempts: 3, give_up: Duration::from_secs(120), ..RecoverySettings::default() };
    assert_eq!([config.source().recovery, config.destination().recovery], [expected; 2]);
    let unable: [&[&str]; 2] =
        [&["pipeline.checksum=false"], &["transport.address=file:x.memferry", "migration.after=pause"]];
    for sets in unable {
        let config = set(sets).unwrap();
        assert_eq!(config.migration.recovery, RecoverySettings::OFF, "{sets:?}");
        let printed = toml::to_string(&config).unwrap();
        assert_eq!(parse("printed", &printed, &[], Purpose::Run).unwrap(), config);
        let off = [sets, &["migration.recovery.attempts=0"]].concat();
        assert_eq!(set(&off).unwrap().source().recovery, RecoverySettings::OFF);
        let error = set(&[sets, &["migration.recovery.attempts=1"]].concat()).unwrap_err();
        assert!(error.contains("--set:1:1") && error.contains("write attempts = 0, or "), "{error}");
    }
    assert_snapshot!(with("[pipeline]\nchecksum = false\n[migration.recovery]\nbackoff = \"0s\""), @r#"
    error: this must be longer than nothing
      --> run.toml:11:11
       |
    11 | backoff = "0s"
       |           ^^^^
       |
       = help: write "500ms"

    error: recovery from a lost connection needs checksums or TLS, and `checksum` is false
      --> run.toml:10:1
       |
    10 | [migration.recovery]
       | ^^^^^^^^^^^^^^^^^^^^
       |
       = help: write attempts = 0, or checksum = true in [pipeline], or an address of tls:
    "#);
}

#[test]
fn cuts_for_trials_rise_and_need_a_connection() {
    let config = set(&["transport.faults.cut_after=[\"40 MiB\", \"90 MiB\"]"]).unwrap();
    assert!(config.cuts().is_some() && set(&[]).unwrap().cuts().is_none());
    let printed = toml::to_string(&config).unwrap();
    assert_eq!(parse("printed", &printed, &[], Purpose::Run).unwrap(), config);
    assert_snapshot!(with("[transport.faults]\nrefuse_for = \"2s\""), @r#"
    error: `cut_after` is missing in `transport.faults`
     --> run.toml:8:1
      |
    8 | [transport.faults]
      | ^^^^^^^^^^^^^^^^^^
      |
      = help: write cut_after = ["40 MiB", "90 MiB"]
    "#);
    assert_snapshot!(with("[transport.faults]\ncut_after = [\"40 MiB\", \"40 MiB\"]"), @r#"
    error: a cut after 40 MiB, with 40 MiB before it
     --> run.toml:9:24
      |
    9 | cut_after = ["40 MiB", "40 MiB"]
      |                        ^^^^^^^^
      |
      = help: write sizes that rise, counted from the beginning: ["40 MiB", "90 MiB"]
    "#);
    let file = ["transport.address=file:x", "migration.after=pause", "transport.faults.cut_after=[\"1 MiB\"]"];
    assert!(set(&file).unwrap_err().contains("has no connection that could be cut"));
}

#[test]
fn every_configuration_that_ships_is_right_and_says_what_it_shows() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "toml"));
    assert!(files.len() >= 10, "{files:?}");
    for file in files {
        let name = file.file_stem().unwrap().to_str().unwrap();
        let purpose = match name {
            name if name.ends_with("-send") => Purpose::Send,
            name if name.ends_with("-recv") => Purpose::Receive,
            _ => Purpose::Run,
        };
        load(&file, &[], purpose).unwrap_or_else(|error| panic!("{error}"));
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(text.lines().take(2).all(|line| line.starts_with("# ")), "{name} begins with two lines of comment");
    }
}

#[test]
#[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
fn a_machine_that_cannot_be_is_refused_key_by_key() {
    let text = refused(
        "[guest.kvm]\nmemory = \"5 MiB\"\nvcpus = 0\nregion = \"1000 B\"\npages_per_second = -1.0\nbytes = \"12 B\"\n\
         [transport]\naddress = \"tcp:localhost:0\"\n",
    );
    let places = (2..7).map(|line| format!("run.toml:{line}:"));
    let words = ["a machine of 5 MiB", "0 vCPUs", "a region of", "-1 pages a second", "a write of"].map(String::from);
    for word in words.into_iter().chain(places) {
        assert!(text.contains(&word), "{word:?} is missing:\n{text}");
    }
    let text = refused(
        "[guest.kvm]\nmemory = \"64 MiB\"\nregion = \"4 MiB\"\nfree = \"60 MiB\"\nunplugged = \"100 B\"\n\
         [guest.kvm.shared]\npath = \"x\"\nsize = \"5 B\"\n[transport]\naddress = \"tcp:localhost:0\"\n",
    );
    for word in
        ["run.toml:4:", "60 MiB beside the rest of a machine of", "run.toml:5:", "run.toml:8:", "a shared block of 5 B"]
    {
        assert!(text.contains(word), "{word:?} is missing:\n{text}");
    }
    let text = refused("[guest.kvm]\ndirty_log = \"ring\"\n[transport]\naddress = \"tcp:localhost:0\"\n");
    assert!(text.contains("`dirty-ring`") && text.contains("run.toml:2:"), "{text}");
}
