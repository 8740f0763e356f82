//! File guests as the engine uses them, through the guest traits alone, with pages copied by hand.

use std::env;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use memferry_stages::geometry::{EXTENT_PAGES, ExtentAt, bits};
use memferry_stages::memory::GuestMemory;
use memferry_stages::pool::BufferPool;
use tempfile::TempDir;

use super::*;
use memferry::guest::{DestinationGuest, Guest, GuestBuilder, GuestError, GuestState, RunState, SourceGuest};

fn settings(images: &[(&str, &Path)]) -> FileGuestSettings {
    let image = |(id, path): &(&str, &Path)| Image { id: (*id).into(), path: (*path).into() };
    FileGuestSettings { images: images.iter().map(image).collect(), ..FileGuestSettings::default() }
}

/// Settings of one image of a page and a few bytes, which is created.
fn one_image(folder: &Path) -> FileGuestSettings {
    let path = folder.join("image");
    fs::write(&path, [7; 5000]).unwrap();
    settings(&[("ram", &path)])
}

fn argv(command: &[&str]) -> Option<Vec<String>> {
    Some(command.iter().map(|&word| word.into()).collect())
}

fn entries(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn built(source: &FileGuest, builder: FileBuilder) -> Result<Arc<FileDestination>, GuestError> {
    let layout = source.memory().layout().clone();
    builder.build(layout.page_size(), layout.blocks(), &source.setup_state()?)
}

/// Copies every page that is not zero, as loaders do.
fn copy(from: &GuestMemory, to: &GuestMemory) {
    let (layout, size) = (from.layout(), from.page_size());
    let pool = BufferPool::new(1, size.extent_bytes());
    let mut buffer = pool.try_take().unwrap();
    for block in 0..layout.block_count() {
        for extent in 0..layout.block_extents(block) {
            let (mask, first) = (layout.valid_mask(ExtentAt { block, extent }), u64::from(extent) * EXTENT_PAGES);
            let zero = from.block(block).memory.read_extent(size, first, mask, &mut buffer).unwrap();
            for (bit, page) in bits(mask & !zero).zip(buffer.chunks(size.bytes())) {
                to.block(block).memory.write_pages(size, first + u64::from(bit), page).unwrap();
            }
        }
    }
}

#[test]
fn images_arrive_whole_with_their_length_and_their_holes() {
    let folder = TempDir::new().unwrap();
    let (here, there) = (folder.path().join("here"), folder.path().join("there"));
    fs::create_dir(&here).unwrap();
    fs::create_dir(&there).unwrap();
    let sparse = fs::File::create(here.join("sparse")).unwrap();
    sparse.set_len((64 << 20) + 123).unwrap();
    sparse.write_all_at(b"begin", 1 << 20).unwrap();
    sparse.write_all_at(b"end", (64 << 20) + 120).unwrap();
    fs::copy(env::current_exe().unwrap(), here.join("dense")).unwrap();
    let images = |folder: &Path| settings(&[("one", &folder.join("sparse")), ("two", &folder.join("dense"))]);

    let source = FileGuest::source(images(&here), None).unwrap();
    let destination = FileGuest::destination(FileGuestSettings {
        start: argv(&["touch", there.join("started").to_str().unwrap()]),
        ..images(&there)
    })
    .unwrap();
    let destination = built(&source, destination).unwrap();
    source.pause().unwrap();
    destination.make_durable().unwrap();
    assert_eq!(destination.not_durable(), 0);
    copy(&source.memory(), &destination.memory());
    assert_eq!(destination.not_durable(), 2);
    let state = source.save().unwrap();
    destination.prepare(&state).unwrap();
    assert_eq!(destination.not_durable(), 0, "even if it was not requested before");
    let partial = entries(&there);
    assert_eq!(partial.len(), 2);
    assert!(partial.iter().all(|name| name.contains(".memferry-") && name.ends_with(".partial")), "{partial:?}");
    assert!(partial.iter().all(|name| there.join(name).metadata().unwrap().permissions().mode() & 0o777 == 0o600));

    destination.start(RunState::Running).unwrap();
    drop(destination);
    assert_eq!(entries(&there), ["dense", "sparse", "started"]);
    for name in ["sparse", "dense"] {
        assert!(fs::read(here.join(name)).unwrap() == fs::read(there.join(name)).unwrap(), "{name} differs");
    }
    let kept = there.join("sparse").metadata().unwrap().blocks() * 512;
    assert!(kept < 1 << 20, "{kept} bytes kept of a file that is nearly all hole");
}

#[test]
fn a_destination_dropped_before_its_start_leaves_nothing_behind() {
    let (here, there) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let source = FileGuest::source(one_image(here.path()), None).unwrap();
    let target = there.path().join("image");
    let destination = FileGuest::destination(settings(&[("ram", &target)])).unwrap();
    let destination = built(&source, destination).unwrap();
    destination.prepare(&GuestState::default()).unwrap();
    assert_eq!(entries(there.path()).len(), 1);
    drop(destination);
    assert_eq!(entries(there.path()), [""; 0]);
}

/// As the transport `file:` does.
#[test]
fn a_link_in_the_place_of_an_image_is_followed() {
    let (here, there) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let source = FileGuest::source(one_image(here.path()), None).unwrap();
    let [real, link] = ["real", "link"].map(|name| there.path().join(name));
    symlink(&real, &link).unwrap();
    let onto_link = |overwrite| {
        let settings = FileGuestSettings { overwrite, ..settings(&[("ram", &link)]) };
        let destination = FileGuest::destination(settings).unwrap();
        built(&source, destination)
    };
    let words = onto_link(true).unwrap_err().to_string();
    assert!(words.contains("link: No such file") && words.contains("leads to nothing"), "{words}");
    fs::write(&real, "old").unwrap();
    assert!(onto_link(false).unwrap_err().to_string().contains("link exists"));
    let destination = onto_link(true).unwrap();
    copy(&source.memory(), &destination.memory());
    destination.prepare(&GuestState::default()).unwrap();
    assert_eq!(fs::read(&real).unwrap(), b"old");
    destination.start(RunState::Running).unwrap();
    assert!(link.is_symlink());
    assert_eq!(fs::read(&real).unwrap(), [7; 5000]);

    let both = FileGuestSettings { overwrite: true, ..settings(&[("ram", &link), ("rom", &real)]) };
    fs::write(here.path().join("rom"), "rom").unwrap();
    let [ram, rom] = ["image", "rom"].map(|name| here.path().join(name));
    let source = FileGuest::source(settings(&[("ram", &ram), ("rom", &rom)]), None).unwrap();
    let words = built(&source, FileGuest::destination(both).unwrap()).unwrap_err().to_string();
    assert!(words.contains("real leads to the place of another file"), "{words}");
    assert_eq!(entries(there.path()), ["link", "real"]);
}

#[test]
fn what_a_killed_destination_left_is_gone_when_the_next_one_is_made() {
    let there = TempDir::new().unwrap();
    let settings = with_state(there.path());
    for left in ["image.memferry-0123456789abcdef.partial", "image.meta.memferry-0123456789abcdef.partial"] {
        fs::write(there.path().join(left), "half").unwrap();
    }
    fs::write(there.path().join("image.memferry-mine.partial"), "mine").unwrap();
    FileGuest::destination(settings).unwrap();
    assert_eq!(entries(there.path()), ["image.memferry-mine.partial"]);
}

#[test]
fn blocks_and_images_that_do_not_match_are_refused_with_both_names() {
    let (here, there) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let source = FileGuest::source(one_image(here.path()), None).unwrap();
    let target = |name: &str| there.path().join(name);
    let refuse = |images: &[(&str, &Path)]| {
        built(&source, FileGuest::destination(settings(images)).unwrap()).unwrap_err().to_string()
    };
    let words = refuse(&[("rom", &target("rom"))]);
    assert!(words.contains("[\"ram\"]") && words.contains("[\"rom\"]"), "{words}");
    let words = refuse(&[("ram", &target("ram")), ("rom", &target("rom"))]);
    assert!(words.contains("[\"ram\", \"rom\"]"), "{words}");
    let words = refuse(&[("ram", &target("no/such/folder"))]);
    assert!(words.contains("No such file or directory: there is no folder ") && words.contains("no/such"), "{words}");
    assert_eq!(entries(there.path()), [""; 0]);

    let section = memferry::guest::StateSection { name: "workload".into(), version: 1, bytes: vec![] };
    let layout = source.memory().layout().clone();
    let destination = FileGuest::destination(settings(&[("ram", &target("ram"))])).unwrap();
    let words =
        destination.build(layout.page_size(), layout.blocks(), &GuestState { sections: vec![section] }).unwrap_err();
    assert!(words.to_string().contains("\"workload\""), "{words}");
}

#[test]
fn a_file_that_exists_is_replaced_only_when_asked_and_only_at_the_start() {
    let (here, there) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let source = FileGuest::source(one_image(here.path()), None).unwrap();
    let target = there.path().join("image");
    fs::write(&target, "old").unwrap();
    let words = built(&source, FileGuest::destination(settings(&[("ram", &target)])).unwrap()).unwrap_err().to_string();
    assert!(words.ends_with("image exists: remove it, or set overwrite = true"), "{words}");
    let destination =
        FileGuest::destination(FileGuestSettings { overwrite: true, ..settings(&[("ram", &target)]) }).unwrap();
    let destination = built(&source, destination).unwrap();
    copy(&source.memory(), &destination.memory());
    destination.prepare(&GuestState::default()).unwrap();
    assert_eq!(fs::read(&target).unwrap(), b"old");
    destination.start(RunState::Running).unwrap();
    assert_eq!(fs::read(&target).unwrap(), [7; 5000]);
}

#[test]
fn what_is_no_image_is_refused_by_name() {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("empty"), "").unwrap();
    for name in ["", "absent", "empty"] {
        let path = folder.path().join(name);
        let words = FileGuest::source(settings(&[("ram", &path)]), None).unwrap_err().to_string();
        assert!(words.starts_with(&format!("image ram: {}: cannot be opened: ", path.display())), "{words}");
    }
}

