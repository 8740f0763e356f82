//! The settings of a KVM machine: memory, vCPUs, and the work of its program. Plain values with their limits.

use serde::{Deserialize, Serialize};

use crate::shared::SharedSettings;
use memferry::guest::GuestError;
use memferry::values::size;

/// A page of the machine, in bytes.
pub const PAGE_BYTES: u64 = 4096;
/// The start of the memory, which holds tables, program and stacks.
pub const OWN_BYTES: u64 = 2 << 20;
/// The unit of its memory: the size that one entry of its page tables maps.
pub const MEMORY_UNIT: u64 = 2 << 20;
/// The most memory: the limit of its page tables.
pub const MOST_MEMORY: u64 = 64 << 30;
/// The most vCPUs: each has a stack.
pub const MOST_VCPUS: u32 = 16;

/// The settings of a machine. All but the dirty log travels as setup state, so a destination needs no settings of its
/// own.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct KvmSettings {
    /// Bytes of RAM: a multiple of [`MEMORY_UNIT`].
    #[serde(with = "size")]
    pub memory: u64,
    /// Virtual processors. Each has its own part of the region.
    pub vcpus: u32,
    /// Bytes that the program steps through: whole pages, at least one for each vCPU.
    #[serde(with = "size")]
    pub region: u64,
    /// Where the region begins, as an offset in RAM: a whole page, after the program's own part. The hole in physical
    /// memory below 4 GiB is not part of RAM, so a region may span it.
    #[serde(skip)]
    pub region_at: u64,
    /// Pages that a vCPU writes in a second; 0 is no limit.
    pub pages_per_second: f64,
    /// Bytes that it changes in each page: a multiple of 8, from 16 to the page size.
    #[serde(with = "size")]
    pub bytes: u64,
    /// Bytes after the region that are free at the start, and hinted as free: whole pages. The program takes an eighth
    /// of them in each pass and writes them. In the next pass it checks them and gives them back.
    #[serde(with = "size")]
    pub free: u64,
    /// Bytes at the end of the RAM that are unplugged: whole pages.
    #[serde(with = "size")]
    pub unplugged: u64,
    /// An additional block, whose memory is in a file that both ends have: it never travels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shared: Option<SharedSettings>,
    /// How written pages are found at this end.
    pub dirty_log: KvmLogChoice,
}

/// How the pages that a machine writes are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum KvmLogChoice {
    /// KVM's dirty log, with manual protection.
    DirtyLog,
    /// KVM's dirty rings. If KVM emulates the guest's stores, a ring may overflow; then all pages count as written.
    DirtyRing,
    /// userfaultfd and PAGEMAP_SCAN on the machine's memory.
    Userfault,
    /// Hashes of the pages.
    Hash,
}

impl Default for KvmSettings {
    /// 64 MiB, one vCPU, 4 MiB of them written at 5,000 pages a second.
    fn default() -> Self {
        Self {
            memory: 64 << 20,
            vcpus: 1,
            region: 4 << 20,
            region_at: OWN_BYTES,
            pages_per_second: 5_000.0,
            bytes: 64,
            free: 0,
            unplugged: 0,
            shared: None,
            dirty_log: KvmLogChoice::DirtyLog,
        }
    }
}

impl KvmSettings {
    /// Pages of the region.
    #[must_use]
    pub fn region_pages(&self) -> u64 {
        self.region / PAGE_BYTES
    }

