//! Memory that records its operations, and whether the received bits of the pages were set meanwhile.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock};

use crate::bitmap::DirtyBitmap;
use crate::geometry::{BlockInfo, PageAt, PageSize};
use crate::memory::{GuestMemory, Memory, RamBlock};
use crate::pool::PooledBuffer;
use crate::xbzrle::Delta;

/// What a loader did to memory, in pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Deed {
    Wrote(Range<u64>),
    Zeroed(Range<u64>),
    Patched(u64),
}

/// The memory of block 0, whole pages.
#[derive(Debug)]
pub(crate) struct Recorder {
    bytes: Mutex<Vec<u8>>,
    deeds: Mutex<Vec<Deed>>,
    received: OnceLock<Arc<DirtyBitmap>>,
    /// Writes fail from now on.
    pub(crate) full: Mutex<bool>,
}

impl Recorder {
    /// A guest of one block with that memory, its recorder, and its received bitmap.
    pub(crate) fn guest(bytes: Vec<u8>, fresh: bool) -> (GuestMemory, Arc<Self>, Arc<DirtyBitmap>) {
        let length = bytes.len() as u64;
        let info = BlockInfo::new("ram", length);
        let recorder = Arc::new(Self {
            bytes: Mutex::new(bytes),
            deeds: Mutex::default(),
            received: OnceLock::new(),
            full: Mutex::new(false),
        });
        let memory = recorder.clone();
        let guest = GuestMemory::new(PageSize::DEFAULT, vec![RamBlock { info, memory, fresh }]).unwrap();
        let received = Arc::new(DirtyBitmap::empty(guest.layout()));
        recorder.received.set(received.clone()).unwrap();
        (guest, recorder, received)
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().clone()
    }

    /// What was done since the last call.
    pub(crate) fn deeds(&self) -> Vec<Deed> {
        std::mem::take(&mut self.deeds.lock().unwrap())
    }

    fn change(&self, pages: Range<u64>, deed: Deed, change: impl FnOnce(&mut [u8])) -> io::Result<()> {
        let received = self.received.get().unwrap();
        for page in pages.clone() {
            assert!(!received.is_set(PageAt { block: 0, page }), "page {page} counts as received while it is written");
        }
        if *self.full.lock().unwrap() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let bytes = |page: u64| usize::try_from(page * 4096).unwrap();
        change(&mut self.bytes.lock().unwrap()[bytes(pages.start)..bytes(pages.end)]);
        self.deeds.lock().unwrap().push(deed);
        Ok(())
    }
}

impl Memory for Recorder {
    fn length(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }

    fn read_extent(&self, _: PageSize, _: u64, _: u64, _: &mut PooledBuffer) -> io::Result<u64> {
        unreachable!("a loader reads no extents")
    }

    fn read_page(&self, _: PageSize, _: u64, _: &mut [u8]) -> io::Result<()> {
        unreachable!("a loader reads no pages")
    }

    fn write_pages(&self, page_size: PageSize, first_page: u64, bytes: &[u8]) -> io::Result<()> {
        assert_eq!(bytes.len() % page_size.bytes(), 0, "whole pages");
        let pages = first_page..first_page + (bytes.len() / page_size.bytes()) as u64;
        self.change(pages.clone(), Deed::Wrote(pages), |memory| memory.copy_from_slice(bytes))
    }

    fn write_zeros(&self, _: PageSize, pages: Range<u64>) -> io::Result<()> {
        self.change(pages.clone(), Deed::Zeroed(pages), |memory| memory.fill(0))
    }

    fn patch(&self, _: PageSize, page: u64, delta: &Delta<'_>) -> io::Result<()> {
        self.change(page..page + 1, Deed::Patched(page), |memory| delta.apply(memory))
    }
}
