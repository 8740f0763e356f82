//! What this host can do for a migration: asked once, printed by `memferry probe`.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io;
use std::thread::available_parallelism;

use crate::kernel::missing::MissingFaults;
use crate::kernel::{self, WP_ASYNC, WP_SHARED, WP_UNPOPULATED};
use crate::kvm::{self, Offers};

/// Yes, with a figure or a remark where there is one; or no, with the reason and the remedy.
pub type Answer = Result<String, String>;

/// The abilities of a host. Its [`Display`](fmt::Display) is one line for each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Bytes of a page of this host.
    pub page_bytes: usize,
    /// Cores this process may use.
    pub cores: usize,
    /// Whether userfaultfd opens.
    pub userfaultfd: Answer,
    /// Whether it reports faults on missing pages, those of the kernel included. Postcopy and lazy restores need it.
    pub missing_faults: Answer,
    /// Whether it has asynchronous write protection. The userfault log needs it.
    pub wp_async: Answer,
    /// Whether it can protect absent pages. The userfault log needs it.
    pub wp_unpopulated: Answer,
    /// Whether it can protect shared memory. The userfault log needs it.
    pub wp_shared: Answer,
    /// Whether there is the PAGEMAP_SCAN ioctl. The userfault log needs it, and it finds untouched anonymous memory.
    pub pagemap_scan: Answer,
    /// Whether this user can open /dev/kvm.
    pub kvm: Answer,
    /// Whether KVM has a dirty log with manual protection.
    pub kvm_dirty_log: Answer,
    /// Whether KVM has dirty rings.
    pub kvm_dirty_ring: Answer,
    /// Whether memory may be backed by huge pages that are not reserved.
    pub transparent_huge_pages: Answer,
    /// Whether huge pages are reserved and free.
    pub reserved_huge_pages: Answer,
}

/// Cores that this process may use; 1 if that is not known.
#[must_use]
pub fn cores() -> usize {
    available_parallelism().map_or(1, usize::from)
}

impl Probe {
    /// Probes this host. Changes nothing.
    #[must_use]
    pub fn run() -> Self {
        let (features, offers) = (kernel::userfault_features(), kvm::offers());
        Self {
            page_bytes: rustix::param::page_size(),
            cores: cores(),
            missing_faults: missing_faults(),
            wp_async: feature(&features, WP_ASYNC),
            wp_unpopulated: feature(&features, WP_UNPOPULATED),
            wp_shared: feature(&features, WP_SHARED),
            userfaultfd: features.map(|_| String::new()),
            pagemap_scan: kernel::pagemap_scan().map(|()| String::new()),
            kvm: kvm(),
            kvm_dirty_log: offered(&offers, |offers| {
                offers.manual_protect.map(|all| if all { "yes, all bits set at the start" } else { "yes" }.into())
            }),
            kvm_dirty_ring: offered(&offers, |offers| {
                (offers.ring_entries > 0).then(|| format!("yes, up to {} entries", offers.ring_entries))
            }),
            transparent_huge_pages: transparent(fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled")),
            reserved_huge_pages: reserved(fs::read_to_string("/proc/meminfo")),
        }
    }

    /// The names of the abilities and the answers, as they are printed.
    #[must_use]
    pub fn lines(&self) -> Vec<(&'static str, Answer)> {
        vec![
            ("page size", Ok(format!("{} bytes", self.page_bytes))),
            ("cores", Ok(self.cores.to_string())),
            ("userfaultfd", self.userfaultfd.clone()),
            ("  missing faults", self.missing_faults.clone()),
            ("  asynchronous write protection", self.wp_async.clone()),
            ("  protection of absent pages", self.wp_unpopulated.clone()),
            ("  protection of shared memory", self.wp_shared.clone()),
            ("PAGEMAP_SCAN", self.pagemap_scan.clone()),
            ("/dev/kvm", self.kvm.clone()),
            ("  dirty log with manual protection", self.kvm_dirty_log.clone()),
            ("  dirty rings", self.kvm_dirty_ring.clone()),
            ("transparent huge pages", self.transparent_huge_pages.clone()),
            ("reserved huge pages", self.reserved_huge_pages.clone()),
        ]
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (question, answer) in self.lines() {
            let answer = match answer {
                Ok(remark) if remark.is_empty() => "yes".into(),
                Ok(remark) => remark,
                Err(why) => format!("no: {why}"),
            };
            writeln!(f, "{question:<36}{answer}")?;
        }
        Ok(())
    }
}

fn feature(features: &Result<u64, String>, feature: u64) -> Answer {
    match features {
        Ok(features) if features & feature != 0 => Ok(String::new()),
        Ok(_) => Err("Linux 6.7 or later has it".into()),
        Err(_) => Err("userfaultfd does not open".into()),
    }
}

fn missing_faults() -> Answer {
    MissingFaults::open(true).map(|_| "yes, also of the kernel".into()).map_err(|why| why.to_string())
}

/// Whether this user can open /dev/kvm.
///
/// # Errors
/// Why not, and what to do about it.
pub fn kvm() -> Answer {
    explain_kvm(OpenOptions::new().read(true).write(true).open("/dev/kvm").map(drop))
}

fn offered(offers: &io::Result<Offers>, find: impl Fn(&Offers) -> Option<String>) -> Answer {
    match offers {
        Ok(offers) => find(offers).ok_or_else(|| "this kernel's KVM has none".into()),
        Err(_) => Err("KVM makes no machine".into()),
    }
}

fn explain_kvm(opened: io::Result<()>) -> Answer {
    opened.map(|()| String::new()).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => "it is not there: load the kvm module, or allow nested virtualization".into(),
        io::ErrorKind::PermissionDenied => "this user may not open it: add the user to its group, often kvm".into(),
        _ => error.to_string(),
    })
}

