//! Addresses as an operator writes them: `tls:host:port`, `tcp:host:port`, `tls+unix:/path`, `unix:/path`, `file:/path`.
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
    /// TLS over a TCP port.
    TlsTcp {
        /// As for [`Tcp`](Self::Tcp).
        host: String,
        /// As for [`Tcp`](Self::Tcp).
        port: u16,
    },
    /// TLS over a Unix socket.
    TlsUnix(PathBuf),
}

impl Address {
    /// The address of the connections that TLS protects; `None` where the address has no TLS.
    #[must_use]
    pub fn beneath(&self) -> Option<Self> {
        match self {
            Self::TlsTcp { host, port } => Some(Self::Tcp { host: host.clone(), port: *port }),
            Self::TlsUnix(path) => Some(Self::Unix(path.clone())),
            Self::Tcp { .. } | Self::Unix(_) | Self::File(_) => None,
        }
    }

    /// The address with TLS over its connections; `None` for a file, and where it has TLS.
    #[must_use]
    pub fn over_tls(&self) -> Option<Self> {
        match self {
            Self::Tcp { host, port } => Some(Self::TlsTcp { host: host.clone(), port: *port }),
            Self::Unix(path) => Some(Self::TlsUnix(path.clone())),
            Self::File(_) | Self::TlsTcp { .. } | Self::TlsUnix(_) => None,
        }
    }
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
            Some((scheme @ "tcp", rest)) => parse_tcp(scheme, rest).map_err(refuse),
            Some((scheme @ "tls", rest)) => over_tls(parse_tcp(scheme, rest)).map_err(refuse),
            Some((scheme @ "unix", rest)) => parse_unix(scheme, rest).map_err(refuse),
            Some((scheme @ "tls+unix", rest)) => over_tls(parse_unix(scheme, rest)).map_err(refuse),
            Some(("file", rest)) => parse_path("file", rest).map(Address::File).map_err(refuse),
            other => Err(refuse(unknown_scheme(text, other.map(|(scheme, _)| scheme)))),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp { host, port } => write!(f, "tcp:{}:{port}", bracketed(host)),
            Address::TlsTcp { host, port } => write!(f, "tls:{}:{port}", bracketed(host)),
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::TlsUnix(path) => write!(f, "tls+unix:{}", path.display()),
            Address::File(path) => write!(f, "file:{}", path.display()),
        }
    }
}

/// A host as it stands before a port: an IPv6 address in brackets.
fn bracketed(host: &str) -> String {
    if host.contains(':') { format!("[{host}]") } else { host.to_owned() }
}

fn over_tls(beneath: Result<Address, Complaint>) -> Result<Address, Complaint> {
    Ok(beneath?.over_tls().expect("TCP and Unix sockets carry TLS"))
}

fn unknown_scheme(text: &str, scheme: Option<&str>) -> Complaint {
    if text.starts_with(['/', '.']) {
        return ("it does not name a transport".into(), format!("file:{text} or unix:{text}"));
    }
    let write = "tls:HOST:PORT, tcp:HOST:PORT, unix:/PATH or file:/PATH".to_owned();
    match scheme {
        Some(scheme) => (format!("there is no transport {scheme:?}"), write),
        None => ("it does not begin with a transport".into(), write),
    }
}

fn parse_tcp(scheme: &str, rest: &str) -> Result<Address, Complaint> {
    if let Some(bare) = rest.strip_prefix("//") {
        return Err(("it has slashes in front of the host".into(), format!("{scheme}:{}", bare.trim_end_matches('/'))));
    }
    let (host, port) = if rest.starts_with('[') { split_brackets(scheme, rest)? } else { split_host(scheme, rest)? };
    Ok(Address::Tcp { port: parse_port(scheme, host, port)?, host: host.to_owned() })
}

