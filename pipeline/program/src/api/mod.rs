//! The control API: HTTP over a Unix socket that only its owner can open, for what a [`Control`](memferry::control::Control) can do.
//!
//! | request | answer |
//! |---|---|
//! | `GET /migration` | the status: [`StatusJson`](memferry_report::status_json::StatusJson) |
//! | `PATCH /migration` | other settings, all of them or none; the status after it |
//! | `POST /migration/cancel` | its end is asked for; the status at that moment, which does not say yet where the guest is |
//! | `POST /migration/switch-over` | it switches over at once; the status |
//! | `GET /migration/events` | what has happened so far and then as it happens, as lines of JSON: [`EventLine`](memferry_report::event_json::EventLine); ends with the migration |
//!
//! `openapi.yaml` beside this crate's manifest describes all of it. What is wrong is answered with `{ "error": "…" }`: 400
//! for a body that cannot be understood or a value that cannot be, 404 and 405 for a path or a method that there is not, 408
//! and 413 for a body that does not come or does not end, 409 for what cannot be done as things are, 503 where the guest's
//! own part takes too long or too many watch.
//!
//! It runs where signals and timers do, on the caller's runtime, so that stages that compute do not delay it. Heads, bodies
//! and the time that a request may take are bounded. At most 64 connections are open, each with one request; when one more comes,
//! the oldest that has not said all of its request is closed for it. A reader of events that is too slow loses the oldest and
//! is told so.

pub mod client;
pub(crate) mod patch;
mod routes;
mod server;

pub use server::Server;
