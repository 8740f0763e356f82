//! The command line: what can be said, and the help that teaches it.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use memferry_transports::Address;

use super::control::socket;
use memferry_plan::bandwidth::Bandwidth;
use memferry_plan::record::SHORTEST;

const ABOUT: &str =
    "Moves the memory of a running guest to another process, host or file while the guest keeps writing to it";

const EXAMPLES: &str = "\
Examples:
  memferry run configs/quickstart.toml        a migration from this process into itself: begin here
  memferry recv destination.toml              on one host: waits for a guest
  memferry send source.toml                   on the other: sends one
  memferry check source.toml                  what would happen, and what it would take
  memferry status /run/guest.sock             what one is doing that was started with --control unix:/run/guest.sock

Exit codes:
  0    done
  1    failed; the source guest is as it was
  2    bad usage or configuration
  3    handed over but not confirmed; the source guest is paused
  4    the source guest could not be resumed
  5    lost in postcopy: the guest was started at the destination, and the rest of its memory did not come
  130  cancelled; the source guest is as it was
A report, or events, that cannot be written change none of these: the last line then says what is lost.";

const RUN_EXAMPLES: &str = "\
Examples:
  memferry run configs/quickstart.toml
  memferry run configs/quickstart.toml --set pipeline.lanes=4 --set pipeline.connections=4
  memferry run configs/hot.toml --set migration.on_deadline=switch-over --report hot.html --report hot.json
  memferry run configs/file.toml --host-for 10s

Both ends in one process: what is sent over the transport comes back in. At the end the guest runs at its destination for
a moment (--host-for, 1s by default) and its writers check every page they find. Exit code 1 if one of them is stale.";

const SEND_EXAMPLES: &str = "\
Examples:
  memferry send source.toml
  memferry send source.toml --set transport.address=tcp:10.0.0.2:7777 --report send.json
  memferry send configs/image-send.toml --set migration.max_bandwidth='200 MiB/s'

Ctrl-C cancels, as SIGTERM and SIGHUP do: the guest continues here as it was; a second one ends the program at once. Ctrl-Z while
the guest is paused waits for the end of the migration. A guest that lives in this program and was not moved is hosted until the
next signal, or for --host-for; the exit code is the migration's.

Nothing that watches holds up a migration: what standard error, standard output or a file of events takes too slowly is dropped,
and counted once there is room again.";

const RECV_EXAMPLES: &str = "\
Examples:
  memferry recv destination.toml
  memferry recv destination.toml --set transport.address=tcp:0.0.0.0:7777 --host-for 1h
  memferry recv configs/image-recv.toml --report recv.html

Waits for one source and takes its guest; other clients on the address are turned away. A guest that lives in this program is
hosted until a signal, or for --host-for; the exit code is the migration's.";

const CHECK_EXAMPLES: &str = "\
Examples:
  memferry check source.toml
  memferry check source.toml --set encoder.xbzrle_cache='1 GiB'
  memferry check destination.toml --for recv

Prints the configuration with every default filled in, as TOML, then as comments the memory that a migration would take
and the times it cannot be faster than. Starts nothing. What the command would refuse before it begins is refused in the same words:
exit code 2 for the configuration, 1 for an image that is missing, a host that has no such memory or machine, a stream's place.";

const RECORD_EXAMPLES: &str = "\
Examples:
  memferry record source.toml -o guest.trace --for 60s
  memferry record source.toml -o guest.trace          until Ctrl-C
  memferry record configs/hot.toml -o hot.trace --for 20s --host-for 0s

Follows the pages that a guest writes, by the dirty log that `send` would use, and moves nothing. The trace holds page
numbers, counts and times, none of the guest's content; `memferry plan` predicts from it how a migration would go. It costs
the guest what its dirty log costs it in a migration. A guest that lives in this program is hosted until the next signal,
or for --host-for.";

const PLAN_EXAMPLES: &str = "\
Examples:
  memferry plan guest.trace
  memferry plan guest.trace --bandwidth 1Gbit/s,10Gbit/s,25Gbit/s --set migration.downtime_limit=50ms
  memferry plan guest.trace --bandwidth '200 MiB/s' --set convergence.on_stall='[\"throttle\"]' --json
  memferry plan guest.trace other.toml

