//! The `memferry` program: what its command line says, and what it does.

pub mod inspect;
