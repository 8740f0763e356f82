//! Rules across the tables: each names the key, the fault and the remedy.

use std::collections::HashSet;
use std::time::Duration;

use memferry_stages::geometry::{MAX_BLOCK_ID, MAX_BLOCKS, PageSize};
use memferry_transports::{Address, Capabilities, open};

use super::fault::Fault;
use super::tables::{
    Compress, Config, DeltaChoice, EncoderTable, FileTable, FreeTable, GuestTable, ImageTable, WorkloadTable,
    WriterTable,
};
use super::{Purpose, settings, tls};
use memferry::migration::cache_beyond_guest;
use memferry::settings::{After, Rule, SwitchoverBandwidth};
use memferry::values::{Bandwidth, Size, Time};
use memferry_guests::SharedSettings;
use memferry_guests::kvm::settings::{MEMORY_UNIT, MOST_MEMORY, MOST_VCPUS, OWN_BYTES, PAGE_BYTES};
use memferry_guests::kvm::{IS_BUILT_IN, KvmSettings};
use memferry_guests::workload::{Fill, Pattern};

/// All faults.
pub(super) fn check(config: &Config, purpose: Purpose) -> Vec<Fault> {
    let mut faults = Vec::new();
    transport(config, purpose, &mut faults);
    tls::check(config, purpose, &mut faults);
    library(config, &mut faults);
    encoder(config, &mut faults);
    bandwidths(config, &mut faults);
    check_snapshot(config, &mut faults);
    recovery(config, &mut faults);
    postcopy(config, &mut faults);
    cuts(config, &mut faults);
    match &config.guest {
        GuestTable::Workload(workload) => check_workload(workload, &mut faults),
        GuestTable::File(file) => {
            check_file(file, purpose, &mut faults);
            check_stream_is_no_image(config, file, &mut faults);
        }
        GuestTable::Kvm(kvm) => check_kvm(kvm, &mut faults),
    }
    faults
}

/// Adds a fault unless `right` holds.
fn need(faults: &mut Vec<Fault>, right: bool, path: &str, what: impl Into<String>, help: impl Into<String>) {
    if !right {
        faults.push(Fault::new(path, what, help));
    }
}

fn transport(config: &Config, purpose: Purpose, faults: &mut Vec<Fault>) {
    match config.transport.address.parse::<Address>() {
        Ok(address) => capabilities(config, open(&address, Duration::ZERO).capabilities(), purpose, faults),
        Err(error) => {
            let error = error.to_string();
            let (what, help) = error
                .split_once("; ")
                .unwrap_or((&error, "write tls:HOST:PORT, tcp:HOST:PORT, unix:/PATH or file:/PATH"));
            faults.push(Fault::new("transport.address", what, help));
        }
    }
}

fn capabilities(config: &Config, can: Capabilities, purpose: Purpose, faults: &mut Vec<Fault>) {
    let connections = config.pipeline.connections;
    need(
        faults,
        connections <= can.max_connections,
        "pipeline.connections",
        format!("{connections} connections, and {} carries at most {}", config.transport.address, can.max_connections),
        format!("write connections = {}; all lanes share it", can.max_connections),
    );
    let after = config.migration.after.is_some();
    need(
        faults,
        can.stored || !after,
        "migration.after",
        "`after` is for files: with a destination that answers the guest always moves",
        "delete it",
    );
    need(
        faults,
        !can.stored || after || purpose == Purpose::Receive,
        "transport.address",
        "a file moves no guest by itself, and `after` does not define what becomes of the source",
        "write after = \"resume\" (a snapshot) or after = \"pause\" (a move) in [migration]",
    );
}

/// What recovery from a lost connection needs and this configuration lacks, and what to write instead.
pub(super) fn recovery_lacks(config: &Config) -> Option<(String, &'static str)> {
    let address = &config.transport.address;
    let is_authenticated = config.transport.address.parse::<Address>().is_ok_and(|address| address.beneath().is_some());
    if !config.pipeline.checksum && !is_authenticated {
        let what = "recovery from a lost connection needs checksums or TLS, and `checksum` is false";
        return Some((what.into(), "write attempts = 0, or checksum = true in [pipeline], or an address of tls:"));
    }
    let what = format!("recovery from a lost connection needs a return path, and {address} has none");
    lacks_return_path(config).then_some((what, "write attempts = 0, or an address of tls:, tcp: or unix:"))
}

fn lacks_return_path(config: &Config) -> bool {
    let address = config.transport.address.parse::<Address>();
    address.is_ok_and(|address| !open(&address, Duration::ZERO).capabilities().return_path)
}

