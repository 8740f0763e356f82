//! The requests of the control API, and their answers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use futures::stream;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use hyper::header::{ALLOW, CONTENT_TYPE};
use hyper::{Method, Response, StatusCode};
use serde::Serialize;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use super::Reach;
use super::patch::{self, Patch};
use crate::http::{Answer, Answerer, Asked, BodyError, whole};
use memferry::control::{Control, ControlError, Events, Happened};
use memferry_report::event_json::EventLine;
use memferry_report::status_json::StatusJson;

/// The time limit for an answer, which the guest's own part may delay.
const ANSWER_TIME: Duration = Duration::from_secs(5);
/// The number of clients that may read events at a time; other requests are always served.
const WATCHERS: usize = 32;

/// Answers requests. Clones share state.
#[derive(Clone)]
pub(super) struct Routes {
    control: Control,
    reach: Reach,
    watchers: Arc<Semaphore>,
    closing: CancellationToken,
}

/// Why a request is refused.
struct Refusal(StatusCode, String);

#[derive(Serialize)]
struct ErrorJson<'a> {
    error: &'a str,
}

impl Answerer for Routes {
    async fn answer(&self, asked: Asked) -> Answer {
        let answered = match (asked.uri().path(), asked.method()) {
            ("/migration", &Method::GET) => Ok(self.status()),
            ("/migration", &Method::PATCH) => self.change(asked.into_body()).await,
            ("/migration", _) => return not_allowed("GET, PATCH"),
            ("/migration/cancel", &Method::POST) => self.cancel(),
            ("/migration/switch-over", &Method::POST) => self.switch_over().await,
            ("/migration/postcopy", &Method::POST) => self.postcopy().await,
            ("/migration/cancel" | "/migration/switch-over" | "/migration/postcopy", _) => return not_allowed("POST"),
            ("/migration/events", &Method::GET) => self.events(),
            ("/migration/events", _) => return not_allowed("GET"),
            _ => Err(Refusal(StatusCode::NOT_FOUND, "there is nothing here; begin at /migration".into())),
        };
        answered.unwrap_or_else(|Refusal(code, why)| json(code, &ErrorJson { error: &why }))
    }
}

impl Routes {
    /// Serves requests for `control`. Streams of events end when `closing` is cancelled.
    pub(super) fn new(control: Control, reach: Reach, closing: CancellationToken) -> Self {
        Self { control, reach, watchers: Arc::new(Semaphore::new(WATCHERS)), closing }
    }

    fn status(&self) -> Answer {
        json(StatusCode::OK, &StatusJson::from(&self.control.status()))
    }

    async fn change(&self, body: Result<Bytes, BodyError>) -> Result<Answer, Refusal> {
        match patch::read(&body?).map_err(|why| Refusal(StatusCode::BAD_REQUEST, why))? {
            Patch::Changes(changes) => in_time(self.control.set(changes)).await?,
            Patch::Address(address) => in_time(self.control.set_address((self.reach)(&address))).await?,
        }
        Ok(self.status())
    }

    async fn switch_over(&self) -> Result<Answer, Refusal> {
        in_time(self.control.switch_over()).await?;
        Ok(self.status())
    }

    async fn postcopy(&self) -> Result<Answer, Refusal> {
        in_time(self.control.postcopy()).await?;
        Ok(self.status())
    }

    fn cancel(&self) -> Result<Answer, Refusal> {
        let status = self.control.status();
        if status.ended.is_some() {
            return Err(ControlError::Over.into());
        }
        // A guest that runs without all of its pages, or may, can be given up while there is no connection.
        let may_switch = status.settings.as_ref().is_some_and(|settings| settings.mode.may_switch());
        let can_give_up = status.disconnected.is_some() && (status.is_postcopy || may_switch);
        if status.is_handed_over && !can_give_up {
            return Err(ControlError::TooLate("the destination may run the guest already".into()).into());
        }
        self.control.cancel();
        Ok(self.status())
    }

    fn events(&self) -> Result<Answer, Refusal> {
        let watching = self.watchers.clone().try_acquire_owned().map_err(|_| {
            let why = format!("{WATCHERS} readers watch the events already: end one of them");
            Refusal(StatusCode::SERVICE_UNAVAILABLE, why)
        })?;
        let (past, events) = self.control.watch();
        let past = stream::iter(past.into_iter().map(|happened| line(&happened, Duration::ZERO)));
        let live = Live { events, began: Instant::now(), closing: self.closing.clone(), _watching: watching };
        let live = stream::unfold(live, |mut live| async move { Some((live.next().await?, live)) });
        let frames = past.chain(live).map(|line| Ok(Frame::data(Bytes::from(line))));
        let mut answer = Response::new(StreamBody::new(frames).boxed_unsync());
        answer.headers_mut().insert(CONTENT_TYPE, "application/x-ndjson".parse().expect("a header's value"));
        Ok(answer)
    }
}

/// Streams events to a client as they happen.
struct Live {
    events: Events,
    began: Instant,
    closing: CancellationToken,
    _watching: OwnedSemaphorePermit,
}

impl Live {
    async fn next(&mut self) -> Option<String> {
        let happened = tokio::select! {
            biased;
            happened = self.events.next() => happened?,
            () = self.closing.cancelled() => return None,
        };
        Some(line(&happened, self.began.elapsed()))
    }
}

/// The line of an event. A line about lost events has the time since its reader connected.
fn line(happened: &Happened, watched: Duration) -> String {
    match happened {
        Happened::Event { at, role, event } => EventLine::new(*at, *role, event),
        Happened::Lost(events) => EventLine::lost(watched, *events),
    }
    .to_json()
}

/// Waits for the migration's answer for a limited time; after that the request is withdrawn.
async fn in_time(asked: impl Future<Output = Result<(), ControlError>>) -> Result<(), Refusal> {
    let answered = tokio::time::timeout(ANSWER_TIME, asked).await.map_err(|_| {
        let why = "the migration waits for its guest and did not take this up; look at the status before you ask again";
        Refusal(StatusCode::SERVICE_UNAVAILABLE, why.into())
    })?;
    answered.map_err(Refusal::from)
}

impl From<BodyError> for Refusal {
    fn from(error: BodyError) -> Self {
        Self(error.code(), error.to_string())
    }
}

impl From<ControlError> for Refusal {
    fn from(error: ControlError) -> Self {
        let code = match error {
            ControlError::Invalid { .. } => StatusCode::BAD_REQUEST,
            _ => StatusCode::CONFLICT,
        };
        Self(code, error.to_string())
    }
}

fn not_allowed(allowed: &'static str) -> Answer {
    let error = format!("this method is not for this path; it takes {allowed}");
    let mut answer = json(StatusCode::METHOD_NOT_ALLOWED, &ErrorJson { error: &error });
    answer.headers_mut().insert(ALLOW, allowed.parse().expect("a header's value"));
    answer
}

fn json(code: StatusCode, value: &impl Serialize) -> Answer {
    let mut bytes = serde_json::to_vec(value).expect("plain values become JSON");
    bytes.push(b'\n');
    whole(code, "application/json", bytes)
}
