//! The guests of a program, and their life after the verdict: a guest that lives in this process outlives its
//! migration.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::config;
use crate::config::settings::{destination_files, source_files, workload};
use crate::config::tables::{Config, GuestTable, WorkloadTable};
use memferry::geometry::{BlockInfo, PageSize};
use memferry::guest::hints::PageHinter;
use memferry::guest::{DestinationGuest, Guest, GuestBuilder, GuestError, GuestState, RunState, SourceGuest};
use memferry::human;
use memferry::memory::GuestMemory;
use memferry_guests::file::FileGuest;
use memferry_guests::workload::Workload;

/// A guest to send, and its home.
#[derive(Debug)]
pub(super) struct Hosted {
    pub(super) guest: Arc<dyn SourceGuest>,
    pub(super) home: Home,
}

/// A guest that was built at the destination, and its home.
#[derive(Debug)]
pub(super) struct Arriving {
    guest: Arc<dyn DestinationGuest>,
    pub(super) home: Home,
}

/// Builds the guest at the destination, of any kind.
pub(super) type Builder =
    Box<dyn FnOnce(PageSize, &[BlockInfo], &GuestState) -> Result<Arc<Arriving>, GuestError> + Send>;

/// The resident guest, if it lives in this process.
#[derive(Clone, Debug)]
pub(super) struct Home(Option<Arc<dyn Resident>>);

/// A guest that lives in this process.
trait Resident: Send + Sync + std::fmt::Debug {
    /// Does it run?
    fn runs(&self) -> bool;

    /// Checks the guest's memory against its own record of writes. May take as long as reading all of its memory.
    fn check(&self) -> Health;
}

/// The result of a check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Health {
    /// Does every checked page have the content that the guest wrote?
    pub(super) is_sound: bool,
    /// A one-line summary.
    pub(super) line: String,
}

impl Hosted {
    /// Creates the guest to send. May take seconds, because a workload's memory is filled; this can be cancelled.
    pub(super) async fn source(config: &Config, cancel: &CancellationToken) -> Result<Self, GuestError> {
        let (config, cancel) = (config.clone(), cancel.clone());
        blocking(move || {
            let hosted = match &config.guest {
                GuestTable::Workload(table) => Workload::source_unless(workload(table), &cancel).map(Self::here),
                GuestTable::File(table) => FileGuest::source(source_files(table), guard_program())
                    .map(|guest| Self { guest, home: Home(None) }),
                GuestTable::Kvm(table) => machine::source(table),
            }?;
            config::fits(&config, hosted.guest.memory().layout().bytes()).map_err(GuestError)?;
            Ok(hosted)
        })
        .await
    }

    fn here<G: SourceGuest + Resident + 'static>(guest: Arc<G>) -> Self {
        Self { guest: guest.clone(), home: Home(Some(guest)) }
    }
}

/// What builds the guest at the destination. With `run`, file guests are copied to new files.
pub(super) async fn destination(config: &Config, run: bool) -> Result<Builder, GuestError> {
    let table = config.guest.clone();
    blocking(move || match table {
        GuestTable::Workload(WorkloadTable { shared: Some(shared), .. }) => {
            Ok(arriving(Workload::destination_sharing(shared.path), Arriving::here))
        }
        GuestTable::Workload(_) => Ok(arriving(Workload::destination(), Arriving::here)),
        GuestTable::File(table) => {
            let builder = FileGuest::destination(destination_files(&table, run))?;
            Ok(arriving(builder, |guest| Arriving { guest, home: Home(None) }))
        }
        GuestTable::Kvm(table) => machine::destination(&table),
    })
    .await
}

/// Where a builder leaves what it has built.
pub(super) type Built = Arc<OnceLock<Arc<Arriving>>>;

/// A builder that leaves the guest in `built` too: whoever holds that decides when it is dropped.
pub(super) fn keeping(builder: Builder, built: Built) -> Builder {
    Box::new(move |page_size, blocks, setup| {
        let guest = builder(page_size, blocks, setup)?;
        Ok(built.get_or_init(|| guest).clone())
    })
}

fn arriving<B: GuestBuilder>(builder: B, home: fn(Arc<B::Built>) -> Arriving) -> Builder {
    Box::new(move |page_size, blocks, setup| Ok(Arc::new(home(builder.build(page_size, blocks, setup)?))))
}

impl Arriving {
    fn here<G: DestinationGuest + Resident + 'static>(guest: Arc<G>) -> Self {
        Self { guest: guest.clone(), home: Home(Some(guest)) }
    }
}

impl Guest for Arriving {
    fn memory(&self) -> GuestMemory {
        self.guest.memory()
    }

    fn page_hinters(&self) -> Vec<Arc<dyn PageHinter>> {
        self.guest.page_hinters()
    }

    fn can_be_userfaulted(&self) -> Result<(), GuestError> {
        self.guest.can_be_userfaulted()
    }

