//! Lines that are written and read back, and their names.

use super::*;
use memferry::samples::{every_event, script};

fn line(index: usize, event: &Event) -> EventLine {
    let index = u64::try_from(index).unwrap();
    EventLine::new(Duration::from_micros(1_234_500 * index + 7), Role::Source, event)
}

#[test]
fn every_event_comes_back_from_its_line() {
    for role in [Role::Source, Role::Destination] {
        for (index, event) in script(role).iter().chain(&every_event()).enumerate() {
            let line = EventLine { role: Some(role), ..line(index, event) };
            let json = line.to_json();
            assert_eq!(json.matches('\n').count(), 1, "{json}");
            assert_eq!(EventLine::from_json(&json).unwrap(), line, "{json}");
        }
    }
    for own in [EventLine::started(SystemTime::now()), EventLine::lost(Duration::from_secs(3), 17)] {
        assert_eq!(EventLine::from_json(&own.to_json()).unwrap(), own);
    }
}

#[test]
fn the_names_are_as_they_were_agreed() {
    let mut lines = EventLine::started(UNIX_EPOCH + Duration::from_millis(1_700_000_000_123)).to_json();
    let events = every_event();
    lines.extend(events.iter().enumerate().map(|(index, event)| line(index, event).to_json()));
    lines.push_str(&EventLine::lost(Duration::from_secs(60), 17).to_json());
    insta::assert_snapshot!(lines);
}

#[test]
fn each_kind_stands_in_the_table() {
    let source = include_str!("mod.rs");
    let kinds = every_event().iter().map(|event| line(0, event).to_json()).collect::<Vec<_>>();
    for json in &kinds {
        let value: serde_json::Value = serde_json::from_str(json).unwrap();
        let row = format!("//! | `{}` |", value["event"].as_str().unwrap());
        let row = source.lines().find(|line| line.starts_with(&row)).unwrap_or_else(|| panic!("no {row}"));
        for field in value.as_object().unwrap().keys().filter(|key| !["ms", "role", "event"].contains(&key.as_str())) {
            let counted = ["zero", "raw", "compressed", "xbzrle", "unchanged"].contains(&field.as_str());
            assert!(counted || row.contains(&format!("`{field}`")), "{field} in {row}");
        }
    }
}

#[test]
fn what_a_reader_does_not_know_is_distinguished() {
    let more = r#"{"ms":1.0,"role":"source","event":"paused","since":"later"}"#;
    assert_eq!(EventLine::from_json(more).unwrap().event, EventJson::Paused);
    assert!(EventLine::from_json(r#"{"ms":1.0,"role":"source","event":"to_come"}"#).is_err());
    assert!(EventLine::from_json("").is_err());
}

#[test]
fn a_rate_that_is_none_is_written_as_a_number() {
    let rates = [f64::NAN, f64::INFINITY, -1.0, 1.5].map(rate);
    assert_eq!(rates, [0, u64::MAX, 0, 2]);
}
