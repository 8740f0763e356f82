//! The `memferry` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    memferry_cli::cli::main()
}
