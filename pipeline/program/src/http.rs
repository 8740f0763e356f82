//! The HTTP server of this program, for the control API and for the Prometheus metrics.
//!
//! A connection carries one request, which is answered when it is complete. At most [`CONNECTIONS`] are open. When
//! another client connects, the oldest connection whose request is incomplete is closed for it: clients that send
//! nothing, or half a request, block no other client, however many they are. Heads, bodies and their duration are
//! bounded.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use memferry_transports::{Arrival, Connection, Listener, is_shortage};
use tokio::task::{AbortHandle, JoinSet};
use tokio_util::sync::CancellationToken;

/// The number of connections that may be open at a time.
pub(crate) const CONNECTIONS: usize = 64;
/// The time limit for the head of a request.
const HEAD_TIME: Duration = Duration::from_secs(2);
/// The most bytes of a head.
const HEAD_BYTES: usize = 16 << 10;
/// The time limit for a body.
const BODY_TIME: Duration = Duration::from_secs(5);
/// The most bytes of a body.
const BODY_BYTES: usize = 16 << 10;
/// The time limit for answers in progress when the server ends.
const FAREWELL: Duration = Duration::from_millis(500);

/// An answer, sent at once or in pieces.
pub(crate) type Answer = Response<UnsyncBoxBody<Bytes, Infallible>>;
/// A request, with its body.
pub(crate) type Asked = Request<Result<Bytes, BodyError>>;

/// Answers requests. Clones share state.
pub(crate) trait Answerer: Clone + Send + Sync + 'static {
    /// Answers a request that is complete, or whose body failed.
    fn answer(&self, asked: Asked) -> impl Future<Output = Answer> + Send;
}

/// Why there is no body.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BodyError {
    #[error("a body has at most {BODY_BYTES} bytes")]
    TooLong,
    #[error("the body does not come")]
    Late,
    #[error("the body cannot be read: {0}")]
    Broken(Box<dyn std::error::Error + Send + Sync>),
}

impl BodyError {
    pub(crate) fn code(&self) -> StatusCode {
        match self {
            Self::TooLong => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Late => StatusCode::REQUEST_TIMEOUT,
            Self::Broken(_) => StatusCode::BAD_REQUEST,
        }
    }
}

/// An answer in one piece, which may not be cached.
pub(crate) fn whole(code: StatusCode, kind: &'static str, text: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(text.into()).boxed_unsync());
    *answer.status_mut() = code;
    answer.headers_mut().insert(CONTENT_TYPE, kind.parse().expect("a header's value"));
    answer.headers_mut().insert(CACHE_CONTROL, "no-store".parse().expect("a header's value"));
    answer
}

/// Serves clients until `closing` is cancelled or the listener fails; answers in progress then have a moment to
/// complete.
pub(crate) async fn serve(mut listener: Box<dyn Listener>, answerer: impl Answerer, closing: CancellationToken) {
    let mut clients = Clients::default();
    loop {
        tokio::select! {
            biased;
            () = closing.cancelled() => break,
            Some(_) = clients.tasks.join_next() => {}
            accepted = listener.accept(), if clients.may_be_one_more() => match accepted {
                Ok(arrival) => clients.serve(arrival, answerer.clone(), closing.clone()),
                // The shortage is temporary: clients that are served end, and so do others of this process.
                Err(error) if is_shortage(&error) => {}
                Err(error) => {
                    tracing::warn!(%error, "{} serves no more", listener.local_address());
                    break;
                }
            },
        }
    }
    drop(listener);
    let ending = async { while clients.tasks.join_next().await.is_some() {} };
    drop(tokio::time::timeout(FAREWELL, ending).await);
}

/// The connected clients.
#[derive(Debug, Default)]
struct Clients {
    tasks: JoinSet<()>,
    /// The oldest first; some have ended.
    connected: VecDeque<Client>,
}

#[derive(Debug)]
struct Client {
    task: AbortHandle,
    /// Is its request complete?
    is_heard: Arc<AtomicBool>,
}

impl Client {
    fn can_go(&self) -> bool {
        self.task.is_finished() || !self.is_heard.load(Ordering::Relaxed)
    }
}

impl Clients {
    fn may_be_one_more(&self) -> bool {
        self.connected.len() < CONNECTIONS || self.connected.iter().any(Client::can_go)
    }

    fn serve(&mut self, arrival: Arrival, answerer: impl Answerer, closing: CancellationToken) {
        self.connected.retain(|client| !client.task.is_finished());
        if self.connected.len() >= CONNECTIONS
            && let Some(client) =
                self.connected.iter().position(Client::can_go).and_then(|oldest| self.connected.remove(oldest))
        {
            client.task.abort();
        }
        let is_heard = Arc::<AtomicBool>::default();
        let task = self.tasks.spawn(serve_one(arrival, answerer, is_heard.clone(), closing));
        self.connected.push_back(Client { task, is_heard });
    }
}

