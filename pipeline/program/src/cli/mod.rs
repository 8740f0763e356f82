//! The `memferry` program: its command line and its commands.

/// Writes a line to standard error: see [`console::message`].
macro_rules! message {
    ($($text:tt)*) => {
        $crate::cli::console::message(format_args!($($text)*))
    };
}

mod args;
mod certs;
mod check;
mod console;
mod control;
mod core_dumps;
mod hosting;
pub mod inspect;
mod outlets;
mod plan;
mod record;
mod reports;
mod session;
mod signals;
mod verdict;
mod watch;

use std::future::Future;
use std::io::{ErrorKind, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use memferry_stages::host::cores;
use memferry_stages::untrusted::{Untrusted, shown_lines};
use memferry_transports::{Address, regular};

use crate::api::patch;
use crate::config::{self, Config, Purpose};
use crate::log;
use args::{Command, CommandLine, Configured, For, Migrate, Record};
use inspect::Inspection;
use memferry::events::Role;
use memferry::threads;
use memferry_guests::file::guard;
use memferry_report::Ends;
use outlets::Outlets;
use session::Session;
use verdict::{BAD_USAGE, DONE, FAILED};

/// Threads of the control plane: timers, signals, the handshakes. The data has a runtime of its own.
const CONTROL_THREADS: usize = 2;
/// The time limit at exit for calls that still block, such as the creation of a guest that was cancelled.
const TIDY_UP: Duration = Duration::from_millis(100);
/// Blocking threads of the control plane, for calls such as those of a guest, in addition to one for each core, which
/// digests use.
const BLOCKING_THREADS: usize = 4;

/// Runs the command that the command line names.
#[must_use]
pub fn main() -> ExitCode {
    signals::outlive_full_files();
    let _last_words = console::LastWords;
    match CommandLine::parse().command {
        Command::Run(options) => migrate(options, Ends::Both, Purpose::Run, Role::Source),
        Command::Send(options) => migrate(options, Ends::Source, Purpose::Send, Role::Source),
        Command::Recv(options) => migrate(options, Ends::Destination, Purpose::Receive, Role::Destination),
        Command::Check(options) => check(&options),
        Command::Record(options) => record(options),
        Command::Plan(options) => plan::run(&options),
        Command::Status { control, json } => ask(control::status(&control.address, json)),
        Command::Set { control, settings } => match patch::go_together(&settings) {
            Ok(()) => ask(control::set(&control.address, settings)),
            Err(why) => complain(&why, BAD_USAGE),
        },
        Command::Cancel(control) => ask(control::cancel(&control.address)),
        Command::SwitchOver(control) => ask(control::switch_over(&control.address)),
        Command::Postcopy(control) => ask(control::postcopy(&control.address)),
        Command::Inspect { file } => inspect(&file),
        Command::Watch { address, speed } => watch(&address, speed),
        Command::Probe { config, sets } => probe(config, sets),
        Command::Certs { directory, hosts } => certs::make(&directory, &hosts),
        Command::Guard => guard::main(),
    }
}

fn migrate(options: Migrate, role: Ends, purpose: Purpose, watch: Role) -> ExitCode {
    if options.no_core
        && let Err(error) = core_dumps::none()
    {
        return complain(&format!("--no-core: core dumps cannot be switched off: {error}"), FAILED);
    }
    let config = match load(&options.configured, purpose) {
        Ok(config) => config,
        Err(code) => return code,
    };
    if let Some(why) = nowhere(&options).or_else(|| named_twice(&options)) {
        return complain(&why, BAD_USAGE);
    }
    if let Err(error) = console::start() {
        return refused(&error);
    }
    if let Err(error) = log::start(options.log_level(), || console::Stderr) {
        return complain(&error, BAD_USAGE);
    }
    config::warnings(&config, purpose).iter().for_each(|line| message!("memferry: {line}"));
    let command = async {
        let outlets = match Outlets::open(&options).await {
            Ok(outlets) => outlets,
            Err(why) => return Ok(complain(&why, BAD_USAGE)),
        };
        let mut session = Session::new(config, options, role, watch, outlets)?;
        let server = match session.serve_control().await {
            Ok(server) => server,
            Err(error) => return Ok(complain(&format!("--control: {error}"), BAD_USAGE)),
        };
        if let Err(why) = session.open_events() {
            return Ok(complain(&why, BAD_USAGE));
        }
        let code = match purpose {
            Purpose::Send => session.send().await,
            Purpose::Receive => session.receive().await,
            Purpose::Run | Purpose::Check | Purpose::Plan => session.run().await,
        };
        if let Some(server) = server {
            server.close().await;
        }
        Ok(code.into())
    };
    match on_control_plane(command) {
        Ok(code) => code,
        Err(error) => refused(&error),
    }
}

/// Queries a running migration, and prints its answer.
fn ask(asking: impl Future<Output = Result<String, String>>) -> ExitCode {
    // Without additional threads: a cancel must be possible even if no more threads are available.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    match runtime.map(|runtime| runtime.block_on(asking)) {
        Ok(Ok(said)) => print(&said, DONE),
        Ok(Err(why)) => complain(&why, FAILED),
        Err(error) => refused(&error),
    }
}

