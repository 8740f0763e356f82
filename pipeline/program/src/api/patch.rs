//! Settings as a client writes them: a JSON object with values in the configuration's format, or plain numbers.

use std::collections::HashSet;
use std::fmt::{self, Display};
use std::str::FromStr;
use std::time::Duration;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;

use memferry_transports::Address;

use memferry::control::Change;
use memferry::settings::SwitchoverBandwidth;
use memferry::values::{Bandwidth, Deadline, Size, Time};

const KEYS: &str =
    "max_bandwidth, switchover_bandwidth, downtime_limit, max_downtime, deadline, throttle and xbzrle_cache";
/// The key of an address, which is no setting.
pub(crate) const ADDRESS: &str = "address";
const RATE: &str = r#"a rate such as "200 MiB/s" or "1 Gbit/s", a number of bytes a second, or "unlimited""#;
const TIME: &str = r#"a length of time such as "50ms", or a number of milliseconds"#;
const TIME_OR_NONE: &str = r#"a length of time such as "5m", a number of milliseconds, or "none""#;
const SIZE: &str = r#"a size such as "512 MiB", or a number of bytes"#;
const PERCENT: &str = "a whole number from 0 to 99";

/// What a body requests.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Patch {
    /// Changes of settings.
    Changes(Vec<Change>),
    /// Another address of the destination.
    Address(Address),
}

