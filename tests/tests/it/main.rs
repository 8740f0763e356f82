//! Whole migrations, in one binary with a module for each subject. To find the test of something, begin here.
//!
//! | module | subject |
//! |---|---|
//! | `precopy` | migrations that complete, over each transport, page size and encoding |
//! | `exclusions` | pages that do not travel: hints, unplugged memory, shared blocks |
//! | `handshake` | the last handshake against a peer played by hand (law 7) |
//! | `faults` | faults in the middle: cuts, stalls, guests, memory and logs that fail |
//! | `recovery` | lost connections that are made again, through a proxy that cuts them |
//! | `tls` | migrations over TLS, lost connections and truncation among them |
//! | `hostile` | peers and files that are malicious (law 8) |
//! | `convergence` | guests that do not converge, and each step against them |
//! | `control` | settings that change while a migration runs, and the switchover on request |
//! | `figures` | the bottleneck, and the figures before and after the end |
//! | `record`, `plan` | a recorded guest, and a plan compared with its migration |
//! | `kvm`, `vm_memory` | guests: a KVM machine, memory of the crate `vm-memory` |
//! | `verify`, `broken_logs` | what each way of comparing the memories finds |
//! | `verdicts` | `inspect` and a destination come to one verdict |
//! | `dependencies`, `examples` | the crates that the engine needs, and the examples as a reader runs them |
//!
//! A test that measures its whole process is a binary of its own beside this folder: `cancel` and `cancel_api` count
//! threads and descriptors, `recovery` as well while connections are lost at random, `sparse` and `tls_hostile` resident memory, `per_page` allocations and system calls (law 10).
//!
//! Other tests are with what they test: pure logic and stages in their modules, both courses in virtual time in
//! `pipeline/engine/src/migration/pair`, transports in `transports/tests`, guests in `pipeline/guests/tests`, the
//! program in `pipeline/program/tests`.

mod broken_logs;
mod control;
mod convergence;
mod dependencies;
mod examples;
mod exclusions;
mod faults;
mod figures;
mod handshake;
mod hostile;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod kvm;
mod plan;
mod postcopy;
mod precopy;
mod record;
mod recovery;
mod tls;
mod verdicts;
mod verify;
mod vm_memory;