#[test]
fn what_is_no_regular_file_is_never_replaced() {
    let (here, there) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let source = FileGuest::source(one_image(here.path()), None).unwrap();
    let target = there.path().join("socket");
    let _socket = std::os::unix::net::UnixListener::bind(&target).unwrap();
    let destination =
        FileGuest::destination(FileGuestSettings { overwrite: true, ..settings(&[("ram", &target)]) }).unwrap();
    let words = built(&source, destination).unwrap_err().to_string();
    assert!(words.ends_with("socket is no regular file, and stays: name another"), "{words}");
}

#[test]
fn a_place_taken_meanwhile_is_left_alone_and_no_image_looks_complete() {
    let (here, there) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let mut two = one_image(here.path());
    fs::write(here.path().join("second"), "2").unwrap();
    two.images.push(Image { id: "second".into(), path: here.path().join("second") });
    let source = FileGuest::source(two, None).unwrap();
    let second = there.path().join("second");
    let destination =
        FileGuest::destination(settings(&[("ram", &there.path().join("image")), ("second", &second)])).unwrap();
    let destination = built(&source, destination).unwrap();
    destination.prepare(&GuestState::default()).unwrap();
    fs::write(&second, "somebody's").unwrap();
    let words = destination.start(RunState::Running).unwrap_err().to_string();
    assert!(words.contains("second cannot take its place"), "{words}");
    drop(destination);
    assert_eq!(entries(there.path()), ["second"]);
    assert_eq!(fs::read(&second).unwrap(), b"somebody's");
}

