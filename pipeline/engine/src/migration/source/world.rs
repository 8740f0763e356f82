//! The source's world: inputs are awaited, actions performed.

use std::time::Duration;

use memferry_stages::bitmap_sync::SyncOrder;
use memferry_stages::scanner::ScannerOrder;
use memferry_stages::sender::Control;
use memferry_stages::stage_id::StageKind;
use memferry_stages::wire::Message;

use super::flow::{Flow, Signal, decides};
use super::reach::{Reached, ReachedAgain, Unreached};
use super::{Attempt, Digests, Happened, Source};
use crate::bottleneck::Watch;
use crate::change::Changed;
use crate::control::{Ask, Change, ControlError, Request, with_all};
use crate::controller::forecast::{Standing, whole};
use crate::events::Event;
use crate::guest::hints::Point;
use crate::migration::alive::silenced;
use crate::migration::course::source::{Action, Input, Returned, SourceCourse};
use crate::migration::driver::World;
use crate::migration::error::{Failure, Loss, MigrationError, guarded};
use crate::migration::source_graph::{SourceGraph, SourceParts};
use crate::migration::{block_facts, bounds, unparked};
use crate::settings::SourceSettings;
use crate::values::Size;

/// How long a stage that ended may take to report why.
const EXPLANATION: Duration = Duration::from_secs(1);

/// The answer to an action, if it has one.
type Answer = Result<Option<Input>, MigrationError>;

impl World<SourceCourse> for Source<'_> {
    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    async fn next(&mut self, course: &SourceCourse) -> Input {
        loop {
            let is_begun = self.attempt.flow().is_some() || course.is_disconnected();
            let Self { operator, attempt, digests, ticks, .. } = self;
            let happened = tokio::select! {
                biased;
                () = operator.cancel.next() => return Input::Cancel,
                happened = attempt.next() => happened,
                digested = digests.next() => {
                    return digested.map_or_else(Input::Failed, |()| Input::Digested);
                }
                request = operator.requests.next() => Happened::Asked(request),
                _ = ticks.tick(), if is_begun => Happened::Tick,
            };
            let input = match happened {
                Happened::Reached(Ok(reached)) => Some(self.reached(*reached)),
                Happened::Reached(Err(error)) => Some(self.not_reached(error)),
                Happened::ReachedAgain(result) => Some(self.reached_again(result)),
                Happened::Tick => Some(self.tick(course)),
                Happened::Signal(signal) => self.input(signal),
                Happened::Asked(request) => self.asked(request, course),
            };
            if let Some(input) = input {
                return input;
            }
        }
    }

    async fn perform(&mut self, action: Action, course: &SourceCourse) -> Option<Input> {
        if matches!(action, Action::CloseHints | Action::LiftThrottle | Action::Moved) {
            self.clean_up(action).await;
            return None;
        }
        // A panic in the guest's code is a failure like any other.
        match guarded(self.act(action, course)).await {
            Ok(answer) => answer,
            Err(MigrationError::Cancelled) => Some(Input::Cancel),
            Err(error) => Some(Input::Failed(error)),
        }
    }
}

