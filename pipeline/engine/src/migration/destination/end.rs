//! The end, in every case: the source is notified of the outcome, and everything is closed.

use memferry_stages::exclusions::ExcludedPages;
use memferry_stages::wire::Message;

use super::{Attempt, Destination};
use crate::bottleneck::Watch;
use crate::events::{Ended, Event, Outcome};
use crate::migration::course::destination::DestinationCourse;
use crate::migration::driver::Course;
use crate::migration::error::MigrationError;
use crate::migration::outcome::ReceiveError;

impl Destination<'_> {
    /// The course is over: notifies the source, closes everything and reports the outcome. `mistake` is why the course
    /// did not end by itself, if it did not.
    pub(super) async fn conclude(
        mut self,
        course: DestinationCourse,
        mistake: Option<MigrationError>,
    ) -> Result<Ended, ReceiveError> {
        if let Some(door) = self.gate.door.take() {
            // The listener is closed when this returns.
            door.abort();
            drop(door.await);
        }
        self.gate.turned_away.finish();
        if let Some(mistake) = mistake.as_ref().filter(|_| course.is_over()) {
            // What the course ended with stands.
            self.observers.notify(&Event::Warning(mistake.to_string()));
        }
        let start_begun = course.start_begun();
        let has_returned = course.outages().lost > 0;
        let figures = self.ended(&course);
        let result = course.into_outcome(mistake);
        self.report_last_progress(result.is_ok());
        self.take_leave(farewell(&result, start_begun, has_returned)).await;
        self.writer.end().await;
        let ended = self.report_end(&result, figures);
        let Err(source) = result else { return Ok(ended) };
        let ended = Box::new(ended);
        Err(match source {
            MigrationError::Cancelled => ReceiveError::Cancelled { source, ended },
            MigrationError::PagesLost(source) => ReceiveError::Lost { source: *source, ended },
            _ if start_begun => ReceiveError::StartFailed { source, ended },
            _ => ReceiveError::Failed { source, ended },
        })
    }

    /// Sends the last message and ends the connections and stages.
    async fn take_leave(&mut self, farewell: Option<Message>) {
        match std::mem::replace(&mut self.attempt, Attempt::None) {
            Attempt::Running(flow) => flow.close(farewell).await,
            Attempt::Agreeing(_, Some(answers)) | Attempt::Ready(_, Some(answers)) => answers.close(farewell).await,
            _ => {}
        }
    }

    /// The figures of the outcome.
    fn ended(&self, course: &DestinationCourse) -> Ended {
        let flow = match &self.attempt {
            Attempt::Running(flow) => Some(flow),
            _ => None,
        };
        let figures = flow.map(|flow| self.figures(flow));
        let (wire_bytes, memory_peak, stages) = figures.unwrap_or_default();
        let watch = flow.map(|flow| &flow.rates.watch);
        Ended {
            outcome: Outcome::Failed,
            error: None,
            verified: course.verified(),
            checked: self
                .built
                .as_ref()
                .and_then(|built| built.verification.page_hashes())
                .map(|hashes| hashes.coverage()),
            total: self.started.elapsed(),
            setup: self.setup,
            downtime: None,
            forecast: None,
            parts: course.parts(),
            wire_bytes: wire_bytes.max(self.before.wire_bytes),
            excluded: ExcludedPages::default(),
            memory_peak,
            bottleneck: watch.map(|watch| watch.all(&stages)).unwrap_or_default(),
            cpu: watch.map(Watch::cpu).unwrap_or_default(),
            stages,
            resume_failed: false,
            outages: course.outages(),
            postcopy: self.postcopy(),
        }
    }

    fn report_end(&self, result: &Result<(), MigrationError>, figures: Ended) -> Ended {
        let (outcome, error) = match result {
            Ok(()) => (Outcome::Completed, None),
            Err(error @ MigrationError::Cancelled) => (Outcome::Cancelled, Some(error.to_string())),
            Err(error @ MigrationError::PagesLost(_)) => (Outcome::Lost, Some(error.to_string())),
            Err(error) => (Outcome::Failed, Some(error.to_string())),
        };
        let ended = Ended { outcome, error, total: self.started.elapsed(), ..figures };
        self.observers.notify_end(&ended);
        ended
    }
}

/// The last message to the source if the start was not begun. Once a start was begun, the source has had every message.
fn farewell(result: &Result<(), MigrationError>, start_begun: bool, has_returned: bool) -> Option<Message> {
    match result {
        Ok(()) => None,
        Err(error @ MigrationError::PagesLost(_)) => Some(Message::Abort(error.to_string().into())),
        Err(_) if start_begun => None,
        Err(MigrationError::Cancelled) => Some(Message::Abort("cancelled at the destination".into())),
        // A source that returns takes Refused for the listener's word about this attempt, and tries another.
        Err(error) if has_returned => Some(Message::Abort(error.to_string().into())),
        Err(
            error @ (MigrationError::Guest(_)
            | MigrationError::BuiltOtherwise(_)
            | MigrationError::Layout(_)
            | MigrationError::TooLarge(_)
            | MigrationError::Differs(_)),
        ) => Some(Message::Refused(error.to_string().into())),
        Err(error) => Some(Message::Abort(error.to_string().into())),
    }
}
