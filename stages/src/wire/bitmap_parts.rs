//! A bitmap on the wire, in runs of extents with the same pages: one that is all ones or all zeros takes one run a block, and
//! one with scattered pages 12 bytes an extent.

use super::error::WireError;
use super::messages::{BitmapPart, MAX_RUNS, Run};
use crate::bitmap::DirtyBitmap;
use crate::geometry::{ExtentAt, Layout};

/// The parts of a bitmap, block by block. Each is made when it is asked for.
pub fn bitmap_parts(bitmap: &DirtyBitmap) -> impl Iterator<Item = BitmapPart> + Send {
    let blocks = 0..bitmap.layout().block_count();
    blocks.flat_map(|block| PartsOfBlock { bitmap, block, next: 0 })
}

struct PartsOfBlock<'a> {
    bitmap: &'a DirtyBitmap,
    block: u32,
    next: u32,
}

impl Iterator for PartsOfBlock<'_> {
    type Item = BitmapPart;

    fn next(&mut self) -> Option<BitmapPart> {
        let (block, first) = (self.block, self.next);
        let mut runs: Vec<Run> = Vec::new();
        while self.next < self.bitmap.layout().block_extents(block) {
            let mask = self.bitmap.peek(ExtentAt { block, extent: self.next });
            let is_full = runs.len() == MAX_RUNS;
            match runs.last_mut() {
                Some(run) if run.mask == mask => run.extents += 1,
                _ if is_full => break,
                _ => runs.push(Run { extents: 1, mask }),
            }
            self.next += 1;
        }
        (!runs.is_empty()).then_some(BitmapPart { block, first, runs })
    }
}

/// A bitmap that arrives, part by part.
#[derive(Debug)]
pub struct BitmapParts {
    bitmap: DirtyBitmap,
    /// The next extent, by block.
    next: Vec<u32>,
}

impl BitmapParts {
    /// Nothing has arrived.
    #[must_use]
    pub fn new(layout: &Layout) -> Self {
        Self { bitmap: DirtyBitmap::empty(layout), next: vec![0; layout.blocks().len()] }
    }

    /// Adds the next part of a block.
    ///
    /// # Errors
    /// If it is not the next one, or has pages that are not in the block.
    pub fn add(&mut self, part: &BitmapPart) -> Result<(), WireError> {
        let BitmapPart { block, first, ref runs } = *part;
        let layout = self.bitmap.layout();
        let Some(next) = self.next.get_mut(block as usize) else {
            return Err(WireError::NoBlock { block, blocks: layout.block_count() });
        };
        let extents: u64 = runs.iter().map(|run| u64::from(run.extents)).sum();
        if first != *next || extents > u64::from(layout.block_extents(block) - first) {
            return Err(WireError::PartMisplaced { block, first });
        }
        for run in runs {
            for extent in *next..*next + run.extents {
                let at = ExtentAt { block, extent };
                if run.mask & !layout.valid_mask(at) != 0 {
                    return Err(WireError::PartMisplaced { block, first: extent });
                }
                self.bitmap.set_mask(at, run.mask);
            }
            *next += run.extents;
        }
        Ok(())
    }

    /// The bitmap.
    ///
    /// # Errors
    /// If a part has not arrived.
    pub fn finish(self) -> Result<DirtyBitmap, WireError> {
        let layout = self.bitmap.layout();
        let missing = (0..).zip(&self.next).find(|(block, next)| **next != layout.block_extents(*block));
        match missing {
            Some((block, &first)) => Err(WireError::PartMisplaced { block, first }),
            None => Ok(self.bitmap),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::stage::testing::{layout, page_size};
    use crate::wire::Message;

    fn guest() -> Layout {
        // 9000 extents and a partial one; 3 pages.
        layout(page_size(4), &[9000 * 64 * 4096 + 4096, 3 * 4096])
    }

    fn arrived(parts: &[BitmapPart]) -> Result<DirtyBitmap, WireError> {
        let mut arrived = BitmapParts::new(&guest());
        parts.iter().try_for_each(|part| arrived.add(part))?;
        arrived.finish()
    }

    #[test]
    fn a_bitmap_without_gaps_is_small_and_one_with_gaps_arrives() {
        let received = DirtyBitmap::filled(&guest());
        let parts: Vec<_> = bitmap_parts(&received).collect();
        assert_eq!(parts.len(), 2);
        assert!(parts.iter().map(|part| Message::Received(part.clone()).encode(0).len()).sum::<usize>() < 200);
        assert_eq!(arrived(&parts).unwrap().count(), received.count());
    }

    #[test]
    fn parts_that_do_not_follow_are_refused() {
        let parts: Vec<_> = bitmap_parts(&DirtyBitmap::filled(&guest())).collect();
        assert!(arrived(&parts[..1]).is_err(), "a block is missing");
        assert!(arrived(&[parts[0].clone(), parts[0].clone()]).is_err(), "a block comes twice");
        let runs = vec![Run { extents: 1, mask: 0b1000 }];
        assert!(arrived(&[parts[0].clone(), BitmapPart { block: 1, first: 0, runs }]).is_err(), "no such page");
        let runs = vec![Run { extents: 9002, mask: 1 }];
        assert!(arrived(&[BitmapPart { block: 0, first: 0, runs }]).is_err(), "no such extent");
        let runs = vec![Run { extents: 1, mask: 1 }];
        assert!(arrived(&[BitmapPart { block: 7, first: 0, runs }]).is_err(), "no such block");
    }

    proptest! {
        #[test]
        fn what_was_received_is_what_arrives(words in prop::collection::vec((0..9000_u32, any::<u64>()), 0..9000)) {
            let received = DirtyBitmap::empty(&guest());
            words.into_iter().for_each(|(extent, mask)| _ = received.set_mask(ExtentAt { block: 0, extent }, mask));
            let there = arrived(&bitmap_parts(&received).collect::<Vec<_>>()).unwrap();
            for at in received.extents() {
                prop_assert_eq!(there.peek(at), received.peek(at));
            }
        }
    }
}
