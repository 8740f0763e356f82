//! Connections of the control API: accepted, served, ended.

use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use memferry_transports::{Address, Connection, Listener, open};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::routes::Routes;
use crate::control::Control;

/// Connections that are served at a time; others wait until one ends.
const CONNECTIONS: usize = 64;
/// How long the head of a request may take, and a connection stay idle.
const HEAD_TIME: Duration = Duration::from_secs(2);
/// The most bytes of a head.
const HEAD_BYTES: usize = 16 << 10;
/// How long answers on their way may take when the server ends.
const FAREWELL: Duration = Duration::from_millis(500);

/// A server of the control API. Dropped, it ends at once; the socket goes with it.
#[derive(Debug)]
pub struct Server {
    closing: CancellationToken,
    serving: AbortOnDropHandle<()>,
}

impl Server {
    /// Listens at a Unix socket, made for its owner only, and serves what is asked of `control`. A socket that a dead
    /// program left is replaced.
    ///
    /// # Errors
    /// When the address is no Unix socket's, somebody listens there, or the system refuses.
    pub async fn listen(address: &Address, control: Control) -> io::Result<Self> {
        if !matches!(address, Address::Unix(_)) {
            let what = format!("{address} is no Unix socket, which the control API needs; write unix:/PATH");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        let listener = open(address, Duration::ZERO).listen().await?;
        let closing = CancellationToken::new();
        let serving = tokio::spawn(serve(listener, Routes::new(control, closing.clone()), closing.clone()));
        Ok(Self { closing, serving: AbortOnDropHandle::new(serving) })
    }

    /// Takes no more requests, and gives the answers that are on their way a moment: streams of events that have come to
    /// their end are read to it.
    pub async fn close(self) {
        self.closing.cancel();
        drop(self.serving.await);
    }
}

async fn serve(mut listener: Box<dyn Listener>, routes: Routes, closing: CancellationToken) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            () = closing.cancelled() => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < CONNECTIONS => match accepted {
                Ok(connection) => _ = connections.spawn(serve_one(connection, routes.clone(), closing.clone())),
                Err(error) => {
                    tracing::warn!(%error, "the control API ends");
                    break;
                }
            },
        }
    }
    drop(listener);
    let ending = async { while connections.join_next().await.is_some() {} };
    drop(tokio::time::timeout(FAREWELL, ending).await);
}

async fn serve_one(connection: Connection, routes: Routes, closing: CancellationToken) {
    let Connection { reader: Some(reader), writer: Some(writer), .. } = connection else { return };
    let service = service_fn(move |request| {
        let routes = routes.clone();
        async move { Ok::<_, Infallible>(routes.answer(request).await) }
    });
    let mut server = http1::Builder::new();
    server.timer(TokioTimer::new()).header_read_timeout(HEAD_TIME).max_buf_size(HEAD_BYTES);
    let mut served = pin!(server.serve_connection(TokioIo::new(tokio::io::join(reader, writer)), service));
    // A client that breaks off or speaks something else is its own trouble.
    tokio::select! {
        served = served.as_mut() => return drop(served),
        () = closing.cancelled() => {}
    }
    served.as_mut().graceful_shutdown();
    drop(served.await);
}
