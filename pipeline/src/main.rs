//! The `memferry` program.
fn main() {}
