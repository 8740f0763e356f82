//! memferry compared with QEMU: the same memory over the same kind of socket, each with two processes, in turn, in
//! one run.
//!
//! *Still guests* are RAM image files of known content that are not written. QEMU maps one as the memory of a paused
//! machine without devices; memferry's source maps the same file, as a VMM would. Both destinations start with fresh
//! anonymous memory. Bare sockets are measured as well, for memory of which every byte travels: the kernel's part of
//! the cost, which no program with sockets can avoid.
//! *Running guests* write one byte in each page of 100 MiB, page after page at a set pace: QEMU's by a boot sector,
//! memferry's by its workload. Both have the same bandwidth and the same downtime limit.
//!
//! Results are printed as Markdown, progress goes to standard error.
//!
//! ```text
//! cargo bench -p memferry-tests --bench peers                               # all of it, about eight minutes
//! cargo bench -p memferry-tests --bench peers -- --help
//! cargo bench -p memferry-tests --bench peers -- --only tcp --only incompressible --runs 3
//! ```

mod boot;
mod end;
mod ends;
mod floor;
mod host;
mod image;
mod moved;
mod options;
mod process;
mod program;
mod qemu;
mod qmp;
mod running;
mod still;
mod still_guest;
mod table;

use std::process::ExitCode;

use options::Options;

/// An error of the bench: a sentence for its user.
type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let ended = match arguments.as_slice() {
        [command, order] if command == end::COMMAND => end::run(order),
        _ => bench(arguments),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("peers: {error}");
            ExitCode::FAILURE
        }
    }
}

fn bench(arguments: Vec<String>) -> Fallible<()> {
    let Some(options) = Options::parse(arguments)? else {
        println!("{}", options::HELP);
        return Ok(());
    };
    let Some(version) = qemu::version() else {
        println!("skipped: there is no {} to compare with; on Debian: apt-get install qemu-system-x86", qemu::PROGRAM);
        return Ok(());
    };
    println!("{}\n", host::describe(&version));
    let mut failures = 0;
    if options.still {
        failures += still::compare(&options)?;
    }
    if options.running {
        failures += running::compare(&options)?;
    }
    if failures > 0 { Err(format!("{failures} migrations went wrong, see above").into()) } else { Ok(()) }
}
