//! Planning a migration before it is run: a guest's writes are recorded without moving anything, and the real controller is
//! run against the record in simulated time.
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
//! | [`sampler`] | how pages compress, how large their deltas are, what that costs |
//! | [`trace`] | what was recorded, and its file |
//! | [`written`] | the sets of pages of a trace, at hand |
//! | [`model`] | a trace as a guest of the simulation |
//! | [`forecast`] | what a migration over a link would come to |
//! | [`advice`] | the least that would have to be otherwise for it to meet its limit |
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

/// The whole part of a figure that is not negative, to count by.
fn index(figure: f64) -> usize {
    usize::try_from(memferry::controller::forecast::whole(figure)).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests;