    /// Where in RAM its free memory begins: after the region.
    #[cfg_attr(
        not(all(feature = "kvm", target_os = "linux", target_arch = "x86_64")),
        expect(dead_code, reason = "machines alone ask")
    )]
    pub(super) fn free_at(&self) -> u64 {
        self.region_at + self.region
    }

    /// Checks every limit. Settings from a peer are checked by this before anything is built from them.
    ///
    /// # Errors
    /// A sentence that names the setting, its value and the valid values.
    pub fn validate(&self) -> Result<(), GuestError> {
        let Self { memory, vcpus, region, region_at, pages_per_second, bytes, free, unplugged, .. } = *self;
        check((2 * MEMORY_UNIT..=MOST_MEMORY).contains(&memory) && memory.is_multiple_of(MEMORY_UNIT), || {
            format!("memory is {memory} bytes: it may be 4 MiB to 64 GiB, in steps of 2 MiB")
        })?;
        check((1..=MOST_VCPUS).contains(&vcpus), || format!("vcpus is {vcpus}: it may be 1 to {MOST_VCPUS}"))?;
        check(region.is_multiple_of(PAGE_BYTES) && region / PAGE_BYTES >= u64::from(vcpus), || {
            format!("region is {region} bytes: it must be whole pages of {PAGE_BYTES} bytes, one or more for each vCPU")
        })?;
        check(region <= memory - OWN_BYTES, || {
            format!("region is {region} bytes: in {memory} bytes of memory it may be {} at most", memory - OWN_BYTES)
        })?;
        check(region_at.is_multiple_of(PAGE_BYTES) && (OWN_BYTES..=memory - region).contains(&region_at), || {
            let most = memory - region;
            format!("region_at is {region_at}: it may be {OWN_BYTES} to {most}, in steps of {PAGE_BYTES}")
        })?;
        for (name, part) in [("free", free), ("unplugged", unplugged)] {
            check(part.is_multiple_of(PAGE_BYTES), || {
                format!("{name} is {part} bytes: it must be whole pages of {PAGE_BYTES} bytes")
            })?;
        }
        let taken = [region, free, unplugged].iter().fold(region_at, |sum, part| sum.saturating_add(*part));
        check(taken <= memory, || {
            format!(
                "free is {free} bytes: behind a region of {region} and with {unplugged} unplugged it does not fit {memory} bytes of memory"
            )
        })?;
        if let Some(SharedSettings { bytes, .. }) = &self.shared {
            check(*bytes > 0 && bytes.is_multiple_of(PAGE_BYTES) && *bytes <= MOST_MEMORY, || {
                format!("the shared block has {bytes} bytes: it must have whole pages of {PAGE_BYTES}, at most 64 GiB")
            })?;
        }
        check((0.0..=1e9).contains(&pages_per_second), || {
            format!("pages_per_second is {pages_per_second}: it may be 0 (as fast as it can) to 1000000000")
        })?;
        check((16..=PAGE_BYTES).contains(&bytes) && bytes.is_multiple_of(8), || {
            format!("bytes is {bytes}: it may be 16 to 4096, in steps of 8")
        })
    }
}

fn check(fine: bool, otherwise: impl FnOnce() -> String) -> Result<(), GuestError> {
    if fine { Ok(()) } else { Err(GuestError(otherwise())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_kept_and_name_the_setting() {
        let fine = KvmSettings::default();
        fine.validate().unwrap();
        let refused = |settings: KvmSettings, name: &str| {
            let error = settings.validate().unwrap_err().to_string();
            assert!(error.starts_with(name), "{error}");
        };
        refused(KvmSettings { memory: 3 << 20, ..fine.clone() }, "memory");
        refused(KvmSettings { memory: 128 << 30, ..fine.clone() }, "memory");
        refused(KvmSettings { vcpus: 0, ..fine.clone() }, "vcpus");
        refused(KvmSettings { vcpus: 17, ..fine.clone() }, "vcpus");
        refused(KvmSettings { region: 4096, vcpus: 2, ..fine.clone() }, "region");
        refused(KvmSettings { region: 63 << 20, ..fine.clone() }, "region");
        refused(KvmSettings { region_at: 4096, ..fine.clone() }, "region_at");
        refused(KvmSettings { region_at: (2 << 20) + 1, ..fine.clone() }, "region_at");
        refused(KvmSettings { region_at: 61 << 20, ..fine.clone() }, "region_at");
        refused(KvmSettings { pages_per_second: f64::NAN, ..fine.clone() }, "pages_per_second");
        refused(KvmSettings { free: 62 << 20, ..fine.clone() }, "free");
        refused(KvmSettings { free: u64::MAX - 4095, ..fine.clone() }, "free");
        refused(KvmSettings { unplugged: 5, ..fine.clone() }, "unplugged");
        refused(KvmSettings { bytes: 20, ..fine }, "bytes");
    }
}
