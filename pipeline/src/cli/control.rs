//! The commands that ask a running migration through its control API: `status`, `set`, `cancel`, `switch-over`.

use std::io::ErrorKind;

use memferry_stages::untrusted::{Untrusted, shown, shown_json};
use memferry_transports::Address;
use serde_json::{Map, Value};

use crate::api::client::{self, ClientError};
use crate::api::patch;
use crate::report::human;

/// The address of a control socket: `unix:/path`, or the path alone.
pub(super) fn socket(text: &str) -> Result<Address, String> {
    let address = match text.split_once(':') {
        Some(("unix" | "tcp" | "file", _)) => text.parse::<Address>(),
        _ => format!("unix:{text}").parse(),
    };
    match address.map_err(|error| error.to_string())? {
        address @ Address::Unix(_) => Ok(address),
        other => Err(format!("{other} is no Unix socket; write unix:/PATH")),
    }
}

/// `key=value`, for a setting that there is; a value that is a number or null is one, all else is text.
pub(super) fn setting(text: &str) -> Result<(String, Value), String> {
    let (key, value) =
        text.split_once('=').ok_or("there is no = in it; write a setting such as downtime_limit=50ms")?;
    let (key, value) = (key.trim(), value.trim());
    if key.is_empty() {
        return Err("there is no key before the =; write a setting such as downtime_limit=50ms".into());
    }
    let plain = serde_json::from_str::<Value>(value).ok().filter(|value| value.is_number() || value.is_null());
    let value = plain.unwrap_or_else(|| value.into());
    patch::change(key, &value)?;
    Ok((key.to_owned(), value))
}

/// `memferry status`: lines for a person, or the object as it came.
pub(super) async fn status(address: &Address, json: bool) -> Result<String, String> {
    let status = client::status(address).await.map_err(in_words)?;
    Ok(if json { shown_json(format!("{status:#}")) } else { describe(&status) })
}

/// `memferry set`
pub(super) async fn set(address: &Address, settings: Vec<(String, Value)>) -> Result<String, String> {
    let settings: Map<String, Value> = settings.into_iter().collect();
    let status = client::set(address, &settings).await.map_err(in_words)?;
    let line = |key: &String| format!("{key} = {}", plain(&status["settings"][key]));
    Ok(settings.keys().map(line).collect::<Vec<_>>().join("\n"))
}

/// `memferry cancel`
pub(super) async fn cancel(address: &Address) -> Result<String, String> {
    client::cancel(address).await.map_err(in_words)?;
    Ok("cancelling: the guest goes on at the source".into())
}

/// `memferry switch-over`
pub(super) async fn switch_over(address: &Address) -> Result<String, String> {
    let status = client::switch_over(address).await.map_err(in_words)?;
    Ok(text(&status["decision"]["why"]).map_or_else(|| "it switches over".into(), |why| why.to_string()))
}

/// What a tired operator can do about it.
pub(super) fn in_words(error: ClientError) -> String {
    match error {
        ClientError::Nobody(error) => {
            let check = match error.kind() {
                ErrorKind::NotFound => {
                    "there is no such socket: was the migration started with --control, and does it run?"
                }
                ErrorKind::ConnectionRefused => "nobody listens there any more: the migration that did has been killed",
                ErrorKind::PermissionDenied => "only the user who started the migration may ask it",
                _ => "was the migration started with --control, and does it run?",
            };
            format!("{error}; {check}")
        }
        other => other.to_string(),
    }
}

/// A status in a few lines.
fn describe(status: &Value) -> String {
    let progress = &status["progress"];
    let mut lines = vec![headline(status)];
    if progress.is_object() {
        lines.push(format!(
            "round {}: {} of {} left",
            plain(&progress["round"]),
            bytes(&progress["remaining_bytes"]),
            bytes(&progress["total_bytes"]),
        ));
        let mut rates = format!("{} on the wire", rate(&progress["wire_bytes_per_s"]));
        if progress["dirty_bytes_per_s"].is_number() {
            rates.push_str(&format!(", {} dirtied", rate(&progress["dirty_bytes_per_s"])));
        }
        if progress["throttle_percent"].as_u64().is_some_and(|percent| percent > 0) {
            rates.push_str(&format!(", the guest is held back for {} %", plain(&progress["throttle_percent"])));
        }
        lines.push(rates);
        if progress["expected_downtime_ms"].is_number() {
            let (expected, limit) = (time(&progress["expected_downtime_ms"]), time(&progress["downtime_limit_ms"]));
            lines.push(format!("expected downtime {expected}, limit {limit}"));
        }
    }
    lines.extend(
        text(&status["decision"]["why"]).map(|why| format!("decided after round {}: {why}", plain(&status["rounds"]))),
    );
    if let Some(settings) = status["settings"].as_object() {
        let settings: Vec<_> =
            settings.iter().map(|(key, value)| format!("{} = {}", shown(key), plain(value))).collect();
        lines.push(settings.join(", "));
    }
    lines.extend(
        status["warnings"].as_array().into_iter().flatten().filter_map(text).map(|what| format!("warning: {what}")),
    );
    lines.join("\n")
}