fn recovery(config: &Config, faults: &mut Vec<Fault>) {
    let lacks = recovery_lacks(config).filter(|_| config.migration.recovery.attempts > 0);
    faults.extend(lacks.map(|(what, help)| Fault::new("migration.recovery.attempts", what, help)));
}

/// A guest that is started before all of its memory is there asks its source for the rest, and the kernel sees what it touches.
fn postcopy(config: &Config, faults: &mut Vec<Fault>) {
    let mode = config.migration.mode;
    if !mode.may_switch() {
        return;
    }
    let (path, name) = ("migration.mode", mode.name());
    let what = format!("mode {name:?} needs a destination that answers, and {} has none", config.transport.address);
    need(faults, !lacks_return_path(config), path, what, "write mode = \"precopy\", or an address of tcp: or unix:");
    let what = format!(
        "mode {name:?} with a guest of files: images are read by another program, whose access to a page that is missing nobody sees"
    );
    need(faults, !matches!(config.guest, GuestTable::File(_)), path, what, "write mode = \"precopy\"");
}

/// The aid for trials: each cut comes after the one before it.
fn cuts(config: &Config, faults: &mut Vec<Fault>) {
    let Some(table) = &config.transport.faults else { return };
    let what = format!("{} has no connection that could be cut", config.transport.address);
    need(faults, !lacks_return_path(config), "transport.faults", what, "delete the table");
    let mut before = Size(0);
    for (number, &cut) in table.cut_after.iter().enumerate() {
        let what = format!("a cut after {cut}, with {before} before it");
        let path = format!("transport.faults.cut_after.{number}");
        need(
            faults,
            cut > before,
            &path,
            what,
            "write sizes that rise, counted from the beginning: [\"40 MiB\", \"90 MiB\"]",
        );
        before = cut;
    }
    let help = "write \"2s\"";
    need(
        faults,
        table.refuse_for <= Time::LONGEST,
        "transport.faults.refuse_for",
        "this is longer than a hundred years",
        help,
    );
}

/// The library's rules for settings from any origin: each once, even if it applies at both ends.
fn library(config: &Config, faults: &mut Vec<Fault>) {
    let mut broken = config.source().broken_rules(page_size(config).0);
    for more in config.destination().broken_rules() {
        if !broken.contains(&more) {
            broken.push(more);
        }
    }
    // The bandwidth zero is below the configuration's own minimum.
    broken.retain(|error| error.broken != Rule::Bandwidth);
    // Recovery is off where it is not possible, and what it lacks is a fault of its own.
    let lacks_more = recovery_lacks(config).is_some();
    broken.retain(|error| !(lacks_more && matches!(error.broken, Rule::PostcopyRecovery(_))));
    faults.extend(broken.iter().map(|error| Fault::new(error.setting.key(), error.broken.to_string(), error.help())));
}

fn encoder(config: &Config, faults: &mut Vec<Fault>) {
    let table = &config.encoder;
    faults.extend(guest_bytes(config).and_then(|guest| cache_beyond(config, guest)));
    need(
        faults,
        table.compress_level.is_none() || table.compress == Compress::Zstd,
        "encoder.compress_level",
        "only zstd has levels",
        "delete it, or write compress = \"zstd\"",
    );
}

/// A configured cache that is larger than the guest's memory.
pub(super) fn cache_beyond(config: &Config, guest_bytes: u64) -> Option<Fault> {
    let EncoderTable { delta: DeltaChoice::Xbzrle, xbzrle_cache: Some(cache), .. } = &config.encoder else {
        return None;
    };
    let (what, help) = cache_beyond_guest(cache.0, guest_bytes, page_size(config).0, config.pipeline.lanes)?;
    Some(Fault::new("encoder.xbzrle_cache", what, help))
}

/// The size of the guest's memory, if the configuration specifies it.
fn guest_bytes(config: &Config) -> Option<u64> {
    match &config.guest {
        GuestTable::Workload(workload) => Some(workload.memory.0),
        GuestTable::File(_) => None,
        GuestTable::Kvm(kvm) => Some(kvm.memory),
    }
}

fn bandwidths(config: &Config, faults: &mut Vec<Fault>) {
    let table = &config.migration;
    check_bandwidth("migration.max_bandwidth", table.max_bandwidth, faults);
    if let SwitchoverBandwidth::AtMost(most) = table.switchover_bandwidth {
        check_bandwidth("migration.switchover_bandwidth", Bandwidth(Some(most)), faults);
    }
}

fn positive(faults: &mut Vec<Fault>, path: &str, time: Time, example: &str) {
    let help = format!("write \"{example}\"");
    need(faults, !time.0.is_zero(), path, "this must be longer than nothing", help.as_str());
    need(faults, time <= Time::LONGEST, path, "this is longer than a hundred years", help);
}

