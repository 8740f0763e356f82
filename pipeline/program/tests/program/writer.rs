//! A process that writes to a file continuously, and the commands that pause and resume it: `sh pause` and `sh
//! resume`.

use std::env;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};

use crate::harness::{Scene, until};

/// The settings that pause a writer.
pub(crate) const COMMANDS: [&str; 2] =
    ["guest.file.pause=[\"sh\", \"pause\"]", "guest.file.resume=[\"sh\", \"resume\"]"];

/// The page size of the file, and the distance between the first words of its pages.
const PAGE: u64 = 4096;
/// The longest that a writer lives, even if it is not killed.
const LIFE: Duration = Duration::from_secs(180);

/// A process that numbers the pages of a file, one after another, in a cycle: at every moment a page's number is that
/// of the page before it, or one less. Dropped, it is killed.
pub(crate) struct Writer {
    child: Child,
}

impl Writer {
    /// Begins to write to the image `name`, with a rest after each page, and creates the scripts that pause and
    /// resume it.
    pub(crate) fn begin(scene: &Scene, name: &str, rest: Duration) -> Self {
        let image = fs::File::options().write(true).open(scene.path(name)).unwrap();
        let pages = image.metadata().unwrap().len() / PAGE;
        (0..pages).for_each(|page| image.write_all_at(&[0; 8], page * PAGE).unwrap());
        let child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "writer::acts_as_writer", "--ignored", "--nocapture"])
            .env("MEMFERRY_TEST_WRITES", scene.path(name))
            .env("MEMFERRY_TEST_RESTS", rest.as_micros().to_string())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let writer = Self { child };
        let pid = writer.child.id();
        // A stopped process may still complete its last write until its state says otherwise.
        let stopped = format!("until grep -q '^State:.T' /proc/{pid}/status; do :; done");
        scene.write("pause", format!("echo pause >> log; kill -STOP {pid}; {stopped}"));
        scene.write("resume", format!("echo resume >> log; kill -CONT {pid}"));
        until("the writer has written to every page", || number(&scene.path(name), 0) >= 2);
        writer
    }

    /// Is it stopped?
    pub(crate) fn is_stopped(&self) -> bool {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        status.lines().any(|line| line.starts_with("State:\tT"))
    }

    /// Asserts that it is not stopped, and writes.
    #[track_caller]
    pub(crate) fn continues(&self, image: &Path) {
        until("the writer runs", || !self.is_stopped());
        let before = number(image, 0);
        until("the writer writes", || number(image, 0) > before);
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        kill_process(Pid::from_child(&self.child), Signal::KILL).unwrap();
        self.child.wait().unwrap();
    }
}

/// The number on a page.
pub(crate) fn number(image: &Path, page: u64) -> u64 {
    let mut word = [0; 8];
    fs::File::open(image).unwrap().read_exact_at(&mut word, page * PAGE).unwrap();
    u64::from_le_bytes(word)
}

/// Is this the content of the file at one moment?
#[track_caller]
pub(crate) fn is_of_one_moment(image: &Path) {
    let pages = fs::metadata(image).unwrap().len() / PAGE;
    let numbers: Vec<u64> = (0..pages).map(|page| number(image, page)).collect();
    assert!(numbers[0] > 1, "the writer never wrote");
    assert!(numbers.is_sorted_by(|a, b| a >= b), "a page is newer than one that is written before it");
    assert!(numbers[0] - numbers[numbers.len() - 1] <= 1, "a page is older than it can be");
}

#[test]
#[ignore = "the writing process of other tests"]
fn acts_as_writer() {
    set_parent_process_death_signal(Some(Signal::KILL)).unwrap();
    let file = fs::File::options().write(true).open(env::var("MEMFERRY_TEST_WRITES").unwrap()).unwrap();
    let rest = Duration::from_micros(env::var("MEMFERRY_TEST_RESTS").unwrap().parse().unwrap());
    let pages = file.metadata().unwrap().len() / PAGE;
    let begun = Instant::now();
    for number in 1_u64.. {
        for page in 0..pages {
            file.write_all_at(&number.to_le_bytes(), page * PAGE).unwrap();
            if !rest.is_zero() {
                thread::sleep(rest);
            }
        }
        if begun.elapsed() > LIFE {
            return;
        }
    }
}
