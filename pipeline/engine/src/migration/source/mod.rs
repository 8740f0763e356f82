//! The source of a migration, as the world that its [course](super::course::source) acts on.
//!
//! ```text
//!              ┌ transfer ─ guest, memory, logs, bitmap, hints: what survives a lost connection
//!  driver ─▶ source ┤
//!              ├ attempt ── link, then stages and queues: what dies with a connection
//!              └ operator ─ cancel and requests
//! ```
//!
//! | | |
//! |---|---|
//! | `world` | inputs are awaited, actions performed |
//! | `reach` | the destination is reached and accepts |
//! | `transfer`, `hints` | calls into the guest, its logs and its page hinters |
//! | `flow` | the stages, and what they report |
//! | `figures` | figures for observers |
//! | `end` | everybody is notified of the outcome, and everything is closed |

mod end;
mod figures;
mod flow;
mod hints;
mod operator;
mod reach;
mod transfer;
mod world;

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use memferry_transports::Transport;
use tokio::time::Interval;

use super::bounds;
use super::course::source::{Facts, SourceCourse};
use super::digests;
use super::driver::drive;
use super::error::MigrationError;
use super::link::Link;
use super::outcome::{SendError, Sent};
use super::plane::DataPlane;
use super::ticks;
use crate::control::{Control, Request};
use crate::events::Observers;
use crate::guest::SourceGuest;
use crate::settings::SourceSettings;
use figures::Rates;
use flow::{Flow, Signal};
use operator::Operator;
use reach::{Reached, ReachedAgain, Unreached};
use transfer::Transfer;

/// Moves a guest to the other end of `transport`, and returns when it is decided where the guest is.
///
/// The guest runs while its memory is sent, is paused for the switchover, and is resumed here if anything fails before
/// the destination may have started it. `control` is a [`Control`], or the token that cancels it: cancelling takes
/// effect at once, until the handover has begun.
///
/// # Errors
/// Why the guest was not sent, and where it is: see [`SendError`].
pub async fn send(
    guest: Arc<dyn SourceGuest>,
    transport: Arc<dyn Transport>,
    mut settings: SourceSettings,
    plane: &DataPlane,
    observers: Observers,
    control: impl Into<Control>,
) -> Result<Sent, SendError> {
    let transfer = Transfer::new(guest, settings.max_state_bytes);
    let layout = transfer.layout();
    settings.check(layout.page_size().bytes() as u64)?;
    let cache_bytes = bounds::cache_bytes(layout, &settings);
    settings.encoder.xbzrle.iter_mut().for_each(|xbzrle| xbzrle.cache_bytes = cache_bytes);
    let facts = Facts {
        was: transfer.was,
        return_path: transport.capabilities().return_path,
        recovers: reach::recovers(&settings, transport.capabilities()),
        hints: transfer.hints.may_come(),
        page_bytes: layout.page_size().bytes() as u64,
    };
    let control = control.into();
    let (observers, requests) = control.source_begins(&settings, &observers);
    let source = Source {
        transfer,
        transport,
        plane,
        observers,
        operator: Operator::new(control.token(), requests),
        started: Instant::now(),
        setup: Duration::ZERO,
        attempt: Attempt::None,
        rates: Rates::default(),
        digests: Digests::None,
        is_throttled: false,
        earlier_bytes: 0,
        earlier_urgent: 0,
        ticks: ticks(TICK),
    };
    boxed(source, SourceCourse::new(settings, facts)).await
}

/// Boxed in a function that is not async, so that the migration is compiled once: the body of an async function is
/// compiled in each program that awaits it.
fn boxed(source: Source<'_>, course: SourceCourse) -> BoxFuture<'_, Result<Sent, SendError>> {
    Box::pin(run(source, course))
}

async fn run(mut source: Source<'_>, mut course: SourceCourse) -> Result<Sent, SendError> {
    let mistake = drive(&mut course, &mut source).await.err();
    source.conclude(course, mistake).await
}

/// How often figures are taken and the deadline is checked.
const TICK: Duration = Duration::from_millis(100);

/// See the [module](self).
struct Source<'a> {
    transfer: Transfer,
    transport: Arc<dyn Transport>,
    plane: &'a DataPlane,
    observers: Observers,
    operator: Operator,
    started: Instant,
    /// The time before the first round.
    setup: Duration,
    attempt: Attempt<'a>,
    rates: Rates,
    digests: Digests,
    /// Could the throttle not be lifted?
    is_throttled: bool,
    /// Bytes handed to the transport in attempts that ended.
    earlier_bytes: u64,
    /// Pages that the destination asked for in attempts that ended.
    earlier_urgent: u64,
    /// When figures are taken, and the deadline is checked.
    ticks: Interval,
}

/// What dies with a connection.
enum Attempt<'a> {
    None,
    /// The destination is being reached.
    Reaching(BoxFuture<'a, Result<Box<Reached>, MigrationError>>),
    /// It is being reached again, after a lost connection.
    ReachingAgain(BoxFuture<'a, Result<Box<ReachedAgain>, Unreached>>),
    /// It is ready, and the stages do not run yet.
    Linked(Box<Link>),
    Running(Box<Flow>),
}

/// What happens at a source.
enum Happened {
    Reached(Result<Box<Reached>, MigrationError>),
    ReachedAgain(Result<Box<ReachedAgain>, Unreached>),
    Tick,
    Signal(Signal),
    Asked(Request),
}

impl Attempt<'_> {
    /// Safe to race in a `select!`.
    async fn next(&mut self) -> Happened {
        match self {
            Self::Reaching(reaching) => Happened::Reached(reaching.await),
            Self::ReachingAgain(reaching) => Happened::ReachedAgain(reaching.await),
            Self::Running(flow) => Happened::Signal(flow.next().await),
            Self::None | Self::Linked(_) => std::future::pending().await,
        }
    }

    fn flow(&self) -> Option<&Flow> {
        match self {
            Self::Running(flow) => Some(flow),
            _ => None,
        }
    }
}

/// The digests of the paused guest.
enum Digests {
    None,
    /// Those of the whole memory are computed while the last round is sent.
    Started(BoxFuture<'static, Result<digests::Digests, MigrationError>>),
    /// They are waited for.
    Awaited(BoxFuture<'static, Result<digests::Digests, MigrationError>>),
    Done(digests::Digests),
}

impl Digests {
    /// Waits for awaited digests. Safe to race in a `select!`.
    async fn next(&mut self) -> Result<(), MigrationError> {
        let Self::Awaited(digests) = self else { return std::future::pending().await };
        let digests = digests.await;
        *self = Self::None;
        *self = Self::Done(digests?);
        Ok(())
    }
}
