//! Rounds, while the guest runs: scan, sync, decide.

use std::time::{Duration, Instant};

use memferry_stages::bitmap_sync::{SyncOrder, Synced};
use memferry_stages::scanner::ScanOrder;
use memferry_stages::sender::Sent;
use memferry_stages::tally::RoundTally;
use memferry_stages::wire::Message;
use memferry_stages::wire::messages::Progress as Acknowledged;

use super::Source;
use super::spent::Part;
use crate::controller::forecast::{Standing, whole};
use crate::controller::{Decided, Decision};
use crate::events::{Event, Role};
use crate::migration::asked;
use crate::migration::error::{Loss, MigrationError};
use crate::migration::flow::{Flow, Signal};

impl Source {
    /// Rounds while the guest runs, until the controller ends them.
    pub(super) async fn rounds(&mut self, flow: &mut Flow) -> Result<(), MigrationError> {
        if !self.clearers.is_empty() {
            // Hints may arrive in the first round already; after it they follow a sync.
            self.sync(flow).await?;
            self.controller.armed(self.started.elapsed());
        }
        let mut order = Some(ScanOrder::all(1, false));
        loop {
            match order {
                Some(order) => {
                    self.scan(flow, order).await?;
                    self.estimate_verify().await?;
                }
                None => self.drain(flow, Duration::MAX).await?,
            }
            let found = self.sync(flow).await?;
            let kept_pages = self.kept_pages(flow);
            let decided = self.controller.synced(&Standing { kept_pages, ..self.standing(flow, found.dirty_pages) });
            self.tell(&decided);
            order = Some(ScanOrder::all(self.round + 1, false));
            match decided.decision {
                Decision::AnotherRound | Decision::RaiseLimit(_) => {}
                Decision::Sample(pages) => order = Some(ScanOrder::sample(self.round + 1, pages)),
                Decision::Drain => order = None,
                Decision::Throttle(percent) => self.throttle(percent).await,
                Decision::SwitchOver => return Ok(()),
                Decision::GiveUp => return Err(MigrationError::GaveUp(Box::new(decided))),
            }
        }
    }

    /// Reports a decision, and stores the forecast that a switchover rests on. A paused guest has no forecast to
    /// report.
    pub(super) fn tell(&mut self, decided: &Decided) {
        if decided.decision == Decision::SwitchOver {
            if self.paused.is_some() {
                return;
            }
            self.forecast = decided.forecast;
        }
        self.observers.tell(&Event::Decided(decided.clone()));
    }

    /// Throttles the guest. If it cannot be throttled, it runs at full speed, and the controller continues without this
    /// step.
    pub(super) async fn throttle(&mut self, percent: u8) {
        let guest = self.guest.clone();
        self.throttled = true;
        if let Err(error) = asked(move || guest.throttle(percent)).await {
            self.controller.cannot_throttle();
            self.observers.tell(&Event::Warning(error.to_string()));
        }
    }

    /// One round: all dirty pages, or a sample of them, until the last byte is handed to the transport.
    pub(super) async fn scan(&mut self, flow: &mut Flow, order: ScanOrder) -> Result<(), MigrationError> {
        let ScanOrder { round, last, .. } = order;
        self.round = round;
        self.spent.on(Part::Transfer);
        let began = Instant::now();
        self.quiet_since = Some(began);
        let before = flow.graph.readings();
        if flow.graph.scan.put(order).await.is_err() {
            return Err(self.broken(flow).await);
        }
        let mut tally = RoundTally::new(round, last);
        let (mut is_scanned, mut lanes_left) = (false, self.settings.lanes);
        // The lanes may complete a small round before the scanner reports its end.
        while !is_scanned || lanes_left > 0 {
            match self.next(flow).await? {
                Signal::Scanned(scanned) => {
                    is_scanned = true;
                    self.observers.tell(&Event::RoundScanned { round: scanned.round });
                }
                Signal::Sent(Sent::RoundComplete { tally: of_lane, .. }) => {
                    tally += of_lane;
                    lanes_left -= u16::from(!last);
                }
                Signal::Sent(Sent::Switchover { .. }) => lanes_left -= 1,
                other => return Err(unexpected(&other)),
            }
        }
        self.quiet_since = None;
        if self.transport.capabilities().stored {
            // Written and flushed: without a return path this is the only acknowledgement.
            flow.graph.in_flight.acknowledge_all();
        }
        let duration = began.elapsed();
        self.pages_frames += tally.batches;
        self.controller.round(&tally, duration, flow.graph.busiest_since(&before));
        self.observers.tell(&Event::RoundSent { tally, duration });
        Ok(())
    }

    pub(super) async fn sync(&mut self, flow: &mut Flow) -> Result<Synced, MigrationError> {
        self.spent.on(Part::Sync);
        self.reach_before_sync().await;
        if flow.graph.sync.put(SyncOrder { after_round: self.round }).await.is_err() {
            return Err(self.broken(flow).await);
        }
        let found = match self.next(flow).await? {
            Signal::Synced(found) => found,
            other => return Err(unexpected(&other)),
        };
        self.controller.fixed().sync = found.duration;
        let Synced { after_round, dirty_pages, duration } = found;
        self.observers.tell(&Event::Synced { after_round, dirty_pages, duration });
        self.reach_after_sync().await?;
        Ok(found)
    }

    /// The state of the migration with the given number of dirty pages.
    fn standing(&self, flow: &Flow, dirty_pages: u64) -> Standing {
        let in_flight_pages = flow.graph.in_flight.pages();
        let page_rate = whole(self.page_speed.latest());
        Standing { elapsed: self.started.elapsed(), dirty_pages, in_flight_pages, page_rate, ..Standing::default() }
    }

