//! Tests that cannot run on this host. They pass, and a line at the end of the binary's output counts them:
//!
//! ```text
//! skipped: 2 of it: KVM is not here, 2 times
//! ```
//!
//! The test binaries of other crates include this file, because they do not depend on this crate.

use std::collections::BTreeMap;
use std::ffi::c_int;
use std::io::Write;
use std::sync::Mutex;

/// How often each reason was given.
static REASONS: Mutex<BTreeMap<String, u64>> = Mutex::new(BTreeMap::new());

unsafe extern "C" {
    safe fn atexit(function: extern "C" fn()) -> c_int;
}

/// Notes that a test, or a part of it, is skipped, and why.
///
/// # Panics
/// If the process cannot register what prints the line.
pub fn skipped(why: impl std::fmt::Display) {
    println!("skipped: {why}");
    let mut reasons = REASONS.lock().unwrap();
    // The test harness has no end of its own that a test could use, and captures what tests print.
    if reasons.is_empty() {
        assert_eq!(atexit(print), 0, "the line of skipped tests cannot be registered");
    }
    *reasons.entry(why.to_string()).or_default() += 1;
}

extern "C" fn print() {
    let Ok(reasons) = REASONS.lock() else { return };
    let binary = std::env::current_exe().unwrap_or_default();
    let name = binary.file_stem().unwrap_or_default().to_string_lossy();
    // Cargo appends a hash.
    let name = name.rsplit_once('-').map_or(&*name, |(name, _)| name);
    let each: Vec<_> = reasons.iter().map(|(why, times)| format!("{why}, {times} times")).collect();
    let line = format!("skipped: {} of {name}: {}\n", reasons.values().sum::<u64>(), each.join("; "));
    // Nothing can be done about a closed output.
    drop(std::io::stderr().write_all(line.as_bytes()));
}
