//! Guests: the machines that are moved, behind traits that the author of a VMM implements.
//!
//! | trait | purpose |
//! |---|---|
//! | [`Guest`] | common to both ends: the RAM blocks |
//! | [`SourceGuest`] | a guest that can be sent: it runs, is paused, saved, and resumed if the migration fails |
//! | [`GuestBuilder`] | builds a guest for the received blocks; any function with its signature is one |
//! | [`DestinationGuest`] | the built guest: pages are loaded into it, then it is prepared and started |
//!
//! The engine calls them in this order, and in no other:
//!
//! ```text
//!  SOURCE: send(guest, …)                                     DESTINATION: receive(builder, …)
//!
//!  memory, run_state, page_hinters
//!  setup_state ───────────── setup state, blocks ──────────▶  build
//!  dirty_logs; each log: start                                memory, page_hinters, of what was built
//!  rounds; each log: sync, rearm, copied ═════ pages ═══════▶    ┊ the loaders write its memory,
//!     (throttle, where it does not converge)                     ┊ and nothing else does
//!  pause            (only if it ran)                             ┊
//!  save, release                                                 ┊
//!  each log: sync, rearm, copied ════ last pages, state ════▶    ┊
//!             ◀────────────────── Loaded ──────────────────   make_durable, prepare
//!  committed ───────────────────────── Go ─────────────────▶  start
//!             ◀────────────────── Running ─────────────────
//!  moved; each log: stop                                      receive returns the guest
//!
//!  ─ any failure, or cancel, before Go,
//!    a failed committed among them ─────▶ reacquire (if release was called), resume (if pause was called);
//!                                         each log: stop; at the destination nothing more is called
//!  ─ a snapshot that is complete ───────▶ the same: the guest continues here
//!  ─ no answer after Go ────────────────▶ nothing more is called: the guest stays paused, and an operator decides
//!  ─ a connection that is lost and made ▶ reacquire and resume, as after a failure, and unprepare (if prepare was called);
//!    again, before Go arrived              rounds follow, and everything from pause on is called again
//!  ─ postcopy ──────────────────────────▶ after build: can_be_userfaulted, mapping_is_exclusive. After the start pages that are missing
//!                                         follow, threads that touch one wait for it, and receive returns once all are there
//! ```
//!
//! **The form of the destination.** [`GuestBuilder::build`] consumes the builder and returns the guest, so that a guest without
//! memory does not exist: no order of calls has to be checked, and no field waits to be filled. The built guest is an associated
//! type and not `Arc<dyn DestinationGuest>`, so that [`receive`](crate::migration::receive) returns it as the type that the VMM
//! knows, without a downcast. A function `fn(PageSize, &[BlockInfo], &GuestState) -> Result<Arc<Vmm>, GuestError>` or a closure is
//! a builder, so most VMMs write no type for it. A program with several kinds of guests builds one type that delegates.
//!
//! **Threads.** Every method but [`Guest::memory`], [`Guest::page_hinters`] and [`SourceGuest::run_state`] at the source is
//! called from a thread where blocking is allowed. The calls come one after another, and the next step waits until a
//! call returns: the time of [`SourceGuest::pause`], `save`, `release`, [`DestinationGuest::make_durable`], `prepare`
//! and `start` is downtime. The calls come from different threads. A cancel takes effect after such a call, not in it; only
//! `setup_state` and `build` may still be running when a cancelled `send` or `receive` has returned. A panic in a
//! method counts as an error of it.
//!
//! **Memory.** Between `dirty_logs` and the end the engine reads the blocks from its own threads at any time, while the guest
//! runs. At the destination it writes them between `build` and `prepare`, and in postcopy through a userfaultfd until it returns. No Rust reference to that memory may exist: it is
//! [`MappedMemory`](crate::memory::MappedMemory) that a VMM lends, or its own [`Memory`](crate::memory::Memory).
//!
//! **Pages that need not travel.** A guest with free or unplugged pages returns [page hinters](Guest::page_hinters). A block
//! whose memory the destination has already is marked by [`BlockInfo::ignored`], at both ends.
//!
//! [`conformance`] tests a guest for all of this.

use std::fmt;
use std::io;
use std::sync::Arc;

use memferry_stages::dirty_log::DirtyLog;
use memferry_stages::geometry::{BlockInfo, LayoutError, PageSize};
use memferry_stages::memory::GuestMemory;
use memferry_stages::untrusted::Untrusted;
pub use memferry_stages::wire::messages::RunState;

use hints::{BlockPages, PageHinter};

pub mod conformance;
pub mod hints;