Runs the migration's own controller against a trace of `memferry record` in simulated time: does it converge, in how many
rounds, how long does it take, how long is the guest paused, how much is sent. Then says which bandwidth is
the smallest that meets the downtime limit, and what would have to be set where the given ones do not. The settings are
those of the recording, or of a second file. A total with a * is longer than the recording: the trace was begun again for it.";

const STATUS_EXAMPLES: &str = "\
Examples:
  memferry status /run/guest.sock
  memferry status unix:/run/guest.sock --json

Asks a migration that was started with --control unix:/run/guest.sock what it is doing. Exit code 1 if nobody answers there.";

const SET_EXAMPLES: &str = "\
Examples:
  memferry set /run/guest.sock max_bandwidth='200 MiB/s'
  memferry set /run/guest.sock downtime_limit=50ms deadline=none
  memferry set /run/guest.sock xbzrle_cache='1 GiB' throttle=50
  memferry set /run/guest.sock address=tcp:10.0.0.3:7777

Settings of a running source, as the configuration writes them: max_bandwidth, switchover_bandwidth, downtime_limit,
max_downtime, deadline (from the start), throttle (the most, in percent), xbzrle_cache. All of them are changed or none: exit code 2
for a key or a value that cannot be, with those that can; 1 if the migration refuses, or nobody answers. address is where the
source reaches the same destination from its next attempt on; an open connection stays. It is given alone.";

const CANCEL_EXAMPLES: &str = "\
Examples:
  memferry cancel /run/guest.sock

Waits for the end of the migration and says where the guest is: at the source as it was, unless it says otherwise. Exit code 1
if it is too late, the guest could not be resumed, the migration has not ended after 30 s, or nobody answers.";

const SWITCH_OVER_EXAMPLES: &str = "\
Examples:
  memferry switch-over /run/guest.sock

Pauses the guest at once and sends what is left, whatever downtime_limit says. Exit code 1 if max_downtime forbids it, with the
figures.";

const POSTCOPY_EXAMPLES: &str = "\
Examples:
  memferry postcopy /run/guest.sock

Has the guest start at the destination before all of its memory is there: what it touches travels first, the rest in the background. For
a guest that writes faster than its memory travels. It needs mode = \"hybrid\" or \"postcopy\", which both ends agree on at the start.
From then on, losing either program or host loses the guest; a lost connection is made again. Exit code 1 if the mode forbids it, it is
too late, or nobody answers.";

const INSPECT_EXAMPLES: &str = "\
Examples:
  memferry inspect /var/tmp/guest.memferry

Checks every frame of a stream in a file. Exit code 1 if it is damaged; the first damage is named with its byte.";

const WATCH_EXAMPLES: &str = "\
Examples:
  memferry watch unix:/run/memferry.sock      the migration that was started with --control unix:/run/memferry.sock
  memferry watch events.jsonl                 what --events events.jsonl wrote, as fast as it happened
  memferry watch events.jsonl --speed 10      ten times as fast
  ssh host memferry send source.toml --events - | memferry watch -

Shows a migration live: what remains, rates over time, forecast against limit, what each stage does, rounds, decisions.
Ends with the migration, or with q or Ctrl-C, which do not touch it. Writes plain lines where standard output is no terminal;
NO_COLOR=1 leaves the colours out. Exit code 1 if nobody is there or the events break off.";

const PROBE_EXAMPLES: &str = "\
Examples:
  memferry probe
  memferry probe source.toml      and warns of certificates that end within 30 days

Says what this host can do for a migration: userfaultfd and its modes, missing pages for postcopy, PAGEMAP_SCAN, KVM, huge pages.";

const CERTS_EXAMPLES: &str = "\
Examples:
  memferry certs pki --host dest.example --host 10.0.0.7

Makes an authority, and a certificate and key for the source and for the destination, under the names that QEMU and Cloud Hypervisor
use: copy the directory to both hosts and name it in [transport.tls] of either, as directory. Each certificate is valid for every HOST,
for localhost, and for 90 days. For trials: whoever has the directory can be either end. Exit code 1 if a file is there already.";