fn check_bandwidth(path: &str, bandwidth: Bandwidth, faults: &mut Vec<Fault>) {
    faults.extend(bandwidth.too_slow().map(|(what, write)| Fault::new(path, what, format!("write {write}"))));
}

/// The page size of the configured guest.
fn page_size(config: &Config) -> Size {
    match &config.guest {
        GuestTable::Workload(workload) => workload.page_size,
        GuestTable::File(file) => file.page_size,
        GuestTable::Kvm(_) => Size(PAGE_BYTES),
    }
}

fn check_page_size(size: Size, path: &str, faults: &mut Vec<Fault>) {
    let what = format!("a page of {size} cannot be");
    need(
        faults,
        PageSize::new(size.0).is_some(),
        path,
        what,
        "write \"4 KiB\", \"8 KiB\", \"16 KiB\", \"32 KiB\" or \"64 KiB\"",
    );
}

fn check_workload(table: &WorkloadTable, faults: &mut Vec<Fault>) {
    check_page_size(table.page_size, "guest.workload.page_size", faults);
    let most = u32::try_from(MAX_BLOCKS).expect("a small number");
    let blocks = (1..=most).contains(&table.blocks);
    need(
        faults,
        blocks,
        "guest.workload.blocks",
        format!("{} blocks", table.blocks),
        format!("write a number from 1 to {most}"),
    );
    let unit = Size(table.page_size.0.saturating_mul(u64::from(table.blocks.max(1))));
    need(
        faults,
        table.memory.0 > 0 && table.memory.0.is_multiple_of(unit.0.max(1)),
        "guest.workload.memory",
        format!("{} cannot be cut into equal blocks of whole pages", table.memory),
        format!("write a multiple of {unit}, such as \"1 GiB\""),
    );
    check_fill(&table.fill, faults);
    check_what_stays(table, faults);
    for (number, writer) in table.writers.iter().enumerate() {
        check_writer(writer, table.page_size, &format!("guest.workload.writers.{number}"), faults);
    }
    if faults.is_empty()
        && let Err(error) = settings::workload(table).validate()
    {
        faults.push(Fault::bare("guest.workload", error.to_string()));
    }
}

/// Memory that is unplugged, free, or shared.
fn check_what_stays(table: &WorkloadTable, faults: &mut Vec<Fault>) {
    let unplugged = table.unplugged;
    need(
        faults,
        (0.0..1.0).contains(&unplugged),
        "guest.workload.unplugged",
        format!("a share of {unplugged}"),
        "write a share of the memory from 0 up, below 1.0",
    );
    let page = table.page_size;
    if let Some(FreeTable { share, turns_per_second, range }) = table.free {
        need(
            faults,
            share > 0.0 && share + unplugged < 1.0,
            "guest.workload.free.share",
            format!("a share of {share}, beside {unplugged} that is unplugged"),
            "write a share of the memory above 0 that leaves some in use: 0.8",
        );
        need(
            faults,
            turns_per_second.is_finite() && turns_per_second >= 0.0,
            "guest.workload.free.turns_per_second",
            format!("{turns_per_second} turns a second"),
            "write a number, or 0 for memory that stays free",
        );
        let whole = range.0 > 0 && range.0.is_multiple_of(page.0.max(1)) && range.0 / page.0.max(1) <= 1 << 16;
        need(
            faults,
            whole,
            "guest.workload.free.range",
            format!("ranges of {range}"),
            format!("write 1 to 65536 whole pages of {page}: \"256 KiB\""),
        );
    }
    check_shared(table.shared.as_ref(), page, "guest.workload.shared.size", faults);
}

fn check_shared(table: Option<&SharedSettings>, page: Size, path: &str, faults: &mut Vec<Fault>) {
    let Some(SharedSettings { bytes, .. }) = table else { return };
    let right = *bytes > 0 && bytes.is_multiple_of(page.0.max(1));
    let help = format!("write whole pages of {page}: \"64 MiB\"");
    need(faults, right, path, format!("a shared block of {}", Size(*bytes)), help);
}

/// A snapshot does not contain shared memory, and its guest continues to write it.
fn check_snapshot(config: &Config, faults: &mut Vec<Fault>) {
    let shares = match &config.guest {
        GuestTable::Workload(table) => table.shared.is_some(),
        GuestTable::Kvm(table) => table.shared.is_some(),
        GuestTable::File(_) => false,
    };
    need(
        faults,
        !(shares && config.migration.after == Some(After::Resume)),
        "migration.after",
        "a snapshot would lack the shared block, which its guest continues to write",
        "write after = \"pause\", or delete the table `shared`",
    );
}

