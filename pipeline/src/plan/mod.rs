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
//! | [`model`] | a trace as a guest of the simulation |

pub mod model;
pub mod record;
pub mod sampler;
pub mod trace;
