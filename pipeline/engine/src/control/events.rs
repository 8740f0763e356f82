//! The events of an end as a stream that its readers cannot block, and the past events.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;

use crate::events::{Event, Role};

/// Past events that are stored, not counting progress figures.
const CAPACITY: usize = 512;

/// An item of the event stream.
#[derive(Clone, Debug, PartialEq)]
pub enum Happened {
    /// One event.
    Event {
        /// When it happened, counted from the start of its end.
        at: Duration,
        /// Which end it belongs to.
        role: Role,
        /// The event.
        event: Arc<Event>,
    },
    /// The reader was too slow, and lost this number of events.
    Lost(u64),
}

/// Events as they happen, up to [`Event::Ended`]. The queue for a slow reader is bounded; the reader loses the oldest
/// events.
#[derive(Debug)]
pub struct Events(Option<broadcast::Receiver<Happened>>);

impl Events {
    pub(super) fn new(receiver: Option<broadcast::Receiver<Happened>>) -> Self {
        Self(receiver)
    }

    /// The next item; `None` after the end. Safe to race in a `select!`.
    pub async fn next(&mut self) -> Option<Happened> {
        let happened = match self.0.as_mut()?.recv().await {
            Ok(happened) => happened,
            Err(RecvError::Lagged(lost)) => return Some(Happened::Lost(lost)),
            Err(RecvError::Closed) => return None,
        };
        if is_of(&happened, |event| matches!(event, Event::Ended(_))) {
            self.0 = None;
        }
        Some(happened)
    }
}

/// The events so far, for readers that come later: of progress figures only the latest, and of events that recur each
/// round only the latest of each kind.
#[derive(Debug, Default)]
pub(super) struct Past(VecDeque<Happened>);

impl Past {
    pub(super) fn note(&mut self, happened: Happened) {
        let is_progress = |event: &Event| matches!(event, Event::Progress(_));
        if is_of(&happened, is_progress) {
            self.forget_first(is_progress);
        } else if self.0.len() >= CAPACITY {
            // The peer and the guest are reported once, and early.
            self.forget_first(|event| {
                !matches!(event, Event::Phase(_) | Event::Connected { .. } | Event::Guest { .. })
            });
        }
        self.0.push_back(happened);
    }

    fn forget_first(&mut self, which: fn(&Event) -> bool) {
        let first = self.0.iter().position(|happened| is_of(happened, which));
        first.map(|first| self.0.remove(first));
    }

    /// All past events, in order.
    pub(super) fn list(&self) -> Vec<Happened> {
        self.0.iter().cloned().collect()
    }
}

fn is_of(happened: &Happened, which: impl Fn(&Event) -> bool) -> bool {
    matches!(happened, Happened::Event { event, .. } if which(event))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::Progress;

    fn happened(event: Event) -> Happened {
        Happened::Event { at: Duration::ZERO, role: Role::Source, event: Arc::new(event) }
    }

    #[test]
    fn the_past_is_bounded_and_keeps_what_is_reported_once_and_the_latest_figures() {
        let mut past = Past::default();
        past.note(happened(Event::Connected { peer: "there".into() }));
        for round in 1..=1000 {
            past.note(happened(Event::RoundScanned { round }));
            past.note(happened(Event::Progress(Progress { round, ..Progress::default() })));
        }
        let list = past.list();
        assert!(list.len() <= CAPACITY + 1, "{}", list.len());
        assert_eq!(list[0], happened(Event::Connected { peer: "there".into() }));
        assert_eq!(list.last(), Some(&happened(Event::Progress(Progress { round: 1000, ..Progress::default() }))));
        assert_eq!(list.iter().filter(|past| is_of(past, |event| matches!(event, Event::Progress(_)))).count(), 1);
    }
}
