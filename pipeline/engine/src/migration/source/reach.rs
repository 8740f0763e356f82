//! The destination is reached: connections are opened and greeted, and it accepts the guest.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use memferry_stages::memory::GuestMemory;
use memferry_stages::wire::messages::{Figure, StatePhase};
use memferry_stages::wire::{Features, Message};
use memferry_transports::Transport;

use super::Source;
use crate::guest::SourceGuest;
use crate::migration::course::times::build_of;
use crate::migration::error::MigrationError;
use crate::migration::link::{Greeted, Link, features};
use crate::migration::plane::DataPlane;
use crate::migration::state::{self, Room};
use crate::migration::{blocking, bounds};
use crate::settings::SourceSettings;

/// A destination that accepts.
pub(super) struct Reached {
    pub(super) link: Link,
    /// The time of one request and its answer, without the work that the destination reports.
    pub(super) answered_in: Duration,
    /// What guest state may still take.
    pub(super) room: Room,
}

/// The values needed to reach the destination, separate from the source, whose settings may be changed meanwhile.
struct Introduction {
    guest: Arc<dyn SourceGuest>,
    memory: GuestMemory,
    transport: Arc<dyn Transport>,
    settings: SourceSettings,
    features: Features,
    /// The limit for guest state.
    room: Room,
}

impl<'a> Source<'a> {
    /// Begins to reach the destination.
    pub(super) fn reach(
        &self,
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
            left_out: may_leave_out,
            ignored_blocks: transfer.layout().blocks().iter().any(|block| block.ignored),
            ..features(settings)
        };
        let introduction = Introduction {
            guest: transfer.guest.clone(),
            memory: transfer.memory.clone(),
            transport: self.transport.clone(),
            settings: settings.clone(),
            features,
            room: transfer.state_room,
        };
        Ok(Box::pin(introduction.make(self.plane)))
    }
}

impl Introduction {
    async fn make(mut self, plane: &DataPlane) -> Result<Box<Reached>, MigrationError> {
        let mut link = self.connect(plane).await?;
        let answered_in = self.agree(&mut link).await?;
        Ok(Box::new(Reached { link, answered_in, room: self.room }))
    }

    async fn connect(&self, plane: &DataPlane) -> Result<Link, MigrationError> {
        let (transport, settings) = (self.transport.clone(), self.settings.clone());
        let (page_size, features) = (self.memory.page_size(), self.features);
        let opening = async move { Greeted::open(transport, settings, page_size, features).await };
        let greeted = plane.run(opening).await?;
        // A bandwidth limit that was set in the meantime is applied when the stages start.
        Ok(Link::start(greeted, &self.settings, self.transport.capabilities().stored, plane.handle()))
    }

    /// The destination accepts the stream, builds its machine and is ready for pages, before any is sent. Returns the
    /// time of one request and its answer.
    async fn agree(&mut self, link: &mut Link) -> Result<Duration, MigrationError> {
        self.answer(link, "Accept", |message| matches!(message, Message::Accept)).await?;
        let guest = self.guest.clone();
        let setup = blocking(move || guest.setup_state()).await?;
        for chunk in state::chunks(StatePhase::Setup, setup, &mut self.room)? {
            link.send(&Message::State(chunk)).await?;
        }
        link.send(&Message::Blocks(self.memory.layout().blocks().to_vec())).await?;
        let asked = Instant::now();
        let figures = self.answer(link, "Ready", |message| *message == Message::Ready).await?;
        Ok(asked.elapsed().saturating_sub(build_of(&figures)))
    }

    /// Waits for an answer, for as long as the last handshake may take. Returns the figures that came before it.
    async fn answer(
        &self,
        link: &mut Link,
        name: &str,
        is_it: fn(&Message) -> bool,
    ) -> Result<Vec<Figure>, MigrationError> {
        let answered = tokio::time::timeout(self.settings.handover_timeout, link.expect(is_it)).await;
        answered.unwrap_or_else(|_| Err(MigrationError::TimedOut(format!("{} does not answer with {name}", link.peer))))
    }
}
