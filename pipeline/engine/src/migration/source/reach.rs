//! The destination is reached: connections are opened and greeted, and it accepts the guest; or, after a lost connection, both ends prove
//! themselves, and it reports what it has.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use memferry_stages::bitmap::DirtyBitmap;
use memferry_stages::memory::GuestMemory;
use memferry_stages::wire::messages::{Resume, StatePhase};
use memferry_stages::wire::{BitmapParts, Features, Message, WireError};
use memferry_transports::{Capabilities, Transport};

use super::Source;
use super::transfer::Agreement;
use crate::guest::SourceGuest;
use crate::migration::course::source::Connected;
use crate::migration::course::times::build_of;
use crate::migration::error::MigrationError;
use crate::migration::link::{Greeted, Heard, Identity, Link, features};
use crate::migration::plane::DataPlane;
use crate::migration::state::{self, Room};
use crate::migration::{blocking, bounds};
use crate::settings::SourceSettings;
use crate::values::whole_ms;

/// How long one try to reach a destination again may take, until both ends have proven themselves.
const LONGEST_TRY: Duration = Duration::from_secs(10);

/// A destination that accepts.
pub(super) struct Reached {
    pub(super) link: Link,
    pub(super) connected: Connected,
    /// What guest state may still take.
    pub(super) room: Room,
}

/// A destination that is reached again after a lost connection.
pub(super) struct ReachedAgain {
    pub(super) link: Link,
    /// What it had loaded, and whether it runs the guest.
    pub(super) resume: Resume,
    /// The received bitmap.
    pub(super) received: DirtyBitmap,
}

/// Why the destination was not reached again.
pub(super) struct Unreached {
    /// What went wrong.
    pub(super) error: MigrationError,
    /// Had the destination proven that it is the one whose connection was lost?
    pub(super) is_proven: bool,
}

/// The values needed to reach the destination, separate from the source, whose settings may be changed meanwhile.
struct Introduction {
    guest: Arc<dyn SourceGuest>,
    memory: GuestMemory,
    transport: Arc<dyn Transport>,
    settings: SourceSettings,
    features: Features,
    identity: Identity,
    /// The limit for guest state.
    room: Room,
}

impl<'a> Source<'a> {
    /// Begins to reach the destination.
    pub(super) fn reach(
        &mut self,
        settings: &SourceSettings,
    ) -> Result<BoxFuture<'a, Result<Box<Reached>, MigrationError>>, MigrationError> {
        let transfer = &self.transfer;
        let may_leave_out = transfer.hints.may_leave_out();
        bounds::check_source(
            bounds::source_bound(transfer.layout(), settings, may_leave_out),
            transfer.layout(),
            settings,
        )?;
        let features = Features {
            left_out: may_leave_out || settings.mode.may_switch(),
            ignored_blocks: transfer.layout().blocks().iter().any(|block| block.ignored),
            recovery: recovers(settings, self.transport.capabilities()),
            ..features(settings)
        };
        if features.postcopy && !self.transport.capabilities().return_path {
            return Err(MigrationError::NoReturnPath(settings.mode));
        }
        self.transfer.agreement = Some(Agreement { features, identity: Identity::new(features)? });
        Ok(Box::pin(self.introduction(settings)?.make(self.plane)))
    }

    /// Begins to reach the destination again, as this attempt.
    pub(super) fn reach_again(
        &mut self,
        settings: &SourceSettings,
        attempt: u32,
    ) -> Result<BoxFuture<'a, Result<Box<ReachedAgain>, Unreached>>, MigrationError> {
        if let Some(agreement) = &mut self.transfer.agreement {
            agreement.identity.attempt = attempt;
        }
        Ok(Box::pin(self.introduction(settings)?.make_again(self.plane)))
    }

    fn introduction(&self, settings: &SourceSettings) -> Result<Introduction, MigrationError> {
        let transfer = &self.transfer;
        let agreement = transfer.agreement.clone();
        let Agreement { features, identity } =
            agreement.ok_or_else(|| MigrationError::Mistake("the source has no identity".into()))?;
        Ok(Introduction {
            guest: transfer.guest.clone(),
            memory: transfer.memory.clone(),
            transport: self.transport.clone(),
            settings: settings.clone(),
            features,
            identity,
            room: transfer.state_room,
        })
    }
}

/// Is a lost connection made again? A page that is lost is sent again only if it is known to be lost: payloads need checksums, or a
/// transport that authenticates them (law 8).
pub(super) fn recovers(settings: &SourceSettings, transport: Capabilities) -> bool {
    settings.recovery.attempts > 0 && (settings.checksum || transport.authenticated) && transport.return_path
}