#[test]
fn a_start_command_that_fails_is_reported_with_what_is_in_place() {
    let (here, there) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let source = FileGuest::source(one_image(here.path()), None).unwrap();
    let images = settings(&[("ram", &there.path().join("image"))]);
    let destination =
        FileGuest::destination(FileGuestSettings { start: argv(&["sh", "-c", "echo no room; exit 9"]), ..images })
            .unwrap();
    let destination = built(&source, destination).unwrap();
    destination.prepare(&GuestState::default()).unwrap();
    let words = destination.start(RunState::Running).unwrap_err().to_string();
    assert!(words.starts_with("the images are complete and in place, but the start command"), "{words}");
    assert!(words.ends_with("exit status: 9; output: no room"), "{words}");
}

#[test]
fn settings_that_do_not_fit_together_are_refused() {
    let refuse = |change: fn(&mut FileGuestSettings)| {
        let mut settings = settings(&[("a", Path::new("/a")), ("b", Path::new("/b"))]);
        change(&mut settings);
        FileGuest::destination(settings).unwrap_err().to_string()
    };
    assert_eq!(refuse(|s| s.images.clear()), "there are no images: name at least one, with an id and a path");
    assert_eq!(refuse(|s| s.images[1].id = "a".into()), "two files have the id \"a\"");
    assert_eq!(refuse(|s| s.images[1].path = "/a".into()), "two files have the path /a");
    assert_eq!(refuse(|s| s.pause = argv(&["p"])), "pause and resume belong together: give both or neither");
    assert!(refuse(|s| s.start = argv(&[])).starts_with("start names no program"));
    assert!(refuse(|s| s.command_timeout = Duration::ZERO).starts_with("command_timeout is 0"));
}