fn headline(status: &Value) -> String {
    let phase = text(&status["phase"]).unwrap_or_else(|| "?".into());
    let ended = &status["ended"];
    let elapsed = time(&status["elapsed_ms"]);
    if ended.is_object() {
        let downtime = if ended["downtime_ms"].is_number() {
            format!(", the guest was paused for {}", time(&ended["downtime_ms"]))
        } else {
            String::new()
        };
        let why = text(&ended["error"]).map(|why| format!(": {why}")).unwrap_or_default();
        return format!("{phase} after {elapsed}{downtime}{why}");
    }
    let role = text(&status["role"]).map_or_else(|| "not begun".into(), |role| format!("{phase}, {role}"));
    let peer = text(&status["peer"]).map(|peer| format!(", other end {peer}")).unwrap_or_default();
    format!("{role}, for {elapsed}{peer}")
}

fn text(value: &Value) -> Option<Untrusted> {
    value.as_str().map(Untrusted::from)
}

/// A setting as the configuration writes it.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => shown(text).into_owned(),
        Value::Null => "as max_bandwidth".into(),
        other => shown(&other.to_string()).into_owned(),
    }
}

fn bytes(value: &Value) -> String {
    human::bytes(value.as_u64().unwrap_or(0))
}

fn rate(value: &Value) -> String {
    human::rate(value.as_f64().unwrap_or(0.0))
}

fn time(value: &Value) -> String {
    let seconds = value.as_f64().unwrap_or(0.0) / 1000.0;
    human::time(std::time::Duration::try_from_secs_f64(seconds).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{InForce, Status};
    use crate::events::{Phase, Progress, Role};
    use crate::report::status_json::StatusJson;
    use crate::settings::SourceSettings;
    use memferry_stages::untrusted::is_unsafe;

    #[test]
    fn sockets_are_written_with_or_without_their_scheme() {
        for text in ["unix:/run/a.sock", "/run/a.sock"] {
            assert_eq!(socket(text).unwrap().to_string(), "unix:/run/a.sock");
        }
        assert_eq!(socket("a.sock").unwrap().to_string(), "unix:a.sock");
        assert!(socket("tcp:127.0.0.1:7777").unwrap_err().contains("write unix:/PATH"));
        assert!(socket("").is_err());
    }

    #[test]
    fn settings_are_numbers_null_or_text() {
        let read = |text| setting(text).unwrap();
        assert_eq!(read("throttle=50"), ("throttle".into(), 50.into()));
        assert_eq!(read("downtime_limit = 50ms"), ("downtime_limit".into(), "50ms".into()));
        assert_eq!(read("deadline=null").1, Value::Null);
        assert!(setting("throttle").is_err() && setting("=3").is_err());
    }

    #[test]
    fn a_setting_that_cannot_be_is_refused_before_anybody_is_asked() {
        let wrong = |text| setting(text).unwrap_err();
        assert!(wrong("lanes=4").contains("these are: max_bandwidth, switchover_bandwidth, downtime_limit"));
        assert!(wrong("downtime_limit=soon").contains("write a length of time such as"));
        assert!(wrong("max_bandwidth=\"1 MiB/s\"").contains("write a rate such as"));
        assert!(wrong("max_bandwidth=1").contains("too slow"));
    }

    #[test]
    fn what_a_status_says_does_not_move_the_cursor() {
        let evil = "x\n\u{1b}[2J\u{9b}1m\u{202e}";
        let status = serde_json::json!({
            "phase": evil, "role": evil, "peer": evil, "rounds": evil, "decision": { "why": evil }, "settings": { evil: evil },
            "progress": { "round": evil, "throttle_percent": evil }, "warnings": [evil],
        });
        let lines = describe(&status);
        assert!(!lines.chars().any(|c| is_unsafe(c) && c != '\n'), "{lines:?}");
        assert_eq!(lines.lines().count(), 6, "{lines}");
        let ended = serde_json::json!({ "phase": "failed", "ended": { "error": evil } });
        assert_eq!(describe(&ended), r"failed after 0 µs: x\n\u{1b}[2J\u{9b}1m\u{202e}");
        let answered = in_words(ClientError::Refused(evil.into()));
        assert_eq!(answered, r"x\n\u{1b}[2J\u{9b}1m\u{202e}");
    }

    #[test]
    fn a_status_is_a_few_lines_for_a_person() {
        let progress = Progress {
            round: 3,
            remaining_bytes: 5 << 20,
            total_bytes: 1 << 30,
            wire_rate: 2e8,
            dirty_rate: Some(1e7),
            throttle: 20,
            expected_downtime: Some(std::time::Duration::from_millis(120)),
            downtime_limit: std::time::Duration::from_millis(100),
            ..Progress::default()
        };
        let status = Status {
            role: Some(Role::Source),
            phase: Phase::Active,
            elapsed: std::time::Duration::from_millis(4200),
            peer: Some("10.0.0.2:7777".into()),
            progress: Some(progress),
            in_force: Some(InForce::of(&SourceSettings::default())),
            warnings: vec!["a warning".into()],
            ..Status::default()
        };
        let lines = describe(&serde_json::to_value(StatusJson::from(&status)).unwrap());
        let expected = "\
active, source, for 4.20 s, other end 10.0.0.2:7777
round 3: 5.00 MiB of 1.00 GiB left
191 MiB/s on the wire, 9.54 MiB/s dirtied, the guest is held back for 20 %
expected downtime 120 ms, limit 100 ms
deadline = none, downtime_limit = 300ms, max_bandwidth = unlimited, max_downtime = none, switchover_bandwidth = as \
max_bandwidth, xbzrle_cache = 256 MiB
warning: a warning";
        assert_eq!(lines, expected);
        assert_eq!(
            describe(&serde_json::to_value(StatusJson::from(&Status::default())).unwrap()),
            "not begun, for 0 µs"
        );
    }
}
