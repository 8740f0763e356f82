//! Operations that clear bits: the order of their points, hints of free pages, unplugged memory, ignored blocks.

#[path = "exclusions/guest.rs"]
mod guest;
#[path = "exclusions/hints.rs"]
mod hints;
#[path = "exclusions/points.rs"]
mod points;
#[path = "exclusions/stays.rs"]
mod stays;
#[path = "exclusions/torture.rs"]
mod torture;
