//! Operations that clear bits: the order of their points, hints of free pages, unplugged memory, ignored blocks.

mod guest;
mod hints;
mod points;
mod stays;
mod torture;
