//! `--report FILE`: the reports that are written after a migration, each through an outlet of its own. If a disk or a
//! pipe blocks, the report is lost, and the end of the program is delayed for a limited time only.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use super::check;
use crate::config::Config;
use memferry::events::Ended;
use memferry::outlet::{Outlet, Sink};
use memferry_report::account::Account;
use memferry_report::html::Page;
use memferry_report::todo::Conclusion;
use memferry_report::{Ends, Report, write};
use memferry_stages::untrusted::Untrusted;

/// The time limit for all of them.
const TIME: Duration = Duration::from_secs(10);

/// The data of a report.
#[derive(Clone, Copy)]
pub(super) struct Ending<'a> {
    /// The ends that this process hosts.
    pub(super) role: Ends,
    pub(super) verdict: &'a Ended,
    pub(super) account: &'a Account,
    /// The account of the other end, if it was in this process.
    pub(super) far: Option<&'a Account>,
    pub(super) conclusions: &'a [Conclusion],
}

/// The reports in progress.
pub(super) struct Reports(Vec<Writing>);

/// One report in progress.
struct Writing {
    file: PathBuf,
    outcome: Outcome,
    /// `None` if it could not begin.
    outlet: Option<Outlet<Vec<u8>>>,
}

/// The error, if it could not be written.
#[derive(Clone, Default)]
struct Outcome(Arc<Mutex<Option<io::Error>>>);

impl Outcome {
    fn failed(&self, error: io::Error) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    }

    fn error(&self) -> Option<io::Error> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Reports {
    /// Begins to write all reports that the options name.
    pub(super) fn begin(files: &[PathBuf], config: &Config, ending: &Ending<'_>) -> Self {
        if files.is_empty() {
            return Self(Vec::new());
        }
        let Ending { role, verdict, account, far, conclusions } = *ending;
        let report = Report::new(role, verdict, account, far);
        let text = |file: &Path| {
            if !file.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("html")) {
                return report.to_json();
            }
            let (settings, configuration) = (&config.source(), &check::written(config));
            let written = SystemTime::now();
            let page = Page { report: &report, account, other: far, settings, configuration, conclusions, written };
            page.render().into_bytes()
        };
        Self(files.iter().map(|file| Writing::begin(file.clone(), text(file))).collect())
    }

    /// Waits for the reports; returns those that are lost, with the reasons.
    pub(super) fn finish(self) -> Vec<String> {
        let end = Instant::now() + TIME;
        self.0.iter().filter_map(|writing| writing.finish(end)).collect()
    }
}

impl Writing {
    fn begin(file: PathBuf, text: Vec<u8>) -> Self {
        let outcome = Outcome::default();
        let writer = Writer { file: file.clone(), outcome: outcome.clone() };
        let outlet = match Outlet::begin("memferry-report", 1, writer) {
            Ok(outlet) => {
                outlet.put(text);
                Some(outlet)
            }
            Err(error) => {
                outcome.failed(error);
                None
            }
        };
        Self { file, outcome, outlet }
    }

    fn finish(&self, end: Instant) -> Option<String> {
        let file = Untrusted::from(self.file.as_path());
        let left = end.saturating_duration_since(Instant::now());
        if self.outlet.as_ref().is_some_and(|outlet| !outlet.close(left)) {
            return Some(format!("the report {file}: it has taken too little for {TIME:?}"));
        }
        self.outcome.error().map(|error| format!("the report {file}: {error}"))
    }
}

/// The work of the outlet's thread.
struct Writer {
    file: PathBuf,
    outcome: Outcome,
}

impl Sink<Vec<u8>> for Writer {
    fn take(&mut self, text: Vec<u8>) {
        if let Err(error) = write(&self.file, &text) {
            self.outcome.failed(error);
        }
    }

    fn dropped(&mut self, _: u64) {
        unreachable!("there is one text, and room for it");
    }
}