/// `host:port`.
fn split_host<'a>(scheme: &str, rest: &'a str) -> Result<(&'a str, &'a str), Complaint> {
    if rest.parse::<Ipv6Addr>().is_ok() {
        return Err((
            "an IPv6 address stands in brackets and a port follows".into(),
            format!("{scheme}:[{rest}]:7777"),
        ));
    }
    let Some((host, port)) = rest.rsplit_once(':') else {
        let host = if rest.is_empty() { "HOST" } else { rest };
        return Err(("the port is missing".into(), format!("{scheme}:{host}:7777")));
    };
    if host.is_empty() {
        return Err(("the host is missing".into(), format!("{scheme}:0.0.0.0:{port} to listen everywhere")));
    }
    if host.contains(':') {
        return Err(("it has too many colons".into(), format!("{scheme}:[{host}]:{port} for an IPv6 address")));
    }
    let odd = |c: char| c.is_whitespace() || c.is_control() || "/[]%@?#".contains(c);
    if let Some(odd) = host.chars().find(|&c| odd(c)) {
        return Err((format!("a host has no {odd:?}"), format!("{scheme}:HOST:PORT")));
    }
    if host.len() > MAX_HOST {
        return Err((
            format!("the host has {} bytes, at most {MAX_HOST} can be", host.len()),
            format!("{scheme}:HOST:PORT"),
        ));
    }
    Ok((host, port))
}

/// `[::1]:port`, where the address may have a zone: `[fe80::1%eth0]:port`.
fn split_brackets<'a>(scheme: &str, rest: &'a str) -> Result<(&'a str, &'a str), Complaint> {
    let Some((host, after)) = rest[1..].split_once(']') else {
        return Err(("the bracket is not closed".into(), format!("{scheme}:[::1]:7777")));
    };
    let (bare, zone) = host.split_once('%').unwrap_or((host, "lo"));
    let plain_zone = zone.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c)) && !zone.is_empty();
    if bare.parse::<Ipv6Addr>().is_err() || !plain_zone || zone.len() > MAX_HOST {
        let write = format!("{scheme}:[::1]:7777, or a name without brackets");
        return Err((format!("{host:?} is no IPv6 address"), write));
    }
    if bare.parse().is_ok_and(|address: Ipv6Addr| address.is_unicast_link_local()) && !host.contains('%') {
        let port = after.strip_prefix(':').unwrap_or("7777");
        let why = "a link-local address needs the name of its interface (ip -6 addr shows it)".to_owned();
        return Err((why, format!("{scheme}:[{host}%eth0]:{port}")));
    }
    match after.strip_prefix(':') {
        Some(port) => Ok((host, port)),
        None => Err(("the port is missing".into(), format!("{scheme}:[{host}]:7777"))),
    }
}

fn parse_port(scheme: &str, host: &str, port: &str) -> Result<u16, Complaint> {
    let digits = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
    match port.parse() {
        Ok(port) if digits => Ok(port),
        _ => {
            let host = bracketed(host);
            Err((format!("{port:?} is no port from 0 to 65535"), format!("{scheme}:{host}:7777")))
        }
    }
}

fn parse_unix(scheme: &str, rest: &str) -> Result<Address, Complaint> {
    let path = parse_path(scheme, rest)?;
    check_path_length(&path).map_err(|why| (why, format!("a shorter path, such as {scheme}:/run/memferry.sock")))?;
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
            ("tls:node-3.example.org:1", Address::TlsTcp { host: "node-3.example.org".into(), port: 1 }),
            ("tls:[::1]:0", Address::TlsTcp { host: "::1".into(), port: 0 }),
            ("tls+unix:/run/m.sock", Address::TlsUnix("/run/m.sock".into())),
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
            ("tls:host", "write tls:host:7777"),
            ("tls://host:7", "write tls:host:7"),
            ("tls+unix:", "write tls+unix:/PATH"),
            ("tls+file:/x", "no transport \"tls+file\""),
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
    fn tls_is_over_another_address() {
        for (text, over) in [("tcp:[::1]:7", Some("tls:[::1]:7")), ("unix:/s", Some("tls+unix:/s")), ("file:/f", None)]
        {
            let address: Address = text.parse().expect(text);
            let secured = address.over_tls();
            assert_eq!(secured.as_ref().map(Address::to_string).as_deref(), over);
            assert_eq!((address.beneath(), secured.as_ref().and_then(Address::over_tls)), (None, None));
            assert_eq!(secured.as_ref().and_then(Address::beneath), over.map(|_| address));
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
        let parts = [
            "tcp:", "tls:", "tls+", "unix:", "file:", "[", "]", ":", "::1", "/", "a", "7", "99999", "%", ".", " ", "é",
            "\0",
        ];
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