/// `memferry …`
#[derive(Debug, Parser)]
#[command(name = "memferry", version, about = ABOUT, after_help = EXAMPLES, max_term_width = 120)]
pub(super) struct CommandLine {
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Both ends in one process: the quickstart, plans, experiments
    #[command(after_help = RUN_EXAMPLES)]
    Run(Migrate),
    /// The source: sends a guest
    #[command(after_help = SEND_EXAMPLES)]
    Send(Migrate),
    /// The destination: waits for a guest
    #[command(after_help = RECV_EXAMPLES)]
    Recv(Migrate),
    /// Prints a configuration with its defaults, bounds and floors
    #[command(after_help = CHECK_EXAMPLES)]
    Check(Check),
    /// Follows the pages that a guest writes, and moves nothing: for plan
    #[command(after_help = RECORD_EXAMPLES)]
    Record(Record),
    /// How a migration of a recorded guest would go, and what would help
    #[command(after_help = PLAN_EXAMPLES)]
    Plan(Plan),
    /// What a running migration is doing
    #[command(after_help = STATUS_EXAMPLES)]
    Status {
        #[command(flatten)]
        control: Controlled,
        /// Prints all of it as JSON
        #[arg(long)]
        json: bool,
    },
    /// Changes settings of a running migration
    #[command(after_help = SET_EXAMPLES)]
    Set {
        #[command(flatten)]
        control: Controlled,
        /// What is to be different, as in downtime_limit=50ms
        #[arg(required = true, value_name = "KEY=VALUE", value_parser = super::control::setting)]
        settings: Vec<(String, serde_json::Value)>,
    },
    /// Ends a running migration; the guest continues at the source
    #[command(after_help = CANCEL_EXAMPLES)]
    Cancel(Controlled),
    /// Has a running migration pause its guest and finish
    #[command(after_help = SWITCH_OVER_EXAMPLES)]
    SwitchOver(Controlled),
    /// Has a running migration start its guest at the destination, and send the rest afterwards
    #[command(after_help = POSTCOPY_EXAMPLES)]
    Postcopy(Controlled),
    /// What a stream in a file holds: blocks, rounds, encodings, first damage
    #[command(after_help = INSPECT_EXAMPLES)]
    Inspect {
        /// The file
        file: PathBuf,
    },
    /// A live view of a running migration, or of one that was recorded
    #[command(after_help = WATCH_EXAMPLES)]
    Watch {
        /// What --control was given, a file that --events wrote, or - for lines on standard input
        address: String,
        /// How fast a file is replayed: 2 is twice as fast as it happened, 0 at once [default: 1; 0 where there is no terminal]
        #[arg(long, value_name = "FACTOR", value_parser = speed, allow_hyphen_values = true)]
        speed: Option<f64>,
    },
    /// What this host can do
    #[command(after_help = PROBE_EXAMPLES)]
    Probe {
        /// A configuration whose certificates are looked at too
        config: Option<PathBuf>,
        /// Changes a key of it, as in --set transport.tls.directory=pki
        #[arg(long = "set", value_name = "KEY=VALUE", requires = "config")]
        sets: Vec<String>,
    },
    /// Certificates for a trial of TLS
    #[command(after_help = CERTS_EXAMPLES)]
    Certs {
        /// Where to make them; nothing that is there is replaced
        directory: PathBuf,
        /// A name or an IP address by which an end is reached; may be given often
        #[arg(long = "host", value_name = "NAME", required = true)]
        hosts: Vec<String>,
    },
    /// Runs pause and resume, and resumes a paused guest should memferry be killed
    #[command(hide = true)]
    Guard,
}

/// What a configuration comes from.
#[derive(Args, Debug)]
pub(super) struct Configured {
    /// The TOML file that describes the migration
    pub(super) config: PathBuf,
    /// Changes a key of the configuration, as in --set encoder.compress=zstd; may be given often, and
    /// the last one for a key counts
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(super) sets: Vec<String>,
}

/// What a configuration is looked at for.
#[derive(Args, Debug)]
pub(super) struct Check {
    #[command(flatten)]
    pub(super) configured: Configured,
    /// The command that it is for. Without it: `send`, and `run` too unless images have no `copy`
    #[arg(long = "for", value_name = "COMMAND")]
    pub(super) command: Option<For>,
}

