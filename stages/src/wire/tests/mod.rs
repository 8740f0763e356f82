//! The format as a whole: what goes in comes out, and nothing else does.

mod round_trip;
mod samples;
