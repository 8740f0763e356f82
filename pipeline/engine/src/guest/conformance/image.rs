//! A copy of a guest's memory at one moment, and the comparison of two copies.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use memferry_stages::geometry::PageAt;
use memferry_stages::memory::GuestMemory;

/// How long a running guest may take to write its memory.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long memory is watched in which nothing may change.
const WATCHED: Duration = Duration::from_millis(60);

/// All bytes of all blocks, in whole pages.
#[derive(Clone, Debug)]
pub(super) struct Image {
    blocks: Vec<Vec<u8>>,
    page: usize,
}

impl Image {
    /// Copies everything.
    pub(super) fn of(memory: &GuestMemory) -> io::Result<Self> {
        let (size, layout) = (memory.page_size(), memory.layout());
        let copy = |index: u32| {
            let pages = layout.block_pages(index);
            let mut bytes = vec![0; usize::try_from(pages).expect("a small guest") * size.bytes()];
            for (page, into) in (0..pages).zip(bytes.chunks_exact_mut(size.bytes())) {
                memory.block(index).memory.read_page(size, page, into)?;
            }
            Ok(bytes)
        };
        Ok(Self { blocks: (0..layout.block_count()).map(copy).collect::<io::Result<_>>()?, page: size.bytes() })
    }

    /// The first byte that is not the same: where, and both.
    pub(super) fn first_difference(&self, other: &Self) -> Option<Difference> {
        (0..).zip(self.blocks.iter().zip(&other.blocks)).find_map(|(block, (one, two))| {
            // Pages are compared as a whole, and byte by byte only if they differ.
            let mut pages = one.chunks_exact(self.page).zip(two.chunks_exact(self.page));
            let page = pages.position(|(one, two)| one != two)?;
            let byte = (page * self.page..).find(|&byte| one[byte] != two[byte])?;
            Some(Difference {
                at: PageAt { block, page: page as u64 },
                byte: byte % self.page,
                bytes: (one[byte], two[byte]),
            })
        })
    }

    /// The first page that is not zero.
    pub(super) fn first_not_zero(&self, block: u32) -> Option<PageAt> {
        let mut pages = self.blocks[block as usize].chunks_exact(self.page);
        let page = pages.position(|page| page.iter().any(|&byte| byte != 0))?;
        Some(PageAt { block, page: page as u64 })
    }
}

/// Where two images differ.
#[derive(Clone, Copy, Debug)]
pub(super) struct Difference {
    pub(super) at: PageAt,
    byte: usize,
    bytes: (u8, u8),
}

impl Difference {
    /// Describes the bytes of both images.
    pub(super) fn words(&self, one: &str, other: &str) -> String {
        let Self { at, byte, bytes } = self;
        format!("byte {byte} of {at} is {:#04x} {one} and {:#04x} {other}", bytes.0, bytes.1)
    }
}

/// Watches memory in which nothing may change. Returns the first page that changes.
pub(super) fn change_while_paused(memory: &GuestMemory) -> io::Result<Option<Difference>> {
    let before = Image::of(memory)?;
    thread::sleep(WATCHED);
    Ok(before.first_difference(&Image::of(memory)?))
}

/// Waits until memory changes, as it does if its guest runs.
pub(super) fn changes(memory: &GuestMemory) -> io::Result<bool> {
    let (before, since) = (Image::of(memory)?, Instant::now());
    while since.elapsed() < PATIENCE {
        thread::sleep(Duration::from_millis(5));
        if before.first_difference(&Image::of(memory)?).is_some() {
            return Ok(true);
        }
    }
    Ok(false)
}
