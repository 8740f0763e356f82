//! The commands that query or change a running migration through its control API: `status`, `set`, `cancel`,
//! `switch-over`, `postcopy`.

use std::io::ErrorKind;
use std::time::Duration;

use memferry_stages::untrusted::{Untrusted, shown, shown_json};
use memferry_transports::Address;
use serde_json::{Map, Value};

use crate::api::client::{self, ClientError, Lines};
use crate::api::patch;
use memferry::bottleneck::Bottleneck;
use memferry::events::{Outcome, Phase, Role, TimeLeft};
use memferry::human;
use memferry_report::event_json::{EndedJson, EventJson, EventLine};

/// The time limit for a cancelled migration to end: a command of the guest may have to finish first.
const END_TIME: Duration = Duration::from_secs(30);

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

/// Parses `key=value` for a known setting. A number or null is taken as JSON, any other value as text.
pub(super) fn setting(text: &str) -> Result<(String, Value), String> {
    let (key, value) =
        text.split_once('=').ok_or("there is no = in it; write a setting such as downtime_limit=50ms")?;
    let (key, value) = (key.trim(), value.trim());
    if key.is_empty() {
        return Err("there is no key before the =; write a setting such as downtime_limit=50ms".into());
    }
    let plain = serde_json::from_str::<Value>(value).ok().filter(|value| value.is_number() || value.is_null());
    let value = plain.unwrap_or_else(|| value.into());
    patch::check(key, &value)?;
    Ok((key.to_owned(), value))
}

/// `memferry status`: lines for a person, or the JSON object as received.
pub(super) async fn status(address: &Address, json: bool) -> Result<String, String> {
    let status = client::status(address).await.map_err(in_words)?;
    Ok(if json { shown_json(format!("{status:#}")) } else { describe(&status) })
}

/// `memferry set`
pub(super) async fn set(address: &Address, settings: Vec<(String, Value)>) -> Result<String, String> {
    let settings: Map<String, Value> = settings.into_iter().collect();
    let status = client::set(address, &settings).await.map_err(in_words)?;
    let line = |(key, given): (&String, &Value)| match key.as_str() {
        patch::ADDRESS => format!("the source tries to reach the destination at {}", plain(given)),
        _ => format!("{key} = {}", plain(&status["settings"][key])),
    };
    Ok(settings.iter().map(line).collect::<Vec<_>>().join("\n"))
}

/// `memferry cancel`: waits for the end, and reports where the guest is.
pub(super) async fn cancel(address: &Address) -> Result<String, String> {
    let watching = client::events(address).await;
    client::cancel(address).await.map_err(in_words)?;
    let mut seen = Seen::default();
    let ended = match watching {
        Ok(lines) => tokio::time::timeout(END_TIME, seen.read_on(lines)).await.is_ok(),
        // Too many clients already read events.
        Err(_) => false,
    };
    seen.verdict(ended, address)
}

/// The outcome of a cancelled migration, from its events.
#[derive(Debug, Default)]
struct Seen {
    role: Option<Role>,
    is_paused: bool,
    is_postcopy: bool,
    ended: Option<EndedJson>,
}

impl Seen {
    /// Reads until the migration, or the stream, ends.
    async fn read_on(&mut self, mut lines: Lines) {
        while let Ok(Some(line)) = lines.next().await {
            // A line that is not a known event is ignored.
            if let Ok(line) = EventLine::from_json(&line) {
                self.note(line);
            }
            if self.ended.is_some() {
                break;
            }
        }
    }

    fn note(&mut self, line: EventLine) {
        self.role = line.role.or(self.role);
        match line.event {
            EventJson::Phase { phase: Phase::Switchover } | EventJson::Paused => self.is_paused = true,
            EventJson::Resumed => self.is_paused = false,
            EventJson::Phase { phase: Phase::Postcopy } => self.is_postcopy = true,
            EventJson::Ended(ended) => self.ended = Some(*ended),
            _ => {}
        }
    }

    fn verdict(self, lines_ended: bool, address: &Address) -> Result<String, String> {
        let Some(ended) = self.ended else {
            return match (lines_ended, self.role) {
                (true, None) => Ok("cancelled before it began: nothing has changed".into()),
                (true, Some(_)) => {
                    Err("the program ended without saying how the migration did: look at its output".into())
                }
                (false, _) => Err(format!(
                    "cancelling, but it has not ended yet{}; ask again: memferry status {address}",
                    self.guest()
                )),
            };
        };
        let why = ended.end.error.map(|why| format!(": {why}")).unwrap_or_default();
        match (ended.outcome, self.role) {
            _ if ended.resume_failed => Err(format!("the migration ended, and the guest is paused at the source{why}")),
            (Outcome::Cancelled | Outcome::Failed, Some(Role::Destination)) => {
                Ok("cancelled here, at the destination: the source is notified and decides about the guest".into())
            }
            (Outcome::Cancelled, _) => Ok("cancelled: the guest continues at the source".into()),
            (Outcome::Failed, _) => Ok(format!("the migration failed, and the guest continues at the source{why}")),
            (Outcome::Completed, _) => Err("too late: the migration is completed".into()),
            (Outcome::Lost, _) => Err(format!(
                "the guest is lost: it was started without all of its memory, and the rest did not come{why}"
            )),
            _ => Err(format!("too late: the handover is not confirmed{why}")),
        }
    }

