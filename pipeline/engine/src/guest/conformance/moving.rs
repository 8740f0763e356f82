//! Whole migrations inside this process: those that succeed, and those that do not.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use memferry_stages::missing;
use memferry_transports::Transport;
use memferry_transports::memory::MemoryTransport;
use tokio::runtime::Builder;
use tokio_util::sync::CancellationToken;

use super::cases::Trial;
use super::image::Image;
use super::witness::{Arrived, Expecting, Leaving, held};
use super::{BUILT, Breach, GuestBuilder, SourceGuest, Subject, contract};
use crate::events::{Ended, Event, Observer, Observers, Phase, Role};
use crate::guest::{Guest, RunState};
use crate::migration::{DataPlane, ReceiveError, SendError, Sent, receive, send};
use crate::settings::{
    DestinationSettings, Mode, OnDeadline, RecoverySettings, SourceSettings, Verify, XbzrleSettings,
};

const LOGS: &str = "the dirty logs see every write, before the pause";
const LOGS_SAVE: &str = "the dirty logs see what save writes";
const MOVES: &str = "a guest with a right peer is moved";
const NO_LONGER_HERE: &str = "a guest that was handed over stays paused at its source";
const STARTS_AS_IT_WAS: &str = "start runs the guest if it ran, and leaves it paused if it was";
const SURVIVES: &str = "a source continues as it was when a migration ends before Go";

/// The failure that is provoked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    Nothing,
    CancelledAtOnce,
    CancelledAtSave,
    LostAtSave,
    Refused,
    /// Lost once while it is saved, and made again.
    MadeAgainAtSave,
    /// Lost once when Go is about to leave, and made again.
    MadeAgainAtCommit,
    /// Started before any page is there.
    Postcopy,
}

impl Trouble {
    fn is_recovered(self) -> bool {
        matches!(self, Self::MadeAgainAtSave | Self::MadeAgainAtCommit | Self::Postcopy)
    }
}

struct Moved<G> {
    source: Result<Sent, SendError>,
    destination: Result<(), ReceiveError>,
    left: Arc<Leaving>,
    arrived: Arc<Mutex<Arrived<G>>>,
}

/// Moves a guest that runs.
pub(super) fn moving<S: Subject>(subject: &S) -> Result<(), Breach> {
    move_running(subject, &Trial::source("moving", subject)?)
}

/// Moves a guest that its operator has paused.
pub(super) fn paused<S: Subject>(subject: &S) -> Result<(), Breach> {
    let source = Trial::source("paused", subject)?;
    source.pause()?;
    let moved = migrate(source.guest.clone(), subject.destination(), Trouble::Nothing);
    let destination = arrives(source.case, &moved)?;
    if destination.guest.run_state() == RunState::Running {
        return Err(destination.breach(STARTS_AS_IT_WAS, "it runs, though it was paused at its source"));
    }
    destination.stays_paused(STARTS_AS_IT_WAS)?;
    let (left, arrived) = (moved.left.seen().state.take().unwrap_or_default(), destination.save()?);
    subject.same_state(&left, &arrived).map_err(|why| destination.breach(contract::STATE, why))?;
    destination.resume()?;
    destination.writes(contract::CONTINUES)?;
    destination.examine(subject)
}

/// A guest that survives one failure after another, and is moved in the end.
pub(super) fn failures<S: Subject>(subject: &S) -> Result<(), Breach> {
    let source = Trial::source("failures", subject)?;
    let troubles = [
        Trouble::CancelledAtOnce,
        Trouble::CancelledAtSave,
        Trouble::LostAtSave,
        Trouble::Refused,
        Trouble::LostAtSave,
    ];
    for trouble in troubles {
        let moved = migrate(source.guest.clone(), subject.destination(), trouble);
        survives(subject, &source, trouble, &moved)?;
        stays_down(source.case, &held(&moved.arrived))?;
    }
    move_running(subject, &source)
}

/// A guest whose switchover is interrupted by a lost connection, and which is moved when that is made again.
pub(super) fn recovered<S: Subject>(subject: &S) -> Result<(), Breach> {
    for trouble in [Trouble::MadeAgainAtSave, Trouble::MadeAgainAtCommit] {
        let source = Trial::source("recovered", subject)?;
        let moved = migrate(source.guest.clone(), subject.destination(), trouble);
        if held(&moved.arrived).stays_prepared {
            // It may refuse: then it stays at its source.
            survives(subject, &source, trouble, &moved)?;
        } else {
            has_moved(subject, &source, &moved)?;
        }
    }
    Ok(())
}

