//! `memferry check`: whether a configuration can start, its effective settings, its memory bound, and its lower
//! bounds on time.

use std::fmt::Write;
use std::time::Duration;

use memferry_stages::bitmap::DirtyBitmap;
use memferry_stages::dirty_log::{HashLog, KvmLog};
use memferry_stages::geometry::{BlockInfo, Layout, PageSize};
use memferry_stages::missing;
use memferry_stages::untrusted::Untrusted;
use memferry_transports::Address;
use memferry_transports::file::FileTransport;

use super::hosting::{check_destination, check_source};
use crate::config::settings::{source_files, workload};
use crate::config::tables::{Config, GuestTable};
use crate::config::{self, Purpose};
use memferry::human;
use memferry::migration::{self, DIGEST_PASSES, HashingCost, destination_bound, hashing_cost, source_bound};
use memferry::settings::{SourceSettings, Verify};
use memferry::values::Size;
use memferry_guests::SharedSettings;
use memferry_guests::kvm::KvmLogChoice;
use memferry_guests::workload::LogChoice;

/// What postcopy costs in safety.
const POSTCOPY: &str = "postcopy: once the guest runs at the destination without all of its memory, losing either end loses the guest; a \
                        lost connection is made again";

/// The configuration as TOML, followed by its bounds and its lower limits as comments.
///
/// # Errors
/// The errors with which the configuration's command would refuse it at the start, in the same words.
pub(super) fn describe(config: &Config, purpose: Purpose) -> Result<String, String> {
    can_start(config, purpose)?;
    let mut text = written(config);
    text.push('\n');
    for line in facts(config).into_iter().chain(config::warnings(config, purpose)) {
        writeln!(text, "# {line}").expect("a string takes it");
    }
    Ok(text)
}

/// Can the guest be created, is there room to move it, and can a file hold the stream?
fn can_start(config: &Config, purpose: Purpose) -> Result<(), String> {
    let says_of_copies = match &config.guest {
        GuestTable::File(table) => table.images.iter().chain(&table.state_files).all(|file| file.copy.is_some()),
        GuestTable::Workload(_) | GuestTable::Kvm(_) => true,
    };
    if purpose != Purpose::Receive {
        check_source(config).map_err(|error| error.to_string())?;
        let (layout, settings) = (layout(config)?, config.source());
        config::fits(config, layout.bytes())?;
        let bound = source_bound(&layout, &settings, may_leave_out(config));
        migration::check_source(bound, &layout, &settings).map_err(|error| error.to_string())?;
    }
    let runs = purpose == Purpose::Run || (purpose == Purpose::Check && says_of_copies);
    if runs || purpose == Purpose::Receive {
        check_destination(config, runs).map_err(|error| error.to_string())?;
    }
    let Address::File(path) = config.address() else { return Ok(()) };
    let file = FileTransport::new(path);
    let can_be_used = if purpose == Purpose::Receive { file.check_readable() } else { file.check_writable() };
    can_be_used.map_err(|error| error.to_string())
}

/// The configuration as TOML, with every default written out.
pub(super) fn written(config: &Config) -> String {
    let mut config = config.clone();
    if let Ok(layout) = layout(&config) {
        let bytes = Size(migration::cache_bytes(&layout, &config.source()));
        config.encoder.xbzrle_cache.get_or_insert(bytes);
    }
    toml::to_string(&config).expect("what was read can be written")
}

fn facts(config: &Config) -> Vec<String> {
    let layout = match layout(config) {
        Ok(layout) => layout,
        Err(why) => return vec![format!("no figures, {why}")],
    };
    let settings = config.source();
    let bytes = layout.bytes();
    let logs = logs_bytes(config, &layout);
    let mut facts = vec![
        format!("guest: {} in {} pages", human::bytes(bytes), human::count(layout.pages())),
        format!(
            "memory at the source: at most {}",
            human::bytes(source_bound(&layout, &settings, may_leave_out(config)) + logs)
        ),
        format!(
            "memory at the destination: at most {}",
            human::bytes(destination_bound(&layout, settings.lanes, config.destination().max_state_bytes))
        ),
    ];
    if config.tls().is_some() {
        let bytes = u64::from(settings.connections) * memferry_transports_tls::CONNECTION_BYTES;
        facts.push(format!("memory of TLS at either end besides: at most {}", human::bytes(bytes)));
    }
    if let Some(cap) = settings.max_bandwidth {
        let whole = at_rate(bytes, cap);
        facts.push(format!("first round: {} if nothing shrinks, at {}/s", human::time(whole), human::bytes(cap)));
    }
    let calls = [settings.expected_pause, settings.expected_prepare, settings.expected_start];
    let calls = calls.into_iter().fold(Duration::ZERO, Duration::saturating_add);
    if calls >= settings.downtime_limit {
        let [calls, limit] = [calls, settings.downtime_limit].map(human::time);
        facts.push(format!(
            "pausing, preparing and starting the guest are expected to take {calls}, the downtime limit is {limit}: raise it"
        ));
    }
    if settings.mode.may_switch() {
        facts.push(POSTCOPY.into());
        facts.extend(
            missing::supported().err().map(|why| format!("postcopy: as a destination this host refuses it: {why}")),
        );
    }
    if settings.verify == Verify::Full || hashes_for_log(config) {
        facts.extend(hashing(config, bytes, &settings));
    }
    facts
}

