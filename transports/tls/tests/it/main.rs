//!
//! | module | subject |
//! |---|---|
//! | `refusals` | certificates, names and versions that are refused, on the right side, with names and dates |
//! | `files` | directories of the usual names, keys that others can read, lists of revoked certificates |
//! | `streams` | bytes in both directions, writes that are not flushed, truncation, tampering |
//! | `certtool` | directories made by GnuTLS's certtool |

mod authority;
mod certtool;
mod files;
mod refusals;
mod streams;

#[path = "../../../../tests/src/skip.rs"]
pub mod skip;
