//! The client side of the control API: the requests of the program's `status`, `set`, `cancel`, `switch-over`,
//! `postcopy` and `watch`.
//!
//! Each function takes the address of a migration's control socket, opens a connection, and returns the answer.

use std::io;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::HOST;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use memferry_stages::untrusted::Untrusted;
use memferry_transports::Address;
use serde_json::{Map, Value};
use tokio::net::UnixStream;
use tokio_util::task::AbortOnDropHandle;

/// The time limit for an answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// The longest line of events that is accepted.
const LONGEST_LINE: usize = 4 << 20;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nothing listens at the address.
    #[error("{0}")]
    Nobody(io::Error),
    /// The answer is not one of a control API.
    #[error("what listens at {address} is no control API of a migration: {why}")]
    Strange {
        /// Where.
        address: Address,
        /// What is wrong with the answer.
        why: Untrusted,
    },
    /// The migration refuses the request; the text is its answer.
    #[error("{0}")]
    Refused(Untrusted),
}

/// The status of the migration: the object of `GET /migration`.
///
/// # Errors
/// If the connection or the request fails.
pub async fn status(address: &Address) -> Result<Value, ClientError> {
    ask(address, Method::GET, "/migration", Bytes::new()).await
}

/// Changes settings, and returns the status after the change.
///
/// # Errors
/// If the request fails, or the migration refuses it: then no setting is changed.
pub async fn set(address: &Address, settings: &Map<String, Value>) -> Result<Value, ClientError> {
    let body = serde_json::to_vec(settings).expect("plain values become JSON");
    ask(address, Method::PATCH, "/migration", body.into()).await
}

/// Cancels the migration, and returns the status after the request.
///
/// # Errors
/// If the request fails, or it is too late to cancel.
pub async fn cancel(address: &Address) -> Result<Value, ClientError> {
    ask(address, Method::POST, "/migration/cancel", Bytes::new()).await
}

/// Requests a switchover, and returns the status after the request.
///
/// # Errors
/// If the request fails, or the migration refuses it.
pub async fn switch_over(address: &Address) -> Result<Value, ClientError> {
    ask(address, Method::POST, "/migration/switch-over", Bytes::new()).await
}

/// Requests postcopy, and returns the status after the request.
///
/// # Errors
/// If the request fails, or the migration refuses it.
pub async fn postcopy(address: &Address) -> Result<Value, ClientError> {
    ask(address, Method::POST, "/migration/postcopy", Bytes::new()).await
}

/// The events of the migration, from its beginning on.
///
/// # Errors
/// If the request fails, or too many clients read events.
pub async fn events(address: &Address) -> Result<Lines, ClientError> {
    let (answer, driver) = send(address, Method::GET, "/migration/events", Bytes::new()).await?;
    let address = address.clone();
    if answer.status().is_success() {
        return Ok(Lines { address, body: answer.into_body(), read: BytesMut::new(), _driver: driver });
    }
    Err(refusal(&address, read(&address, answer).await?))
}

/// Lines of JSON, in order of arrival.
#[derive(Debug)]
pub struct Lines {
    address: Address,
    body: Incoming,
    /// Bytes that are read and not yet returned.
    read: BytesMut,
    _driver: AbortOnDropHandle<()>,
}

impl Lines {
    /// The next line, without its newline; `None` after the last. A stream that breaks off within a line ends with an
    /// error.
    ///
    /// # Errors
    /// If the connection breaks, because the migrating program has ended, or if a line is too long.
    pub async fn next(&mut self) -> Result<Option<String>, ClientError> {
        loop {
            if let Some(end) = self.read.iter().position(|&byte| byte == b'\n') {
                let line = self.read.split_to(end + 1);
                return Ok(Some(String::from_utf8_lossy(&line[..end]).into_owned()));
            }
            if self.read.len() > LONGEST_LINE {
                return Err(self.strange("a line of its events does not end"));
            }
            match self.body.frame().await {
                Some(Ok(frame)) => frame.data_ref().into_iter().for_each(|data| self.read.extend_from_slice(data)),
                None if self.read.is_empty() => return Ok(None),
                None => return Err(self.strange("its events end in the middle of a line")),
                Some(Err(error)) => {
                    let gone = format!("the connection to {} broke: {error}", self.address);
                    return Err(ClientError::Nobody(io::Error::new(io::ErrorKind::ConnectionReset, gone)));
                }
            }
        }
    }

    fn strange(&self, why: &str) -> ClientError {
        ClientError::Strange { address: self.address.clone(), why: why.into() }
    }
}

async fn ask(address: &Address, method: Method, path: &'static str, body: Bytes) -> Result<Value, ClientError> {
    let asking = async {
        let (answer, _driver) = send(address, method, path, body).await?;
        let is_success = answer.status().is_success();
        let value = read(address, answer).await?;
        if is_success { Ok(value) } else { Err(refusal(address, value)) }
    };
    tokio::time::timeout(PATIENCE, asking).await.unwrap_or_else(|_| Err(too_slow(address)))
}

/// Opens a connection for one request, and spawns the task that drives it.
async fn send(
    address: &Address,
    method: Method,
    path: &'static str,
    body: Bytes,
) -> Result<(Response<Incoming>, AbortOnDropHandle<()>), ClientError> {
    let Address::Unix(socket) = address else {
        return Err(ClientError::Strange { address: address.clone(), why: "it is no Unix socket".into() });
    };
    let nobody = |error: io::Error| ClientError::Nobody(io::Error::new(error.kind(), format!("{address}: {error}")));
    let connection = UnixStream::connect(socket).await.map_err(nobody)?;
    let strange =
        |error: hyper::Error| ClientError::Strange { address: address.clone(), why: error.to_string().into() };
    let (mut sender, driving) = http1::handshake(TokioIo::new(connection)).await.map_err(strange)?;
    let driver = AbortOnDropHandle::new(tokio::spawn(async move { drop(driving.await) }));
    let request = Request::builder().method(method).uri(path).header(HOST, "memferry");
    let request = request.body(Full::new(body)).expect("a request of ours");
    let answer = tokio::time::timeout(PATIENCE, sender.send_request(request)).await;
    let answer = answer.map_err(|_| too_slow(address))?.map_err(strange)?;
    Ok((answer, driver))
}

async fn read(address: &Address, answer: Response<Incoming>) -> Result<Value, ClientError> {
    let strange = |why: String| ClientError::Strange { address: address.clone(), why: why.into() };
    let body = answer.into_body().collect().await.map_err(|error| strange(error.to_string()))?;
    serde_json::from_slice(&body.to_bytes()).map_err(|error| strange(error.to_string()))
}

fn refusal(address: &Address, value: Value) -> ClientError {
    match value.get("error").and_then(Value::as_str) {
        Some(why) => ClientError::Refused(why.into()),
        None => ClientError::Strange { address: address.clone(), why: "it refuses without a reason".into() },
    }
}

fn too_slow(address: &Address) -> ClientError {
    ClientError::Strange { address: address.clone(), why: format!("it has not answered for {PATIENCE:?}").into() }
}
