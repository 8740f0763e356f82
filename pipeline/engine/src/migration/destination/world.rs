//! The destination's world: inputs are awaited, actions performed.

use std::time::Duration;

use memferry_stages::batch::Mark;
use memferry_stages::loader::Loaded;
use memferry_stages::stage_id::StageId;
use memferry_stages::wire::Message;
use memferry_stages::wire::messages::RunState;
use tokio::sync::mpsc;

use super::flow::Signal;
use super::postcopy::Switch;
use super::setup::Ready;
use super::verify::{Comparison, describe, page_hashes};
use super::{Attempt, Destination};
use crate::events::Event;
use crate::guest::GuestState;
use crate::migration::alive::silenced;
use crate::migration::course::destination::{Action, Agreed, DestinationCourse, Input};
use crate::migration::driver::World;
use crate::migration::error::{Failure, Loss, MigrationError, guarded};
use crate::migration::session::{Door, Session};
use crate::migration::state::Assembly;
use crate::migration::{asked, blocking};

/// What an attempt reports.
enum Happened {
    Gathered(Result<Box<(Session, Door)>, MigrationError>),
    Ready(Result<Ready, MigrationError>),
    Failed(MigrationError),
    /// A part of the memory is durable.
    Written(Result<(), MigrationError>),
    Signal(Signal),
    /// The source is back.
    Returned(Session),
}

/// The next session of a source that returns. Safe to race in a `select!`.
async fn returned(returning: &mut Option<mpsc::Receiver<Session>>) -> Session {
    match returning {
        Some(sessions) => match sessions.recv().await {
            Some(session) => session,
            None => std::future::pending().await,
        },
        None => std::future::pending().await,
    }
}

impl Attempt<'_> {
    /// Safe to race in a `select!`.
    async fn next(&mut self) -> Happened {
        match self {
            Self::Gathering(gathering) => Happened::Gathered(gathering.await),
            Self::Agreeing(agreeing, answers) => tokio::select! {
                biased;
                ready = agreeing => Happened::Ready(ready),
                silence = silenced(answers.as_ref().map(|answers| &answers.alive)) => {
                    Happened::Failed(MigrationError::Silent(silence))
                }
            },
            Self::Running(flow) => Happened::Signal(flow.next().await),
            Self::None | Self::Gathered(_) | Self::Ready(..) => std::future::pending().await,
        }
    }
}

impl World<DestinationCourse> for Destination<'_> {
    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    async fn next(&mut self, course: &DestinationCourse) -> Input {
        loop {
            let Self { cancel, attempt, comparison, writer, gate, .. } = self;
            let happened = tokio::select! {
                biased;
                () = cancel.next() => return Input::Cancel,
                happened = attempt.next() => happened,
                session = returned(&mut gate.returning) => Happened::Returned(session),
                equal = comparison.next() => {
                    return equal.map_or_else(Input::Failed, |equal| Input::Compared { equal });
                }
                written = writer.next() => Happened::Written(written),
            };
            let input = match happened {
                Happened::Gathered(Ok(gathered)) => {
                    let (session, door) = *gathered;
                    self.gathered(session, door);
                    Some(Input::Gathered)
                }
                Happened::Ready(Ok(ready)) => Some(self.ready(ready)),
                Happened::Gathered(Err(error)) | Happened::Ready(Err(error)) => Some(self.not_ready(error)),
                Happened::Returned(session) => {
                    self.gate.returned = Some(Box::new(session));
                    Some(Input::Returned)
                }
                Happened::Failed(error) => Some(Input::Failed(error)),
                Happened::Written(written) => {
                    written.and_then(|()| self.report_write_back(course)).err().map(Input::Failed)
                }
                Happened::Signal(signal) => {
                    self.input(signal, course).unwrap_or_else(|error| Some(Input::Failed(error)))
                }
            };
            if let Some(input) = input {
                return input;
            }
        }
    }

    async fn perform(&mut self, action: Action, course: &DestinationCourse) -> Option<Input> {
        // A panic in the guest's code is a failure like any other.
        guarded(self.act(action, course)).await.unwrap_or_else(|error| Some(Input::Failed(error)))
    }
}