    fn guest(&self) -> &'static str {
        match self.role {
            _ if self.is_postcopy => ": the guest runs at the destination and needs both ends",
            Some(Role::Source) if self.is_paused => ": the guest is paused at the source",
            Some(Role::Source) => ": the guest runs at the source",
            _ => "",
        }
    }
}

/// `memferry switch-over`
pub(super) async fn switch_over(address: &Address) -> Result<String, String> {
    let status = client::switch_over(address).await.map_err(in_words)?;
    Ok(text(&status["decision"]["why"]).map_or_else(|| "it switches over".into(), |why| why.to_string()))
}

/// `memferry postcopy`
pub(super) async fn postcopy(address: &Address) -> Result<String, String> {
    client::postcopy(address).await.map_err(in_words)?;
    Ok("accepted: what is left follows while the guest runs at the destination, unless it is little enough to be sent first".into())
}

/// What the operator can do about it.
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
    if status["postcopy"] == true {
        lines.push("the guest runs at the destination and needs both ends".into());
    }
    if progress.is_object() {
        let (round, total) = (plain(&progress["round"]), bytes(&progress["total_bytes"]));
        lines.push(match progress["done_percent"].as_f64() {
            Some(done) => format!(
                "round {round}: {}, {} of {total} left{}",
                human::done(done),
                bytes(&progress["remaining_bytes"]),
                time_left(progress).map(|time| format!(", {time}")).unwrap_or_default(),
            ),
            None => format!("round {round} of a guest of {total}"),
        });
        let mut rates = format!("{} on the wire", rate(&progress["wire_bytes_per_s"]));
        if progress["dirty_bytes_per_s"].is_number() {
            rates.push_str(&format!(", {} dirtied", rate(&progress["dirty_bytes_per_s"])));
        }
        if progress["throttle_percent"].as_u64().is_some_and(|percent| percent > 0) {
            rates.push_str(&format!(", the guest is throttled by {} %", plain(&progress["throttle_percent"])));
        }
        lines.push(rates);
        lines.extend(held_up(&progress["bottleneck_percent"]).map(|shares| format!("held up by: {shares}")));
        if progress["expected_downtime_ms"].is_number() {
            let (expected, limit) = (time(&progress["expected_downtime_ms"]), time(&progress["downtime_limit_ms"]));
            lines.push(format!("expected downtime {expected}, limit {limit}"));
        }
    }
    lines.extend(text(&status["disconnected"]).map(|why| format!("disconnected: {why}")));
    lines.extend(outages(&status["outages"]));
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

/// What lost connections have cost so far, if there were any.
fn outages(outages: &Value) -> Option<String> {
    let lost = outages["lost"].as_u64().filter(|lost| *lost > 0)?;
    let (time, again) = (time(&outages["time_ms"]), bytes(&outages["put_back_bytes"]));
    Some(format!("{} lost, none for {time}, {again} sent again", human::counted(lost, "connection")))
}

/// Time until nothing remains, if it is known.
fn time_left(progress: &Value) -> Option<TimeLeft> {
    let remaining = progress["remaining_bytes"].as_u64().filter(|bytes| *bytes > 0)?;
    let (sent, dirtied) = (progress["page_bytes_per_s"].as_f64()?, progress["dirty_bytes_per_s"].as_f64());
    Some(TimeLeft::at_rates(remaining, sent, dirtied)).filter(|time| *time != TimeLeft::Unknown)
}

