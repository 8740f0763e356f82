//! `memferry record`: records a guest's dirty pages without moving anything.

use serde::Serialize;

use super::args::Record;
use super::console;
use super::hosting::Hosted;
use super::signals::Signals;
use super::verdict::{CANCELLED, DONE, FAILED};
use crate::config::Config;
use crate::config::tables::{EncoderTable, MigrationTable, PipelineTable};
use memferry::human;
use memferry::settings::ConvergenceSettings;
use memferry_plan::record::{INTERVAL, RecordError, RecordSettings, Recorded, record_watched};
use memferry_stages::untrusted::Untrusted;

/// The level of zstd that is measured if none is configured.
const ZSTD_LEVEL: i32 = 1;

/// The part of a configuration that a plan uses: neither guest nor address.
#[derive(Serialize)]
struct Planned<'a> {
    encoder: &'a EncoderTable,
    pipeline: &'a PipelineTable,
    migration: &'a MigrationTable,
    convergence: &'a ConvergenceSettings,
}

/// Records, then hosts a guest that lives here until its end; returns the exit code.
pub(super) async fn run(config: Config, options: Record) -> std::io::Result<u8> {
    let (signals, cancel) = Signals::listen("ending the recording")?;
    let guest = tokio::select! {
        biased;
        () = cancel.cancelled() => {
            message!("memferry: not recorded: cancelled before the guest was ready");
            return Ok(CANCELLED);
        }
        guest = Hosted::source(&config, &cancel) => guest,
    };
    let guest = match guest {
        Ok(guest) => guest,
        Err(error) => return Ok(failed(&error.to_string())),
    };
    let interval = options.interval.unwrap_or(INTERVAL);
    let settings = RecordSettings {
        interval,
        length: options.length,
        zstd_level: config.encoder.compress_level.unwrap_or(ZSTD_LEVEL),
        settings: planned(&config),
    };
    // Before the first interval there is no trace to write.
    let says = !options.quiet && options.length.is_none();
    let watch = move |recorded: &Recorded| {
        if says && recorded.intervals == 1 {
            message!("memferry: recording; Ctrl-C ends it and writes the trace");
        }
    };
    let recorded = record_watched(guest.guest.clone(), settings, &options.output, cancel, watch).await;
    let stop = signals.arm("ending");
    let code = match recorded {
        Ok(recorded) => {
            print(&format!("{} recorded: {}", Untrusted::from(options.output.as_path()), summary(&recorded, interval)));
            DONE
        }
        Err(error @ RecordError::Write(_)) => {
            failed(&format!("{}: {error}", Untrusted::from(options.output.as_path())))
        }
        Err(error) => failed(&error.to_string()),
    };
    if !guest.home.lives_here() {
        return Ok(code);
    }
    if options.host_for.is_none() && !options.quiet && !stop.is_cancelled() {
        message!("memferry: the guest is hosted here: Ctrl-C ends it");
    }
    let Some(health) = guest.home.live(options.host_for, stop).await else { return Ok(code) };
    if !options.quiet || !health.is_sound {
        print(&health.line);
    }
    Ok(if health.is_sound { code } else { FAILED })
}

fn planned(config: &Config) -> String {
    let Config { encoder, pipeline, migration, convergence, .. } = config;
    toml::to_string(&Planned { encoder, pipeline, migration, convergence }).expect("what was read can be written")
}

/// A one-line summary of a recording.
fn summary(recorded: &Recorded, interval: std::time::Duration) -> String {
    let seconds = recorded.length.as_secs_f64();
    #[expect(clippy::cast_precision_loss, reason = "rates to be shown")]
    let [pages, bytes] = [recorded.written, recorded.bytes].map(|amount| amount as f64 / seconds);
    let mut line = format!(
        "{} in {}; {pages:.0} pages/s found dirty, a sync takes {}; {}, {} for each second",
        human::time(recorded.length),
        human::counted(recorded.intervals, "interval"),
        human::time(recorded.sync),
        human::bytes(recorded.bytes),
        human::rate(bytes).trim_end_matches("/s"),
    );
    if recorded.sync > interval / 4 {
        line.push_str("; the syncs take much of the interval and slow the guest's host: --interval can make it longer");
    }
    line
}

fn failed(why: &str) -> u8 {
    message!("memferry: not recorded: {why}");
    FAILED
}

/// Writes to standard output, or to standard error if that fails.
fn print(text: &str) {
    if !console::print(text) {
        message!("{text}");
    }
}
