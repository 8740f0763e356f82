//! The size and the seed of a test that draws what it tries. `cargo test` runs a fixed sample; the environment sets
//! another (`MEMFERRY_COUNT`, `MEMFERRY_SEED`), as the example `soak` does.
//!
//! The test binaries of other crates include this file, because they do not depend on this crate.

/// The seed of a sample unless the environment sets one.
const SEED: u64 = 14;

/// The number of tries: the test's own unless the environment sets one.
///
/// # Panics
/// If the environment sets something else.
#[must_use]
pub fn count(own: u64) -> u64 {
    from_environment("MEMFERRY_COUNT").unwrap_or(own)
}

/// The seed of all that is drawn. It is printed, so that a failure names it and can be repeated.
///
/// # Panics
/// If the environment sets something that is no number.
#[must_use]
pub fn seed() -> u64 {
    let seed = from_environment("MEMFERRY_SEED").unwrap_or(SEED);
    println!("MEMFERRY_SEED={seed}");
    seed
}

fn from_environment(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|error| panic!("{name}={text}: {error}")))
}