fn check_fill(fill: &Fill, faults: &mut Vec<Fault>) {
    let shares = [("zero", fill.zero), ("text", fill.text), ("random", fill.random), ("process", fill.process)];
    for (name, share) in shares {
        let right = share.is_finite() && share >= 0.0;
        need(
            faults,
            right,
            &format!("guest.workload.fill.{name}"),
            format!("a share of {share}"),
            "write a number from 0 up",
        );
    }
    let sum: f64 = shares.iter().map(|(_, share)| share).sum();
    let what = format!("the shares add up to {sum}");
    // Shares such as 0.1 do not have an exact sum.
    need(
        faults,
        sum <= 1.0 + 1e-9,
        "guest.workload.fill",
        what,
        "write shares that add up to at most 1.0; the rest is zero pages",
    );
}

fn check_writer(writer: &WriterTable, page_size: Size, path: &str, faults: &mut Vec<Fault>) {
    need(
        faults,
        writer.bytes <= page_size,
        &format!("{path}.bytes"),
        format!("a write of {} in a page of {page_size}", writer.bytes),
        format!("write a size of at most {} bytes", page_size.0),
    );
    let rate = writer.pages_per_second;
    let right = rate.is_finite() && rate >= 0.0;
    let help = "write a number, or 0 for as many as it can";
    need(faults, right, &format!("{path}.pages_per_second"), format!("{rate} pages a second"), help);
    let [from, to] = writer.region;
    let right = 0.0 <= from && from < to && to <= 1.0;
    let what = format!("a region from {from} to {to}");
    need(faults, right, &format!("{path}.region"), what, "write two shares of the memory, the lower first: [0.0, 0.5]");
    check_pattern(writer.pattern, &format!("{path}.pattern"), faults);
}

fn check_pattern(pattern: Pattern, path: &str, faults: &mut Vec<Fault>) {
    match pattern {
        Pattern::Sequential | Pattern::Uniform => {}
        Pattern::Zipf { exponent } => {
            let right = exponent.is_finite() && exponent > 0.0;
            let path = format!("{path}.zipf.exponent");
            need(faults, right, &path, format!("an exponent of {exponent}"), "write a number above 0, such as 1.1");
        }
        Pattern::HotSpot { pages, writes } => {
            for (name, share) in [("pages", pages), ("writes", writes)] {
                let right = share > 0.0 && share <= 1.0;
                let path = format!("{path}.hot-spot.{name}");
                need(faults, right, &path, format!("a share of {share}"), "write a share above 0, at most 1.0");
            }
        }
    }
}

fn check_kvm(table: &KvmSettings, faults: &mut Vec<Fault>) {
    need(
        faults,
        IS_BUILT_IN,
        "guest.kvm",
        "this program was built without KVM",
        "build it for x86-64 Linux with the feature `kvm`, which is on by default",
    );
    let memory = (2 * MEMORY_UNIT..=MOST_MEMORY).contains(&table.memory) && table.memory.is_multiple_of(MEMORY_UNIT);
    need(
        faults,
        memory,
        "guest.kvm.memory",
        format!("a machine of {}", Size(table.memory)),
        "write \"4 MiB\" to \"64 GiB\", in steps of 2 MiB",
    );
    need(
        faults,
        (1..=MOST_VCPUS).contains(&table.vcpus),
        "guest.kvm.vcpus",
        format!("{} vCPUs", table.vcpus),
        format!("write a number from 1 to {MOST_VCPUS}"),
    );
    let most = Size(table.memory.saturating_sub(OWN_BYTES));
    let least = Size(PAGE_BYTES * u64::from(table.vcpus.min(MOST_VCPUS)));
    let region = table.region >= least.0 && table.region.is_multiple_of(PAGE_BYTES);
    need(
        faults,
        region && (table.region <= most.0 || !memory),
        "guest.kvm.region",
        format!("a region of {} in a machine of {}", Size(table.region), Size(table.memory)),
        format!("write whole pages of {PAGE_BYTES} bytes, {least} to {most}"),
    );
    for (path, part) in [("guest.kvm.free", table.free), ("guest.kvm.unplugged", table.unplugged)] {
        let parts = [table.region, table.free, table.unplugged];
        let others = parts.iter().fold(OWN_BYTES, |all, &part| all.saturating_add(part));
        let fits = part.is_multiple_of(PAGE_BYTES) && (part == 0 || others <= table.memory);
        need(
            faults,
            fits || !memory || !region,
            path,
            format!("{} beside the rest of a machine of {}", Size(part), Size(table.memory)),
            format!("write whole pages of {PAGE_BYTES} bytes; region, free and unplugged together may be {most}"),
        );
    }
    check_shared(table.shared.as_ref(), Size(PAGE_BYTES), "guest.kvm.shared.size", faults);
    need(
        faults,
        (0.0..=1e9).contains(&table.pages_per_second),
        "guest.kvm.pages_per_second",
        format!("{} pages a second", table.pages_per_second),
        "write a number from 0 (as many as it can) to 1000000000",
    );
    need(
        faults,
        (16..=PAGE_BYTES).contains(&table.bytes) && table.bytes.is_multiple_of(8),
        "guest.kvm.bytes",
        format!("a write of {} in a page of {PAGE_BYTES} bytes", Size(table.bytes)),
        format!("write 16 to {PAGE_BYTES}, in steps of 8"),
    );
}

