//! Stands in for a transport that is in a crate of its own.

use std::future::ready;
use std::io::{self, ErrorKind};

use futures::FutureExt;
use futures::future::BoxFuture;

use crate::{Address, Capabilities, Connection, Listener, Transport};

/// A TLS address that no certificates were given for. It can do what TLS can, and refuses to do it.
#[derive(Clone, Debug)]
pub(crate) struct Unregistered {
    address: String,
}

impl Unregistered {
    pub(crate) fn new(address: &Address) -> Self {
        Self { address: address.to_string() }
    }

    fn refusal(&self) -> io::Error {
        let what = format!(
            "{}: TLS needs certificates; open this address with memferry_transports_tls::TlsTransport",
            self.address
        );
        io::Error::new(ErrorKind::Unsupported, what)
    }
}

impl Transport for Unregistered {
    fn capabilities(&self) -> Capabilities {
        Capabilities { return_path: true, max_connections: u16::MAX, stored: false, authenticated: true }
    }

    fn address(&self) -> String {
        self.address.clone()
    }

    fn connect(&self) -> BoxFuture<'_, io::Result<Connection>> {
        ready(Err(self.refusal())).boxed()
    }

    fn listen(&self) -> BoxFuture<'_, io::Result<Box<dyn Listener>>> {
        ready(Err(self.refusal())).boxed()
    }
}