/// The causes that slow the migration down, the greatest share first.
fn held_up(shares: &Value) -> Option<String> {
    let shares: Bottleneck = serde_json::from_value(shares.clone()).ok()?;
    Some(shares.to_string()).filter(|shares| !shares.is_empty())
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
    human::time(Duration::try_from_secs_f64(seconds).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::verdict::never_begun;
    use memferry::bottleneck::Cause;
    use memferry::control::Status;
    use memferry::events::{Ended, Event, Outages, Progress};
    use memferry::settings::SourceSettings;
    use memferry_report::status_json::StatusJson;
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
    fn a_cancel_says_where_the_guest_is() {
        let address = socket("/run/a.sock").unwrap();
        let line = |role, event| EventLine::new(Duration::ZERO, role, &event);
        let ended = |outcome, resume_failed| {
            Event::Ended(Box::new(Ended { outcome, resume_failed, ..never_begun("why".into()) }))
        };
        let says = |events: Vec<Event>, role, is_over| {
            let mut seen = Seen::default();
            events.into_iter().for_each(|event| seen.note(line(role, event)));
            seen.verdict(is_over, &address).unwrap_or_else(|why| format!("NO: {why}"))
        };
        let at_source = |events| says(events, Role::Source, true);
        assert_eq!(at_source(vec![ended(Outcome::Cancelled, false)]), "cancelled: the guest continues at the source");
        assert_eq!(
            at_source(vec![ended(Outcome::Cancelled, true)]),
            "NO: the migration ended, and the guest is paused at the source: why"
        );
        assert_eq!(at_source(vec![ended(Outcome::Completed, false)]), "NO: too late: the migration is completed");
        assert_eq!(
            at_source(vec![ended(Outcome::Unconfirmed, false)]),
            "NO: too late: the handover is not confirmed: why"
        );
        assert!(
            at_source(vec![ended(Outcome::Lost, false)]).starts_with("NO: the guest is lost: it was started without")
        );
        assert!(at_source(vec![ended(Outcome::Failed, false)]).ends_with("the guest continues at the source: why"));
        assert!(at_source(Vec::new()).starts_with("cancelled before it began"));
        assert!(at_source(vec![Event::Paused]).starts_with("NO: the program ended without saying"));
        let so_far = |events| says(events, Role::Source, false);
        assert!(so_far(vec![Event::Paused]).contains("not ended yet: the guest is paused at the source; ask again"));
        let postcopy = vec![Event::Paused, Event::Phase(Phase::Postcopy)];
        assert!(so_far(postcopy).contains(": the guest runs at the destination and needs both ends; ask again"));
        assert!(so_far(vec![Event::Paused, Event::Resumed]).contains(": the guest runs at the source; ask again"));
        let there = says(vec![ended(Outcome::Cancelled, false)], Role::Destination, true);
        assert!(there.starts_with("cancelled here, at the destination"), "{there}");
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
            remaining_bytes: Some(5 << 20),
            total_bytes: 1 << 30,
            wire_rate: 2e8,
            page_rate: 1.1e8,
            bottleneck: Bottleneck::made_up(&[(Cause::Wire, 0.2), (Cause::Processor, 0.9)]),
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
            settings: Some(SourceSettings::default()),
            warnings: vec!["a warning".into()],
            ..Status::default()
        };
        let lines = describe(&serde_json::to_value(StatusJson::from(&status)).unwrap());
        let expected = "\
active, source, for 4.20 s, other end 10.0.0.2:7777
round 3: 99 % done, 5.00 MiB of 1.00 GiB left, 52.4 ms to go
191 MiB/s on the wire, 9.54 MiB/s dirtied, the guest is throttled by 20 %
held up by: processor 90 %, wire 20 %
expected downtime 120 ms, limit 100 ms
deadline = none, downtime_limit = 300ms, max_bandwidth = unlimited, max_downtime = none, switchover_bandwidth = as \
max_bandwidth, xbzrle_cache = 256 MiB
warning: a warning";
        assert_eq!(lines, expected);
        let postcopy = Status { phase: Phase::Postcopy, is_postcopy: true, ..status.clone() };
        let lines = describe(&serde_json::to_value(StatusJson::from(&postcopy)).unwrap());
        assert!(lines.starts_with("postcopy, source, for 4.20 s"), "{lines}");
        assert!(lines.contains("\nthe guest runs at the destination and needs both ends\nround 3: "), "{lines}");
        let outages = Outages { lost: 2, time: Duration::from_secs(5), put_back_bytes: 3 << 20, ..Outages::default() };
        let lost =
            Status { phase: Phase::Disconnected, disconnected: Some("refused".into()), outages, ..status.clone() };
        let lines = describe(&serde_json::to_value(StatusJson::from(&lost)).unwrap());
        assert!(lines.starts_with("disconnected, source, for 4.20 s"), "{lines}");
        let says = "\ndisconnected: refused\n2 connections lost, none for 5.00 s, 3.00 MiB sent again\n";
        assert!(lines.contains(says), "{lines}");
        let unknown = Progress { round: 3, total_bytes: 1 << 30, ..Progress::default() };
        let status = Status { progress: Some(unknown), ..Status::default() };
        let lines = describe(&serde_json::to_value(StatusJson::from(&status)).unwrap());
        assert!(lines.contains("round 3 of a guest of 1.00 GiB\n"), "{lines}");
        assert_eq!(
            describe(&serde_json::to_value(StatusJson::from(&Status::default())).unwrap()),
            "not begun, for 0 µs"
        );
    }
}
