//! Operations that clear bits: the order of their points, hints of free pages, unplugged memory, ignored blocks.

#[path = "clears/guest.rs"]
mod guest;
#[path = "clears/hints.rs"]
mod hints;
#[path = "clears/points.rs"]
mod points;
#[path = "clears/stays.rs"]
mod stays;
#[path = "clears/torture.rs"]
mod torture;
