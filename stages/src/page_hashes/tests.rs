use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::bitmap::locate;
use crate::geometry::{BlockInfo, PageSize};
use crate::memory::{MappedMemory, RamBlock};
use crate::pool::BufferPool;

/// A block of two stretches and three pages, with its memory.
fn guest() -> (GuestMemory, Arc<MappedMemory>, PooledBuffer) {
    let length = (4 << 20) + 3 * 4096;
    let memory = Arc::new(MappedMemory::anonymous(length).unwrap());
    let block = RamBlock { info: BlockInfo::new("ram", length as u64), memory: memory.clone(), fresh: true };
    let guest = GuestMemory::new(PageSize::DEFAULT, vec![block]).unwrap();
    let scratch = BufferPool::new(1, guest.page_size().extent_bytes()).try_take().unwrap();
    (guest, memory, scratch)
}

fn at(extent: u32) -> ExtentAt {
    ExtentAt { block: 0, extent }
}

/// Writes a page that is filled with a byte, and records it.
fn send(hashes: &PageHashes, memory: &MappedMemory, page: u64, byte: u8) {
    let content = [byte; 4096];
    memory.store(usize::try_from(page).unwrap() * 4096, &content);
    let (at, mask) = locate(PageAt { block: 0, page });
    let zero = if byte == 0 { mask } else { 0 };
    hashes.record(at, mask, zero, mask, (byte != 0).then(|| page_hash(&content)));
}

fn byte(step: u64) -> u8 {
    step.to_le_bytes()[0]
}

const NOTHING: [u64; STRETCH_WORDS] = [0; STRETCH_WORDS];

proptest! {
    /// A sum is that of the latest hashes, in whatever order they were recorded, without those that are left out.
    #[test]
    fn a_sum_is_that_of_the_latest_hashes(
        records in prop::collection::vec((0..17_u32, any::<u64>(), any::<u64>(), 1..u64::MAX), 0..60),
        left_out in any::<[u64; STRETCH_WORDS]>(),
    ) {
        let (guest, ..) = guest();
        let layout = guest.layout();
        let hashes = PageHashes::new(layout);
        let mut naive = vec![0_u64; 1027];
        for (extent, mask, zero, hash) in records {
            let mask = mask & layout.valid_mask(at(extent));
            let zero = zero & mask;
            hashes.record(at(extent), mask, zero, 0, (0..).map(|step| hash.wrapping_add(step).max(1)));
            let mut next = (0..).map(|step| hash.wrapping_add(step).max(1));
            for bit in bits(mask) {
                let hash = if zero >> bit & 1 == 1 { page_hash(&[0; 4096]) } else { next.next().unwrap() };
                naive[extent as usize * 64 + bit as usize] = hash;
            }
        }
        for stretch in 0..3 {
            let pages = stretch * 512..(stretch * 512 + 512).min(1027);
            let is_out = |page: &usize| left_out[page % 512 / 64] >> (page % 64) & 1 == 1;
            let left_out = if stretch == 2 { [left_out[0] & 7, 0, 0, 0, 0, 0, 0, 0] } else { left_out };
            let sum = pages.clone().filter(|page| !is_out(page)).fold(0_u64, |sum, page| {
                sum.wrapping_add(naive[page].wrapping_mul(factor(page as u64)))
            });
            prop_assert_eq!(hashes.stretch_sum(0, stretch as u64, &left_out), sum);
            let listed: Vec<_> = pages.map(|page| if is_out(&page) { 0 } else { naive[page] }).collect();
            prop_assert_eq!(hashes.of_stretch(0, stretch as u64, &left_out), listed);
        }
    }
}

#[test]
fn equal_pages_in_other_places_have_another_sum() {
    let (guest, memory, _) = guest();
    let [ours, theirs] = [(); 2].map(|()| PageHashes::new(guest.layout()));
    for page in 0..512 {
        send(&ours, &memory, page, 1 + u8::from(page == 7));
        send(&theirs, &memory, page, 1 + u8::from(page == 8));
    }
    assert_ne!(ours.stretch_sum(0, 0, &NOTHING), theirs.stretch_sum(0, 0, &NOTHING));
    send(&ours, &memory, 7, 1);
    send(&ours, &memory, 8, 2);
    assert_eq!(ours.stretch_sum(0, 0, &NOTHING), theirs.stretch_sum(0, 0, &NOTHING));
}

