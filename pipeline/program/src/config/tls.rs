//! The rules of `[transport.tls]`, and warnings of certificates that end soon.

use std::time::SystemTime;

use memferry_transports::Address;
use memferry_transports_tls::{Credentials, End, TlsError, TlsSettings, Validity};

use super::Purpose;
use super::fault::Fault;
use super::tables::Config;

/// Adds what is wrong with the table and with the files that it names.
pub(super) fn check(config: &Config, purpose: Purpose, faults: &mut Vec<Fault>) {
    let Ok(address) = config.transport.address.parse::<Address>() else { return };
    let Some(settings) = config.tls() else {
        faults.extend(misplaced(config, &address));
        return;
    };
    let now = SystemTime::now();
    for loaded in loaded(&settings, purpose) {
        match loaded {
            Ok(credentials) => faults.extend(credentials.certificates().filter_map(|own| {
                let (facts, path) = (own.facts, key(own.key.name()));
                let (what, help) = match facts.validity(now) {
                    Validity::Expired => (format!("expired on {}", facts.ends()), "renew it, or set the clock"),
                    Validity::NotYet => (format!("is valid from {}", facts.begins()), "set the clock"),
                    Validity::Holds | Validity::EndsIn { .. } => return None,
                };
                Some(Fault::new(path, format!("{facts} in {} {what}", own.file), help))
            })),
            Err(TlsError { key: named, what, help }) => faults.push(Fault::new(key(named.name()), what, help)),
        }
    }
    faults.dedup();
}

/// TLS without certificates, or certificates without TLS.
fn misplaced(config: &Config, address: &Address) -> Option<Fault> {
    let has_tls = address.beneath().is_some();
    if has_tls && config.transport.tls.is_none() {
        let what = "TLS needs certificates, and there is no table [transport.tls]";
        let help =
            "write [transport.tls] with directory = \"DIR\"; `memferry certs DIR --host NAME` makes some for a trial";
        return Some(Fault::new("transport.address", what, help));
    }
    let secured = address.over_tls().map_or_else(|| "tls:HOST:PORT".into(), |address| address.to_string());
    (!has_tls && config.transport.tls.is_some()).then(|| {
        let what = format!("certificates, and {address} has no TLS");
        Fault::new("transport.tls", what, format!("write address = \"{secured}\", or delete the table"))
    })
}

fn key(name: &str) -> String {
    format!("transport.tls.{name}")
}

/// The credentials of the ends that a command has.
fn loaded(settings: &TlsSettings, purpose: Purpose) -> Vec<Result<Credentials, TlsError>> {
    let load = |end| Credentials::load(settings, end);
    match purpose {
        Purpose::Run => vec![load(End::Source), load(End::Destination)],
        Purpose::Send => vec![load(End::Source)],
        Purpose::Receive => vec![load(End::Destination)],
        // A host has the files of one end, or of both.
        Purpose::Check => {
            let [source, destination] = [End::Source, End::Destination].map(load);
            match (source, destination) {
                (Err(_), Ok(destination)) => vec![Ok(destination)],
                (Ok(source), Err(_)) => vec![Ok(source)],
                (Err(source), Err(_)) => vec![Err(source)],
                (Ok(source), Ok(destination)) => vec![Ok(source), Ok(destination)],
            }
        }
        Purpose::Plan => Vec::new(),
    }
}

/// The certificates that end soon, each in a line.
pub(crate) fn warnings(config: &Config, purpose: Purpose) -> Vec<String> {
    let Some(settings) = config.tls() else { return Vec::new() };
    let now = SystemTime::now();
    let mut warnings = Vec::new();
    for credentials in loaded(&settings, purpose).into_iter().flatten() {
        for own in credentials.certificates() {
            if let Validity::EndsIn { days } = own.facts.validity(now) {
                let ends = own.facts.ends();
                warnings.push(format!("{} in {} ends in {days} days, on {ends}: renew it", own.facts, own.file));
            }
        }
    }
    warnings.dedup();
    warnings
}

#[cfg(test)]
mod tests {
    use memferry_transports_tls::trial;

    use super::*;
    use crate::config::parse;

    const GUEST: &str = "[guest.workload]\nmemory = \"64 MiB\"\n";

    fn refused(transport: &str, purpose: Purpose) -> String {
        let text = format!("{GUEST}[transport]\n{transport}");
        parse("run.toml", &text, &[], purpose).expect_err(transport).render(false)
    }

    #[test]
    fn what_does_not_go_together_is_shown_at_its_line() {
        let cases = [
            ("address = \"tls:host:1\"\n", "run.toml:4:11", "no table [transport.tls]"),
            (
                "address = \"tcp:host:1\"\n[transport.tls]\ndirectory = \"/d\"\n",
                "run.toml:5:1",
                "write address = \"tls:host:1\"",
            ),
            (
                "address = \"tls:host:1\"\n[transport.tls]\nca = \"/absent\"\n",
                "run.toml:5:1",
                "TLS needs `certificate`",
            ),
            (
                "address = \"tls:host:1\"\n[transport.tls]\ndirectory = \"/absent\"\nkey = \"/k\"\n",
                "run.toml:7:7",
                "`directory` has all files",
            ),
            (
                "address = \"tls:host:1\"\n[transport.tls]\ndirectory = \"/absent\"\n",
                "run.toml:6:13",
                "/absent/client-cert.pem cannot be read",
            ),
            (
                "address = \"tls:host:1\"\n[transport.tls]\npeer_name = \"a b\"\n",
                "run.toml:6:13",
                "is no name of a host",
            ),
            ("address = \"tls:host:1\"\n[transport.tls]\nallow = [\"\"]\n", "run.toml:6:9", "a pattern is empty"),
            (
                "address = \"tls:host:1\"\n[transport.tls]\nclient_certificates = \"some\"\n",
                "run.toml:6:23",
                "`required`, `none`",
            ),
        ];
        for (transport, place, words) in cases {
            let why = refused(transport, Purpose::Send);
            assert!(why.contains(place) && why.contains(words), "{place}, {words}: {why}");
        }
    }

    #[test]
    fn a_directory_serves_every_command_and_a_plan_reads_none() {
        let folder = tempfile::tempdir().unwrap();
        let directory = folder.path().join("pki");
        trial::write(&directory, &["host".into()]).unwrap();
        let text = |directory: &std::path::Path| {
            format!(
                "{GUEST}[transport]\naddress = \"tls:host:1\"\n[transport.tls]\ndirectory = {directory:?}\n[pipeline]\nchecksum = false\n"
            )
        };
        for purpose in [Purpose::Run, Purpose::Send, Purpose::Receive, Purpose::Check] {
            let config = parse("run.toml", &text(&directory), &[], purpose).unwrap();
            assert!(warnings(&config, purpose).is_empty());
            // TLS authenticates what checksums would.
            assert!(config.migration.recovery.attempts > 0 && !config.pipeline.checksum);
            assert_eq!(config.tls().unwrap().peer_name.as_deref(), Some("host"));
        }
        // A host has the files of its own end.
        std::fs::remove_file(directory.join("client-key.pem")).unwrap();
        parse("run.toml", &text(&directory), &[], Purpose::Check).unwrap();
        parse("run.toml", &text(&directory), &[], Purpose::Receive).unwrap();
        parse("run.toml", &text(&directory), &[], Purpose::Run).unwrap_err();
        parse("run.toml", &text("/absent".as_ref()), &[], Purpose::Plan).unwrap();
    }
}
