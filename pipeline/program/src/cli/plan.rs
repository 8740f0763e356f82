//! `memferry plan`: the forecast for a recorded guest, and changes that would improve it.

use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;

use memferry_stages::untrusted::{Untrusted, shown_json};

use super::args::Plan;
use super::verdict::{BAD_USAGE, DONE, FAILED};
use super::{complain, print};
use crate::config::{self, Config, ConfigError, Purpose};
use memferry::host::beyond_half_of_memory;
use memferry_plan::answer::Answer;
use memferry_plan::picture::draw;
use memferry_plan::trace::{GuestFacts, read};
use memferry_plan::written::Written;

/// Bits of memory that a plan uses for each page of the guest.
const BITMAPS: u64 = 12;

/// Runs the plan, and returns the exit code.
pub(super) fn run(options: &Plan) -> ExitCode {
    let name = Untrusted::from(options.trace.as_path());
    let trace = match read(&options.trace) {
        Ok(trace) => trace,
        Err(error) => return complain(&format!("{name}: {error}"), FAILED),
    };
    let needed = trace.guest.pages() / 8 * BITMAPS;
    if let Some(host) = beyond_half_of_memory(needed) {
        let why = format!("a plan for its guest takes {needed} bytes, more than half of {host}");
        return complain(&format!("{name}: {why}"), FAILED);
    }
    let config = match &options.config {
        Some(config) => config::load(config, &options.sets, Purpose::Plan),
        None => recorded(&options.trace, &trace.guest, &options.sets),
    };
    let settings = match config {
        Ok(config) => config.source(),
        Err(error) => {
            message!("{}", error.render(std::io::stderr().is_terminal()));
            return BAD_USAGE.into();
        }
    };
    let answer = Answer::of(&Written::of(&trace), &settings, &options.bandwidths);
    if options.json {
        print(&shown_json(serde_json::to_string_pretty(&answer).expect("plain values become JSON")), DONE)
    } else {
        print(&draw(&answer), DONE)
    }
}

/// The settings of the recording, changed by the `--set`s. A trace does not contain guest and address, and they do
/// not matter: they are of a kind that refuses no setting.
fn recorded(trace: &Path, guest: &GuestFacts, sets: &[String]) -> Result<Config, ConfigError> {
    let is_stored = guest.settings.raw().lines().any(|line| line.starts_with("after = "));
    let address = if is_stored { "file:/recorded" } else { "tcp:recorded:1" };
    let text = format!(
        "{}\n[guest.workload]\nmemory = \"192 GiB\"\n\n[transport]\naddress = \"{address}\"\n",
        guest.settings.raw()
    );
    config::parse(&format!("the settings in {}", Untrusted::from(trace)), &text, sets, Purpose::Plan)
}
