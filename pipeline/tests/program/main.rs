//! The program, run as operators run it: its ends as processes, on real files, killed, starved of disk, misconfigured.

mod configs;
mod harness;
mod images;
mod kills;
mod messages;
mod reports;
mod writer;