/// An error of a guest: a sentence for the operator that includes the cause.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct GuestError(pub String);

impl GuestError {
    /// Joins `what` and the error that caused it.
    pub fn caused(what: impl fmt::Display, cause: impl fmt::Display) -> Self {
        Self(format!("{what}: {cause}"))
    }
}

impl From<io::Error> for GuestError {
    fn from(error: io::Error) -> Self {
        Self(error.to_string())
    }
}

impl From<LayoutError> for GuestError {
    fn from(error: LayoutError) -> Self {
        Self(format!("the RAM blocks do not fit: {error}"))
    }
}

/// Named, versioned sections of guest state, opaque to memferry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GuestState {
    /// In the order they were saved.
    pub sections: Vec<StateSection>,
}

/// One section of state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateSection {
    /// Its name, 1 to 255 bytes.
    pub name: Untrusted,
    /// Version of its format.
    pub version: u32,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// The calls common to both ends. The [module](self) gives their order.
pub trait Guest: Send + Sync + fmt::Debug {
    /// Its RAM blocks. Called once at each end, before anything else; at the source where blocking is not allowed. At
    /// the destination they are the blocks that [`GuestBuilder::build`] received.
    fn memory(&self) -> GuestMemory;

    /// The parts of the guest that know which pages need not be sent. At the source it is called once, where blocking
    /// is not allowed, before anything else. At the destination it is called once the guest is built, for its unplugged
    /// memory. None by default.
    fn page_hinters(&self) -> Vec<Arc<dyn PageHinter>> {
        Vec::new()
    }

    /// Can faults on its memory be handled in user space, those of the kernel on its behalf too (KVM, system calls)? Postcopy asks at the
    /// destination: threads that touch a page which is still at the source wait for it. Asked once the guest is built.
    ///
    /// # Errors
    /// Why not. By default: it is unknown.
    fn can_be_userfaulted(&self) -> Result<(), GuestError> {
        Err(GuestError("this guest does not report that its memory can be userfaulted".into()))
    }

    /// Is the mapping that it lends the only one, with none of it pinned or locked (VFIO, vhost-user, mlock)? Postcopy asks at the
    /// destination: an access that does not go through this mapping finds zeros where a page is missing.
    ///
    /// # Errors
    /// What else maps or pins it. By default: it is unknown.
    fn mapping_is_exclusive(&self) -> Result<(), GuestError> {
        Err(GuestError("this guest does not report that its memory is mapped once and not pinned".into()))
    }
}

/// Reserved: the hook that a guest calls, and waits for, before it discards pages. See [`SourceGuest::before_discard`].
pub type DiscardHook = Arc<dyn Fn(BlockPages) + Send + Sync>;

/// A guest that can be sent.
pub trait SourceGuest: Guest {
    /// Does it run? Called once, before the migration begins, where blocking is not allowed. A guest that its operator
    /// has paused is neither paused nor resumed, and arrives paused.
    fn run_state(&self) -> RunState;

    /// The logs that together see every write to its memory, not started yet. Called once in a migration, so that each may
    /// have logs of its own.
    ///
    /// # Errors
    /// When the host cannot provide one; the migration then does not begin.
    fn dirty_logs(&self) -> Result<Vec<Arc<dyn DirtyLog>>, GuestError>;

    /// The state that a destination needs to build its machine, before any page. Empty by default.
    ///
    /// # Errors
    /// When it cannot be determined; the migration then does not begin.
    fn setup_state(&self) -> Result<GuestState, GuestError> {
        Ok(GuestState::default())
    }

    /// Pauses the guest: when this returns, no vCPU, device thread or I/O in flight writes guest memory, until
    /// [`SourceGuest::resume`]. Called once for each switchover, of which there is more than one if connections are lost, and only if
    /// the guest ran. A deadline may cause the call in the middle of
    /// a round, so that [`SourceGuest::save`] may come much later.
    ///
    /// # Errors
    /// When it cannot be paused. It is then resumed, and must run again whatever part of it was paused.
    fn pause(&self) -> Result<(), GuestError>;

    /// Resumes a paused guest where it stopped. Called after a failed [`SourceGuest::pause`] too, when it may still
    /// run.
    ///
    /// # Errors
    /// When it cannot be resumed; the operator is notified (exit code 4).
    fn resume(&self) -> Result<(), GuestError>;

