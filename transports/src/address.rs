//! Addresses as an operator writes them: `tcp:host:port`, `unix:/path`, `file:/path`.
//!
//! Takes text, gives a checked [`Address`], or an [`AddressError`] that says what was wrong and what to write instead.
//! `Display` prints an address as text that parses to the same address.

use std::fmt;
use std::net::Ipv6Addr;
use std::path::PathBuf;
use std::str::FromStr;

use crate::unix::check_path_length;

/// The address of one end of a migration.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// A TCP port.
    Tcp {
        /// A name, an IPv4 address, or an IPv6 address without its brackets.
        host: String,
        /// The port; 0 lets the system choose one for a listener.
        port: u16,
    },
    /// A Unix socket.
    Unix(PathBuf),
    /// A stream in a file.
    File(PathBuf),
}

/// Why a text is no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{address:?} is no address: {why}; write {write}")]
pub struct AddressError {
    /// The text.
    pub address: String,
    /// What is wrong with it.
    pub why: String,
    /// What to write instead.
    pub write: String,
}

/// What is wrong, and what to write instead.
type Complaint = (String, String);

/// The longest host name, in bytes.
const MAX_HOST: usize = 253;

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let refuse = |(why, write)| AddressError { address: text.to_owned(), why, write };
        match text.split_once(':') {
            Some(("tcp", rest)) => parse_tcp(rest).map_err(refuse),
            Some(("unix", rest)) => parse_unix(rest).map_err(refuse),
            Some(("file", rest)) => parse_path("file", rest).map(Address::File).map_err(refuse),
            other => Err(refuse(unknown_scheme(text, other.map(|(scheme, _)| scheme)))),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Address::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::File(path) => write!(f, "file:{}", path.display()),
        }
    }
}

fn unknown_scheme(text: &str, scheme: Option<&str>) -> Complaint {
    if text.starts_with(['/', '.']) {
        return ("it does not name a transport".into(), format!("file:{text} or unix:{text}"));
    }
    let write = "tcp:HOST:PORT, unix:/PATH or file:/PATH".to_owned();
    match scheme {
        Some(scheme) => (format!("there is no transport {scheme:?}"), write),
        None => ("it does not begin with a transport".into(), write),
    }
}

fn parse_tcp(rest: &str) -> Result<Address, Complaint> {
    if let Some(bare) = rest.strip_prefix("//") {
        return Err(("it has slashes in front of the host".into(), format!("tcp:{}", bare.trim_end_matches('/'))));
    }
    let (host, port) = if rest.starts_with('[') { split_brackets(rest)? } else { split_host(rest)? };
    Ok(Address::Tcp { port: parse_port(host, port)?, host: host.to_owned() })
}

/// `host:port`.
fn split_host(rest: &str) -> Result<(&str, &str), Complaint> {
    if rest.parse::<Ipv6Addr>().is_ok() {
        return Err(("an IPv6 address stands in brackets and a port follows".into(), format!("tcp:[{rest}]:7777")));
    }
    let Some((host, port)) = rest.rsplit_once(':') else {
        let host = if rest.is_empty() { "HOST" } else { rest };
        return Err(("the port is missing".into(), format!("tcp:{host}:7777")));
    };
    if host.is_empty() {
        return Err(("the host is missing".into(), format!("tcp:0.0.0.0:{port} to listen everywhere")));
    }
    if host.contains(':') {
        return Err(("it has too many colons".into(), format!("tcp:[{host}]:{port} for an IPv6 address")));
    }
    let odd = |c: char| c.is_whitespace() || c.is_control() || "/[]%@?#".contains(c);
    if let Some(odd) = host.chars().find(|&c| odd(c)) {
        return Err((format!("a host has no {odd:?}"), "tcp:HOST:PORT".into()));
    }
    if host.len() > MAX_HOST {
        return Err((format!("the host has {} bytes, at most {MAX_HOST} can be", host.len()), "tcp:HOST:PORT".into()));
    }
    Ok((host, port))
}

/// `[::1]:port`, where the address may have a zone: `[fe80::1%eth0]:port`.
fn split_brackets(rest: &str) -> Result<(&str, &str), Complaint> {
    let Some((host, after)) = rest[1..].split_once(']') else {
        return Err(("the bracket is not closed".into(), "tcp:[::1]:7777".into()));
    };
    let (bare, zone) = host.split_once('%').unwrap_or((host, "lo"));
    let plain_zone = zone.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c)) && !zone.is_empty();
    if bare.parse::<Ipv6Addr>().is_err() || !plain_zone || zone.len() > MAX_HOST {
        let write = "tcp:[::1]:7777, or a name without brackets".to_owned();
        return Err((format!("{host:?} is no IPv6 address"), write));
    }
    if bare.parse().is_ok_and(|address: Ipv6Addr| address.is_unicast_link_local()) && !host.contains('%') {
        let port = after.strip_prefix(':').unwrap_or("7777");
        let why = "a link-local address needs the name of its interface (ip -6 addr shows it)".to_owned();
        return Err((why, format!("tcp:[{host}%eth0]:{port}")));
    }
    match after.strip_prefix(':') {
        Some(port) => Ok((host, port)),
        None => Err(("the port is missing".into(), format!("tcp:[{host}]:7777"))),
    }
}

