//! What survives a lost connection: the guest, its memory and its logs. Every call into the guest is here, besides those
//! to its page hinters.

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use memferry_stages::bitmap::DirtyBitmap;
use memferry_stages::dirty_log::{DirtyLog, LogCall};
use memferry_stages::geometry::Layout;
use memferry_stages::memory::GuestMemory;
use memferry_stages::page_hashes::PageHashes;
use memferry_stages::wire::messages::{StateChunk, StatePhase};
use memferry_stages::wire::{Features, Message, bitmap_parts};

use super::hints::Hints;
use crate::guest::{GuestError, GuestState, RunState, SourceGuest};
use crate::migration::arming::{Armed, arm};
use crate::migration::checker::Checker;
use crate::migration::digests::{self, Digests, LeftOut};
use crate::migration::error::{MigrationError, guarded};
use crate::migration::link::Identity;
use crate::migration::source_graph::Lanes;
use crate::migration::state::{self, Room};
use crate::migration::{asked, blocking};
use crate::settings::Verify;

/// See the [module](self).
pub(super) struct Transfer {
    pub(super) guest: Arc<dyn SourceGuest>,
    pub(super) memory: GuestMemory,
    /// Did the guest run before the migration?
    pub(super) was: RunState,
    pub(super) hints: Hints,
    pub(super) logs: Vec<Arc<dyn DirtyLog>>,
    /// Set once the logs are armed.
    pub(super) bitmap: Option<Arc<DirtyBitmap>>,
    /// The pages that were untouched when the logs had been armed.
    pub(super) untouched: Option<Arc<DirtyBitmap>>,
    /// The limit for guest state, and how much of it is used.
    pub(super) state_room: Room,
    /// The saved device state, until it is sent.
    device: Option<GuestState>,
    /// The hashes of the pages as they were sent, once the logs are armed, if they are what is compared.
    pub(super) page_hashes: Option<Arc<PageHashes>>,
    checker: Option<Checker>,
    /// The pages that the digests leave out, once the digests are begun.
    left_out: LeftOut,
    /// The pages that the destination was to discard, in a switch to postcopy.
    named: Option<DirtyBitmap>,
    /// Pages that were missing when the guest was handed over.
    pub(super) missing_pages: u64,
    /// What both ends have agreed on, once the destination is being reached.
    pub(super) agreement: Option<Agreement>,
    /// What the lanes know, while there is no connection.
    pub(super) lanes: Option<Lanes>,
}

/// What both ends agree on in the first attempt.
#[derive(Clone)]
pub(super) struct Agreement {
    pub(super) features: Features,
    pub(super) identity: Identity,
}

impl Transfer {
    pub(super) fn new(guest: Arc<dyn SourceGuest>, max_state_bytes: u64) -> Self {
        let memory = guest.memory();
        Self {
            was: guest.run_state(),
            hints: Hints::new(guest.page_hinters(), &memory),
            guest,
            memory,
            logs: Vec::new(),
            bitmap: None,
            untouched: None,
            state_room: Room::new(max_state_bytes),
            device: None,
            page_hashes: None,
            checker: None,
            left_out: None,
            named: None,
            missing_pages: 0,
            agreement: None,
            lanes: None,
        }
    }

    pub(super) fn layout(&self) -> &Layout {
        self.memory.layout()
    }

    pub(super) fn page_bytes(&self, pages: u64) -> u64 {
        pages * self.memory.page_size().bytes() as u64
    }

    /// Asks for the logs that see every write.
    pub(super) async fn ask_for_logs(&mut self) -> Result<(), MigrationError> {
        let guest = self.guest.clone();
        self.logs = blocking(move || guest.dirty_logs()).await?;
        Ok(())
    }

    /// Starts the logs, and only then asks which pages are untouched, so that a log sees every later write. All bits
    /// are set but those of pages that never travel: the bitmap is the truth from here on (law 1).
    pub(super) async fn arm(&mut self, verify: Verify) -> Result<(), MigrationError> {
        let (memory, logs) = (self.memory.clone(), self.logs.clone());
        let (excluded, may_leave_out) = (self.hints.excluded_ranges(), self.hints.may_leave_out());
        let Armed { bitmap, exclusions, untouched } =
            blocking(move || arm(&memory, &logs, &excluded, may_leave_out)).await?;
        self.bitmap = Some(bitmap);
        self.untouched = Some(untouched);
        self.hints.armed(exclusions);
        self.page_hashes = (verify == Verify::Pages).then(|| Arc::new(PageHashes::new(self.layout())));
        Ok(())
    }