/// Settings of one image, and of a state file that is listed and not created.
fn with_state(folder: &Path) -> FileGuestSettings {
    FileGuestSettings {
        state_files: vec![Image { id: "meta".into(), path: folder.join("image.meta") }],
        ..settings(&[("ram", &folder.join("image"))])
    }
}

#[test]
fn state_files_are_read_after_the_pause_and_in_place_before_the_start() {
    let (here, there) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    fs::write(here.path().join("image"), "memory").unwrap();
    let meta = here.path().join("image.meta");
    let leaves = format!("printf left > '{}'", meta.display());
    let settings = FileGuestSettings {
        pause: argv(&["sh", "-c", &leaves]),
        resume: argv(&["rm", meta.to_str().unwrap()]),
        ..with_state(here.path())
    };
    let source = FileGuest::source(settings, None).unwrap();
    let is_there = format!("test \"$(cat '{}')\" = left", there.path().join("image.meta").display());
    let settings = FileGuestSettings { start: argv(&["sh", "-c", &is_there]), ..with_state(there.path()) };
    let destination = FileGuest::destination(settings).unwrap();
    let destination = built(&source, destination).unwrap();
    source.pause().unwrap();
    copy(&source.memory(), &destination.memory());
    let state = source.save().unwrap();
    destination.prepare(&state).unwrap();
    assert!(entries(there.path()).iter().all(|name| name.ends_with(".partial")), "{:?}", entries(there.path()));
    destination.start(RunState::Running).unwrap();
    assert_eq!(entries(there.path()), ["image", "image.meta"]);
    assert_eq!(there.path().join("image.meta").metadata().unwrap().permissions().mode() & 0o777, 0o600);
    source.resume().unwrap();
    assert!(!meta.exists());
}

#[test]
fn a_state_file_that_cannot_come_is_named() {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("image"), "memory").unwrap();
    let source = FileGuest::source(with_state(folder.path()), None).unwrap();
    let refused = || source.save().unwrap_err().to_string();
    let meta = folder.path().join("image.meta");
    assert!(refused().starts_with("state file meta: ") && refused().contains("image.meta: No such file"));
    fs::create_dir(&meta).unwrap();
    assert!(refused().ends_with("image.meta: it is a directory"), "{}", refused());
    fs::remove_dir(&meta).unwrap();
    let file = fs::File::create(&meta).unwrap();
    file.set_len(16 << 20).unwrap();
    assert_eq!(source.save().unwrap().sections[0].bytes.len(), 16 << 20);
    file.set_len((16 << 20) + 1).unwrap();
    assert!(refused().ends_with("it has more than 16 MiB: make it an image"), "{}", refused());
}

#[test]
fn state_files_without_a_place_and_places_without_a_state_file_are_refused_before_any_page() {
    let (here, there) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    fs::write(here.path().join("image"), "memory").unwrap();
    let with = FileGuest::source(with_state(here.path()), None).unwrap();
    let without = FileGuest::source(settings(&[("ram", &here.path().join("image"))]), None).unwrap();
    let destination = || FileGuest::destination(with_state(there.path())).unwrap();
    let words = built(&without, destination()).unwrap_err().to_string();
    assert!(words.starts_with("setup state [] came, there are state_files for [\"meta\"]"), "{words}");
    let bare = FileGuest::destination(settings(&[("ram", &there.path().join("image"))])).unwrap();
    let words = built(&with, bare).unwrap_err().to_string();
    assert!(words.starts_with("setup state [\"meta\"] came, there are state_files for []"), "{words}");
    fs::write(there.path().join("image.meta"), "somebody's").unwrap();
    assert!(built(&with, destination()).unwrap_err().to_string().contains("image.meta exists"));
    fs::remove_file(there.path().join("image.meta")).unwrap();
    let destination = built(&with, destination()).unwrap();
    let twice = vec![state::section("meta", vec![]), state::section("meta", vec![])];
    let words = destination.prepare(&GuestState { sections: twice }).unwrap_err().to_string();
    assert!(words.starts_with("device state [\"meta\", \"meta\"] came"), "{words}");
    drop(destination);
    assert_eq!(entries(there.path()), [""; 0]);
}