impl Destination<'_> {
    fn ready(&mut self, ready: Ready) -> Input {
        let Attempt::Agreeing(_, answers) = std::mem::replace(&mut self.attempt, Attempt::None) else {
            unreachable!("only an agreement makes it ready");
        };
        self.state_room.left = ready.room;
        let agreed = Agreed {
            lanes: ready.session.hello.lanes,
            verify: ready.session.features.verify,
            return_path: answers.is_some(),
            recovers: ready.session.features.recovery && answers.is_some(),
            awaited: self.gate.known.awaited(),
        };
        self.attempt = Attempt::Ready(Box::new(ready), answers);
        Input::Agreed(agreed)
    }

    /// The return path stays: the source is notified.
    fn not_ready(&mut self, error: MigrationError) -> Input {
        self.attempt = match std::mem::replace(&mut self.attempt, Attempt::None) {
            Attempt::Agreeing(_, answers) => Attempt::Agreeing(Box::pin(std::future::pending()), answers),
            _ => Attempt::None,
        };
        Input::Failed(error)
    }

    /// The input for a signal, if the course needs it.
    fn input(&mut self, signal: Signal, course: &DestinationCourse) -> Result<Option<Input>, MigrationError> {
        let Attempt::Running(flow) = &mut self.attempt else { return Ok(None) };
        Ok(match signal {
            Signal::Received(Message::State(chunk)) if course.is_loading() => {
                if let Some(device) = &mut flow.arrived.device {
                    device.add(chunk)?;
                    self.state_room.left = device.room();
                }
                None
            }
            Signal::Received(Message::Missing(part)) if course.is_loading() => {
                self.switch()?.add(&part)?;
                None
            }
            Signal::Received(Message::Digests { block, first, stretches }) if course.is_loading() => {
                flow.arrived.digests.add(block, first, stretches)?;
                None
            }
            Signal::Received(message) => Some(Input::Received(message)),
            Signal::Loaded(Loaded { mark: Mark::RoundComplete(tally), .. }) => {
                if let Some(event) = flow.rates.loaded(tally, flow.graph.progress.len()) {
                    self.observers.notify(&event);
                    // The source is about to decide, and counts on what it believes to be in flight.
                    flow.report(&self.writer.times(flow.loaded_bytes()))?;
                    self.write_back(course);
                }
                None
            }
            Signal::Loaded(Loaded { mark: Mark::LaneEnds, .. }) => {
                Some(Input::LaneOver { frames: flow.loaded_frames() })
            }
            Signal::Loaded(Loaded { mark: Mark::DirectEnds, .. }) => {
                Some(Input::DirectEnded { frames: flow.loaded_frames() })
            }
            Signal::Loaded(Loaded { mark: mark @ Mark::Checkpoint(_), .. }) => {
                return Err(MigrationError::Mistake(format!("{mark:?}: the receiver lets none pass")));
            }
            Signal::Filled => Some(Input::Filled),
            // No page is missing: the source serves none any more.
            Signal::ConnectionEnded(receiver)
                if receiver == StageId::receiver(flow.stream.bulk)
                    && self.switch.as_ref().and_then(Switch::left) == Some(0) =>
            {
                None
            }
            // Pages are missing, or a loader is about to fail at what came last.
            Signal::ConnectionEnded(receiver) if course.is_loading() || course.is_filling() => {
                Some(Input::Broke(Failure::Ended(receiver)))
            }
            // No message comes any more.
            Signal::ConnectionEnded(receiver) if receiver == StageId::receiver(0) => Some(Input::StreamEnded),
            Signal::ConnectionEnded(_) => None,
            Signal::StreamEnded => Some(Input::StreamEnded),
            Signal::Broke(failure) => Some(Input::Broke(failure)),
            Signal::Silent(silence) => Some(Input::Failed(MigrationError::Silent(silence))),
            Signal::Tick => {
                if course.is_loading() || course.is_filling() {
                    flow.acknowledge()?;
                }
                self.write_back(course);
                self.watch_progress();
                None
            }
        })
    }

    async fn act(&mut self, action: Action, course: &DestinationCourse) -> Result<Option<Input>, MigrationError> {
        Ok(match action {
            Action::Notify(event) => {
                self.observers.notify(&event);
                None
            }
            Action::Gather => {
                let listener = self.gate.listener.take().expect("connections are gathered once");
                self.attempt = Attempt::Gathering(self.gather(listener));
                None
            }
            Action::Agree => {
                let (Attempt::Gathered(session), Some(build)) =
                    (std::mem::replace(&mut self.attempt, Attempt::None), self.build.take())
                else {
                    unreachable!("what is gathered is agreed on, once");
                };
                self.agree(*session, build);
                None
            }
            Action::StartStages => {
                match std::mem::replace(&mut self.attempt, Attempt::None) {
                    Attempt::Ready(ready, answers) => self.start_stages(*ready, answers)?,
                    _ => unreachable!("stages start when both ends have agreed"),
                }
                None
            }
            Action::EndAttempt => {
                self.end_attempt().await;
                if !course.start_begun() {
                    self.abandon_missing();
                }
                None
            }
            Action::Rejoin { started } => {
                let session = self.gate.returned.take().expect("the source has returned");
                self.rejoin(*session, started);
                None
            }
            Action::Discard => {
                self.discard_ahead().await?;
                Some(Input::Discarded)
            }
            Action::Register => {
                self.register().await?;
                Some(Input::Registered)
            }
            Action::MakeDurable => {
                let guest = self.built.as_ref().expect("what is loaded was built").guest.clone();
                self.writer.finish(guest).await?;
                Some(Input::Durable)
            }
            Action::Prepare => {
                self.prepare().await?;
                Some(Input::Prepared)
            }
            Action::Unprepare => {
                let guest = self.built.as_ref().expect("what is prepared was built").guest.clone();
                blocking(move || guest.unprepare()).await?;
                Some(Input::Unprepared)
            }
            Action::Start(run_state) => Some(Input::Started(self.start(run_state).await)),
            Action::Explain(failure) => Some(Input::Failed(self.explain(failure).await)),
            Action::StartDigests => {
                let built = self.built.as_ref().expect("what is loaded was built");
                let ours = built.verification.finish(built.memory(), self.left_out());
                self.comparison = Comparison::Started(ours);
                None
            }
            Action::Compare => {
                let built = self.built.as_ref().expect("what is loaded was built");
                let theirs = self.attempt.running()?.arrived.take_digests(built.memory().layout());
                self.comparison.compare(built.memory(), theirs);
                None
            }
            Action::NameStretch => return Err(self.name_stretch().await?),
            Action::Report => {
                let flow = self.attempt.running()?;
                flow.report(&self.writer.times(flow.loaded_bytes()))?;
                None
            }
            Action::Send(message) => {
                self.send(&message, course).await?;
                None
            }
        })
    }

    /// Sends a message. Once the start was begun, a source that does not get it changes nothing.
    async fn send(&mut self, message: &Message, course: &DestinationCourse) -> Result<(), MigrationError> {
        let Attempt::Running(flow) = &self.attempt else { return Ok(()) };
        let sent = flow.send(message).await;
        if sent.is_ok() || !course.start_begun() {
            return sent;
        }
        // A source that can return asks then.
        if !matches!(message, Message::Heartbeat(_)) && !course.recovers() {
            let what = "the source could not be notified that the guest was started here";
            self.observers.notify(&Event::Warning(what.into()));
        }
        Ok(())
    }

    /// Ends what dies with a connection, once all that has arrived is loaded.
    async fn end_attempt(&mut self) {
        self.comparison = Comparison::None;
        if let Attempt::Running(mut flow) = std::mem::replace(&mut self.attempt, Attempt::None) {
            self.before.frames = flow.end().await;
            self.before.loaded_bytes = flow.loaded_bytes();
            self.before.wire_bytes = flow.wire_bytes();
            self.before.rates = Some(flow.rates);
        }
    }

    /// While pages are loaded, begins to make durable what is loaded.
    fn write_back(&mut self, course: &DestinationCourse) {
        let (Attempt::Running(flow), Some(built)) = (&self.attempt, &self.built) else { return };
        if course.is_loading() {
            self.writer.begin(&built.guest, flow.loaded_bytes());
        }
    }

    /// What was loaded some time ago is durable: reports it to the source, which may wait for it, and continues with what was
    /// loaded since.
    fn report_write_back(&mut self, course: &DestinationCourse) -> Result<(), MigrationError> {
        let Attempt::Running(flow) = &self.attempt else { return Ok(()) };
        if course.is_loading() {
            flow.report(&self.writer.times(flow.loaded_bytes()))?;
        }
        Ok(())
    }

    /// Sends the page hashes of the stretch that differs. Returns the error that names the stretch.
    async fn name_stretch(&mut self) -> Result<MigrationError, MigrationError> {
        let (Some(built), Comparison::Differs(stretch, left_out)) = (&self.built, &self.comparison) else {
            return Ok(MigrationError::Differs("a stretch".into()));
        };
        let flow = self.attempt.running()?;
        if flow.graph.answer.is_some() {
            let hashes = page_hashes(built.memory(), built.verification.page_hashes(), left_out, *stretch).await?;
            flow.send(&hashes).await?;
        }
        Ok(describe(built.memory(), *stretch))
    }

    /// Everything is loaded: applies the device state to the guest.
    async fn prepare(&mut self) -> Result<(), MigrationError> {
        let guest = self.built.as_ref().expect("what is loaded was built").guest.clone();
        let device = self.attempt.running()?.arrived.device.take();
        let device = device.map_or_else(|| Ok(GuestState::default()), Assembly::finish)?;
        let preparing = guest.clone();
        let mut prepared = Box::pin(blocking(move || preparing.prepare(&device)));
        let missing = self.switch.as_ref().and_then(|switch| switch.missing.clone());
        let (Some(missing), Self { attempt: Attempt::Running(flow), cancel, .. }) = (missing, &mut *self) else {
            return Ok(prepared.await?);
        };
        tokio::select! {
            biased;
            prepared = &mut prepared => return Ok(prepared?),
            () = cancel.token.cancelled() => {}
            () = flow.lost(&missing) => {}
        }
        // It may wait for a page that does not come. What it does with zeros has no effect: the guest is not started.
        missing.abandon();
        if prepared.await.is_ok() {
            blocking(move || guest.unprepare()).await?;
        }
        Err(if self.cancel.token.is_cancelled() {
            MigrationError::Cancelled
        } else {
            MigrationError::Lost(Loss::Incomplete)
        })
    }

    async fn start(&mut self, run_state: RunState) -> Result<(), MigrationError> {
        self.switch.iter_mut().for_each(Switch::starts);
        let guest = self.built.as_ref().expect("what is prepared was built").guest.clone();
        asked(move || guest.start(run_state)).await
    }

    /// The failure that came first in time.
    async fn explain(&mut self, failure: Failure) -> MigrationError {
        match &mut self.attempt {
            Attempt::Running(flow) => flow.explain(failure).await,
            _ => MigrationError::Stage(failure),
        }
    }
}