/// The kernel writes all modes and brackets the chosen one: `always [madvise] never`.
fn transparent(modes: io::Result<String>) -> Answer {
    let modes = modes.map_err(|_| "the kernel was built without them".to_string())?;
    let chosen = modes.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map(|(mode, _)| mode);
    match chosen {
        Some("always") => Ok("yes, always".into()),
        Some("madvise") => Ok("yes, where advised".into()),
        _ => Err("switched off: write madvise to /sys/kernel/mm/transparent_hugepage/enabled".into()),
    }
}

fn reserved(meminfo: io::Result<String>) -> Answer {
    let meminfo = meminfo.map_err(|error| format!("/proc/meminfo: {error}"))?;
    let figure = |name: &str| -> Option<u64> {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.split_whitespace().next()?.parse().ok()
    };
    match (figure("HugePages_Free"), figure("Hugepagesize")) {
        (Some(0), _) => Err("none is free: write a number to /proc/sys/vm/nr_hugepages".into()),
        (Some(free), Some(kib)) => Ok(format!("{free} of {kib} KiB free")),
        _ => Err("the kernel was built without them".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_agrees_with_what_the_log_says_and_prints_a_line_for_each_question() {
        let probe = Probe::run();
        let parts = [&probe.userfaultfd, &probe.wp_async, &probe.wp_unpopulated, &probe.wp_shared, &probe.pagemap_scan];
        let all = parts.iter().all(|answer| answer.is_ok());
        assert_eq!(crate::dirty_log::UserfaultLog::supported().is_ok(), all, "{probe}");
        assert_eq!(probe.to_string().lines().count(), probe.lines().len());
        assert!(probe.page_bytes >= 4096 && probe.cores >= 1);
    }

    #[test]
    fn answers_say_what_to_do() {
        let text = |text: &str| Ok(text.to_string());
        assert_eq!(transparent(text("always [madvise] never\n")), Ok("yes, where advised".into()));
        assert!(transparent(text("always madvise [never]\n")).unwrap_err().contains("write madvise"));
        let meminfo = "HugePages_Total:      16\nHugePages_Free:        3\nHugepagesize:       2048 kB\n";
        assert_eq!(reserved(text(meminfo)), Ok("3 of 2048 KiB free".into()));
        assert!(reserved(text(&meminfo.replace('3', "0"))).unwrap_err().contains("nr_hugepages"));
        assert!(reserved(text("MemTotal: 1 kB\n")).unwrap_err().contains("without"));
        assert!(explain_kvm(Err(io::ErrorKind::PermissionDenied.into())).unwrap_err().contains("group"));
        assert!(explain_kvm(Err(io::ErrorKind::NotFound.into())).unwrap_err().contains("module"));
        assert_eq!(feature(&Ok(WP_ASYNC), WP_ASYNC), Ok(String::new()));
        assert!(feature(&Ok(0), WP_ASYNC).unwrap_err().contains("6.7"));
    }
}