/// What a body requests, if all of it is valid; otherwise an error that names the setting.
pub(super) fn read(body: &[u8]) -> Result<Patch, String> {
    let Entries(entries) = serde_json::from_slice(body)
        .map_err(|error| format!(r#"the body is no JSON object such as {{ "downtime_limit": "50ms" }}: {error}"#))?;
    entries.iter().try_for_each(|(key, value)| check(key, value))?;
    go_together(&entries)?;
    match &entries[..] {
        [(key, value)] if key == ADDRESS => address(value).map(Patch::Address),
        _ => entries.iter().map(|(key, value)| change(key, value)).collect::<Result<_, _>>().map(Patch::Changes),
    }
}

/// Refuses a setting that is given twice, for neither value may be ignored silently, and an address beside settings, which
/// would not be changed with it or not at all.
pub(crate) fn go_together(entries: &[(String, Value)]) -> Result<(), String> {
    let mut seen = HashSet::new();
    if let Some((key, _)) = entries.iter().find(|(key, _)| !seen.insert(key)) {
        return Err(format!("{key} is given twice: give it once"));
    }
    if seen.len() > 1 && entries.iter().any(|(key, _)| key == ADDRESS) {
        return Err(format!("{ADDRESS} is given beside settings: give it alone"));
    }
    Ok(())
}

/// Can this be requested?
pub(crate) fn check(key: &str, value: &Value) -> Result<(), String> {
    if key == ADDRESS { address(value).map(drop) } else { change(key, value).map(drop) }
}

/// An address of a destination that answers.
fn address(value: &Value) -> Result<Address, String> {
    let wrong = |why: &str| format!("{ADDRESS}: {why}");
    let text = value.as_str().ok_or_else(|| wrong("write tls:HOST:PORT, tcp:HOST:PORT or unix:/PATH, in quotes"))?;
    match text.parse::<Address>().map_err(|error| wrong(&error.to_string()))? {
        Address::File(_) => Err(wrong("a file has no return path; write tls:HOST:PORT, tcp:HOST:PORT or unix:/PATH")),
        address => Ok(address),
    }
}

/// The entries of an object, in order and with repeated keys: a map would retain only the last of these.
struct Entries(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}

/// The change for a setting and its value.
fn change(key: &str, value: &Value) -> Result<Change, String> {
    let change = match key {
        "max_bandwidth" => rate(value).map(Change::MaxBandwidth),
        "switchover_bandwidth" => switchover_bandwidth(value).map(Change::SwitchoverBandwidth),
        "downtime_limit" => time(value).map(Change::DowntimeLimit),
        "max_downtime" => time_or_none(value).map(Change::MaxDowntime),
        "deadline" => time_or_none(value).map(Change::Deadline),
        "throttle" => percent(value).map(Change::ThrottleMost),
        "xbzrle_cache" => size(value).map(Change::XbzrleCache),
        _ => {
            let start: String = key.chars().take(40).collect();
            return Err(format!(
                "{start:?} is no setting that can be changed while it runs; these are: {KEYS}; \
                 {ADDRESS} gives the source another address of its destination"
            ));
        }
    };
    let change = change.map_err(|expected| format!("{key}: {} is wrong here; write {expected}", shortened(value)))?;
    change.check().map_err(|error| error.to_string())?;
    Ok(change)
}

fn shortened(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= 60 { text } else { text.chars().take(60).chain("…".chars()).collect() }
}

type Expected = &'static str;

fn rate(value: &Value) -> Result<Option<u64>, Expected> {
    match value {
        Value::Null => Ok(None),
        Value::Number(_) => value.as_u64().map(Some).ok_or(RATE),
        _ => written::<Bandwidth>(value, RATE).map(|rate| rate.0),
    }
}

/// Null corresponds to an omitted key in the configuration: the limit of the rounds applies.
fn switchover_bandwidth(value: &Value) -> Result<SwitchoverBandwidth, Expected> {
    Ok(match rate(value)? {
        _ if value.is_null() => SwitchoverBandwidth::AsRounds,
        None => SwitchoverBandwidth::Unlimited,
        Some(most) => SwitchoverBandwidth::AtMost(most),
    })
}

fn time(value: &Value) -> Result<Duration, Expected> {
    match value.as_f64() {
        Some(ms) => Duration::try_from_secs_f64(ms / 1000.0).map_err(|_| TIME),
        None => written::<Time>(value, TIME).map(|time| time.0),
    }
}

fn time_or_none(value: &Value) -> Result<Option<Duration>, Expected> {
    match value {
        Value::Null => Ok(None),
        Value::Number(_) => time(value).map(Some).map_err(|_| TIME_OR_NONE),
        _ => written::<Deadline>(value, TIME_OR_NONE).map(|time| time.0),
    }
}

fn percent(value: &Value) -> Result<u8, Expected> {
    value.as_u64().and_then(|percent| u8::try_from(percent).ok()).filter(|percent| *percent <= 99).ok_or(PERCENT)
}

fn size(value: &Value) -> Result<u64, Expected> {
    match value.as_u64() {
        Some(bytes) => Ok(bytes),
        None => written::<Size>(value, SIZE).map(|size| size.0),
    }
}

/// A value as the configuration writes it.
fn written<T: FromStr<Err: Display>>(value: &Value, expected: Expected) -> Result<T, Expected> {
    value.as_str().and_then(|text| text.parse().ok()).ok_or(expected)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The changes that a body requests.
    fn changes(body: &[u8]) -> Result<Vec<Change>, String> {
        read(body).map(|patch| match patch {
            Patch::Changes(changes) => changes,
            Patch::Address(address) => panic!("{address}"),
        })
    }

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn values_are_written_as_in_the_configuration_or_as_numbers() {
        let body = br#"{ "max_bandwidth": "1Gbit/s", "switchover_bandwidth": "unlimited", "downtime_limit": "50ms",
            "max_downtime": "none", "deadline": "5m", "throttle": 40, "xbzrle_cache": "512 MiB" }"#;
        let mut all = changes(body).unwrap();
        all.sort_by_key(Change::key);
        let expected = [
            Change::Deadline(Some(300_000 * MS)),
            Change::DowntimeLimit(50 * MS),
            Change::MaxBandwidth(Some(125_000_000)),
            Change::MaxDowntime(None),
            Change::SwitchoverBandwidth(SwitchoverBandwidth::Unlimited),
            Change::ThrottleMost(40),
            Change::XbzrleCache(512 << 20),
        ];
        assert_eq!(all, expected);
        let body =
            br#"{ "max_bandwidth": 100000, "switchover_bandwidth": 65536, "downtime_limit": 0.5, "max_downtime": 30,
            "deadline": null, "xbzrle_cache": 4096 }"#;
        let mut all = changes(body).unwrap();
        all.sort_by_key(Change::key);
        let expected = [
            Change::Deadline(None),
            Change::DowntimeLimit(MS / 2),
            Change::MaxBandwidth(Some(100_000)),
            Change::MaxDowntime(Some(30 * MS)),
            Change::SwitchoverBandwidth(SwitchoverBandwidth::AtMost(65536)),
            Change::XbzrleCache(4096),
        ];
        assert_eq!(all, expected);
        let nulls = changes(br#"{ "max_bandwidth": null, "switchover_bandwidth": null }"#).unwrap();
        let expected = [Change::MaxBandwidth(None), Change::SwitchoverBandwidth(SwitchoverBandwidth::AsRounds)];
        assert_eq!(nulls, expected);
        assert_eq!(changes(b"{}").unwrap(), []);
    }

    #[test]
    fn what_is_wrong_is_named_with_what_would_be_right() {
        let wrong = |body: &str| changes(body.as_bytes()).unwrap_err();
        assert!(wrong("").contains("no JSON object such as"));
        assert!(wrong("[1]").contains("no JSON object such as"));
        assert!(wrong(r#"{ "lanes": 4 }"#).contains(r#""lanes" is no setting"#));
        assert_eq!(
            wrong(r#"{ "downtime_limit": "soon" }"#),
            r#"downtime_limit: "soon" is wrong here; write a length of time such as "50ms", or a number of milliseconds"#
        );
        for body in [
            r#"{ "downtime_limit": null }"#,
            r#"{ "downtime_limit": -1 }"#,
            r#"{ "max_bandwidth": "200 MiB" }"#,
            r#"{ "max_bandwidth": -5 }"#,
            r#"{ "throttle": 100 }"#,
            r#"{ "throttle": null }"#,
            r#"{ "xbzrle_cache": null }"#,
            r#"{ "deadline": 1e300 }"#,
            r#"{ "max_downtime": [] }"#,
        ] {
            assert!(wrong(body).contains("is wrong here"), "{body}");
        }
        assert_eq!(
            wrong(r#"{ "max_bandwidth": 1 }"#),
            r#"max_bandwidth: 1 B/s is too slow to move a guest; write "64 KiB/s" or more, or "unlimited""#
        );
        assert!(wrong(r#"{ "deadline": "900 years" }"#).contains("longer than a hundred years"));
        let long = wrong(&format!(r#"{{ "deadline": "{}" }}"#, "ß".repeat(5000)));
        assert!(long.len() < 300, "{long}");
    }

    #[test]
    fn a_setting_that_is_given_twice_is_refused_by_name() {
        let twice = |body: &str| changes(body.as_bytes()).unwrap_err();
        let body = r#"{ "deadline": "5m", "max_bandwidth": 100000, "deadline": null }"#;
        assert_eq!(twice(body), "deadline is given twice: give it once");
        let escaped = r#"{ "throttle": 40, "thr\u006fttle": 40 }"#;
        assert_eq!(twice(escaped), "throttle is given twice: give it once");
    }

    #[test]
    fn an_address_is_checked_and_goes_alone() {
        let given = |body: &str| read(body.as_bytes());
        let there = Patch::Address(Address::Tcp { host: "10.0.0.3".into(), port: 7777 });
        assert_eq!(given(r#"{ "address": "tcp:10.0.0.3:7777" }"#), Ok(there));
        for (body, why) in [
            (r#"{ "address": "file:/x" }"#, "no return path"),
            (r#"{ "address": "10.0.0.3" }"#, "write tls:HOST:PORT, tcp:HOST:PORT"),
            (r#"{ "address": 7777 }"#, "write tls:HOST:PORT, tcp:HOST:PORT"),
            (r#"{ "address": "unix:/x", "throttle": 40 }"#, "give it alone"),
            (r#"{ "address": "unix:/x", "address": "unix:/x" }"#, "give it once"),
        ] {
            let error = given(body).unwrap_err();
            assert!(error.starts_with("address") && error.contains(why), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_changes_or_an_error(body in prop::collection::vec(any::<u8>(), 0..200)) {
            drop(read(&body));
        }

        #[test]
        fn any_value_is_a_change_or_an_error(
            key in prop::sample::select(KEYS.split([',', ' ']).filter(|word| word.len() > 3).collect::<Vec<_>>()),
            value in "[-0-9a-zA-Z \"./\\[\\]{}]{0,20}",
        ) {
            drop(read(format!(r#"{{ "{key}": {value} }}"#).as_bytes()));
            drop(read(format!(r#"{{ "{key}": "{value}" }}"#).as_bytes()));
        }
    }
}
