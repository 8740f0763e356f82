//! The end, in every case: the guest is where the verdict says, and all parties are notified.

use memferry_stages::dirty_log::LogCall;
use memferry_stages::wire::Message;

use super::figures::Figures;
use super::spent::Part;
use super::{End, Source};
use crate::events::{Ended, Event, Phase};
use crate::guest::RunState;
use crate::migration::error::{MigrationError, guarded};
use crate::migration::flow::Flow;
use crate::migration::outcome::{LOOK, SendError, Sent};
use crate::migration::{FAREWELL, asked, blocking};
use crate::settings::After;

impl Source {
    /// In every case: puts the guest where the result says, stops the logs, notifies the peer, and reports the outcome.
    pub(super) async fn conclude(mut self, end: End, mut flow: Option<Flow>) -> Result<Sent, SendError> {
        self.requests = None;
        flow.iter_mut().for_each(Flow::close_requests);
        self.close_window().await;
        let completed = matches!(end, End::Completed);
        let stays_paused = match end {
            End::Completed => self.settings.after != Some(After::Resume),
            End::Unconfirmed(_) => true,
            End::Failed(_) | End::Cancelled(_) => false,
        };
        self.spent.on(Part::Resume);
        self.downtime = self.spent.total().filter(|_| completed);
        let is_throttled = !self.lift_throttle().await;
        let resume_error = if stays_paused { None } else { self.let_go_on().await };
        if completed && stays_paused {
            self.moved().await;
        }
        let end = self.with_page(end);
        let farewell = farewell(&end);
        if let Some(flow) = &flow {
            self.report_last_progress(flow, completed, is_throttled);
        }
        let ended = self.ended(&end, resume_error.as_ref(), self.figures(flow.as_ref()));
        // The verdict is final; only cleanup remains.
        if let Some(mut flow) = flow {
            if self.transport.capabilities().return_path {
                flow.close(farewell, FAREWELL).await;
            }
            flow.graph.end().await;
        }
        // No stage runs any more: nothing is scanned or synced after this.
        self.reach_cleanup().await;
        self.stop_logs().await;
        result(end, resume_error, stays_paused, ended)
    }

    /// The failure with the page that differs, if one was named.
    fn with_page(&mut self, end: End) -> End {
        match (end, self.differing_page.take()) {
            (End::Failed(MigrationError::Handover(source)), Some(page)) => {
                self.verified = Some(false);
                End::Failed(MigrationError::PageDiffers { source, page })
            }
            (end, _) => end,
        }
    }

    /// Wherever the guest is, a migration that is over does not throttle it. Returns whether it runs at full speed.
    async fn lift_throttle(&self) -> bool {
        if !self.throttled {
            return true;
        }
        let guest = self.guest.clone();
        let lifted = asked(move || guest.throttle(0)).await;
        if let Err(error) = &lifted {
            self.observers.tell(&Event::Warning(format!("the guest may still be throttled: {error}")));
        }
        lifted.is_ok()
    }

    /// Resumes the guest if the engine paused it. Returns the error if it cannot be resumed.
    async fn let_go_on(&mut self) -> Option<MigrationError> {
        self.paused?;
        let (guest, released, run) = (self.guest.clone(), self.released, self.was == RunState::Running);
        let go_on = move || {
            if released {
                guest.reacquire()?;
            }
            if run { guest.resume() } else { Ok(()) }
        };
        match asked(go_on).await {
            Ok(()) => {
                if run {
                    self.spent.on(Part::Resume);
                    self.downtime = self.spent.total();
                    self.observers.tell(&Event::Resumed);
                }
                None
            }
            Err(error) => Some(error),
        }
    }

    /// The guest may run elsewhere: nothing here needs to guard it.
    async fn moved(&self) {
        let guest = self.guest.clone();
        let moved = move || {
            guest.moved();
            Ok(())
        };
        if let Err(error) = asked(moved).await {
            self.observers.tell(&Event::Warning(error.to_string()));
        }
    }

    async fn stop_logs(&self) {
        // Stops every log, even if one of them fails.
        for log in self.logs.clone() {
            let stop = move || log.stop().map_err(|error| MigrationError::Log { doing: LogCall::Stop, error });
            if let Err(error) = guarded(blocking(stop)).await {
                self.observers.tell(&Event::Warning(error.to_string()));
            }
        }
    }

    /// Reports the verdict to observers.
    fn ended(&self, end: &End, resume_error: Option<&MigrationError>, figures: Figures) -> Ended {
        let (phase, error) = match end {
            End::Completed => (Phase::Completed, None),
            End::Failed(why) => (Phase::Failed, Some(why.to_string())),
            End::Cancelled(why) => (Phase::Cancelled, Some(why_cancelled(why))),
            End::Unconfirmed(why) => (Phase::Unconfirmed, Some(format!("{why}; {LOOK}"))),
        };
        let resume = resume_error.map(|why| format!("the guest could not be resumed here and stays paused: {why}"));
        let error = [error, resume].into_iter().flatten().reduce(|all, more| format!("{all}; {more}"));
        self.tell_phase(phase);
        let ended = Ended {
            phase,
            error,
            verified: self.verified,
            total: self.started.elapsed(),
            setup: self.setup,
            downtime: self.downtime,
            parts: self.spent.parts(),
            forecast: self.forecast,
            wire_bytes: figures.wire_bytes,
            spared: self.spared(),
            memory_peak: figures.memory_peak,
            bottleneck: self.watch.as_ref().map(|watch| watch.all(&figures.stages)).unwrap_or_default(),
            cpu: self.cpu(),
            stages: figures.stages,
            resume_failed: resume_error.is_some(),
        };
        self.observers.tell(&Event::Ended(ended.clone()));
        ended
    }
}

/// Why Go will not be sent, if it will not.
fn farewell(end: &End) -> Option<Message> {
    match end {
        End::Completed | End::Unconfirmed(_) => None,
        End::Failed(why) => Some(Message::Abort(why.to_string().into())),
        End::Cancelled(why) => Some(Message::Abort(why_cancelled(why).into())),
    }
}

fn why_cancelled(why: &MigrationError) -> String {
    match why {
        MigrationError::Cancelled => "cancelled at the source".into(),
        gave_up => gave_up.to_string(),
    }
}

/// The result for the caller.
fn result(end: End, resume_error: Option<MigrationError>, stays_paused: bool, ended: Ended) -> Result<Sent, SendError> {
    let boxed = Box::new;
    match (end, resume_error) {
        (End::Completed, None) => Ok(Sent { resumed: !stays_paused, ended }),
        (End::Completed, Some(source)) => {
            Err(SendError::ResumeFailed { source: Box::new(source), cause: None, ended: boxed(ended) })
        }
        (End::Failed(cause) | End::Cancelled(cause), Some(source)) => {
            let source = Box::new(source);
            Err(SendError::ResumeFailed { source, cause: Some(Box::new(cause)), ended: boxed(ended) })
        }
        (End::Failed(source), None) => Err(SendError::Failed { source, ended: boxed(ended) }),
        (End::Cancelled(source), None) => Err(SendError::Cancelled { source, ended: boxed(ended) }),
        // A guest that may run elsewhere is not resumed, so there is no resume error.
        (End::Unconfirmed(source), _) => Err(SendError::Unconfirmed { source, ended: boxed(ended) }),
    }
}