impl Source<'_> {
    fn reached(&mut self, reached: Reached) -> Input {
        let Reached { link, connected, room } = reached;
        self.transfer.state_room = room;
        self.observers.notify(&Event::Connected { peer: link.peer.clone() });
        self.attempt = Attempt::Linked(Box::new(link));
        Input::Connected(connected)
    }

    /// A destination that has proven itself and gives up is done; after any other failure the source tries again.
    fn reached_again(&mut self, result: Result<Box<ReachedAgain>, Unreached>) -> Input {
        self.attempt = Attempt::None;
        let reached = match result {
            Ok(reached) => *reached,
            Err(Unreached { error: MigrationError::GivenUp { why, .. }, is_proven: true }) => {
                return Input::Received(Message::Abort(why));
            }
            Err(Unreached { error, .. }) => return Input::NotReached(error),
        };
        let ReachedAgain { link, resume, received } = reached;
        self.observers.notify(&Event::Connected { peer: link.peer.clone() });
        self.attempt = Attempt::Linked(Box::new(link));
        if resume.started {
            if self.transfer.is_switching() {
                self.transfer.sends_the_rest(&received);
            }
            return Input::Returned(Returned { started: true, put_back_pages: 0 });
        }
        match self.transfer.put_back(&resume.frames, &received) {
            Ok(put_back_pages) => Input::Returned(Returned { started: false, put_back_pages }),
            Err(error) => Input::Failed(error),
        }
    }

    fn not_reached(&mut self, error: MigrationError) -> Input {
        self.attempt = Attempt::None;
        Input::Failed(error)
    }

    /// A request, unless this host refuses it.
    fn asked(&self, request: Request, course: &SourceCourse) -> Option<Input> {
        match self.check_request(&request.ask, course.settings()) {
            Ok(()) => Some(Input::Asked { request, standing: self.standing() }),
            Err(why) => {
                // The requester may be gone.
                drop(request.answer.send(Err(why)));
                None
            }
        }
    }

    fn check_request(&self, ask: &Ask, settings: &SourceSettings) -> Result<(), ControlError> {
        let Ask::Set(changes) = ask else { return Ok(()) };
        let cache = changes.iter().find(|change| matches!(change, Change::XbzrleCache(_)));
        let Some(to @ &Change::XbzrleCache(bytes)) = cache else { return Ok(()) };
        let settings = with_all(settings, &[*to])?;
        self.check_cache(to, bytes, &settings)
    }

    /// The checks of the start: the cache holds pages, is no larger than the guest, and this host has the memory.
    fn check_cache(&self, to: &Change, bytes: u64, settings: &SourceSettings) -> Result<(), ControlError> {
        let (page, layout) = (self.transfer.page_bytes(1), self.transfer.layout());
        let least = bounds::least_cache(page, settings.lanes);
        if bytes < least {
            let what = format!("a cache of {} holds no pages; write {} or more", Size(bytes), Size(least));
            return Err(to.wrong(what).into());
        }
        if let Some((what, write)) = bounds::cache_beyond_guest(bytes, layout.bytes(), page, settings.lanes) {
            return Err(to.wrong(format!("{what}; {write}")).into());
        }
        bounds::check_cache(self.bound(settings), bytes).map_err(|why| to.wrong(why).into())
    }

    /// The most memory that the source takes for itself, without the dirty logs.
    pub(super) fn bound(&self, settings: &SourceSettings) -> u64 {
        bounds::source_bound(self.transfer.layout(), settings, self.transfer.hints.may_leave_out())
    }

    /// The input for a signal, if the course needs it.
    fn input(&mut self, signal: Signal) -> Option<Input> {
        let Attempt::Running(flow) = &mut self.attempt else { return None };
        match signal {
            Signal::Scanned(scanned) => Some(Input::Scanned(scanned)),
            Signal::Sent(sent) => Some(Input::Sent(sent, flow.work())),
            Signal::Synced(found) => {
                let standing = Standing { cached_pages: self.cached_pages(), ..self.standing_with(found.dirty_pages) };
                Some(Input::Synced { found, standing })
            }
            Signal::Received(Message::Progress(acknowledged)) => {
                self.rates.hear(&[]);
                Some(flow.acknowledge(&acknowledged).unwrap_or_else(Input::Failed))
            }
            Signal::Received(Message::Heartbeat(figures)) => {
                self.rates.hear(&figures);
                Some(Input::Received(Message::Heartbeat(figures)))
            }
            Signal::Received(message) => Some(Input::Received(message)),
            Signal::Lost(why) => Some(Input::Failed(MigrationError::Lost(why))),
            Signal::Silent(silence) => Some(Input::Failed(MigrationError::Silent(silence))),
            Signal::StageDone(stage) if stage.kind == StageKind::Sender => Some(Input::FileComplete),
            Signal::StageDone(_) => None,
            Signal::Broke(failure) => Some(Input::Broke(failure)),
        }
    }

    /// Time has passed, with or without a connection.
    fn tick(&mut self, course: &SourceCourse) -> Input {
        if course.is_serving() {
            self.attempt.flow().iter().for_each(|flow| flow.graph.lanes.in_flight.forget_urgent());
        }
        let standing = self.standing();
        self.report_progress(course, &standing);
        let bulk_bytes = self.attempt.flow().map_or(0, Flow::bulk_bytes);
        Input::Tick { standing, bulk_bytes }
    }

    /// The state of the migration, by the bitmap alone.
    pub(super) fn standing(&self) -> Standing {
        self.standing_with(self.transfer.bitmap.as_ref().map_or(0, |bitmap| bitmap.count()))
    }

    /// The state of the migration with the given number of dirty pages.
    fn standing_with(&self, dirty_pages: u64) -> Standing {
        let in_flight_pages = self.attempt.flow().map_or(0, |flow| flow.graph.lanes.in_flight.pages());
        let page_rate = whole(self.rates.pages_latest());
        Standing { elapsed: self.now(), dirty_pages, in_flight_pages, page_rate, ..Standing::default() }
    }

    /// Dirty pages that can be sent as deltas. It takes a sweep over the bitmap.
    fn cached_pages(&self) -> u64 {
        let references = self.attempt.flow().and_then(|flow| flow.graph.lanes.references.as_ref());
        self.transfer.bitmap.as_ref().zip(references).map_or(0, |(bitmap, references)| references.count_in(bitmap))
    }

    async fn act(&mut self, action: Action, course: &SourceCourse) -> Answer {
        match action {
            Action::Notify(event) => self.observers.notify(&event),
            Action::ReportChange { round, from, to } => {
                let memory_bound = self.bound(course.settings()) + bounds::logs_bytes(&self.transfer.logs);
                self.observers.notify(&Event::Changed(Changed { round, from, to, memory_bound }));
            }
            // The requester may be gone.
            Action::Answer(answer, result) => drop(answer.send(result)),
            Action::Connect => self.attempt = Attempt::Reaching(self.reach(course.settings())?),
            Action::EndAttempt => self.end_attempt(course).await,
            Action::Return { attempt } => {
                self.attempt = Attempt::ReachingAgain(self.reach_again(course.settings(), attempt)?);
            }
            Action::SetTransport(transport) => self.transport = transport,
            Action::StartStages(bandwidth) => self.start_stages(course.settings(), bandwidth)?,
            // Before the stages run they are settings like others.
            Action::SetBandwidth(bandwidth) => {
                self.attempt.flow().iter().for_each(|flow| flow.graph.set_bandwidth(bandwidth));
            }
            Action::SetCache(bytes) => self.attempt.flow().iter().for_each(|flow| flow.graph.set_cache(bytes)),
            Action::StartDigests => self.digests = Digests::Started(self.transfer.start_digests()),
            Action::AwaitDigests => {
                if let Digests::Started(digests) = std::mem::replace(&mut self.digests, Digests::None) {
                    self.digests = Digests::Awaited(digests);
                }
            }
            action => return self.call(action, course).await,
        }
        Ok(None)
    }

    /// Calls into the guest, and their answers.
    async fn call(&mut self, action: Action, course: &SourceCourse) -> Answer {
        let guest = &mut self.transfer;
        Ok(Some(match action {
            Action::Arm => {
                self.arm(course).await?;
                Input::Armed
            }
            Action::Measure => Input::Measured(guest.digest_time().await?),
            Action::OpenHints { runs } => {
                if let Some(bitmap) = &guest.bitmap {
                    guest.hints.open(runs, bitmap, &guest.logs, &self.observers).await?;
                }
                Input::HintsOpen
            }
            Action::Throttle(percent, request) => {
                let throttled = guest.throttle(percent).await;
                request.map(|answer| answer.send(Ok(())));
                Input::Throttled(throttled)
            }
            Action::Pause => {
                guest.pause().await?;
                Input::Paused
            }
            Action::Save => {
                guest.hints.reach(Point::Complete, &self.observers).await;
                guest.save().await?;
                Input::Saved
            }
            Action::Release => {
                guest.release().await?;
                Input::Released
            }
            Action::NamePage(message) => Input::PageNamed(guest.name_page(&message).await),
            Action::Commit => {
                guest.commit(self.transport.address()).await?;
                Input::Committed
            }
            Action::Resume { reacquire, run } => Input::Resumed(guest.resume(reacquire, run).await),
            order => return self.order(order, course).await,
        }))
    }

    /// What precedes a resume. A failure is a warning: the rest of the list must follow, whatever a hinter or an
    /// observer does.
    async fn clean_up(&mut self, action: Action) {
        let cleaned = guarded(async {
            match action {
                Action::CloseHints => self.transfer.hints.close().await,
                Action::LiftThrottle => self.lift_throttle().await,
                _ => self.transfer.moved().await?,
            }
            Ok(())
        });
        if let Err(error) = cleaned.await {
            let warn = async {
                self.observers.notify(&Event::Warning(error.to_string()));
                Ok(())
            };
            // An observer that panics is no reason to leave the guest paused.
            drop(guarded(warn).await);
        }
    }

    /// Orders to the stages, and messages to the destination.
    async fn order(&mut self, action: Action, course: &SourceCourse) -> Answer {
        let Attempt::Running(flow) = &mut self.attempt else {
            return Err(MigrationError::Mistake(format!("{action:?} without stages")));
        };
        match action {
            Action::Scan(order) => {
                flow.round_begins();
                if flow.graph.scan.put(order.into()).await.is_err() {
                    return self.broken().await;
                }
            }
            Action::CutRound => flow.graph.cut_round(),
            Action::EndLanes => {
                if flow.graph.scan.put(ScannerOrder::EndLanes).await.is_err() {
                    return self.broken().await;
                }
            }
            Action::EndDirect => {
                flow.graph.forget_references();
                if flow.graph.scan.put(ScannerOrder::EndDirect).await.is_err() {
                    return self.broken().await;
                }
                let named = self.transfer.name_missing();
                return self.send_all(named, course).await;
            }
            Action::Serve => {
                let urgent = unparked(&mut flow.urgent);
                let urgent = urgent.ok_or_else(|| MigrationError::Mistake("there is no urgent connection".into()))?;
                let served = flow.graph.serve(urgent, course.round() + 1, self.plane.urgent()?);
                served.map_err(|refused| MigrationError::Mistake(refused.to_string()))?;
            }
            Action::SendMissing => {
                let more = self.transfer.name_more();
                return self.send_all(more, course).await;
            }
            Action::Sync { after_round } => {
                self.transfer.hints.before_sync(&self.observers).await;
                if flow.graph.sync.put(SyncOrder { after_round }).await.is_err() {
                    return self.broken().await;
                }
            }
            Action::AcknowledgeAll => flow.graph.lanes.in_flight.acknowledge_all(),
            Action::SendState => {
                let chunks = self.transfer.take_state()?;
                let failed = self.send_all(chunks.into_iter().map(Message::State), course).await?;
                return Ok(failed.or(Some(Input::StateSent)));
            }
            Action::SendDigests => {
                let Digests::Done(digests) = std::mem::replace(&mut self.digests, Digests::None) else {
                    return Ok(None);
                };
                return self.send_all(digests.messages(), course).await;
            }
            Action::SendEnd { run_state, frames } => {
                let failed = self.send(&Message::End { run_state, frames }, course).await?;
                return Ok(failed.or(Some(Input::EndSent)));
            }
            // A closed queue needs no handling here: the sender's failure follows, and counts as after Go.
            Action::Go(run_state) => _ = flow.send(&Message::Go(run_state)).await,
            Action::Finish => {
                if flow.graph.control[0].put(Control::Finish).await.is_err() {
                    return self.broken().await;
                }
            }
            Action::Explain(failure) => return Ok(Some(self.explain(failure).await)),
            other => unreachable!("{other:?} is no order"),
        }
        Ok(None)
    }

    /// Why a stage failed: the destination's message that decides where the guest is; else the first failure in time.
    async fn explain(&mut self, failure: Failure) -> Input {
        let Attempt::Running(flow) = &mut self.attempt else { return Input::Failed(MigrationError::Stage(failure)) };
        match flow.last_message(failure).await {
            Ok(message) => Input::Received(message),
            Err(cause) => Input::Failed(MigrationError::Stage(cause)),
        }
    }

    /// A queue was found closed: a stage has failed, and its failure is reported shortly.
    async fn broken(&mut self) -> Answer {
        let Attempt::Running(flow) = &mut self.attempt else { return Ok(None) };
        let failure = async {
            loop {
                match flow.next().await {
                    Signal::Broke(failure) => break Input::Broke(failure),
                    Signal::Received(message) if decides(&message) => break Input::Received(message),
                    Signal::Lost(why) => break Input::Failed(MigrationError::Lost(why)),
                    _ => {}
                }
            }
        };
        let failed = tokio::time::timeout(EXPLANATION, failure).await;
        Ok(Some(failed.unwrap_or_else(|_| Input::Failed(MigrationError::Lost(Loss::StageEnded)))))
    }

    async fn send_all(&mut self, messages: impl IntoIterator<Item = Message>, course: &SourceCourse) -> Answer {
        for message in messages {
            if let Some(failed) = self.send(&message, course).await? {
                return Ok(Some(failed));
            }
        }
        Ok(None)
    }

    /// Sends a control message. A destination that does not read delays neither a cancel nor, forever, a paused guest.
    async fn send(&mut self, message: &Message, course: &SourceCourse) -> Answer {
        let Self { attempt: Attempt::Running(flow), operator, .. } = self else { return Ok(None) };
        let sent = tokio::select! {
            biased;
            () = operator.cancel.token.cancelled() => return Err(MigrationError::Cancelled),
            silence = silenced(flow.alive.as_ref()) => return Err(MigrationError::Silent(silence)),
            sent = tokio::time::timeout(course.settings().handover_timeout, flow.send(message)) => sent,
        };
        match sent {
            Ok(Ok(())) => Ok(None),
            Ok(Err(_)) => self.broken().await,
            Err(_) => Err(MigrationError::TimedOut("the destination does not read what it is sent".into())),
        }
    }

    async fn arm(&mut self, course: &SourceCourse) -> Result<(), MigrationError> {
        let layout = self.transfer.layout().clone();
        self.transfer.hints.set_up(&layout, course.settings().after).await?;
        self.transfer.ask_for_logs().await?;
        self.observers.notify(&Event::Guest {
            blocks: block_facts(&layout),
            pages: layout.pages(),
            memory_bound: self.bound(course.settings()) + bounds::logs_bytes(&self.transfer.logs),
        });
        self.transfer.arm(course.settings().verify).await?;
        self.transfer.hints.report(&self.observers);
        self.transfer.hints.warn_if_lost(&self.transfer.logs, &self.observers);
        Ok(())
    }

    /// Ends the stages. What the lanes know stays.
    async fn end_attempt(&mut self, course: &SourceCourse) {
        self.digests = Digests::None;
        self.report_last_progress(course, false);
        let Attempt::Running(mut flow) = std::mem::replace(&mut self.attempt, Attempt::None) else { return };
        self.earlier_bytes += flow.wire_bytes();
        self.earlier_urgent += flow.urgent_pages();
        flow.graph.end().await;
        self.transfer.interrupted(flow.graph.into_lanes());
    }

    fn start_stages(&mut self, settings: &SourceSettings, bandwidth: Option<u64>) -> Result<(), MigrationError> {
        let transfer = &mut self.transfer;
        let link = match std::mem::replace(&mut self.attempt, Attempt::None) {
            Attempt::Linked(link) => link,
            other => {
                self.attempt = other;
                return Ok(());
            }
        };
        let (Some(bitmap), Some(untouched)) = (transfer.bitmap.clone(), transfer.untouched.clone()) else {
            return Ok(());
        };
        transfer.start_check()?;
        let parts = SourceParts {
            memory: transfer.memory.clone(),
            logs: transfer.logs.clone(),
            bitmap,
            exclusions: transfer.hints.exclusions(),
            untouched,
            page_hashes: transfer.page_hashes.clone(),
        };
        let graph = SourceGraph::start(parts, link.senders, settings, transfer.lanes.take());
        graph.set_bandwidth(bandwidth);
        let watch = Watch::begin(self.transport.capabilities().return_path);
        self.rates.begin(watch, self.earlier_bytes);
        if self.setup.is_zero() {
            self.setup = self.started.elapsed();
        }
        self.attempt = Attempt::Running(Box::new(Flow::new(graph, link.return_path, link.alive, link.urgent)));
        Ok(())
    }

    async fn lift_throttle(&mut self) {
        if let Err(error) = self.transfer.throttle(0).await {
            self.is_throttled = true;
            self.observers.notify(&Event::Warning(format!("the guest may still be throttled: {error}")));
        }
    }
}
