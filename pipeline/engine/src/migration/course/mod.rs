//! The courses of a migration as values: what each end does, and when. No I/O, no clock, no tasks.
//!
//! A course takes inputs and the time and returns actions; the driver (`driver.rs`) delivers the ones and performs
//! the others. Its states carry their data. Each end has one:
//!
//! | | |
//! |---|---|
//! | `source` | setup, rounds, switchover, handover, end |
//! | `destination` | setup, loading, verification, handover |
//! | [`handshake`] | the last handshake of both ends: where the guest is (law 7) |
//! | `times` | what the destination reports of the downtime's parts |

pub(super) mod destination;
pub(super) mod handshake;
pub(super) mod source;
pub(super) mod times;
