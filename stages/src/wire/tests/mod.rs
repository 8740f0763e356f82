//! The format as a whole: what goes in comes out, and nothing else does.

mod damage;
mod deframer;
mod golden;
mod hostile;
mod limits;
mod reading;
mod refusals;
mod round_trip;
mod samples;
