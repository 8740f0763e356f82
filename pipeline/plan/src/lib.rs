//! Plans a migration before it runs. A guest's writes are recorded without moving anything, and the real controller
//! is run against the recording in simulated time.
//!
//! ```text
//!  guest ─▶ record ─▶ trace (a file) ─▶ model: a guest as the simulation sees it ─┐
//!             │                                                                   ├─▶ controller::simulation ─▶ forecast
//!             └─ sampler: what pages come to, what a page costs      settings, link ┘                            advice, picture
//! ```
//!
//! | | |
//! |---|---|
//! | [`record`] | follows a guest's dirty pages by its own logs |
//! | [`sampler`] | how pages compress, how large their deltas are, and the processor time of both |
//! | [`trace`] | the recording, and its file format |
//! | [`written`] | the sets of dirty pages of a trace, in memory |
//! | [`model`] | a trace as a guest of the simulation |
//! | [`forecast`] | the forecast of a migration over a link |
//! | [`advice`] | the smallest change with which the migration meets its limit |
//! | [`bandwidth`] | rates as operators of networks write them |
//! | [`answer`], [`picture`] | the answer: as values and JSON, and for a terminal |

pub mod advice;
pub mod answer;
pub mod bandwidth;
pub mod forecast;
mod mix;
pub mod model;
pub mod picture;
pub mod record;
pub mod sampler;
pub mod trace;
pub mod written;

/// The whole part of a non-negative figure, as an integer.
fn index(figure: f64) -> usize {
    usize::try_from(memferry::controller::forecast::whole(figure)).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests;