impl Introduction {
    async fn make(mut self, plane: &DataPlane) -> Result<Box<Reached>, MigrationError> {
        let mut link = self.connect(plane).await?;
        let connected = self.agree(&mut link).await?;
        Ok(Box::new(Reached { link, connected, room: self.room }))
    }

    async fn make_again(self, plane: &DataPlane) -> Result<Box<ReachedAgain>, Unreached> {
        let unproven = |error| Unreached { error, is_proven: false };
        let connected = tokio::time::timeout(LONGEST_TRY, self.connect(plane)).await;
        let no_answer = || MigrationError::TimedOut(format!("{} does not answer", self.transport.address()));
        let mut link = connected.unwrap_or_else(|_| Err(no_answer())).map_err(unproven)?;
        let resumed = self.resume(&mut link).await;
        let (resume, received) = resumed.map_err(|error| Unreached { error, is_proven: true })?;
        Ok(Box::new(ReachedAgain { link, resume, received }))
    }

    async fn connect(&self, plane: &DataPlane) -> Result<Link, MigrationError> {
        let (transport, settings, identity) = (self.transport.clone(), self.settings.clone(), self.identity.clone());
        let (page_size, features) = (self.memory.page_size(), self.features);
        let opening = async move { Greeted::open(transport, settings, page_size, features, identity).await };
        let greeted = plane.run(opening).await?;
        // A bandwidth limit that was set in the meantime is applied when the stages start.
        Ok(Link::start(greeted, &self.settings, self.transport.capabilities().stored, plane.handle()))
    }

    /// The destination accepts the stream, builds its machine and is ready for pages, before any is sent.
    async fn agree(&mut self, link: &mut Link) -> Result<Connected, MigrationError> {
        let accept = self.answer(link, "Accept", |message| matches!(message, Message::Accept { .. })).await?;
        let awaited = match accept {
            Some(Heard { message: Message::Accept { waits_ms }, .. }) if self.features.recovery => {
                Duration::from_millis(waits_ms)
            }
            _ => Duration::ZERO,
        };
        if let Some(secret) = &self.identity.secret {
            let waits_ms = whole_ms(self.settings.recovery.give_up);
            link.send(&Message::Secret { secret: secret.clone(), waits_ms }).await?;
        }
        let guest = self.guest.clone();
        let setup = blocking(move || guest.setup_state()).await?;
        for chunk in state::chunks(StatePhase::Setup, setup, &mut self.room)? {
            link.send(&Message::State(chunk)).await?;
        }
        link.send(&Message::Blocks(self.memory.layout().blocks().to_vec())).await?;
        let asked = Instant::now();
        let ready = self.answer(link, "Ready", |message| *message == Message::Ready).await?;
        let figures = ready.map_or_else(Vec::new, |ready| ready.figures);
        Ok(Connected { answered_in: asked.elapsed().saturating_sub(build_of(&figures)), awaited })
    }

    /// The destination, which has proven itself, reports what it has, and is ready for pages.
    async fn resume(&self, link: &mut Link) -> Result<(Resume, DirtyBitmap), MigrationError> {
        let resume = self.answer(link, "Resume", |message| matches!(message, Message::Resume(_))).await?;
        let Some(Heard { message: Message::Resume(resume), .. }) = resume else {
            return Err(MigrationError::Mistake("a stream that is stored cannot be resumed".into()));
        };
        let mut parts = BitmapParts::new(self.memory.layout());
        let is_next = |message: &Message| matches!(message, Message::Received(_) | Message::Ready);
        while let Some(Heard { message, .. }) = self.answer(link, "Ready", is_next).await? {
            let Message::Received(part) = message else { break };
            parts.add(&part).map_err(invalid)?;
        }
        Ok((resume, parts.finish().map_err(invalid)?))
    }

    /// Waits for an answer, for as long as the last handshake may take.
    async fn answer(
        &self,
        link: &mut Link,
        name: &str,
        is_it: fn(&Message) -> bool,
    ) -> Result<Option<Heard>, MigrationError> {
        let answered = tokio::time::timeout(self.settings.handover_timeout, link.expect(is_it)).await;
        answered.unwrap_or_else(|_| Err(MigrationError::TimedOut(format!("{} does not answer with {name}", link.peer))))
    }
}

fn invalid(error: WireError) -> MigrationError {
    MigrationError::Protocol(error.to_string())
}