/// A command that a configuration is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum For {
    Run,
    Send,
    Recv,
}

/// A migration that runs elsewhere on this host.
#[derive(Args, Debug)]
pub(super) struct Controlled {
    /// The socket of its --control: unix:/PATH or the path alone
    #[arg(value_parser = socket)]
    pub(super) address: Address,
}

/// Options of every migration.
#[derive(Args, Debug)]
pub(super) struct Migrate {
    #[command(flatten)]
    pub(super) configured: Configured,
    /// Writes a report, whole or not at all: a page for a person if FILE ends in .html, else JSON; may be given once for each.
    /// One that is lost (a full disk, a pipe that nobody reads for 10 s) is reported at the end, and does not change the exit code
    #[arg(long, value_name = "FILE", value_parser = file)]
    pub(super) report: Vec<PathBuf>,
    /// Writes every event as a line of JSON as it happens, for its owner only; - is standard output. The reader of a pipe may come
    /// later. What is lost of it is reported at the end, and does not change the exit code
    #[arg(long, value_name = "FILE", value_parser = file)]
    pub(super) events: Option<PathBuf>,
    /// Serves figures to Prometheus at http://ADDRESS/metrics for as long as the program lives, as in 127.0.0.1:9464; with port 0
    /// at one that is free, and says at which even with --quiet
    #[arg(long, value_name = "ADDRESS")]
    pub(super) metrics: Option<String>,
    /// What is logged to standard error: error, warn, info, debug or trace [default: warn]
    #[arg(long, value_name = "LEVEL")]
    pub(super) log: Option<String>,
    /// Writes no core dump, whatever fails: a dump of this program holds a guest's memory. Commands that it starts write none either
    #[arg(long)]
    pub(super) no_core: bool,
    /// Prints nothing but the verdict
    #[arg(long)]
    pub(super) quiet: bool,
    /// Lets status, set, cancel, switch-over and postcopy reach it at a Unix socket, as in unix:/run/guest.sock
    #[arg(long, value_name = "ADDRESS", value_parser = socket)]
    pub(super) control: Option<Address>,
    /// How long a guest that lives in this program is hosted after the verdict, as in 10s; 0s ends at once
    #[arg(long, value_name = "DURATION", value_parser = duration, allow_hyphen_values = true)]
    pub(super) host_for: Option<Duration>,
}

/// Options of a recording.
#[derive(Args, Debug)]
pub(super) struct Record {
    #[command(flatten)]
    pub(super) configured: Configured,
    /// The trace, written whole or not at all
    #[arg(short, long, value_name = "TRACE")]
    pub(super) output: PathBuf,
    /// How long, as in 60s; until Ctrl-C by default
    #[arg(long = "for", value_name = "DURATION", value_parser = some_time, allow_hyphen_values = true)]
    pub(super) length: Option<Duration>,
    /// From one look at the dirty log to the next, at least 10ms [default: 100ms]
    #[arg(long, value_name = "DURATION", value_parser = interval, allow_hyphen_values = true)]
    pub(super) interval: Option<Duration>,
    /// Prints nothing but the verdict
    #[arg(long)]
    pub(super) quiet: bool,
    /// How long a guest that lives in this program is hosted afterwards, as in 10s; 0s ends at once
    #[arg(long, value_name = "DURATION", value_parser = duration, allow_hyphen_values = true)]
    pub(super) host_for: Option<Duration>,
}

/// Options of a plan.
#[derive(Args, Debug)]
pub(super) struct Plan {
    /// A trace of `memferry record`
    pub(super) trace: PathBuf,
    /// The TOML file whose settings are planned with, instead of those of the recording
    pub(super) config: Option<PathBuf>,
    /// What the links carry, in bits or bytes a second
    #[arg(
        long = "bandwidth",
        value_name = "RATE,…",
        value_delimiter = ',',
        allow_hyphen_values = true,
        default_value = "100Mbit/s,1Gbit/s,10Gbit/s"
    )]
    pub(super) bandwidths: Vec<Bandwidth>,
    /// Changes a key of the settings, as in --set migration.downtime_limit=50ms; may be given often,
    /// and the last one for a key counts
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(super) sets: Vec<String>,
    /// Answers as JSON
    #[arg(long)]
    pub(super) json: bool,
}