fn check_file(table: &FileTable, purpose: Purpose, faults: &mut Vec<Fault>) {
    check_page_size(table.page_size, "guest.file.page_size", faults);
    positive(faults, "guest.file.command_timeout", table.command_timeout, "10s");
    need(
        faults,
        (1..=MAX_BLOCKS).contains(&table.images.len()),
        "guest.file.images",
        format!("{} images", table.images.len()),
        "write images = [{ id = \"ram\", path = \"/dev/shm/guest.ram\" }]",
    );
    check_files(table, purpose, faults);
    check_commands(table, faults);
}

/// A stream must not have the name of one of the guest's files: it would overwrite that file.
fn check_stream_is_no_image(config: &Config, table: &FileTable, faults: &mut Vec<Fault>) {
    let Ok(Address::File(stream)) = config.transport.address.parse::<Address>() else { return };
    let place = |path: &std::path::Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let stream = place(&stream);
    let is_stream = |file: &std::path::PathBuf| place(file) == stream;
    let of_stream = |file: &ImageTable| is_stream(&file.path) || file.copy.as_ref().is_some_and(is_stream);
    let taken = table.images.iter().chain(&table.state_files).any(of_stream);
    let what = format!("{} is a file of the guest, and the stream would replace it", stream.display());
    need(faults, !taken, "transport.address", what, "name another file");
}

/// Images and state files: each has a unique id and a unique path.
fn check_files(table: &FileTable, purpose: Purpose, faults: &mut Vec<Fault>) {
    let (mut ids, mut files) = (HashSet::new(), HashSet::new());
    let lists = [("images", &table.images), ("state_files", &table.state_files)];
    let all = lists.iter().flat_map(|(list, files)| files.iter().enumerate().map(move |(at, file)| (list, at, file)));
    for (list, number, image) in all {
        let path = |key: &str| format!("guest.file.{list}.{number}.{key}");
        let right = (1..=MAX_BLOCK_ID).contains(&image.id.len());
        need(
            faults,
            right,
            &path("id"),
            format!("an id of {} bytes", image.id.len()),
            format!("write 1 to {MAX_BLOCK_ID}"),
        );
        need(
            faults,
            ids.insert(&image.id),
            &path("id"),
            format!("two files have the id {:?}", image.id),
            "name them apart",
        );
        let what = |file: &std::path::Path| format!("{} stands here twice", file.display());
        need(faults, files.insert(&image.path), &path("path"), what(&image.path), "name another file");
        match &image.copy {
            Some(copy) => need(faults, files.insert(copy), &path("copy"), what(copy), "name another file"),
            None => need(
                faults,
                purpose != Purpose::Run,
                &path("path"),
                "`run` makes a copy of each file, and this one names no place for it",
                format!("write copy = \"{}.copy\" beside its path", image.path.display()),
            ),
        }
    }
}

fn check_commands(table: &FileTable, faults: &mut Vec<Fault>) {
    let commands = [("pause", &table.pause), ("resume", &table.resume), ("start", &table.start)];
    for (name, command) in commands {
        let right = command.as_ref().is_none_or(|words| words.first().is_some_and(|program| !program.is_empty()));
        let help = format!("write {name} = [\"systemctl\", \"--user\", \"stop\", \"guest\"], or delete it");
        need(faults, right, &format!("guest.file.{name}"), "a command of no words", help);
    }
    let (paused, resumed) = (table.pause.is_some(), table.resume.is_some());
    let help = "write both, or neither: a guest that is paused needs a command that resumes it";
    need(faults, !paused || resumed, "guest.file.pause", "`pause` without `resume`", help);
    need(faults, !resumed || paused, "guest.file.resume", "`resume` without `pause`", help);
}