fn parse_port(host: &str, port: &str) -> Result<u16, Complaint> {
    let digits = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
    match port.parse() {
        Ok(port) if digits => Ok(port),
        _ => {
            let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
            Err((format!("{port:?} is no port from 0 to 65535"), format!("tcp:{host}:7777")))
        }
    }
}

fn parse_unix(rest: &str) -> Result<Address, Complaint> {
    let path = parse_path("unix", rest)?;
    check_path_length(&path).map_err(|why| (why, "a shorter path, such as unix:/run/memferry.sock".to_owned()))?;
    Ok(Address::Unix(path))
}

fn parse_path(scheme: &str, rest: &str) -> Result<PathBuf, Complaint> {
    if rest.is_empty() {
        return Err(("the path is missing".into(), format!("{scheme}:/PATH")));
    }
    if rest.starts_with("//") {
        let why = "it has more slashes than a path".to_owned();
        return Err((why, format!("{scheme}:/{}", rest.trim_start_matches('/'))));
    }
    if rest.ends_with('/') || rest.ends_with("/.") || rest.ends_with("/..") || rest == "." || rest == ".." {
        return Err(("the path is a directory's".into(), format!("{scheme}:{}/NAME", rest.trim_end_matches('/'))));
    }
    if rest.contains('\0') {
        return Err(("a path has no NUL byte".into(), format!("{scheme}:/PATH")));
    }
    Ok(PathBuf::from(rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16) -> Address {
        Address::Tcp { host: host.into(), port }
    }

    #[test]
    fn good_addresses_parse_and_print_as_they_were() {
        let good = [
            ("tcp:127.0.0.1:7777", tcp("127.0.0.1", 7777)),
            ("tcp:node-3.example.org:1", tcp("node-3.example.org", 1)),
            ("tcp:localhost:0", tcp("localhost", 0)),
            ("tcp:[::1]:65535", tcp("::1", 65535)),
            ("tcp:[fe80::1%eth0]:7777", tcp("fe80::1%eth0", 7777)),
            ("unix:/run/m.sock", Address::Unix("/run/m.sock".into())),
            ("unix:m.sock", Address::Unix("m.sock".into())),
            ("file:/var/a b:c.mf", Address::File("/var/a b:c.mf".into())),
        ];
        for (text, address) in good {
            assert_eq!(text.parse::<Address>().as_ref(), Ok(&address));
            assert_eq!(address.to_string(), text);
        }
    }

    #[test]
    fn bad_addresses_say_what_to_write() {
        let bad = [
            ("", "tcp:HOST:PORT"),
            ("/tmp/x", "file:/tmp/x or unix:/tmp/x"),
            ("tpc:a:1", "no transport \"tpc\""),
            ("tcp://host:7", "write tcp:host:7"),
            ("tcp:host", "tcp:host:7777"),
            ("tcp:", "the port is missing"),
            ("tcp::7777", "tcp:0.0.0.0:7777"),
            ("tcp:::1", "write tcp:[::1]:7777"),
            ("tcp:fe80::1:zz", "tcp:[fe80::1]:zz"),
            ("tcp:[::1]", "tcp:[::1]:7777"),
            ("tcp:[::1", "bracket"),
            ("tcp:[host]:1", "is no IPv6 address"),
            ("tcp:[::1%]:1", "is no IPv6 address"),
            ("tcp:[fe80::77]:7907", "write tcp:[fe80::77%eth0]:7907"),
            ("tcp:[fe80::77]", "needs the name of its interface"),
            ("tcp:host:65536", "0 to 65535"),
            ("tcp:host:+1", "0 to 65535"),
            ("tcp:host:", "0 to 65535"),
            ("tcp:a b:1", "no ' '"),
            ("unix:", "unix:/PATH"),
            ("unix:///run/x", "write unix:/run/x"),
            ("file:/tmp/", "write file:/tmp/NAME"),
            ("file:..", "file:../NAME"),
            ("file:/a\0b", "NUL"),
        ];
        for (text, hint) in bad {
            let message = text.parse::<Address>().expect_err(text).to_string();
            assert!(message.contains(hint), "{message}");
        }
    }

    #[test]
    fn a_socket_path_has_107_bytes_at_most() {
        let path = |bytes: usize| format!("unix:/{}", "p".repeat(bytes - 1));
        assert!(path(107).parse::<Address>().is_ok());
        let message = path(108).parse::<Address>().expect_err("108 bytes").to_string();
        assert!(message.contains("108 bytes") && message.contains("107"), "{message}");
    }

    #[test]
    fn whatever_parses_prints_and_parses_alike() {
        let parts = ["tcp:", "unix:", "file:", "[", "]", ":", "::1", "/", "a", "7", "99999", "%", ".", " ", "é", "\0"];
        let mut random = 7_usize;
        let mut parsed = 0;
        for _ in 0..200_000 {
            let mut text = String::new();
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            for part in 0..6 {
                text += parts[(random >> (60 - 5 * part)) % parts.len()];
            }
            if let Ok(address) = text.parse::<Address>() {
                parsed += 1;
                assert_eq!(address.to_string().parse(), Ok(address));
            }
        }
        assert!(parsed > 1000, "only {parsed} of the texts were addresses");
    }
}
