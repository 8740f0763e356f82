//! The end, in every case: the source is notified, and the outcome is reported.

use memferry_stages::clears::Spared;
use memferry_stages::meter::Reading;
use memferry_stages::wire::Message;

use super::Destination;
use super::answers::Answers;
use super::flow::Flow;
use crate::bottleneck::Watch;
use crate::events::{Ended, Event, Phase};
use crate::migration::bounds;
use crate::migration::error::MigrationError;
use crate::migration::outcome::ReceiveError;

impl Destination {
    /// In every case: notifies the source, and reports the outcome.
    pub(super) async fn conclude(
        self,
        result: Result<(), MigrationError>,
        answers: Option<Answers>,
        flow: Option<Flow>,
    ) -> Result<Ended, ReceiveError> {
        let (result, flow) = match (result, flow) {
            (Err(MigrationError::Stage(failure)), Some(mut flow)) => {
                let cause = flow.graph.stages.root_cause(failure).await;
                (Err(MigrationError::Stage(cause)), Some(flow))
            }
            other => other,
        };
        self.turned_away.finish();
        let farewell = self.farewell(&result);
        if let Some(flow) = &flow {
            self.report_last_progress(flow, result.is_ok());
        }
        let (wire_bytes, memory_peak, stages) = flow.as_ref().map(|flow| self.figures(flow)).unwrap_or_default();
        let watch = flow.as_ref().map(|flow| &flow.watch);
        let bottleneck = watch.map(|watch| watch.all(&stages)).unwrap_or_default();
        let cpu = watch.map(Watch::cpu).unwrap_or_default();
        match flow {
            Some(flow) => flow.close(farewell).await,
            None => {
                if let Some(answers) = answers {
                    answers.close(farewell).await;
                }
            }
        }
        let (phase, error) = match &result {
            Ok(()) => (Phase::Completed, None),
            Err(error @ MigrationError::Cancelled) => (Phase::Cancelled, Some(error.to_string())),
            Err(error) => (Phase::Failed, Some(error.to_string())),
        };
        self.observers.tell(&Event::Phase(phase));
        let ended = Ended {
            phase,
            error,
            verified: self.verified,
            total: self.started.elapsed(),
            setup: self.setup,
            downtime: None,
            forecast: None,
            parts: self.parts,
            wire_bytes,
            spared: Spared::default(),
            memory_peak,
            stages,
            bottleneck,
            cpu,
            resume_failed: false,
        };
        self.observers.tell(&Event::Ended(ended.clone()));
        let Err(source) = result else { return Ok(ended) };
        let ended = Box::new(ended);
        Err(match source {
            MigrationError::Cancelled => ReceiveError::Cancelled { source, ended },
            _ if self.start_begun => ReceiveError::StartFailed { source, ended },
            _ => ReceiveError::Failed { source, ended },
        })
    }

    fn figures(&self, flow: &Flow) -> (u64, u64, Vec<Reading>) {
        let layout = self.layout.as_ref().expect("the stages run");
        let keeps = bounds::destination_keeps(layout, self.verified.is_some(), flow.may_leave_out);
        let state =
            bounds::state_bytes(self.state_room.taken(), bounds::state_messages(flow.graph.progress.len() as u64));
        let peak = bounds::peak(&flow.graph.pools, &flow.graph.meters, keeps) + state;
        (flow.wire_bytes(), peak, flow.graph.readings())
    }

    /// The last message to the source if the start was not begun. Once a start was begun, the source has had every
    /// message.
    fn farewell(&self, result: &Result<(), MigrationError>) -> Option<Message> {
        match result {
            Ok(()) => None,
            Err(_) if self.start_begun => None,
            Err(MigrationError::Cancelled) => Some(Message::Abort("cancelled at the destination".into())),
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
}
