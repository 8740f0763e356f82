//! The guests of a program, and their life after the verdict: a guest that lives in this process is not ended by it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::config::settings::{destination_files, source_files, workload};
use crate::config::tables::{Config, GuestTable};
use crate::guest::file::FileGuest;
use crate::guest::workload::{Workload, WorkloadStatus};
use crate::guest::{Guest, GuestError};
use crate::report::human;

/// A guest at one end, and whether it lives in this process.
#[derive(Clone, Debug)]
pub(super) struct Hosted {
    pub(super) guest: Arc<dyn Guest>,
    workload: Option<Arc<Workload>>,
}

impl Hosted {
    /// The guest to be sent. May take seconds: a workload's memory is filled.
    pub(super) async fn source(config: &Config) -> Result<Self, GuestError> {
        let table = config.guest.clone();
        blocking(move || match table {
            GuestTable::Workload(table) => Workload::source(workload(&table)).map(Self::workload),
            GuestTable::File(table) => FileGuest::source(source_files(&table), guard_program()).map(Self::elsewhere),
        })
        .await
    }

    /// The guest to be received. With `run` files become their copies.
    pub(super) async fn destination(config: &Config, run: bool) -> Result<Self, GuestError> {
        let table = config.guest.clone();
        blocking(move || match table {
            GuestTable::Workload(_) => Ok(Self::workload(Workload::destination())),
            GuestTable::File(table) => FileGuest::destination(destination_files(&table, run)).map(Self::elsewhere),
        })
        .await
    }

    fn workload(workload: Arc<Workload>) -> Self {
        Self { guest: workload.clone(), workload: Some(workload) }
    }

    fn elsewhere(guest: Arc<FileGuest>) -> Self {
        Self { guest, workload: None }
    }

    /// Does the guest live here, so that the end of this program is its end?
    pub(super) fn lives_here(&self) -> bool {
        self.workload.is_some()
    }

    /// Do its writers run in this process?
    pub(super) fn runs_here(&self) -> bool {
        self.workload.as_ref().is_some_and(|workload| workload.status().running)
    }

    /// Lets it live for `time`, or until `stop`; then compares every page with what its writers last wrote there. `None`
    /// if it does not live here.
    pub(super) async fn live(&self, time: Option<Duration>, stop: CancellationToken) -> Option<WorkloadStatus> {
        let workload = self.workload.clone()?;
        match time {
            Some(time) => drop(tokio::time::timeout(time, stop.cancelled()).await),
            None => stop.cancelled().await,
        }
        Some(blocking(move || workload.check_all()).await)
    }
}

/// How the guest fares, in one line.
pub(super) fn describe(status: &WorkloadStatus) -> String {
    let state = if status.running { "alive" } else { "paused" };
    let mut line = format!(
        "guest {state}: {} writes here, {} stamps checked, {} stale pages",
        human::count(status.writes_since_start_here),
        human::count(status.pages_checked),
        human::count(status.stale_pages),
    );
    if let Some(first) = &status.first_stale {
        line.push_str(", the first: ");
        line.push_str(first);
    }
    line
}

/// This program, to be run as a guard.
fn guard_program() -> Option<PathBuf> {
    std::env::current_exe().ok()
}

/// Runs what may take long where blocking is allowed.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}