/// The guest's blocks.
fn layout(config: &Config) -> Result<Layout, String> {
    let shared = |table: Option<&SharedSettings>| {
        table.map(|table| BlockInfo { ignored: true, ..BlockInfo::new("shared", table.bytes) })
    };
    let (page_size, blocks) = match &config.guest {
        GuestTable::Workload(table) => {
            let settings = workload(table);
            let ids = (0..settings.blocks).map(|index| BlockInfo::new(index.to_string(), settings.block_bytes()));
            (settings.page_size, ids.chain(shared(table.shared.as_ref())).collect())
        }
        GuestTable::File(table) => {
            let settings = source_files(table);
            let length = |image: &memferry_guests::file::Image| {
                let found = std::fs::metadata(&image.path).map(|file| file.len());
                found
                    .map(|length| BlockInfo::new(image.id.clone(), length))
                    .map_err(|e| format!("{}: {e}", Untrusted::from(image.path.as_path())))
            };
            (settings.page_size, settings.images.iter().map(length).collect::<Result<_, _>>()?)
        }
        GuestTable::Kvm(table) => {
            let ram = BlockInfo::new("ram", table.memory);
            (PageSize::DEFAULT, std::iter::once(ram).chain(shared(table.shared.as_ref())).collect())
        }
    };
    Layout::new(page_size, blocks).map_err(|error| error.to_string())
}

/// Does the guest have pages that may not travel?
fn may_leave_out(config: &Config) -> bool {
    match &config.guest {
        GuestTable::Workload(table) => table.free.is_some() || table.unplugged > 0.0 || table.shared.is_some(),
        GuestTable::File(_) => false,
        GuestTable::Kvm(table) => table.free > 0 || table.unplugged > 0 || table.shared.is_some(),
    }
}

/// The memory of the guest's dirty logs at the source.
fn logs_bytes(config: &Config, layout: &Layout) -> u64 {
    // The program's own writes and marks: one bit for each page.
    let marks = DirtyBitmap::bytes_of(layout);
    match &config.guest {
        GuestTable::Workload(table) if table.dirty_log == LogChoice::Hash => HashLog::bytes_for(layout),
        GuestTable::Workload(_) => marks,
        GuestTable::File(_) => HashLog::bytes_for(layout),
        // In addition, the machine's devices mark their writes in each of them.
        GuestTable::Kvm(table) => {
            marks
                + match table.dirty_log {
                    // A machine without rings uses KVM's dirty log instead.
                    KvmLogChoice::DirtyLog | KvmLogChoice::DirtyRing => KvmLog::bytes_for(layout),
                    KvmLogChoice::Userfault => marks,
                    KvmLogChoice::Hash => HashLog::bytes_for(layout),
                }
        }
    }
}

fn hashes_for_log(config: &Config) -> bool {
    match &config.guest {
        GuestTable::Workload(table) => table.dirty_log == LogChoice::Hash,
        GuestTable::File(_) => true,
        GuestTable::Kvm(table) => table.dirty_log == KvmLogChoice::Hash,
    }
}

/// The cost of hashing, if anything is hashed.
fn hashing(config: &Config, bytes: u64, settings: &SourceSettings) -> Vec<String> {
    let Ok(one_pass) = hashing_cost(bytes) else { return Vec::new() };
    let digests = one_pass.times(DIGEST_PASSES);
    let mut facts = Vec::new();
    if settings.verify == Verify::Full {
        facts.push(format!("verify: about {} of the downtime go to digests", measured(digests)));
        if digests.median > settings.downtime_limit {
            let limit = human::time(settings.downtime_limit);
            facts.push(format!(
                "the digests alone take longer than the downtime limit of {limit}: raise it, or verify = true"
            ));
        }
    }
    if hashes_for_log(config) {
        facts.push(format!("dirty log: each bitmap sync hashes all pages, about {}", measured(one_pass)));
    }
    facts
}