    /// Starts to check memory against the page hashes, if there are any, until digests are begun.
    ///
    /// # Errors
    /// When the check cannot start.
    pub(super) fn start_check(&mut self) -> Result<(), MigrationError> {
        if let Some(page_hashes) = &self.page_hashes {
            let checker = Checker::start(self.memory.clone(), page_hashes.clone());
            self.checker = Some(checker.map_err(MigrationError::Check)?);
        }
        Ok(())
    }

    /// The time of the digests: measured on a sample, and counted for both ends, which may run on one machine.
    pub(super) async fn digest_time(&self) -> Result<Duration, MigrationError> {
        let (memory, exclusions) = (self.memory.clone(), self.hints.exclusions());
        let left_out = move || exclusions.map(|exclusions| exclusions.left_out());
        blocking(move || digests::downtime(&memory, left_out().as_ref())).await.map_err(MigrationError::Digest)
    }

    pub(super) async fn throttle(&self, percent: u8) -> Result<(), MigrationError> {
        let guest = self.guest.clone();
        asked(move || guest.throttle(percent)).await
    }

    pub(super) async fn pause(&self) -> Result<(), MigrationError> {
        let guest = self.guest.clone();
        Ok(blocking(move || guest.pause()).await?)
    }

    /// The guest is paused: saves its device state, and keeps it until it is sent.
    pub(super) async fn save(&mut self) -> Result<(), MigrationError> {
        let guest = self.guest.clone();
        self.device = Some(blocking(move || guest.save()).await?);
        Ok(())
    }

    pub(super) async fn release(&self) -> Result<(), MigrationError> {
        let guest = self.guest.clone();
        Ok(blocking(move || guest.release()).await?)
    }

    /// The saved device state, in chunks.
    pub(super) fn take_state(&mut self) -> Result<Vec<StateChunk>, MigrationError> {
        let device = self.device.take().unwrap_or_default();
        Ok(state::chunks(StatePhase::Device, device, &mut self.state_room)?.into_iter().collect())
    }

