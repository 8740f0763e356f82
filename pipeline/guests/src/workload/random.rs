//! Pseudo-random number generators. The whole state of one is a word, so it can travel.

use fastrand::Rng;

/// A generator for one of several users of a seed.
pub(super) fn generator(seed: u64, user: u64) -> Rng {
    Rng::with_seed(Rng::with_seed(seed).u64(..) ^ Rng::with_seed(!user).u64(..))
}
