//! The control API: HTTP over a Unix socket that only its owner can open. It offers the operations of a
//! [`Control`](memferry::control::Control).
//!
//! | request | answer |
//! |---|---|
//! | `GET /migration` | the status: [`StatusJson`](memferry_report::status_json::StatusJson) |
//! | `PATCH /migration` | changes settings, all of them or none, or gives the source another address of its destination; the status after the change |
//! | `POST /migration/cancel` | requests a cancel; the status at that moment, which does not yet say where the guest is |
//! | `POST /migration/switch-over` | requests a switchover at once; the status |
//! | `POST /migration/postcopy` | requests that the guest is started at the destination before all of its memory is there; the status |
//! | `GET /migration/events` | past events, then each new one, as lines of JSON: [`EventLine`](memferry_report::event_json::EventLine); ends with the migration |
//!
//! `openapi.yaml` beside this crate's manifest describes the API. An error is answered with `{ "error": "…" }`: 400
//! for a malformed body or an invalid value, 404 and 405 for an unknown path or method, 408 and 413 for a body that
//! is too slow or too long, 409 for a request that is not possible in the current state, 503 if the guest's own part
//! takes too long or too many clients read events.
//!
//! The server runs with signals and timers on the caller's runtime, so that compute-bound stages do not delay it.
//! Heads, bodies and the duration of a request are bounded. At most 64 connections are open, each with one request.
//! When another client connects, the oldest connection whose request is incomplete is closed for it. A reader of
//! events that is too slow loses the oldest events and is notified of the loss.

pub mod client;
pub(crate) mod patch;
mod routes;
mod server;

use std::sync::Arc;

use memferry_transports::{Address, Transport};

pub use server::Server;

/// Makes the transport to an address that an operator gives a source.
pub type Reach = Arc<dyn Fn(&Address) -> Arc<dyn Transport> + Send + Sync>;
