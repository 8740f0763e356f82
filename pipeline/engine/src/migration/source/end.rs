//! The end, whatever happened: the guest is where the verdict says, and everybody is told.

use memferry_stages::dirty_log::LogCall;
use memferry_stages::wire::Message;

use super::Source;
use super::figures::Figures;
use crate::events::{Ended, Event, Phase};
use crate::guest::RunState;
use crate::migration::error::{MigrationError, guarded};
use crate::migration::flow::Flow;
use crate::migration::handshake::Verdict;
use crate::migration::{FAREWELL, asked, blocking};
use crate::settings::After;

/// What an operator does about a hand-over that nobody confirmed.
const LOOK: &str = "the guest stays paused here: look at the destination; resume it here only if it does not run there";

impl Source {
    /// Whatever happened: the guest is where the verdict says, the logs are stopped, the peer is told, and it is reported.
    pub(super) async fn conclude(mut self, mut verdict: Verdict, mut flow: Option<Flow>) -> Ended {
        self.requests = None;
        flow.iter_mut().for_each(Flow::close_requests);
        self.close_window().await;
        let stays_paused = match verdict {
            Verdict::Completed => self.settings.after != Some(After::Resume),
            Verdict::Unconfirmed(_) => true,
            Verdict::Failed(_) | Verdict::Cancelled => false,
        };
        self.downtime = self.paused.filter(|_| verdict == Verdict::Completed).map(|paused| paused.elapsed());
        let is_throttled = !self.lift_throttle().await;
        let resume_error = if stays_paused { None } else { self.let_go_on().await };
        if verdict == Verdict::Completed && stays_paused {
            self.moved().await;
        }
        if let (Verdict::Failed(why), Some(page)) = (&mut verdict, &self.differing_page) {
            *why = format!("{why}: {page}");
            self.verified = Some(false);
        }
        let farewell = self.farewell(&verdict);
        if let Some(flow) = &flow {
            self.report_last_progress(flow, verdict == Verdict::Completed, is_throttled);
        }
        let ended = self.ended(verdict, resume_error, self.figures(flow.as_ref()));
        // The verdict is out; what is left is to tidy up.
        if let Some(mut flow) = flow {
            if self.transport.capabilities().return_path {
                flow.close(farewell, FAREWELL).await;
            }
            flow.graph.end().await;
        }
        // No stage is at work any more: nothing is scanned or synced behind it.
        self.reach_cleanup().await;
        self.stop_logs().await;
        ended
    }

    /// Wherever the guest is: nobody throttles it for a migration that is over. Does it run at full speed?
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

    /// Resumes the guest if we paused it: what went wrong, if it does not go on.
    async fn let_go_on(&mut self) -> Option<String> {
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
                    self.downtime = self.paused.map(|paused| paused.elapsed());
                    self.observers.tell(&Event::Resumed);
                }
                None
            }
            Err(error) => Some(format!("the guest could not be resumed here and stays paused: {error}")),
        }
    }

    /// The guest is no longer ours: nothing needs to watch over it.
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
        // Each of them, whatever becomes of the others.
        for log in self.logs.clone() {
            let stop = move || log.stop().map_err(|error| MigrationError::Log { doing: LogCall::Stop, error });
            if let Err(error) = guarded(blocking(stop)).await {
                self.observers.tell(&Event::Warning(error.to_string()));
            }
        }
    }

    /// Why there will be no Go, if there will be none.
    fn farewell(&self, verdict: &Verdict) -> Option<Message> {
        match verdict {
            Verdict::Completed | Verdict::Unconfirmed(_) => None,
            Verdict::Failed(why) => Some(Message::Abort(why.as_str().into())),
            Verdict::Cancelled => Some(Message::Abort(self.why_cancelled().into())),
        }
    }

    fn why_cancelled(&self) -> String {
        self.gave_up.as_ref().map_or_else(|| "cancelled at the source".into(), ToString::to_string)
    }

    /// The verdict, told to whoever watches.
    fn ended(&self, verdict: Verdict, resume_error: Option<String>, figures: Figures) -> Ended {
        let resume_failed = resume_error.is_some();
        let (phase, error) = match verdict {
            Verdict::Completed => (Phase::Completed, None),
            Verdict::Failed(why) => (Phase::Failed, Some(why)),
            Verdict::Cancelled => (Phase::Cancelled, Some(self.why_cancelled())),
            Verdict::Unconfirmed(why) => (Phase::Unconfirmed, Some(format!("{why}; {LOOK}"))),
        };
        let error = [error, resume_error].into_iter().flatten().reduce(|all, more| format!("{all}; {more}"));
        self.tell_phase(phase);
        let ended = Ended {
            phase,
            error,
            verified: self.verified,
            total: self.started.elapsed(),
            setup: self.setup,
            downtime: self.downtime,
            parts: self.parts,
            forecast: self.forecast,
            wire_bytes: figures.wire_bytes,
            spared: self.spared(),
            memory_peak: figures.memory_peak,
            bottleneck: self.watch.as_ref().map(|watch| watch.all(&figures.stages)).unwrap_or_default(),
            cpu: self.cpu(),
            stages: figures.stages,
            resume_failed,
        };
        self.observers.tell(&Event::Ended(ended.clone()));
        ended
    }
}