    /// Dirty pages that can be sent as deltas. It takes a sweep over the bitmap.
    fn kept_pages(&self, flow: &Flow) -> u64 {
        match (&self.bitmap, &flow.graph.kept) {
            (Some(bitmap), Some(kept)) => bitmap.count_common(kept),
            _ => 0,
        }
    }

    /// The state of the migration, by the bitmap alone.
    pub(super) fn standing_now(&self, flow: &Flow) -> Standing {
        self.standing(flow, self.bitmap.as_ref().map_or(0, |bitmap| bitmap.count()))
    }

    pub(super) fn page_bytes(&self, pages: u64) -> u64 {
        pages * self.memory.page_size().bytes() as u64
    }

    /// The next signal that a phase must handle.
    pub(super) async fn next(&mut self, flow: &mut Flow) -> Result<Signal, MigrationError> {
        loop {
            if let Some(signal) = self.attend(flow).await? {
                return Ok(signal);
            }
        }
    }

    /// Waits for one signal and handles it.
    pub(super) async fn attend(&mut self, flow: &mut Flow) -> Result<Option<Signal>, MigrationError> {
        let signal = flow.next().await;
        self.act_on(flow, signal).await
    }

    /// Turns failures into errors, and handles the signals that concern every phase. Returns the others to the phase.
    pub(super) async fn act_on(&mut self, flow: &mut Flow, signal: Signal) -> Result<Option<Signal>, MigrationError> {
        match signal {
            Signal::Cancel => Err(MigrationError::Cancelled),
            Signal::Asked(request) => self.answer(Some(flow), request).await.map(|()| None),
            Signal::Said(Message::Progress(acknowledged)) => self.acknowledge(flow, &acknowledged).map(|()| None),
            Signal::Said(Message::Heartbeat(figures)) => {
                self.hear(&figures);
                Ok(None)
            }
            Signal::Said(Message::Refused(why)) => Err(MigrationError::Refused { peer: Role::Destination, why }),
            Signal::Said(Message::Abort(why)) => Err(MigrationError::GivenUp { peer: Role::Destination, why }),
            Signal::Said(other) => Err(MigrationError::Protocol(format!("{} came out of turn", other.kind().name()))),
            Signal::Lost(loss) => Err(MigrationError::Lost(loss)),
            Signal::Silent(silence) => Err(MigrationError::Silent(silence)),
            Signal::Broke(failure) => Err(flow.explain(failure).await),
            Signal::StageDone(_) => Ok(None),
            Signal::Tick => self.tick(flow).await.map(|()| None),
            signal => Ok(Some(signal)),
        }
    }

    pub(super) fn acknowledge(&mut self, flow: &Flow, acknowledged: &Acknowledged) -> Result<(), MigrationError> {
        self.hear(&[]);
        for (lane, &frames) in (0..self.settings.lanes).zip(&acknowledged.frames) {
            flow.graph.in_flight.acknowledge(lane, frames).map_err(|sent| {
                MigrationError::Protocol(format!("lane {lane}: {frames} frames acknowledged of {sent} sent"))
            })?;
        }
        Ok(())
    }

    /// A queue was found closed: a stage has failed, and its failure is reported shortly.
    pub(super) async fn broken(&mut self, flow: &mut Flow) -> MigrationError {
        let failure = async {
            loop {
                if let Err(error) = self.next(flow).await {
                    break error;
                }
            }
        };
        let failure = tokio::time::timeout(Duration::from_secs(1), failure).await;
        failure.unwrap_or(MigrationError::Lost(Loss::StageEnded))
    }

    /// Figures for observers, and the check of the deadline.
    async fn tick(&mut self, flow: &Flow) -> Result<(), MigrationError> {
        let now = self.standing_now(flow);
        self.report_progress(flow, &now);
        self.mind_the_standstill(flow)?;
        self.mind_the_deadline(flow, &now).await
    }

    /// A destination that accepts no more data would block a round, and perhaps a paused guest, forever. Heartbeats may
    /// continue meanwhile, on another connection.
    fn mind_the_standstill(&mut self, flow: &Flow) -> Result<(), MigrationError> {
        let Some(quiet_since) = &mut self.quiet_since else { return Ok(()) };
        let bulk_bytes = flow.graph.sender_meters.iter().map(|meter| meter.bulk_bytes()).sum();
        if bulk_bytes != self.last_bulk_bytes {
            self.last_bulk_bytes = bulk_bytes;
            *quiet_since = Instant::now();
        }
        if quiet_since.elapsed() < self.settings.handover_timeout {
            return Ok(());
        }
        let why = format!("the destination has taken nothing for {:.1?}", self.settings.handover_timeout);
        Err(MigrationError::TimedOut(why))
    }

    /// The deadline may end the rounds in the middle of one. Then the migration ends at once, or the guest is paused at
    /// once and the rest of the round is sent without it.
    async fn mind_the_deadline(&mut self, flow: &Flow, now: &Standing) -> Result<(), MigrationError> {
        if self.paused.is_some() {
            return Ok(());
        }
        let Some(decided) = self.controller.tick(now) else { return Ok(()) };
        self.tell(&decided);
        match decided.decision {
            Decision::GiveUp => Err(MigrationError::GaveUp(Box::new(decided))),
            _ => self.pause(flow).await,
        }
    }
}

pub(super) fn unexpected(signal: &Signal) -> MigrationError {
    MigrationError::Protocol(format!("{signal:?} came out of turn"))
}
