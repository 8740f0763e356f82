//! Bytes that hold a guest's pages, and are left out of core dumps.

use std::fmt;

use rustix::mm::{Advice, madvise};

/// A fixed number of bytes on whole pages of the host, which core dumps leave out.
///
/// A host that cannot leave them out is no error: a dump then has them, as it would have without.
#[derive(Default)]
pub(crate) struct Undumped {
    /// The bytes, with what is needed before and behind them so that they lie on pages of the host.
    storage: Vec<u8>,
    start: usize,
    bytes: usize,
}

impl Undumped {
    /// So many zeros.
    pub(crate) fn new(bytes: usize) -> Self {
        let page = rustix::param::page_size();
        let storage = vec![0_u8; bytes.next_multiple_of(page) + page];
        let start = storage.as_ptr().addr().next_multiple_of(page) - storage.as_ptr().addr();
        let mut undumped = Self { storage, start, bytes };
        let whole = &mut undumped.storage[start..start + bytes.next_multiple_of(page)];
        // SAFETY: the pages lie within the storage of this value, and the advice changes nothing that a program can see.
        let _advised = unsafe { madvise(whole.as_mut_ptr().cast(), whole.len(), Advice::LinuxDontDump) };
        undumped
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.storage[self.start..self.start + self.bytes]
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.storage[self.start..self.start + self.bytes]
    }
}

impl fmt::Debug for Undumped {
    /// Without the bytes: they are a guest's.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.bytes)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Is the memory at this address left out of core dumps?
    pub(crate) fn is_left_out(address: usize) -> bool {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut lines = maps.lines();
        let holds = |line: &str| {
            let range = line.split(' ').next().and_then(|range| range.split_once('-'));
            let range = range.map(|(from, to)| [from, to].map(|end| usize::from_str_radix(end, 16)));
            matches!(range, Some([Ok(from), Ok(to)]) if (from..to).contains(&address))
        };
        assert!(lines.any(holds), "no mapping has {address:#x}");
        let flags = lines.find(|line| line.starts_with("VmFlags:")).expect("flags");
        flags.split(' ').any(|flag| flag == "dd")
    }

    #[test]
    fn the_first_and_the_last_byte_are_left_out_of_dumps() {
        for bytes in [1, 100, 4096, 4097, 256 << 10, 1 << 20] {
            let mut undumped = Undumped::new(bytes);
            assert!(undumped.bytes().iter().all(|&byte| byte == 0) && undumped.bytes().len() == bytes);
            undumped.bytes_mut().fill(7);
            let ends = [0, bytes - 1].map(|at| undumped.bytes()[at..].as_ptr().addr());
            assert_eq!(ends.map(is_left_out), [true; 2], "{bytes} bytes");
        }
    }
}