/// A guest that is started before its memory is there. One that does not allow that is refused, and stays at its source.
pub(super) fn postcopied<S: Subject>(subject: &S) -> Result<(), Breach> {
    if missing::supported().is_err() {
        return Ok(());
    }
    let source = Trial::source("postcopied", subject)?;
    let moved = migrate(source.guest.clone(), subject.destination(), Trouble::Postcopy);
    let built = held(&moved.arrived).guest.clone();
    let allows = |guest: Arc<S::Guest>| guest.can_be_userfaulted().is_ok() && guest.mapping_is_exclusive().is_ok();
    if built.is_some_and(allows) {
        has_moved(subject, &source, &moved)
    } else {
        survives(subject, &source, Trouble::Postcopy, &moved)
    }
}

fn move_running<S: Subject>(subject: &S, source: &Trial<S::Guest>) -> Result<(), Breach> {
    has_moved(subject, source, &migrate(source.guest.clone(), subject.destination(), Trouble::Nothing))
}

fn has_moved<S: Subject>(subject: &S, source: &Trial<S::Guest>, moved: &Moved<S::Guest>) -> Result<(), Breach> {
    let destination = arrives(source.case, moved)?;
    source.is(RunState::Paused)?;
    source.stays_paused(NO_LONGER_HERE)?;
    destination.is(RunState::Running)?;
    destination.writes(STARTS_AS_IT_WAS)?;
    destination.examine(subject)
}

/// The migration succeeded, and the state at the destination equals that at the source.
fn arrives<G: SourceGuest + 'static>(case: &'static str, moved: &Moved<G>) -> Result<Trial<G>, Breach> {
    let breach = |contract, seen: String| Err(Breach::new(case, contract, seen));
    let (left, arrived) = (moved.left.seen(), held(&moved.arrived));
    if let Some(wrong) = &arrived.badly_built {
        return breach(BUILT, wrong.clone());
    }
    let (Ok(_), Ok(()), Some(guest)) = (&moved.source, &moved.destination, &arrived.guest) else {
        return breach(MOVES, failure(moved));
    };
    if arrived.prepared == Some(RunState::Running) {
        return breach(contract::NOT_STARTED, "it runs when prepare has returned".into());
    }
    let differs = |one: &Option<Image>, other: &Option<Image>| one.as_ref()?.first_difference(other.as_ref()?);
    if let Some(change) = differs(&left.saved, &left.committed) {
        return breach(contract::PAUSED_AFTER_SAVE, change.words("when save returned", "before the handover"));
    }
    let Some(lost) = differs(&left.committed, &arrived.loaded) else {
        return Ok(Trial { case, guest: guest.clone() });
    };
    let by_save = differs(&left.unsaved, &left.saved).is_some_and(|change| change.at == lost.at);
    breach(if by_save { LOGS_SAVE } else { LOGS }, lost.words("at the source", "at the destination"))
}

/// The migration failed, and the source is unaffected.
fn survives<S: Subject>(
    subject: &S,
    source: &Trial<S::Guest>,
    trouble: Trouble,
    moved: &Moved<S::Guest>,
) -> Result<(), Breach> {
    let breach = |seen: String| Err(source.breach(SURVIVES, format!("after {trouble:?}, {seen}")));
    let is_cancelled = matches!(trouble, Trouble::CancelledAtOnce | Trouble::CancelledAtSave);
    match &moved.source {
        Err(SendError::Cancelled { .. }) if is_cancelled => {}
        Err(SendError::Failed { .. }) if !is_cancelled => {}
        _ => return breach(format!("it ended otherwise: {}", failure(moved))),
    }
    if source.guest.run_state() != RunState::Running {
        return breach("it is paused".into());
    }
    source.writes(SURVIVES)?;
    source.examine(subject)
}

/// A guest that was not started does not run.
fn stays_down<G: SourceGuest + 'static>(case: &'static str, seen: &Arrived<G>) -> Result<(), Breach> {
    let Some(guest) = seen.guest.clone() else { return Ok(()) };
    let destination = Trial { case, guest };
    if seen.prepared == Some(RunState::Running) {
        return Err(destination.breach(contract::NOT_STARTED, "it runs when prepare has returned"));
    }
    if seen.loaded.is_none() {
        return Ok(());
    }
    destination.is(RunState::Paused)?;
    destination.stays_paused(contract::NOT_STARTED)
}