    /// From here on bits leave the bitmap only when pages are sent. Pages left out so far are left out of the digests.
    /// Digests of the whole memory are computed from here on. Sums of page hashes are made when they are awaited, after the last
    /// round.
    pub(super) fn start_digests(&mut self) -> BoxFuture<'static, Result<Digests, MigrationError>> {
        self.left_out = self.left_out();
        self.checker.iter().for_each(Checker::stop);
        let (memory, left_out) = (self.memory.clone(), self.left_out.clone());
        match self.page_hashes.clone() {
            Some(page_hashes) => Box::pin(blocking(move || sums(&memory, &page_hashes, left_out))),
            None => {
                let pending = digests::start(&memory, left_out);
                Box::pin(async move { pending.finish().await.map_err(MigrationError::Digest) })
            }
        }
    }

    /// The pages that digests leave out: those that do not travel, and in a switch to postcopy those that the destination does not have.
    fn left_out(&self) -> LeftOut {
        let out = self.hints.exclusions().map(|exclusions| exclusions.left_out());
        let (Some(_), Some(bitmap)) = (&self.named, &self.bitmap) else { return out.map(Arc::new) };
        let out = out.unwrap_or_else(|| DirtyBitmap::empty(bitmap.layout()));
        bitmap.all_dirty_extents().for_each(|at| _ = out.set_mask(at, bitmap.peek(at)));
        Some(Arc::new(out))
    }

    /// The pages that the destination is to discard: all that are dirty.
    pub(super) fn name_missing(&mut self) -> Vec<Message> {
        let Some(bitmap) = &self.bitmap else { return Vec::new() };
        let named = bitmap.copied();
        let messages = bitmap_parts(&named).map(Message::Missing).chain([Message::Discard]).collect();
        self.named = Some(named);
        messages
    }

    /// Those that the last sync has found besides.
    pub(super) fn name_more(&mut self) -> Vec<Message> {
        let (Some(bitmap), Some(named)) = (&self.bitmap, &self.named) else { return Vec::new() };
        self.missing_pages = bitmap.count();
        let more = DirtyBitmap::empty(bitmap.layout());
        bitmap.all_dirty_extents().for_each(|at| _ = more.set_mask(at, bitmap.peek(at) & !named.peek(at)));
        bitmap_parts(&more).map(Message::Missing).collect()
    }

    /// The destination runs the guest, and has these pages: all others are dirty.
    pub(super) fn sends_the_rest(&self, received: &DirtyBitmap) {
        let Some(bitmap) = &self.bitmap else { return };
        for at in bitmap.extents().filter(|at| !self.layout().blocks()[at.block as usize].ignored) {
            _ = bitmap.take(at);
            bitmap.set_mask(at, self.layout().valid_mask(at) & !received.peek(at));
        }
    }

    /// Was a switch to postcopy begun?
    pub(super) fn is_switching(&self) -> bool {
        self.named.is_some()
    }

    /// The destination sent its hashes of a stretch that differs: finds the first page that differs.
    pub(super) async fn name_page(&self, message: &Message) -> String {
        let Message::PageHashes { first, hashes } = message else { return "no page was named".into() };
        let (memory, first, hashes) = (self.memory.clone(), *first, hashes.clone());
        let (left_out, recorded) = (self.left_out.clone(), self.page_hashes.clone());
        let differing = move || digests::first_differing_page(&memory, recorded.as_deref(), &left_out, first, &hashes);
        match blocking(differing).await {
            Ok(Some(at)) => format!("the first page that differs is {}", digests::describe(self.layout(), at)),
            Ok(None) => "no page differs any more: the memory of one side changes while it is paused".into(),
            Err(error) => format!("the differing page cannot be named: {error}"),
        }
    }

    /// From here on nothing here resumes the guest on its own. Until this has succeeded no part of Go leaves.
    pub(super) async fn commit(&self, destination: String) -> Result<(), MigrationError> {
        let guest = self.guest.clone();
        Ok(blocking(move || guest.committed(&destination)).await?)
    }

    /// Puts the guest where it was before it was paused.
    pub(super) async fn resume(&self, reacquire: bool, run: bool) -> Result<(), MigrationError> {
        let guest = self.guest.clone();
        asked(move || {
            if reacquire {
                guest.reacquire()?;
            }
            if run { guest.resume() } else { Ok(()) }
        })
        .await
    }

    /// The guest may run elsewhere: nothing here needs to guard it.
    pub(super) async fn moved(&self) -> Result<(), MigrationError> {
        let guest = self.guest.clone();
        let moved = move || {
            guest.moved();
            Ok::<_, GuestError>(())
        };
        asked(moved).await
    }

    /// The connection is lost: what was begun for a switchover is given up.
    pub(super) fn interrupted(&mut self, lanes: Lanes) {
        self.lanes = Some(lanes);
        self.device = None;
        self.left_out = None;
        self.checker = None;
    }

    /// The destination has reported what it has: pages that were in flight and did not arrive are dirty again, and nothing is known of what the
    /// destination holds of them. Returns how many they are.
    ///
    /// # Errors
    /// When the destination has acknowledged what it has not.
    pub(super) fn put_back(&mut self, frames: &[u64], received: &DirtyBitmap) -> Result<u64, MigrationError> {
        self.named = None;
        let (Some(bitmap), Some(lanes)) = (&self.bitmap, &self.lanes) else { return Ok(0) };
        let lost = lanes.put_back(self.layout(), frames).map_err(|sent| {
            MigrationError::Protocol(format!("{frames:?} frames of each lane are loaded, and a lane sent {sent}"))
        })?;
        lost.all_dirty_extents().for_each(|at| _ = bitmap.set_mask(at, lost.peek(at)));
        self.page_hashes.iter().for_each(|page_hashes| page_hashes.forget(&lost));
        self.check_received(bitmap, received)?;
        Ok(lost.count())
    }

    /// Every page has arrived that is not dirty, unless it does not travel.
    fn check_received(&self, bitmap: &DirtyBitmap, received: &DirtyBitmap) -> Result<(), MigrationError> {
        let left_out = self.hints.exclusions().map(|exclusions| exclusions.left_out());
        for at in bitmap.extents().filter(|at| !self.layout().blocks()[at.block as usize].ignored) {
            let excused = left_out.as_ref().map_or(0, |left_out| left_out.peek(at));
            let missing = self.layout().valid_mask(at) & !(bitmap.peek(at) | received.peek(at) | excused);
            if missing != 0 {
                let page = digests::describe(self.layout(), at.page(missing.trailing_zeros()));
                return Err(MigrationError::Protocol(format!("{page} was acknowledged, and has not arrived")));
            }
        }
        Ok(())
    }

    /// Stops every log, even if one of them fails. Returns the failures.
    pub(super) async fn stop_logs(&self) -> Vec<MigrationError> {
        let mut failures = Vec::new();
        for log in self.logs.clone() {
            let stop = move || log.stop().map_err(|error| MigrationError::Log { doing: LogCall::Stop, error });
            failures.extend(guarded(blocking(stop)).await.err());
        }
        failures
    }
}

/// The sums of page hashes, unless memory differs from what was sent where nothing is to be sent. May block.
fn sums(memory: &GuestMemory, page_hashes: &PageHashes, left_out: LeftOut) -> Result<Digests, MigrationError> {
    let differs = digests::first_unrecorded_change(memory, page_hashes, &left_out).map_err(MigrationError::Digest)?;
    match differs {
        Some(at) => Err(MigrationError::LostWrite(digests::describe(memory.layout(), at))),
        None => Ok(Digests::of_pages(memory.layout(), page_hashes, left_out)),
    }
}
