//! The log: events as lines, to standard error.

use std::io::{self, IsTerminal};

use tracing::{debug, info, warn};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;

use memferry::events::{Ended, Event, Observer, Role};
use memferry::human;

/// Writes every event as a log line: warnings that need the operator's attention, milestones as info, the rest as
/// debug.
#[derive(Clone, Copy, Debug, Default)]
pub struct LogObserver;

impl Observer for LogObserver {
    fn event(&self, role: Role, event: &Event) {
        let role = role.name();
        match event {
            Event::Phase(phase) => info!(role, ?phase, "phase"),
            Event::Connected { peer } => info!(role, ?peer, "connected"),
            Event::Guest { blocks, pages, memory_bound } => {
                info!(role, blocks = blocks.len(), pages, memory_bound, "guest");
            }
            Event::RoundSent { tally, duration } => info!(role, ?tally, ?duration, "round sent"),
            Event::Synced { after_round, dirty_pages, duration } => {
                info!(role, after_round, dirty_pages, ?duration, "bitmap sync");
            }
            Event::Decided(decided) => info!(role, "{decided}"),
            Event::Changed(changed) => info!(role, "{changed}"),
            Event::TurnedAway { peer, why, count: 1, .. } => warn!(role, ?peer, "turned away: {why}"),
            Event::TurnedAway { kind, peer, why, count } => {
                warn!(role, count, kind = kind.name(), ?peer, "more were turned away, the last of them: {why}");
            }
            Event::Warning(what) => warn!(role, "{what}"),
            Event::Paused => info!(role, "the guest is paused"),
            Event::HandedOver => info!(role, "the guest is handed over"),
            Event::Resumed => info!(role, "the guest continues"),
            Event::Disconnected { attempt, why } => warn!(role, attempt, "disconnected: {why}"),
            Event::NotReached { tries, why, again_in } => info!(role, tries, ?again_in, "not connected again: {why}"),
            Event::Reconnected { attempt, outage, put_back_bytes } => {
                info!(role, attempt, ?outage, put_back_bytes, "connected again");
            }
            Event::Ended(ended) => log_end(role, ended),
            other => debug!(role, "{other:?}"),
        }
    }
}

/// The reason of a failure is part of the verdict and shown there; the log records it at info level.
fn log_end(role: &str, ended: &Ended) {
    let total = human::time(ended.total);
    match &ended.error {
        Some(error) => info!(role, total, phase = ?ended.outcome, "ended: {error}"),
        None => info!(role, total, phase = ?ended.outcome, "ended"),
    }
}

/// Sends log lines of a level ("warn", "memferry=debug,info") to a writer, each line in one write. The writer must
/// not block, because the stages log too.
///
/// # Errors
/// If the level is invalid.
///
/// # Panics
/// If a log was already started in this process.
pub fn start(level: &str, writer: impl for<'a> MakeWriter<'a> + Send + Sync + 'static) -> Result<(), String> {
    let refuse = || format!("--log {level:?} is not a level; write error, warn, info, debug or trace");
    // The filter takes an unknown level for the name of a module, and would log nothing.
    let is_level = |part: &str| part.contains('=') || part.trim().parse::<LevelFilter>().is_ok();
    if !level.split(',').all(is_level) {
        return Err(refuse());
    }
    let filter = EnvFilter::builder().parse(level).map_err(|error| format!("{}: {error}", refuse()))?;
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_target(false);
    lines.with_ansi(io::stderr().is_terminal()).with_writer(writer).init();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use memferry::events::TurnedAwayKind;
    use memferry::samples::script;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn events_become_lines_of_their_level() {
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber = tracing_subscriber::fmt().without_time().with_ansi(false).with_target(false);
        let subscriber = subscriber.with_writer(move || writer.clone()).finish();
        tracing::subscriber::with_default(subscriber, || {
            let away = |count| Event::TurnedAway {
                kind: TurnedAwayKind::Protocol,
                peer: "10.0.0.9".into(),
                why: "no Hello".into(),
                count,
            };
            [1, 7].iter().for_each(|&count| LogObserver.event(Role::Destination, &away(count)));
            LogObserver.event(Role::Source, &Event::Disconnected { attempt: 1, why: "it closed".into() });
            script(Role::Source).iter().for_each(|event| LogObserver.event(Role::Source, event));
        });
        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        assert!(text.contains(r#"WARN turned away: no Hello role="destination" peer="10.0.0.9""#), "{text}");
        let more =
            r#"WARN more were turned away, the last of them: no Hello role="destination" count=7 kind="protocol""#;
        assert!(text.contains(more), "{text}");
        assert!(text.contains(r#"INFO bitmap sync role="source" after_round=1 dirty_pages=900"#), "{text}");
        assert!(text.contains(r#"INFO ended role="source" total="2.50 s" phase=Completed"#), "{text}");
        assert!(text.contains(r#"WARN disconnected: it closed role="source" attempt=1"#), "{text}");
        assert!(!text.contains("RoundScanned"), "{text}");
    }
}