/// Why one of the files, or the socket, cannot be created, if that is known before the start.
fn nowhere(options: &Migrate) -> Option<String> {
    let events = options.events.as_deref().filter(|file| *file != Path::new("-"));
    let reports = options.report.iter().find_map(|report| unwritable("--report", report));
    let socket = match &options.control {
        Some(Address::Unix(socket)) => unwritable("--control", socket),
        _ => None,
    };
    reports.or_else(|| unwritable("--events", events?)).or(socket)
}

/// Why two of the files are the same file, if they are: the one written last would replace the other.
fn named_twice(options: &Migrate) -> Option<String> {
    let names = std::iter::once(&options.configured.config).chain(&options.report).chain(&options.events);
    let mut seen = Vec::new();
    for name in names.filter(|name| !name.starts_with("/dev") && name.as_os_str() != "-") {
        let folder = name.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let file = folder.canonicalize().unwrap_or_else(|_| folder.into()).join(name.file_name().unwrap_or_default());
        if seen.contains(&file) {
            return Some(format!(
                "{} is named twice, and one would be written over the other",
                Untrusted::from(name.as_path())
            ));
        }
        seen.push(file);
    }
    None
}

/// Why the file of an option cannot be created there, if that is known before the start.
fn unwritable(option: &str, file: &Path) -> Option<String> {
    let name = Untrusted::from(file);
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if file.is_dir() || file.file_name().is_none() {
        return Some(format!("{option} {name} is a folder: name a file in it"));
    }
    (!folder.is_dir())
        .then(|| format!("{option} {name}: there is no folder {}: make it first", Untrusted::from(folder)))
}

fn check(options: &args::Check) -> ExitCode {
    let purpose = match options.command {
        None => Purpose::Check,
        Some(For::Run) => Purpose::Run,
        Some(For::Send) => Purpose::Send,
        Some(For::Recv) => Purpose::Receive,
    };
    match load(&options.configured, purpose).map(|config| check::describe(&config, purpose)) {
        Ok(Ok(text)) => print(&text, DONE),
        Ok(Err(why)) => complain(&why, FAILED),
        Err(code) => code,
    }
}

fn record(options: Record) -> ExitCode {
    let config = match load(&options.configured, Purpose::Send) {
        Ok(config) => config,
        Err(code) => return code,
    };
    if let Some(why) = unwritable("-o", &options.output) {
        return complain(&why, BAD_USAGE);
    }
    if let Err(error) = console::start() {
        return refused(&error);
    }
    match on_control_plane(record::run(config, options)) {
        Ok(code) => code.into(),
        Err(error) => refused(&error),
    }
}

fn inspect(file: &Path) -> ExitCode {
    let name = Untrusted::from(file).to_string();
    let inspected = on_control_plane(async {
        let stream = regular::open(file)?;
        Ok(Inspection::of(tokio::fs::File::from_std(stream), &name).await)
    });
    match inspected {
        Ok(inspection) => print(&inspection.to_string(), if inspection.is_whole() { DONE } else { FAILED }),
        Err(error) => complain(&format!("{name} cannot be read: {error}"), FAILED),
    }
}

fn watch(address: &str, speed: Option<f64>) -> ExitCode {
    match on_control_plane(watch::watch(address, speed)) {
        Ok(code) => code.into(),
        Err(error) => complain(&format!("the terminal cannot be used: {error}"), FAILED),
    }
}

fn probe(config: Option<PathBuf>, sets: Vec<String>) -> ExitCode {
    let mut text = memferry_stages::host::Probe::run().to_string();
    if let Some(config) = config {
        match load(&Configured { config, sets }, Purpose::Check) {
            Ok(config) => text.extend(config::warnings(&config, Purpose::Check).iter().map(|line| format!("{line}\n"))),
            Err(code) => return code,
        }
    }
    print(&text, DONE)
}

/// The configuration, or the exit code after its errors are shown.
fn load(configured: &Configured, purpose: Purpose) -> Result<Config, ExitCode> {
    config::load(&configured.config, &configured.sets, purpose).map_err(|error| {
        console::styled_message(&error.render(std::io::stderr().is_terminal()));
        ExitCode::from(BAD_USAGE)
    })
}

fn on_control_plane<T>(command: impl Future<Output = std::io::Result<T>>) -> std::io::Result<T> {
    let runtime = threads::runtime("memferry-control", CONTROL_THREADS, cores() + BLOCKING_THREADS)?;
    let done = runtime.block_on(command);
    // A thread that blocks for ever must not prevent the program from ending.
    runtime.shutdown_timeout(TIDY_UP);
    done
}

fn print(text: &str, code: u8) -> ExitCode {
    let mut stdout = std::io::stdout();
    match writeln!(stdout, "{}", shown_lines(text.trim_end())).and_then(|()| stdout.flush()) {
        // A reader that has read enough closes the pipe.
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            complain(&format!("standard output cannot be written: {error}"), FAILED)
        }
        _ => code.into(),
    }
}

fn refused(error: &std::io::Error) -> ExitCode {
    complain(&format!("the system refuses to run it: {error}"), FAILED)
}

fn complain(what: &str, code: u8) -> ExitCode {
    message!("memferry: {what}");
    code.into()
}