    fn mapping_is_exclusive(&self) -> Result<(), GuestError> {
        self.guest.mapping_is_exclusive()
    }
}

impl DestinationGuest for Arriving {
    fn make_durable(&self) -> Result<(), GuestError> {
        self.guest.make_durable()
    }

    fn prepare(&self, state: &GuestState) -> Result<(), GuestError> {
        self.guest.prepare(state)
    }

    fn unprepare(&self) -> Result<(), GuestError> {
        self.guest.unprepare()
    }

    fn start(&self, run_state: RunState) -> Result<(), GuestError> {
        self.guest.start(run_state)
    }
}

impl Home {
    /// Does the guest live in this process, so that it ends with the program?
    pub(super) fn lives_here(&self) -> bool {
        self.0.is_some()
    }

    /// Does it run in this process?
    pub(super) fn runs_here(&self) -> bool {
        self.0.as_ref().is_some_and(|resident| resident.runs())
    }

    /// Lets the guest run for `time`, or until `stop`, then checks its memory. `None` if it does not live here.
    pub(super) async fn live(&self, time: Option<Duration>, stop: CancellationToken) -> Option<Health> {
        let resident = self.0.clone()?;
        match time {
            Some(time) => drop(tokio::time::timeout(time, stop.cancelled()).await),
            None => stop.cancelled().await,
        }
        Some(blocking(move || resident.check()).await)
    }
}

/// Can the guest to send be created? Creates nothing.
pub(super) fn check_source(config: &Config) -> Result<(), GuestError> {
    match &config.guest {
        GuestTable::Workload(table) => Workload::check(workload(table)),
        GuestTable::File(table) => FileGuest::source(source_files(table), None).map(drop),
        GuestTable::Kvm(table) => machine::check(table),
    }
}

/// Is there a place for the guest at the destination? Creates nothing.
pub(super) fn check_destination(config: &Config, run: bool) -> Result<(), GuestError> {
    match &config.guest {
        GuestTable::File(table) => FileGuest::check_destination(destination_files(table, run)),
        GuestTable::Workload(_) | GuestTable::Kvm(_) => Ok(()),
    }
}

impl Resident for Workload {
    fn runs(&self) -> bool {
        self.status().running
    }

    fn check(&self) -> Health {
        let status = self.check_all();
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
        Health { is_sound: status.stale_pages == 0, line }
    }
}

#[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
mod machine {
    use super::{Arriving, Builder, GuestError, Health, Hosted, Resident, arriving, human};
    use memferry_guests::kvm::{KvmGuest, KvmSettings};

    pub(super) fn source(table: &KvmSettings) -> Result<Hosted, GuestError> {
        KvmGuest::source(table.clone()).map(Hosted::here)
    }

    pub(super) fn check(table: &KvmSettings) -> Result<(), GuestError> {
        KvmGuest::check(table.clone())
    }

    /// This end chooses its own dirty log, because the guest may be sent on from here.
    pub(super) fn destination(table: &KvmSettings) -> Result<Builder, GuestError> {
        let builder = match &table.shared {
            Some(shared) => KvmGuest::destination_sharing(table.dirty_log, shared.path.clone()),
            None => KvmGuest::destination(table.dirty_log),
        };
        Ok(arriving(builder, Arriving::here))
    }

    impl Resident for KvmGuest {
        fn runs(&self) -> bool {
            self.status().running
        }

        /// The machine checks its pages itself, continuously.
        fn check(&self) -> Health {
            let status = self.status();
            let state = match (&status.failed, status.running) {
                (Some(_), _) => "dead",
                (None, true) => "alive",
                (None, false) => "paused",
            };
            let mut line = format!(
                "guest {state}: {} heartbeats here, pass {}, {} pages checked here, {} wrong pages",
                human::count(status.heartbeats),
                human::count(status.pass.into()),
                human::count(status.pages),
                human::count(status.troubles),
            );
            if let Some(first) = status.first_trouble.iter().chain(&status.failed).next() {
                line.push_str(", the first: ");
                line.push_str(first);
            }
            Health { is_sound: status.troubles == 0 && status.failed.is_none(), line }
        }
    }
}

#[cfg(not(all(feature = "kvm", target_os = "linux", target_arch = "x86_64")))]
mod machine {
    use super::{Builder, GuestError, Hosted};
    use memferry_guests::kvm::KvmSettings;

    /// The configuration's rules already refuse it.
    pub(super) fn source(_: &KvmSettings) -> Result<Hosted, GuestError> {
        Err(GuestError("this program was built without KVM".into()))
    }

    pub(super) fn destination(_: &KvmSettings) -> Result<Builder, GuestError> {
        Err(GuestError("this program was built without KVM".into()))
    }

    pub(super) fn check(table: &KvmSettings) -> Result<(), GuestError> {
        source(table).map(drop)
    }
}

/// The command that runs this program as a guard.
fn guard_program() -> Option<PathBuf> {
    std::env::current_exe().ok()
}

/// Runs a slow call where blocking is allowed.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}