impl Migrate {
    pub(super) fn log_level(&self) -> &str {
        self.log.as_deref().unwrap_or(if self.quiet { "error" } else { "warn" })
    }
}

fn speed(text: &str) -> Result<f64, String> {
    let speed = text.parse().ok().filter(|speed: &f64| speed.is_finite() && *speed >= 0.0);
    speed.ok_or_else(|| "write how many times as fast, such as 2 or 0.5".into())
}

fn duration(text: &str) -> Result<Duration, String> {
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    humantime::parse_duration(text).map_err(|error| {
        let what = if text.starts_with('-') { "this is no length of time".into() } else { error.to_string() };
        format!("{what}; write a length of time such as 10s or 1h")
    })
}

fn file(text: &str) -> Result<PathBuf, String> {
    if text.is_empty() { Err("there is no name; name the file to be written".into()) } else { Ok(text.into()) }
}

fn some_time(text: &str) -> Result<Duration, String> {
    let time = duration(text)?;
    if time.is_zero() { Err("write a length of time that is more than none, such as 60s".into()) } else { Ok(time) }
}

fn interval(text: &str) -> Result<Duration, String> {
    let time = duration(text)?;
    if time < SHORTEST { Err("a sync takes its time: write 10ms or more".into()) } else { Ok(time) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_holds_together() {
        CommandLine::command().debug_assert();
    }

    #[test]
    fn the_help_of_each_command_teaches_by_example() {
        let mut command = CommandLine::command();
        command.build();
        let visible = command.get_subcommands_mut().filter(|command| !command.is_hide_set());
        let mut names = Vec::new();
        for command in visible.filter(|command| command.get_name() != "help") {
            let name = command.get_name().to_owned();
            let help = command.render_long_help().to_string();
            assert!(help.contains(&format!("Examples:\n  memferry {name}")), "{help}");
            names.push(name);
        }
        assert_eq!(
            names,
            [
                "run",
                "send",
                "recv",
                "check",
                "record",
                "plan",
                "status",
                "set",
                "cancel",
                "switch-over",
                "postcopy",
                "inspect",
                "watch",
                "probe",
                "certs"
            ]
        );
    }

    #[test]
    fn options_are_read() {
        let line = "memferry send a.toml --set pipeline.lanes=4 --set x.y=z --quiet --host-for 1m --report r.json --report r.html";
        let Command::Send(migrate) = CommandLine::parse_from(line.split(' ')).command else { panic!("send") };
        assert_eq!(migrate.configured.sets, ["pipeline.lanes=4", "x.y=z"]);
        assert_eq!(migrate.report, ["r.json", "r.html"].map(PathBuf::from));
        assert_eq!((migrate.host_for, migrate.log_level()), (Some(Duration::from_secs(60)), "error"));
        let line = "memferry set /run/a.sock throttle=50 deadline=5m";
        let Command::Set { control, settings } = CommandLine::parse_from(line.split(' ')).command else {
            panic!("set")
        };
        assert_eq!((control.address.to_string(), settings.len()), ("unix:/run/a.sock".into(), 2));
        assert!(CommandLine::try_parse_from(["memferry", "run", "a.toml", "--host-for", "soon"]).is_err());
    }

    #[test]
    fn what_is_less_than_nothing_or_no_name_is_refused_plainly() {
        for (line, words) in [
            ("send a.toml --host-for -1", "'--host-for <DURATION>': this is no length of time; write a length of time"),
            ("record a.toml -o b --for -1s", "write a length of time such as 10s"),
            ("record a.toml -o b --interval -1", "write a length of time such as 10s"),
            ("watch - --speed -1", "write how many times as fast"),
            ("plan a.trace --bandwidth -5", "write 10Gbit/s"),
            ("send a.toml --events ", "there is no name; name the file"),
        ] {
            let error = CommandLine::try_parse_from(format!("memferry {line}").split(' ')).unwrap_err().to_string();
            assert!(error.contains(words) && !error.contains("tip:"), "{line}: {error}");
        }
    }
}
