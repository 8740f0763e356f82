use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use super::*;
use crate::geometry::{BlockInfo, PageSize};
use crate::memory::{Memory, RamBlock};
use crate::pool::PooledBuffer;
use crate::xbzrle::Delta;

/// The calls to the memory.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Asked {
    Pages(Range<u64>),
    Huge(Range<u64>),
}

/// Memory that only records calls. It has huge pages or not, or refuses.
#[derive(Debug)]
struct Touched {
    pages: u64,
    asked: Mutex<Vec<Asked>>,
    answer: Answer,
}

#[derive(Clone, Copy, Debug)]
enum Answer {
    Huge,
    NoHuge,
    /// For pages and for huge pages.
    Refuse,
    /// For huge pages.
    RefuseHuge,
}

impl Memory for Touched {
    fn length(&self) -> u64 {
        self.pages * 4096
    }
    fn read_extent(&self, _: PageSize, _: u64, _: u64, _: &mut PooledBuffer) -> io::Result<u64> {
        unreachable!("nothing is read")
    }
    fn read_page(&self, _: PageSize, _: u64, _: &mut [u8]) -> io::Result<()> {
        unreachable!("nothing is read")
    }
    fn write_pages(&self, _: PageSize, _: u64, _: &[u8]) -> io::Result<()> {
        unreachable!("nothing is written")
    }
    fn write_zeros(&self, _: PageSize, _: Range<u64>) -> io::Result<()> {
        unreachable!("nothing is written")
    }
    fn patch(&self, _: PageSize, _: u64, _: &Delta<'_>) -> io::Result<()> {
        unreachable!("nothing is written")
    }
    fn populate(&self, _: PageSize, pages: Range<u64>) -> io::Result<()> {
        self.asked.lock().unwrap().push(Asked::Pages(pages));
        if let Answer::Refuse = self.answer { Err(io::ErrorKind::Unsupported.into()) } else { Ok(()) }
    }
    fn populate_huge(&self, _: PageSize, pages: Range<u64>) -> io::Result<bool> {
        match self.answer {
            Answer::Huge => {
                self.asked.lock().unwrap().push(Asked::Huge(pages));
                Ok(true)
            }
            Answer::NoHuge => Ok(false),
            Answer::Refuse | Answer::RefuseHuge => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

/// A lane's first touches of a guest of a number of pages, and its received bitmap.
struct Bed {
    memory: GuestMemory,
    touched: Arc<Touched>,
    received: DirtyBitmap,
    first_touch: FirstTouch,
}

impl Bed {
    fn new(pages: u64, answer: Answer) -> Self {
        let touched = Arc::new(Touched { pages, asked: Mutex::default(), answer });
        let info = BlockInfo::new("ram", pages * 4096);
        let block = RamBlock { info, memory: touched.clone(), fresh: true };
        let memory = GuestMemory::new(PageSize::DEFAULT, vec![block]).unwrap();
        let received = DirtyBitmap::empty(memory.layout());
        Self { memory, touched, received, first_touch: FirstTouch::default() }
    }

    /// Pages of an extent come and are written. Returns the calls.
    fn come(&mut self, extent: u32, mask: u64) -> Vec<Asked> {
        let at = ExtentAt { block: 0, extent };
        self.first_touch.prepare(&self.memory, &self.received, at, mask);
        self.received.set_mask(at, mask);
        std::mem::take(&mut self.touched.asked.lock().unwrap())
    }
}

const ALL: u64 = u64::MAX;

/// A guest whose first stretch has come full.
fn after_a_full_stretch(pages: u64, answer: Answer) -> Bed {
    let mut bed = Bed::new(512 + pages, answer);
    (0..8).for_each(|extent| _ = bed.come(extent, ALL));
    bed
}

#[test]
fn a_dense_stretch_behind_a_full_one_is_asked_for_once_and_whole() {
    let mut bed = Bed::new(2048, Answer::Huge);
    (0..8).for_each(|extent| {
        let first = u64::from(extent) * 64;
        assert_eq!(bed.come(extent, ALL), [Asked::Pages(first..first + 64)]);
    });
    assert_eq!(bed.come(8, ALL), [Asked::Huge(512..1024)]);
    (9..16).for_each(|extent| assert_eq!(bed.come(extent, ALL), []));
    assert_eq!(bed.come(16, ALL), [Asked::Huge(1024..1536)]);
    assert_eq!(bed.come(16, ALL), [], "they are there");
}

#[test]
fn behind_a_stretch_that_did_not_come_full_none_is_asked_for_whole() {
    let mut bed = after_a_full_stretch(1536, Answer::Huge);
    assert_eq!(bed.come(8, ALL), [Asked::Huge(512..1024)]);
    assert_eq!(bed.come(16, ALL), [Asked::Pages(1024..1088)]);
}

#[test]
fn sparse_pages_are_asked_for_as_they_are() {
    let mut bed = Bed::new(1024, Answer::Huge);
    assert_eq!(bed.come(3, 0b1111_0011_1000), [Asked::Pages(195..198), Asked::Pages(200..204)]);
    assert_eq!(bed.come(3, 0b1111_0011_1000), [], "they are there");
    assert_eq!(bed.come(3, 1), [], "one page is written as cheaply");
    assert_eq!(bed.come(4, ALL), [Asked::Pages(256..320)], "the stretch has pages already");
}

#[test]
fn what_is_asked_for_in_vain_stays_a_small_share() {
    // Stretches come full and with nothing but their first extent, in turn.
    let pairs = 1000_u32;
    let mut bed = Bed::new(u64::from(pairs) * 1024, Answer::Huge);
    let (mut in_vain, mut written) = (0, 0);
    for pair in 0..pairs {
        (0..8).for_each(|extent| _ = bed.come(pair * 16 + extent, ALL));
        in_vain += if let [Asked::Huge(_)] = bed.come(pair * 16 + 8, ALL)[..] { 448 } else { 0 };
        written += 512 + 64;
    }
    assert!(in_vain <= written / IN_VAIN + 512, "{in_vain} pages of {written}");
    assert!(in_vain > 0);
}

#[test]
fn a_stretch_that_is_not_whole_in_its_block_is_asked_for_in_pages() {
    let mut bed = after_a_full_stretch(511, Answer::Huge);
    assert_eq!(bed.come(8, ALL), [Asked::Pages(512..576)]);
    assert_eq!(bed.come(15, ALL >> 1), [Asked::Pages(960..1023)]);
}

#[test]
fn without_huge_pages_every_extent_is_asked_for() {
    let mut bed = after_a_full_stretch(1024, Answer::NoHuge);
    assert_eq!(bed.come(8, ALL), [Asked::Pages(512..576)]);
    assert_eq!(bed.come(9, ALL), [Asked::Pages(576..640)]);
}

#[test]
fn memory_that_refuses_is_not_asked_again() {
    let mut bed = Bed::new(1024, Answer::Refuse);
    assert_eq!(bed.come(1, 0b11), [Asked::Pages(64..66)]);
    assert_eq!(bed.come(2, 0b11), []);
    let mut bed = Bed::new(2048, Answer::RefuseHuge);
    (0..8).for_each(|extent| _ = bed.come(extent, ALL));
    assert_eq!(bed.come(8, ALL), []);
    assert_eq!(bed.come(9, 0b11), []);
}
