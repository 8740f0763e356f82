//! The handle without a migration.

use super::*;
use crate::events::{Ended, Phase};
use crate::samples::script;

fn event(happened: Happened) -> Event {
    let Happened::Event { event, .. } = happened else { panic!("{happened:?}") };
    Event::clone(&event)
}

fn observed(control: &Control) -> (Observers, Requests) {
    control.source_begins(&SourceSettings::default(), &Observers::none(Role::Source))
}

#[tokio::test]
async fn what_is_asked_too_early_too_late_or_at_the_wrong_end_is_refused() {
    let control = Control::new();
    assert_eq!(control.switch_over().await, Err(ControlError::NotBegun));
    let (observers, requests) = observed(&control);
    drop(requests);
    assert_eq!(control.switch_over().await, Err(ControlError::Over));
    script(Role::Source).iter().for_each(|event| observers.notify(event));
    assert_eq!(control.set([Change::MaxBandwidth(None)]).await, Err(ControlError::Over));
    control.destination_begins(&Observers::none(Role::Destination));
    assert_eq!(control.switch_over().await, Err(ControlError::WrongEnd));
}

#[tokio::test]
async fn a_request_waits_for_its_answer_and_one_that_nobody_waits_for_is_skipped() {
    let control = Control::new();
    let (_, mut requests) = observed(&control);
    let asking = tokio::time::timeout(Duration::from_millis(1), control.switch_over());
    assert!(asking.await.is_err());
    let taking = async {
        let request = requests.next().await;
        assert!(matches!(request.ask, Ask::Set(changes) if changes == [Change::ThrottleMost(7)]));
        request.answer.send(Err(ControlError::Refused("no".into()))).unwrap();
    };
    let (answer, ()) = tokio::join!(control.set([Change::ThrottleMost(7)]), taking);
    assert_eq!(answer, Err(ControlError::Refused("no".into())));
}

#[test]
fn the_status_is_what_the_events_said() {
    let control = Control::new();
    let (observers, _requests) = observed(&control);
    assert_eq!((control.status().role, control.status().phase), (Some(Role::Source), Phase::Setup));
    let (from, to) = (Change::DowntimeLimit(Duration::ZERO), Change::DowntimeLimit(Duration::MAX));
    observers.notify(&Event::Changed(Changed { round: 1, from, to, memory_bound: 77 }));
    (0..20).for_each(|number| observers.notify(&Event::Warning(format!("warning {number}"))));
    let status = control.status();
    assert_eq!((status.settings.unwrap().downtime_limit, status.memory_bound), (Duration::MAX, 77));
    assert_eq!((status.warnings.len(), &*status.warnings[15]), (16, "warning 19"));
    script(Role::Source).iter().for_each(|event| observers.notify(event));
    let status = control.status();
    assert_eq!((status.phase, status.rounds), (Phase::Completed, 2));
    assert!(status.peer.is_some() && status.total_bytes() > 0 && status.decision.is_some());
    let total = status.ended.map(|ended: Ended| ended.total);
    assert_eq!(total, Some(status.elapsed));
}

#[tokio::test]
async fn events_end_with_the_end_and_a_slow_reader_is_notified_of_what_it_lost() {
    let control = Control::new();
    let (observers, _requests) = observed(&control);
    let (mut events, mut slow) = (control.events(), control.events());
    observers.notify(&Event::Paused);
    assert_eq!(events.next().await.map(event), Some(Event::Paused));
    (0..300).for_each(|round| observers.notify(&Event::RoundScanned { round }));
    assert_eq!(slow.next().await, Some(Happened::Lost(301 - 256)));
    assert_eq!(slow.next().await.map(event), Some(Event::RoundScanned { round: 44 }));
    script(Role::Source).iter().for_each(|event| observers.notify(event));
    let mut last = None;
    while let Some(happened) = slow.next().await {
        last = Some(happened);
    }
    assert!(matches!(last.map(event), Some(Event::Ended(_))));
    assert_eq!(control.events().next().await, None, "nothing follows the end");
}

#[test]
fn a_token_and_its_handle_cancel_each_other() {
    let token = CancellationToken::new();
    let (control, other) = (Control::from(token.clone()), Control::from(token.clone()));
    control.cancel();
    assert!(token.is_cancelled() && other.is_cancelled());
    let parent = Control::new();
    let end = parent.also_ended_by(parent.token().child_token());
    end.cancel();
    assert!(!parent.is_cancelled());
    parent.cancel();
    assert!(end.is_cancelled());
}