/// Settings whose commands append a line each to `log`; `pause` also does `more`.
pub(super) fn logged(folder: &Path, more: &str) -> FileGuestSettings {
    let log = folder.join("log");
    let script = |word: &str, more: &str| argv(&["sh", "-c", &format!("echo {word} >> '{}'; {more}", log.display())]);
    FileGuestSettings { pause: script("pause", more), resume: script("resume", ""), ..one_image(folder) }
}

pub(super) fn log(folder: &Path) -> String {
    fs::read_to_string(folder.join("log")).unwrap_or_default().replace('\n', " ").trim().into()
}

#[test]
fn pausing_and_resuming_run_their_commands_once() {
    let folder = TempDir::new().unwrap();
    let source = FileGuest::source(logged(folder.path(), ""), None).unwrap();
    source.resume().unwrap();
    assert_eq!(log(folder.path()), "");
    source.pause().unwrap();
    source.pause().unwrap();
    source.save().unwrap();
    assert_eq!(log(folder.path()), "pause");
    source.resume().unwrap();
    source.resume().unwrap();
    assert_eq!(log(folder.path()), "pause resume");
}

#[test]
fn a_pause_that_fails_or_takes_too_long_is_undone() {
    let pauses_for = |timeout, more| {
        let folder = TempDir::new().unwrap();
        let settings = FileGuestSettings { command_timeout: timeout, ..logged(folder.path(), more) };
        let error = FileGuest::source(settings, None).unwrap().pause().unwrap_err().to_string();
        (error, log(folder.path()))
    };
    let (error, said) = pauses_for(Duration::from_secs(60), "echo busy; exit 1");
    assert!(error.contains("exit status: 1; output: busy"), "{error}");
    assert_eq!(said, "pause resume");
    // The loop gives a busy machine time to write both words.
    let mut timeout = Duration::from_millis(300);
    loop {
        let (error, said) = pauses_for(timeout, "sleep 1000");
        assert!(error.contains(&format!("it took longer than {}", humantime::format_duration(timeout))), "{error}");
        if said == "pause resume" {
            break;
        }
        timeout *= 2;
    }
}

#[test]
fn a_resume_that_fails_is_reported_and_tried_again() {
    let folder = TempDir::new().unwrap();
    let mut settings = logged(folder.path(), "exit 1");
    let allowed = folder.path().join("allowed");
    settings.resume = argv(&["test", "-e", allowed.to_str().unwrap()]);
    let source = FileGuest::source(settings, None).unwrap();
    let words = source.pause().unwrap_err().to_string();
    assert!(words.contains("the pause command") && words.contains("; and then the resume command"), "{words}");
    assert!(source.resume().is_err());
    fs::write(&allowed, "").unwrap();
    source.resume().unwrap();
}

#[test]
fn images_that_change_their_length_or_vanish_are_named() {
    let folder = TempDir::new().unwrap();
    let image = folder.path().join("image");
    let append = format!("printf x >> '{}'", image.display());
    let source = FileGuest::source(logged(folder.path(), &append), None).unwrap();
    let words = source.pause().unwrap_err().to_string();
    assert!(words.contains("image is 5001 bytes long, it was 5000"), "{words}");
    assert_eq!(log(folder.path()), "pause resume");

    let source = FileGuest::source(one_image(folder.path()), None).unwrap();
    fs::File::options().write(true).open(&image).unwrap().set_len(4999).unwrap();
    assert!(source.save().unwrap_err().to_string().contains("is 4999 bytes long, it was 5000"));
    fs::rename(&image, folder.path().join("moved")).unwrap();
    assert!(source.save().unwrap_err().to_string().contains("No such file"));
    fs::write(&image, [7; 5000]).unwrap();
    assert!(source.save().unwrap_err().to_string().contains("another file took the place of"));
    assert!(
        FileGuest::source(settings(&[("ram", folder.path())]), None).unwrap_err().to_string().contains("image ram")
    );
}