#[test]
fn a_write_that_no_log_reports_is_found_and_one_that_is_sent_again_is_not() {
    let (guest, memory, mut scratch) = guest();
    let hashes = PageHashes::new(guest.layout());
    (0..64).for_each(|page| send(&hashes, &memory, page, u8::try_from(page % 3).unwrap()));
    hashes.check(&guest, at(0), u64::MAX, &mut scratch).unwrap();
    assert_eq!(hashes.coverage(), Coverage { checked: 64, of: 64 });
    for page in [3, 9, 11, 20] {
        memory.store(page * 4096 + 5, &[77]);
    }
    hashes.check(&guest, at(0), u64::MAX, &mut scratch).unwrap();
    assert_eq!(hashes.coverage(), Coverage { checked: 60, of: 64 });
    // Page 3 is sent again, page 9 is as it was, page 11 is to be sent, and page 20 is forgotten.
    send(&hashes, &memory, 3, 200);
    send(&hashes, &memory, 9, 0);
    let (_, dirty) = locate(PageAt { block: 0, page: 11 });
    let first = hashes.first_difference(&guest, |_| dirty, &mut scratch).unwrap();
    assert_eq!(first, Some(PageAt { block: 0, page: 20 }));
    // As it was sent.
    memory.store(20 * 4096 + 5, &[20 % 3]);
    assert_eq!(hashes.first_difference(&guest, |_| dirty, &mut scratch).unwrap(), None);
    assert!(hashes.is_noted(PageAt { block: 0, page: 20 }));
    hashes.check(&guest, at(0), u64::MAX, &mut scratch).unwrap();
    assert!(!hashes.is_noted(PageAt { block: 0, page: 20 }) && hashes.is_noted(PageAt { block: 0, page: 11 }));
}

#[test]
fn a_page_that_is_recorded_during_its_check_has_no_note() {
    let (guest, memory, mut scratch) = guest();
    let hashes = Arc::new(PageHashes::new(guest.layout()));
    // A recorder on another thread changes pages as fast as it can: in the end each is checked, or has no note at all.
    let recorder = {
        let (hashes, memory) = (hashes.clone(), memory.clone());
        std::thread::spawn(move || (0..4000_u64).for_each(|step| send(&hashes, &memory, step % 64, byte(step))))
    };
    while !recorder.is_finished() {
        hashes.check(&guest, at(0), u64::MAX, &mut scratch).unwrap();
    }
    recorder.join().unwrap();
    assert_eq!(hashes.first_difference(&guest, |_| 0, &mut scratch).unwrap(), None);
    let expected = (0..64_u64).map(|page| (page, byte(4000 - 64 + (page + 64 - 4000 % 64) % 64)));
    for (page, byte) in expected {
        let mut content = [0; 4096];
        memory.load(usize::try_from(page).unwrap() * 4096, &mut content);
        assert_eq!(content, [byte; 4096], "page {page}");
    }
    hashes.check(&guest, at(0), u64::MAX, &mut scratch).unwrap();
    assert_eq!(hashes.coverage(), Coverage { checked: 64, of: 64 });
}

#[test]
fn a_hole_is_not_read() {
    let (guest, memory, mut scratch) = guest();
    let hashes = PageHashes::new(guest.layout());
    (64..70).for_each(|page| send(&hashes, &memory, page, 5));
    hashes.record(at(1), u64::MAX, u64::MAX, 0, []);
    // It would be found if it were read.
    memory.store(64 * 4096, &[1]);
    hashes.check(&guest, at(1), u64::MAX, &mut scratch).unwrap();
    assert_eq!(hashes.coverage(), Coverage::default());
    assert_eq!(hashes.first_difference(&guest, |_| 0, &mut scratch).unwrap(), None);
}