    /// Throttles the guest: it does not run for `percent` of its time; 0 lifts the throttle. Called between rounds,
    /// with a higher value each time, if the settings allow throttling and the migration does not converge. Once it was
    /// throttled, 0 follows at the end of the migration, whatever the result is and wherever the guest is then. The
    /// program that drives a migration may call it too, from any thread, beside any other call.
    ///
    /// # Errors
    /// If this guest cannot be throttled: the default.
    fn throttle(&self, percent: u8) -> Result<(), GuestError> {
        let _ = percent;
        Err(GuestError("this guest cannot be throttled".into()))
    }

    /// Its device state. The guest is paused, by the engine or by its operator, and stays so. Saving may write memory,
    /// as long as a dirty log sees it: the last bitmap sync follows. After this call nothing writes memory any more. It
    /// may be followed by [`SourceGuest::resume`], and in a later migration by another save.
    ///
    /// # Errors
    /// When it cannot be saved; the guest is then resumed. The same happens if the state is larger than 256 MiB, or a
    /// section has no name or one longer than 255 bytes.
    fn save(&self) -> Result<GuestState, GuestError>;

    /// Releases what only one side may hold (disks, locks), before the destination may acquire it in
    /// [`DestinationGuest::prepare`].
    ///
    /// # Errors
    /// When it cannot; the migration then fails, everything released is reacquired and the guest is resumed.
    fn release(&self) -> Result<(), GuestError> {
        Ok(())
    }

    /// Reacquires what [`SourceGuest::release`] released, or a part of it if that failed. Called before
    /// [`SourceGuest::resume`].
    ///
    /// # Errors
    /// When it cannot; the guest then stays paused and the operator is notified.
    fn reacquire(&self) -> Result<(), GuestError> {
        Ok(())
    }

    /// Go is about to be handed to the transport. From here on this guest may run at `destination`, and nothing of its
    /// own (a guard that would resume it when this program dies) may start it again. [`SourceGuest::resume`] still may:
    /// the destination can refuse to begin. For a stream in a file, called before its completion, if the guest is to
    /// stay paused.
    ///
    /// # Errors
    /// When it is not certain that nothing here starts the guest on its own. Go then does not leave, the migration fails, and the
    /// guest is resumed.
    fn committed(&self, destination: &str) -> Result<(), GuestError> {
        let _ = destination;
        Ok(())
    }

    /// The destination has confirmed that it runs the guest, or the stream in a file is complete and the guest is to
    /// stay paused: anything that guards the guest here may end. The last call, besides those to its logs.
    fn moved(&self) {}

    // ---- Reserved for later courses. Nothing calls them yet; each default refuses, with the reason. ----

    /// Reserved for snapshots: from here on the guest calls `hook` with each range that it is about to discard (balloon,
    /// virtio-mem, free page reporting), and discards it when the hook has returned: the pages are saved first.
    ///
    /// # Errors
    /// If it cannot: the default.
    fn before_discard(&self, hook: DiscardHook) -> Result<(), GuestError> {
        drop(hook);
        Err(GuestError("this guest cannot report what it is about to discard".into()))
    }

    /// Reserved for snapshots: the cut. The guest is paused, its state is saved and its memory protected, and it is
    /// about to be resumed. State of the same moment, such as a snapshot of its disks, is taken in this call.
    ///
    /// # Errors
    /// If nothing can be taken with it: the default.
    fn at_cut(&self) -> Result<(), GuestError> {
        Err(GuestError("this guest takes nothing of its own at the cut of a snapshot".into()))
    }

    /// Reserved for snapshots and replication: the device state of a guest that continues here. Nothing is
    /// [released](SourceGuest::release) before, nor reacquired after it.
    ///
    /// # Errors
    /// If its state can be saved only when it leaves: the default.
    fn save_and_stay(&self) -> Result<GuestState, GuestError> {
        Err(GuestError("this guest cannot be saved without being released".into()))
    }

    /// Reserved for replication, the output gate: from here on the guest's output to the outside is buffered, until
    /// [`SourceGuest::release_outputs`].
    ///
    /// # Errors
    /// If its outputs cannot be buffered: the default.
    fn hold_outputs(&self) -> Result<(), GuestError> {
        Err(GuestError("the outputs of this guest cannot be buffered".into()))
    }

    /// Reserved for replication: the outputs buffered up to checkpoint `epoch` may leave, because it is acknowledged.
    ///
    /// # Errors
    /// If its outputs cannot be buffered: the default.
    fn release_outputs(&self, epoch: u64) -> Result<(), GuestError> {
        let _ = epoch;
        Err(GuestError("the outputs of this guest cannot be buffered".into()))
    }
}

