//! The received bitmap on the wire, in runs of extents with the same pages: a guest that was received whole takes one run a block, and
//! one with scattered pages 12 bytes an extent.

use super::error::WireError;
use super::messages::{MAX_RUNS, Message, Run};
use crate::bitmap::DirtyBitmap;
use crate::geometry::{ExtentAt, Layout};

/// The messages that carry a bitmap, block by block. Each is made when it is asked for.
pub fn received_messages(received: &DirtyBitmap) -> impl Iterator<Item = Message> + Send {
    let blocks = 0..received.layout().block_count();
    blocks.flat_map(|block| MessagesOfBlock { received, block, next: 0 })
}

struct MessagesOfBlock<'a> {
    received: &'a DirtyBitmap,
    block: u32,
    next: u32,
}

impl Iterator for MessagesOfBlock<'_> {
    type Item = Message;

    fn next(&mut self) -> Option<Message> {
        let (block, first) = (self.block, self.next);
        let mut runs: Vec<Run> = Vec::new();
        while self.next < self.received.layout().block_extents(block) {
            let mask = self.received.peek(ExtentAt { block, extent: self.next });
            let is_full = runs.len() == MAX_RUNS;
            match runs.last_mut() {
                Some(run) if run.mask == mask => run.extents += 1,
                _ if is_full => break,
                _ => runs.push(Run { extents: 1, mask }),
            }
            self.next += 1;
        }
        (!runs.is_empty()).then_some(Message::Received { block, first, runs })
    }
}

/// A received bitmap that arrives, part by part.
#[derive(Debug)]
pub struct ReceivedParts {
    received: DirtyBitmap,
    /// The next extent, by block.
    next: Vec<u32>,
}

impl ReceivedParts {
    /// Nothing has arrived.
    #[must_use]
    pub fn new(layout: &Layout) -> Self {
        Self { received: DirtyBitmap::empty(layout), next: vec![0; layout.blocks().len()] }
    }

    /// Adds the next part of a block.
    ///
    /// # Errors
    /// If it is not the next one, or has pages that are not in the block.
    pub fn add(&mut self, block: u32, first: u32, runs: &[Run]) -> Result<(), WireError> {
        let layout = self.received.layout();
        let Some(next) = self.next.get_mut(block as usize) else {
            return Err(WireError::NoBlock { block, blocks: layout.block_count() });
        };
        let extents: u64 = runs.iter().map(|run| u64::from(run.extents)).sum();
        if first != *next || extents > u64::from(layout.block_extents(block) - first) {
            return Err(WireError::ReceivedMisplaced { block, first });
        }
        for run in runs {
            for extent in *next..*next + run.extents {
                let at = ExtentAt { block, extent };
                if run.mask & !layout.valid_mask(at) != 0 {
                    return Err(WireError::ReceivedMisplaced { block, first: extent });
                }
                self.received.set_mask(at, run.mask);
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
        let layout = self.received.layout();
        let missing = (0..).zip(&self.next).find(|(block, next)| **next != layout.block_extents(*block));
        match missing {
            Some((block, &first)) => Err(WireError::ReceivedMisplaced { block, first }),
            None => Ok(self.received),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::stage::testing::{layout, page_size};

    fn guest() -> Layout {
        // 9000 extents and a partial one; 3 pages.
        layout(page_size(4), &[9000 * 64 * 4096 + 4096, 3 * 4096])
    }

    fn arrived(messages: &[Message]) -> Result<DirtyBitmap, WireError> {
        let mut parts = ReceivedParts::new(&guest());
        for message in messages {
            let Message::Received { block, first, runs } = message else { panic!("{message:?}") };
            parts.add(*block, *first, runs)?;
        }
        parts.finish()
    }

    #[test]
    fn a_bitmap_without_gaps_is_small_and_one_with_gaps_arrives() {
        let received = DirtyBitmap::filled(&guest());
        let messages: Vec<_> = received_messages(&received).collect();
        assert_eq!(messages.len(), 2);
        assert!(messages.iter().map(|message| message.encode(0).len()).sum::<usize>() < 200);
        assert_eq!(arrived(&messages).unwrap().count(), received.count());
    }

    #[test]
    fn parts_that_do_not_follow_are_refused() {
        let messages: Vec<_> = received_messages(&DirtyBitmap::filled(&guest())).collect();
        assert!(arrived(&messages[..1]).is_err(), "a block is missing");
        assert!(arrived(&[messages[0].clone(), messages[0].clone()]).is_err(), "a block comes twice");
        let runs = vec![Run { extents: 1, mask: 0b1000 }];
        assert!(
            arrived(&[messages[0].clone(), Message::Received { block: 1, first: 0, runs }]).is_err(),
            "no such page"
        );
        let runs = vec![Run { extents: 9002, mask: 1 }];
        assert!(arrived(&[Message::Received { block: 0, first: 0, runs }]).is_err(), "no such extent");
        let runs = vec![Run { extents: 1, mask: 1 }];
        assert!(arrived(&[Message::Received { block: 7, first: 0, runs }]).is_err(), "no such block");
    }

    proptest! {
        #[test]
        fn what_was_received_is_what_arrives(words in prop::collection::vec((0..9000_u32, any::<u64>()), 0..9000)) {
            let received = DirtyBitmap::empty(&guest());
            words.into_iter().for_each(|(extent, mask)| _ = received.set_mask(ExtentAt { block: 0, extent }, mask));
            let there = arrived(&received_messages(&received).collect::<Vec<_>>()).unwrap();
            for at in received.extents() {
                prop_assert_eq!(there.peek(at), received.peek(at));
            }
        }
    }
}