fn failure<G>(moved: &Moved<G>) -> String {
    let words = |ended: Option<&Ended>| ended.and_then(|ended| ended.error.clone()).unwrap_or_default();
    let source = moved.source.as_ref().map_or_else(SendError::ended, |sent| Some(&sent.ended));
    let destination = moved.destination.as_ref().map_or_else(ReceiveError::ended, |()| None);
    format!("source: {}; destination: {}", words(source), words(destination))
}

/// Runs both ends. Verification is off: the kit compares by itself, and reports more detail.
fn migrate<B>(source: Arc<dyn SourceGuest>, builder: B, trouble: Trouble) -> Moved<B::Built>
where
    B: GuestBuilder<Built: SourceGuest>,
{
    let transport = MemoryTransport::new(256 << 10);
    let (cancel, over) = (CancellationToken::new(), CancellationToken::new());
    let mut left = Leaving::of(source);
    let arrived = Arc::new(Mutex::default());
    let builder = Expecting { builder, seen: arrived.clone(), refuses: trouble == Trouble::Refused };
    match trouble {
        Trouble::CancelledAtSave => {
            let cancel = cancel.clone();
            left.at_save = Some(Box::new(move || cancel.cancel()));
        }
        Trouble::LostAtSave => {
            let faults = transport.faults();
            left.at_save = Some(Box::new(move || faults.cut()));
        }
        Trouble::MadeAgainAtSave => left.at_save = Some(once(&transport)),
        Trouble::MadeAgainAtCommit => left.at_commit = Some(once(&transport)),
        Trouble::Nothing | Trouble::CancelledAtOnce | Trouble::Refused | Trouble::Postcopy => {}
    }
    let left = Arc::new(left);
    let at_once = cancel.clone();
    let cancels = move |_: Role, event: &Event| {
        if trouble == Trouble::CancelledAtOnce && *event == Event::Phase(Phase::Active) {
            at_once.cancel();
        }
    };
    let observers = Observers::new(Role::Source, vec![Arc::new(cancels) as Arc<dyn Observer>]);

    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("threads for the kit");
    let (source, destination) = runtime.block_on(async {
        let plane = DataPlane::new().expect("threads for the kit");
        let listener = transport.listen().await.expect("it has no listener");
        let sending = async {
            let sent =
                send(left.clone(), Arc::new(transport), source_settings(trouble), &plane, observers, cancel).await;
            if sent.is_err() {
                // It may wait for a source that never got this far.
                tokio::time::sleep(Duration::from_millis(50)).await;
                over.cancel();
            }
            sent
        };
        let recovery = recovery(trouble);
        let settings = DestinationSettings { handover_timeout: PATIENCE, recovery, ..DestinationSettings::default() };
        let watched = Observers::none(Role::Destination);
        tokio::join!(sending, receive(builder, listener, settings, &plane, watched, over.clone()))
    });
    Moved { source, destination: destination.map(drop), left, arrived }
}

/// How long one end waits for the other.
const PATIENCE: Duration = Duration::from_secs(20);

fn recovery(trouble: Trouble) -> RecoverySettings {
    let attempts = if trouble.is_recovered() { 1 } else { 0 };
    RecoverySettings { attempts, give_up: PATIENCE, ..RecoverySettings::default() }
}

/// Cuts the connections, once.
fn once(transport: &MemoryTransport) -> Box<dyn Fn() + Send + Sync> {
    let (faults, is_done) = (transport.faults(), AtomicBool::new(false));
    Box::new(move || {
        if !is_done.swap(true, Ordering::Relaxed) {
            faults.cut();
        }
    })
}

fn source_settings(trouble: Trouble) -> SourceSettings {
    let mut settings = SourceSettings {
        max_rounds: 4,
        on_deadline: OnDeadline::SwitchOver,
        verify: Verify::Off,
        handover_timeout: PATIENCE,
        recovery: recovery(trouble),
        mode: if trouble == Trouble::Postcopy { Mode::Postcopy } else { Mode::Precopy },
        ..SourceSettings::default()
    };
    settings.encoder.xbzrle = Some(XbzrleSettings { cache_bytes: 8 << 20, ..XbzrleSettings::default() });
    settings
}