async fn serve_one(arrival: Arrival, answerer: impl Answerer, is_heard: Arc<AtomicBool>, closing: CancellationToken) {
    let Ok(Connection { reader: Some(reader), writer: Some(writer), .. }) = arrival.complete().await else { return };
    let service = service_fn(move |request: Request<Incoming>| {
        let (answerer, is_heard) = (answerer.clone(), is_heard.clone());
        async move {
            let (head, body) = request.into_parts();
            let body = read(body).await;
            is_heard.store(true, Ordering::Relaxed);
            Ok::<_, Infallible>(answerer.answer(Request::from_parts(head, body)).await)
        }
    });
    let mut server = http1::Builder::new();
    server.timer(TokioTimer::new()).header_read_timeout(HEAD_TIME).max_buf_size(HEAD_BYTES).keep_alive(false);
    let mut served = pin!(server.serve_connection(TokioIo::new(tokio::io::join(reader, writer)), service));
    // A client that disconnects or sends invalid HTTP affects only itself.
    tokio::select! {
        served = served.as_mut() => return drop(served),
        () = closing.cancelled() => {}
    }
    served.as_mut().graceful_shutdown();
    drop(served.await);
}

/// The complete body, if it is not too long and arrives in time.
async fn read(body: Incoming) -> Result<Bytes, BodyError> {
    match tokio::time::timeout(BODY_TIME, Limited::new(body, BODY_BYTES).collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(BodyError::TooLong),
        Ok(Err(error)) => Err(BodyError::Broken(error)),
        Err(_) => Err(BodyError::Late),
    }
}

#[cfg(test)]
mod tests {
    use memferry_transports::open;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixStream;

    use super::*;

    #[derive(Clone)]
    struct Echo;

    impl Answerer for Echo {
        async fn answer(&self, asked: Asked) -> Answer {
            let never = asked.uri().path() == "/never";
            match asked.into_body() {
                Ok(_) if never => std::future::pending().await,
                Ok(body) => whole(StatusCode::OK, "text/plain", body),
                Err(error) => whole(error.code(), "text/plain", error.to_string()),
            }
        }
    }

    struct Scene {
        folder: tempfile::TempDir,
        _serving: tokio_util::task::AbortOnDropHandle<()>,
    }

    impl Scene {
        async fn begin() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let address = format!("unix:{}", folder.path().join("s").display()).parse().unwrap();
            let listener = open(&address, Duration::ZERO).listen().await.unwrap();
            let serving = tokio::spawn(serve(listener, Echo, CancellationToken::new()));
            Self { folder, _serving: tokio_util::task::AbortOnDropHandle::new(serving) }
        }

        /// A client that has sent this.
        async fn client(&self, says: &str) -> UnixStream {
            let mut client = UnixStream::connect(self.folder.path().join("s")).await.unwrap();
            client.write_all(says.as_bytes()).await.unwrap();
            client
        }

        async fn asks(&self) -> String {
            let mut answer = String::new();
            let request = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello";
            self.client(request).await.read_to_string(&mut answer).await.unwrap();
            answer
        }
    }

    fn is_open(client: &UnixStream) -> bool {
        matches!(client.try_read(&mut [0]), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
    }

    /// None of the half-open connections has timed out when the answer arrives: the oldest ones were closed for it.
    #[tokio::test]
    async fn a_client_that_sent_half_of_it_is_closed_for_one_that_sent_all() {
        let scene = Scene::begin().await;
        let halves = ["", "GET / HT", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nhello"];
        let mut silent = VecDeque::new();
        for count in 0..5 * CONNECTIONS {
            silent.push_back(scene.client(halves[count % halves.len()]).await);
        }
        for _ in 0..3 {
            assert!(scene.asks().await.ends_with("\r\n\r\nhello"));
        }
        let open = silent.iter().filter(|client| is_open(client)).count();
        assert!((CONNECTIONS - 3..CONNECTIONS).contains(&open), "{open}");
        assert!(silent.iter().rev().take(CONNECTIONS - 3).all(is_open), "the newest ones stay");
    }

    #[tokio::test]
    async fn a_client_that_has_sent_all_is_not_closed_for_another() {
        let scene = Scene::begin().await;
        let mut heard = Vec::new();
        for _ in 0..CONNECTIONS - 1 {
            heard.push(scene.client("GET /never HTTP/1.1\r\nHost: a\r\n\r\n").await);
        }
        for _ in 0..10 {
            assert!(scene.asks().await.ends_with("hello"));
        }
        assert!(heard.iter().all(is_open));
    }
}