/// `12.0 ms (11.0 ms to 15.0 ms in 7 measurements)`
fn measured(cost: HashingCost) -> String {
    let [median, least, most] = [cost.median, cost.least, cost.most].map(human::time);
    format!("{median} ({least} to {most} in {} measurements)", cost.measurements)
}

fn at_rate(bytes: u64, bytes_per_second: u64) -> Duration {
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    Duration::from_secs_f64(bytes as f64 / bytes_per_second.max(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Purpose, parse};
    use memferry::guest::SourceGuest;
    use memferry_guests::workload::Workload;

    fn described(text: &str) -> String {
        describe(&parse("run.toml", text, &[], Purpose::Check).unwrap(), Purpose::Check).unwrap()
    }

    #[test]
    fn what_is_printed_is_a_configuration_with_its_figures() {
        let text = described(
            "[guest.workload]\nmemory = \"64 MiB\"\n[transport]\naddress = \"tcp:localhost:0\"\n\
             [migration]\nmax_bandwidth = \"32 MiB/s\"\n",
        );
        parse("printed", &text, &[], Purpose::Run).unwrap();
        assert!(text.contains("xbzrle_cache = \"64 MiB\""), "{text}");
        assert!(text.contains("# guest: 64.0 MiB in 16,384 pages"), "{text}");
        assert!(text.contains("# first round: 2.00 s if nothing shrinks, at 32.0 MiB/s"), "{text}");
        assert!(!text.contains("# verify"), "{text}");
        assert!(!text.contains("# dirty log"), "{text}");
        let full = "[guest.workload]\nmemory = \"64 MiB\"\n[transport]\naddress = \"tcp:localhost:0\"\n[migration]\nverify = \"full\"\n";
        let text = described(full);
        assert!(text.contains("# verify: about ") && text.contains(" in 7 measurements) of the downtime"), "{text}");
        assert!(text.contains("\nverify = \"full\"\n"), "{text}");
    }

    fn configured(guest: &str, dirty_log: &str) -> Config {
        let text = format!(
            "[guest.{guest}]\nmemory = \"66 MiB\"\ndirty_log = \"{dirty_log}\"\n\
             [transport]\naddress = \"tcp:localhost:0\"\n"
        );
        parse("run.toml", &text, &[], Purpose::Check).unwrap()
    }

    /// The log memory that is reported before the run, and the memory that the running guest's logs take. `None` if the
    /// host has no such log.
    fn reported_and_allocated(config: &Config, guest: &dyn SourceGuest) -> Option<(u64, u64)> {
        let logs = guest.dirty_logs().inspect_err(|error| println!("skipped: {error}")).ok()?;
        Some((logs_bytes(config, guest.memory().layout()), logs.iter().map(|log| log.memory_bytes()).sum()))
    }

    #[test]
    fn the_memory_that_is_reported_for_a_workloads_log_is_what_it_takes() {
        for dirty_log in ["auto", "software", "userfault", "hash"] {
            let config = configured("workload", dirty_log);
            let GuestTable::Workload(table) = &config.guest else { unreachable!("configured as one") };
            let guest = match Workload::source(workload(table)) {
                Ok(guest) => guest,
                Err(error) => {
                    println!("skipped: {error}");
                    continue;
                }
            };
            let Some((reported, allocated)) = reported_and_allocated(&config, &*guest) else { continue };
            assert_eq!(reported, allocated, "{dirty_log}");
        }
    }

    #[test]
    #[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
    fn the_memory_that_is_reported_for_a_machines_logs_is_what_they_take() {
        if let Err(why) = memferry_stages::host::kvm() {
            return println!("skipped: {why}");
        }
        for dirty_log in ["dirty-log", "dirty-ring", "userfault", "hash"] {
            let config = configured("kvm", dirty_log);
            let GuestTable::Kvm(table) = &config.guest else { unreachable!("configured as one") };
            let guest = memferry_guests::kvm::KvmGuest::source(table.clone()).unwrap();
            let Some((reported, allocated)) = reported_and_allocated(&config, &*guest) else { continue };
            // Rings have no bitmaps of slots, but whether rings are available is not known in advance.
            let slots = if dirty_log == "dirty-ring" { (66 << 20) / 4096 / 8 } else { 0 };
            assert!(
                reported == allocated || reported == allocated + slots,
                "{dirty_log}: {reported} reported, {allocated} allocated"
            );
        }
    }
}
