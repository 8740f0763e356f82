//! The end, in every case: everybody is notified of the outcome, and everything is closed.

use memferry_stages::wire::Message;

use super::figures::Figures;
use super::{Attempt, Source};
use crate::events::{Ended, Event, Outcome, Postcopy};
use crate::guest::hints::Point;
use crate::migration::FAREWELL;
use crate::migration::course::source::{Conclusion, End, SourceCourse, why_cancelled};
use crate::migration::driver::Course;
use crate::migration::error::MigrationError;
use crate::migration::outcome::{LOOK, LOST_HERE, SendError, Sent};

impl Source<'_> {
    /// The course is over: reports the outcome, notifies the peer, and stops stages and logs. `mistake` is why the course
    /// did not end by itself, if it did not.
    pub(super) async fn conclude(
        mut self,
        course: SourceCourse,
        mistake: Option<MigrationError>,
    ) -> Result<Sent, SendError> {
        self.operator.requests.close();
        if let Some(mistake) = mistake.as_ref().filter(|_| course.is_over()) {
            // What the course ended with stands.
            self.observers.notify(&Event::Warning(mistake.to_string()));
        }
        let completed = course.conclusion().is_some_and(|conclusion| matches!(conclusion.end, End::Completed));
        self.report_last_progress(&course, completed);
        let ended = self.ended(&course);
        let farewell = course.farewell();
        let conclusion = course.into_conclusion(mistake);
        let ended = self.report_end(&conclusion, ended);
        // The verdict is final; only cleanup remains.
        self.take_leave(farewell).await;
        // No stage runs any more: nothing is scanned or synced after this.
        self.transfer.hints.reach(Point::Cleanup, &self.observers).await;
        for failure in self.transfer.stop_logs().await {
            self.observers.notify(&Event::Warning(failure.to_string()));
        }
        result(conclusion, ended)
    }

    /// Sends the last message and ends the connections and stages.
    async fn take_leave(&mut self, farewell: Option<Message>) {
        let return_path = self.transport.capabilities().return_path;
        match std::mem::replace(&mut self.attempt, Attempt::None) {
            Attempt::Linked(link) if return_path => {
                if let Some(farewell) = farewell {
                    link.close(farewell, FAREWELL).await;
                }
            }
            Attempt::Running(mut flow) => {
                if return_path {
                    flow.close(farewell, FAREWELL).await;
                }
                flow.graph.end().await;
            }
            Attempt::None | Attempt::Reaching(_) | Attempt::ReachingAgain(_) | Attempt::Linked(_) => {}
        }
    }

    /// The figures of the outcome.
    fn ended(&self, course: &SourceCourse) -> Ended {
        let Figures { wire_bytes, memory_peak, stages } = self.figures(course.settings().verify);
        Ended {
            outcome: Outcome::Failed,
            error: None,
            verified: course.verified(),
            checked: self.transfer.page_hashes.as_ref().map(|page_hashes| page_hashes.coverage()),
            total: self.started.elapsed(),
            setup: self.setup,
            downtime: course.downtime(),
            parts: course.parts(),
            forecast: course.forecast(),
            wire_bytes,
            excluded: self.transfer.hints.excluded(),
            memory_peak,
            bottleneck: self.rates.bottleneck(&stages),
            cpu: self.rates.cpu(),
            stages,
            resume_failed: false,
            outages: course.outages(),
            postcopy: self.postcopy(course),
        }
    }

    /// The figures of a guest that was started before all of its pages had left.
    fn postcopy(&self, course: &SourceCourse) -> Option<Postcopy> {
        let since = course.serving_since()?;
        Some(Postcopy {
            missing_pages: self.transfer.missing_pages,
            time: self.started.elapsed().saturating_sub(since),
            urgent_pages: self.urgent_pages(),
            ..Postcopy::default()
        })
    }

    /// Reports the verdict to observers.
    fn report_end(&self, conclusion: &Conclusion, figures: Ended) -> Ended {
        let (outcome, error) = match &conclusion.end {
            End::Completed => (Outcome::Completed, None),
            End::Failed(why) => (Outcome::Failed, Some(why.to_string())),
            End::Cancelled(why) => (Outcome::Cancelled, Some(why_cancelled(why))),
            End::Lost(why) => (Outcome::Lost, Some(format!("{why}; {LOST_HERE}"))),
            End::Unconfirmed(why) => (Outcome::Unconfirmed, Some(format!("{why}; {LOOK}"))),
        };
        let resume_error = conclusion.resume_error.as_ref();
        let resume = resume_error.map(|why| format!("the guest could not be resumed here and stays paused: {why}"));
        let error = [error, resume].into_iter().flatten().reduce(|all, more| format!("{all}; {more}"));
        let ended = Ended { outcome, error, resume_failed: resume_error.is_some(), ..figures };
        self.observers.notify_end(&ended);
        ended
    }
}

/// The result for the caller.
fn result(conclusion: Conclusion, ended: Ended) -> Result<Sent, SendError> {
    let Conclusion { end, resume_error, stays_paused } = conclusion;
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
        (End::Lost(source), _) => Err(SendError::Lost { source, ended: boxed(ended) }),
        // A guest that may run elsewhere is not resumed, so there is no resume error.
        (End::Unconfirmed(source), _) => Err(SendError::Unconfirmed { source, ended: boxed(ended) }),
    }
}