/// Builds a guest for the blocks that a destination receives. A function or closure with the signature of
/// [`GuestBuilder::build`] is one.
pub trait GuestBuilder: Send + 'static {
    /// The guest type, which [`receive`](crate::migration::receive) returns.
    type Built: DestinationGuest + 'static;

    /// Builds the machine for the received blocks, or refuses with both sides' figures. The built guest has exactly
    /// these blocks. For one that is [`ignored`](BlockInfo::ignored) it has the memory that the source has. Otherwise
    /// the guest refuses it, or builds it as one that is not ignored, which the engine then refuses. The peer is not
    /// trusted: its blocks are a valid layout of any length, and its state may be anything. Nothing of it runs before
    /// [`DestinationGuest::start`].
    ///
    /// # Errors
    /// When the blocks do not fit this guest; the reason is sent to the source.
    fn build(
        self,
        page_size: PageSize,
        blocks: &[BlockInfo],
        setup: &GuestState,
    ) -> Result<Arc<Self::Built>, GuestError>;
}

impl<F, G> GuestBuilder for F
where
    F: FnOnce(PageSize, &[BlockInfo], &GuestState) -> Result<Arc<G>, GuestError> + Send + 'static,
    G: DestinationGuest + 'static,
{
    type Built = G;

    fn build(self, page_size: PageSize, blocks: &[BlockInfo], setup: &GuestState) -> Result<Arc<G>, GuestError> {
        self(page_size, blocks, setup)
    }
}

/// A guest that was built at a destination. If [`DestinationGuest::start`] is not called, it never runs, and it is
/// dropped.
pub trait DestinationGuest: Guest {
    /// Returns when the memory that is loaded so far is on disk, for a guest whose memory shall be. Called beside the
    /// loading, so that less is left for the last call: that comes once everything is loaded, before
    /// [`DestinationGuest::prepare`]. Never called twice at a time. Nothing by default.
    ///
    /// # Errors
    /// When it cannot be written; the guest is then resumed at its source.
    fn make_durable(&self) -> Result<(), GuestError> {
        Ok(())
    }

    /// Everything is loaded: applies the device state and opens its resources. Called once, and again after each
    /// [`DestinationGuest::unprepare`]. May fail; nothing runs yet.
    ///
    /// # Errors
    /// When the state does not fit; the guest is then resumed at its source.
    fn prepare(&self, state: &GuestState) -> Result<(), GuestError>;

    /// Takes back what [`DestinationGuest::prepare`] did: the connection was lost before Go, and the guest runs on at its source. What only
    /// one side may hold is released. Pages are loaded again from here on, and `prepare` is called again with the state of a later moment.
    ///
    /// # Errors
    /// If it cannot: the default. The migration then fails, and the guest stays at its source.
    fn unprepare(&self) -> Result<(), GuestError> {
        Err(GuestError("this guest cannot take back its preparation after a lost connection".into()))
    }

    /// Starts the guest, or leaves it paused if it was paused; its operator starts it then. Called once, after
    /// [`DestinationGuest::prepare`]. Cannot be undone. In postcopy it must not access guest memory itself: a page may be missing for as
    /// long as the connection is lost. The threads that it starts wait where they touch one, and so may `prepare`.
    ///
    /// # Errors
    /// When it does not start; the operators of both sides are notified.
    fn start(&self, run_state: RunState) -> Result<(), GuestError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Least;

    impl Guest for Least {
        fn memory(&self) -> GuestMemory {
            unreachable!("nobody asks")
        }
    }

    impl SourceGuest for Least {
        fn run_state(&self) -> RunState {
            RunState::Paused
        }

        fn dirty_logs(&self) -> Result<Vec<Arc<dyn DirtyLog>>, GuestError> {
            Ok(Vec::new())
        }

        fn pause(&self) -> Result<(), GuestError> {
            Ok(())
        }

        fn resume(&self) -> Result<(), GuestError> {
            Ok(())
        }

        fn save(&self) -> Result<GuestState, GuestError> {
            Ok(GuestState::default())
        }
    }

    /// A guest that does not implement a course is refused by it, with the reason.
    #[test]
    fn what_is_reserved_is_refused_with_a_reason() {
        let refused = [
            Least.can_be_userfaulted(),
            Least.mapping_is_exclusive(),
            Least.before_discard(Arc::new(drop)),
            Least.at_cut(),
            Least.save_and_stay().map(drop),
            Least.hold_outputs(),
            Least.release_outputs(1),
        ];
        assert!(refused.iter().all(|refused| refused.as_ref().is_err_and(|why| !why.0.is_empty())), "{refused:?}");
    }
}
