use std::sync::Mutex;

use proptest::prelude::*;

use super::recorder::{Deed, Recorder};
use super::*;
use crate::batch::RoundKind;
use crate::bitmap::DirtyBitmap;
use crate::codec::Codec;
use crate::geometry::{PageAt, PageSize};
use crate::queue::bounded;
use crate::tally::RoundTally;
use crate::wire::frames::{Frame, PAGE};
use crate::xbzrle::Delta;

/// Pages of the guest of these tests: two extents, the second partial.
const PAGES: usize = 64 + 17;
const CODECS: [Codec; 3] = [Codec::Snap, Codec::Lz4, Codec::Zstd { level: 1 }];

/// A loader of a guest that holds 0xee everywhere (a fresh one holds zeros), and what it works on.
struct Bed {
    loader: Loader,
    memory: Arc<Recorder>,
    received: Arc<DirtyBitmap>,
    progress: Arc<LaneProgress>,
}

fn bed(fresh: bool) -> Bed {
    let (guest, memory, received) = Recorder::guest(vec![if fresh { 0 } else { 0xee }; PAGES * PAGE], fresh);
    let progress = Arc::new(LaneProgress::default());
    let meter = Meter::start(StageId::loader(3));
    let loader = Loader::new(3, Direct::new(guest, received.clone()), progress.clone(), meter);
    Bed { loader, memory, received, progress }
}

impl Bed {
    fn load(&mut self, frame: &Frame) -> Result<(), StageError> {
        self.loader.batch(&frame.arrived(1000))
    }

    /// The error of a frame that cannot be loaded.
    fn refuses(&mut self, frame: &Frame) -> PageFault {
        match self.load(frame).unwrap_err().cause {
            Cause::Pages { offset, fault } => {
                assert_eq!(offset, 1000);
                fault
            }
            other => panic!("{other}"),
        }
    }

    fn received(&self) -> [u64; 2] {
        [0, 1].map(|extent| self.received.peek(ExtentAt { block: 0, extent }))
    }

    fn page(&self, page: usize) -> Vec<u8> {
        self.memory.bytes()[page * PAGE..][..PAGE].to_vec()
    }
}

/// A page of a pattern of its own that compresses well.
fn text(number: u8) -> Vec<u8> {
    (0..PAGE).map(|at| b"memory that moves "[at % 18] ^ number).collect()
}

fn at(page: u64) -> PageAt {
    PageAt { block: 0, page }
}

#[test]
fn zero_pages_of_a_fresh_block_are_not_touched_until_something_was_loaded_there() {
    let mut bed = bed(true);
    bed.load(&Frame::new(0, 1).zero(0).zero(1).zero(5)).unwrap();
    assert_eq!((bed.memory.deeds(), bed.received()), (vec![], [0b10_0011, 0]));
    bed.load(&Frame::new(0, 1).raw(7, &text(1))).unwrap();
    assert_eq!(bed.memory.deeds(), [Deed::Wrote(7..8)]);
    // Received pages are made zero: 0, 1, 5 and 7 may hold any content; 6 was never received.
    bed.load(&Frame::new(0, 2).zero(0).zero(1).zero(5).zero(6).zero(7)).unwrap();
    assert_eq!(bed.memory.deeds(), [Deed::Zeroed(0..2), Deed::Zeroed(5..6), Deed::Zeroed(7..8)]);
    assert_eq!((bed.page(7), bed.received()), (vec![0; PAGE], [0b1110_0011, 0]));
}

#[test]
fn zero_pages_of_any_other_block_are_written() {
    let mut bed = bed(false);
    bed.load(&Frame::new(1, 1).zero(0).zero(1).zero(2).zero(16)).unwrap();
    assert_eq!(bed.memory.deeds(), [Deed::Zeroed(64..67), Deed::Zeroed(80..81)]);
    assert_eq!(bed.received(), [0, 0b1_0000_0000_0000_0111]);
}

#[test]
fn raw_pages_side_by_side_are_written_at_once() {
    let mut bed = bed(true);
    let frame = Frame::new(0, 1).raw(2, &text(2)).raw(3, &text(3)).zero(4).raw(5, &text(5));
    let frame = frame.compressed(6, Codec::Lz4, &text(6)).raw(7, &text(7)).raw(8, &text(8)).raw(9, &text(9));
    bed.load(&frame).unwrap();
    assert_eq!(bed.memory.deeds(), [2..4, 5..6, 6..7, 7..10].map(Deed::Wrote));
    for page in [2, 3, 5, 6, 7, 8, 9] {
        assert_eq!(bed.page(usize::from(page)), text(page), "page {page}");
    }
}

#[test]
fn a_damaged_payload_writes_nothing_of_its_frame() {
    let mut bed = bed(false);
    let mut frame = Frame::new(0, 1).zero(0).raw(2, &text(2)).compressed(3, Codec::Snap, &text(3));
    frame.payload[4000] ^= 1;
    let expected = frame.head.payload_hash;
    assert!(matches!(bed.refuses(&frame), PageFault::PayloadHash { expected: hash, .. } if hash == expected));
    assert_eq!((bed.memory.deeds(), bed.received()), (vec![], [0, 0]));
    assert_eq!(bed.progress.frames.load(Ordering::Acquire), 0);
}

#[test]
fn without_checksums_the_hash_is_not_looked_at() {
    let mut bed = bed(true);
    let arrived = Frame::new(0, 1).raw(2, &text(2)).arrived(0);
    bed.loader.batch(&Arrived { payload_hash: None, ..arrived }).unwrap();
    assert_eq!(bed.page(2), text(2));
}

#[test]
fn a_page_that_cannot_be_decompressed_stays_as_it_was() {
    for codec in CODECS {
        let mut bed = bed(false);
        bed.load(&Frame::new(0, 1).raw(9, &text(9))).unwrap();
        let whole = Frame::new(0, 1).compressed(9, codec, &text(1));
        let good = &whole.payload;
        let cut = &good[..good.len() - 1];
        let longer = [&good[..], good].concat();
        for bad in [cut, &longer, &[0xff; 100], &[0]] {
            let error = bed.refuses(&Frame::new(0, 2).coded(9, codec.encoding(), bad));
            assert!(matches!(error, PageFault::Undecodable { page, .. } if page == at(9)), "{codec:?}: {error}");
            assert_eq!((bed.page(9), bed.received()), (text(9), [1 << 9, 0]), "{codec:?}");
        }
        bed.load(&whole).unwrap();
        assert_eq!(bed.page(9), text(1));
    }
}

#[test]
fn the_pages_of_a_group_are_written_in_runs_wherever_they_lie() {
    for codec in CODECS {
        let mut bed = bed(true);
        let group: Vec<_> = [2_u32, 3, 4, 7, 9, 10].map(|bit| (bit, text(bit.to_le_bytes()[0]))).to_vec();
        let mut frame = Frame::new(0, 1).zero(1).group(codec, &group[..3]);
        // The last three of the group stand behind pages that are none of it.
        frame = frame.raw(5, &text(5)).zero(6);
        for (bit, _) in &group[3..] {
            frame = if *bit == 9 { frame.raw(8, &text(8)) } else { frame }.coded(*bit, PageEncoding::Grouped, &[]);
        }
        let whole = Frame::new(0, 1).group(codec, &group);
        let tail = frame.payload.split_off(frame.head.pages[0].1 as usize);
        frame.payload = [whole.payload, tail].concat();
        frame.head.pages[0] = whole.head.pages[0];
        bed.load(&frame.sealed().group(codec, &[(11, text(11)), (12, text(12))])).unwrap();
        assert_eq!(bed.memory.deeds(), [2..5, 7..8, 9..11, 5..6, 8..9, 11..13].map(Deed::Wrote), "{codec}");
        for page in [2, 3, 4, 5, 7, 8, 9, 10, 11, 12] {
            assert_eq!(bed.page(usize::from(page)), text(page), "{codec}, page {page}");
        }
        assert_eq!(bed.received(), [0b1_1111_1111_1110, 0]);
    }
}

#[test]
fn a_group_that_is_not_exactly_its_pages_leaves_all_of_them_as_they_were() {
    for codec in CODECS {
        let mut bed = bed(false);
        let before = Frame::new(0, 1).raw(8, &text(8)).raw(9, &text(9)).raw(10, &text(10));
        bed.load(&before).unwrap();
        let three = Frame::new(0, 2).group(codec, &[(8, text(1)), (9, text(2)), (10, text(3))]).payload;
        let group = |bytes: &[u8], pages: u32| {
            let first = Frame::new(0, 2).coded(8, codec.encoding(), bytes);
            (9..8 + pages).fold(first, |frame, bit| frame.coded(bit, PageEncoding::Grouped, &[]))
        };
        let cut = &three[..three.len() - 1];
        for bad in [group(&three, 1), group(&three, 2), group(&three, 4), group(cut, 3), group(&[0xff; 5000], 3)] {
            let error = bed.refuses(&bad);
            assert!(matches!(error, PageFault::Undecodable { page, .. } if page == at(8)), "{codec:?}: {error}");
            assert_eq!([8, 9, 10].map(|page| bed.page(page)), [8, 9, 10].map(text), "{codec:?}");
            assert_eq!(bed.received(), [0b111 << 8, 0]);
        }
        bed.load(&group(&three, 3)).unwrap();
        assert_eq!([8, 9, 10].map(|page| bed.page(page)), [1, 2, 3].map(text));
    }
}

#[test]
fn a_delta_is_checked_whole_before_its_page_is_touched() {
    let mut bed = bed(true);
    let mut new = text(1);
    (new[100], new[4000]) = (0, 0);
    let whole = Frame::new(0, 2).delta(9, &text(1), &new);
    assert_eq!(whole.head.pages.len(), 1);
    assert_eq!(bed.refuses(&whole), PageFault::NotHeld { page: at(9) });
    bed.load(&Frame::new(0, 1).raw(9, &text(1))).unwrap();
    for cut in 1..whole.payload.len() {
        let error = bed.load(&Frame::new(0, 2).coded(9, PageEncoding::Xbzrle, &whole.payload[..cut]));
        // A delta that ends after its first run is whole, and another one.
        if let Err(error) = error {
            assert!(error.to_string().contains("page 9 of block 0"), "{error}");
            assert_eq!((bed.page(9), bed.received()), (text(1), [1 << 9, 0]));
        } else {
            bed.load(&Frame::new(0, 1).raw(9, &text(1))).unwrap();
        }
    }
    bed.load(&whole).unwrap();
    assert_eq!(bed.page(9), new);
}

#[test]
fn a_delta_may_patch_a_page_that_came_as_zero() {
    for fresh in [true, false] {
        let mut bed = bed(fresh);
        let mut new = vec![0; PAGE];
        new[17] = 1;
        bed.load(&Frame::new(0, 1).zero(9)).unwrap();
        bed.load(&Frame::new(0, 2).delta(9, &[0; PAGE], &new)).unwrap();
        // In a fresh block the page was never written; in any other it held something else.
        let cleared = if fresh { vec![] } else { vec![Deed::Zeroed(9..10)] };
        assert_eq!((bed.memory.deeds(), bed.page(9)), ([cleared, vec![Deed::Patched(9)]].concat(), new.clone()));
        let unnamed = Frame::new(0, 2).delta(8, &[0; PAGE], &new);
        assert_eq!(bed.refuses(&unnamed), PageFault::NotHeld { page: at(8) }, "no frame has named it");
    }
}

#[test]
fn a_page_whose_write_failed_is_not_held() {
    let mut bed = bed(false);
    bed.load(&Frame::new(0, 1).raw(1, &text(1)).raw(2, &text(2)).raw(40, &text(3))).unwrap();
    *bed.memory.full.lock().unwrap() = true;
    let error = bed.load(&Frame::new(0, 2).raw(1, &text(4)).raw(2, &text(4)).raw(40, &text(4))).unwrap_err();
    assert_eq!(error.to_string(), "loader of lane 3: cannot write page 1 of block 0: no storage space");
    assert_eq!(bed.received(), [1 << 40, 0]);
}

#[tokio::test]
async fn frames_are_acknowledged_and_marks_reported_in_order_until_the_lane_ends() {
    let Bed { loader, progress, memory, .. } = bed(true);
    let meter = loader.stage.meter.clone();
    let ((input_end, input), (output, reports)) = (bounded(8), bounded(8));
    let tally = RoundTally::new(1, RoundKind::Final);
    input_end.put(Item::Batch(Frame::new(0, 1).raw(1, &text(1)).zero(2).arrived(0))).await.unwrap();
    input_end.put(Item::Batch(Frame::new(1, 1).arrived(9))).await.unwrap();
    let marks = [Mark::RoundComplete(tally), Mark::Checkpoint(1), Mark::DirectEnds, Mark::LaneEnds];
    for mark in marks {
        input_end.put(Item::Mark(mark)).await.unwrap();
    }
    loader.run(input, output).await.unwrap();
    for mark in marks {
        assert_eq!(reports.next().await, Some(Loaded { lane: 3, mark }));
    }
    assert_eq!(reports.next().await, None);
    assert_eq!((progress.frames.load(Ordering::Acquire), progress.bytes.load(Ordering::Acquire)), (2, 8192));
    assert_eq!((meter.read().batches, meter.read().pages, memory.deeds().len()), (2, 2, 1));
}

/// What happens to one page in one frame of a random run.
#[derive(Clone, Copy, Debug)]
enum Step {
    Zero,
    Raw(u8),
    Compressed(usize, u8),
    /// With the steps behind it that say the same, up to the most that a group may have.
    Group(usize, u8),
    Delta(u16),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        Just(Step::Zero),
        any::<u8>().prop_map(Step::Raw),
        (0..CODECS.len(), any::<u8>()).prop_map(|(codec, number)| Step::Compressed(codec, number)),
        (0..CODECS.len(), any::<u8>()).prop_map(|(codec, number)| Step::Group(codec, number)),
        any::<u16>().prop_map(Step::Delta),
    ]
}

/// A frame that makes the steps, and what they make of the model's pages. A delta of a page that the model does not hold
/// goes raw, as an encoder would have it.
fn frame_of(steps: &[(u32, Step)], extent: u32, model: &mut [Option<Vec<u8>>]) -> Frame {
    let mut frame = Frame::new(extent, 1);
    let (mut steps, mut group) = (steps.iter().copied().peekable(), Vec::new());
    while let Some((bit, step)) = steps.next() {
        let page = &mut model[extent as usize * 64 + bit as usize];
        let new = match step {
            Step::Zero => vec![0; PAGE],
            Step::Raw(number) | Step::Compressed(_, number) | Step::Group(_, number) => text(number),
            Step::Delta(seed) => {
                let mut new = page.clone().unwrap_or_else(|| vec![1; PAGE]);
                (0..4).for_each(|turn| new[(usize::from(seed) * 7 + turn * 997) % PAGE] ^= 0x55);
                new
            }
        };
        frame = match (step, &page) {
            (Step::Zero, _) => frame.zero(bit),
            (Step::Compressed(codec, _), _) => frame.compressed(bit, CODECS[codec], &new),
            (Step::Group(codec, _), _) => {
                group.push((bit, new.clone()));
                *page = Some(new);
                if let Some((_, Step::Group(next, _))) = steps.peek()
                    && *next == codec
                    && group.len() < 16
                {
                    continue;
                }
                frame = frame.group(CODECS[codec], &std::mem::take(&mut group));
                continue;
            }
            (Step::Delta(_), Some(old)) => frame.delta(bit, old, &new),
            _ => frame.raw(bit, &new),
        };
        *page = Some(new);
    }
    frame
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn memory_is_what_a_naive_model_makes_of_the_frames(
        fresh: bool,
        frames in prop::collection::vec(
            (0_u32..2, prop::collection::btree_map(0_u32..64, step(), 0..24)),
            1..12,
        ),
    ) {
        let mut bed = bed(fresh);
        let mut model = vec![None; PAGES];
        for (extent, steps) in frames {
            let steps: Vec<_> =
                steps.into_iter().filter(|&(bit, _)| (extent * 64 + bit) < u32::try_from(PAGES).unwrap()).collect();
            bed.load(&frame_of(&steps, extent, &mut model)).unwrap();
            let memory = bed.memory.bytes();
            for (number, (page, expected)) in memory.chunks_exact(PAGE).zip(&model).enumerate() {
                let untouched = vec![if fresh { 0 } else { 0xee }; PAGE];
                prop_assert!(page == expected.as_ref().unwrap_or(&untouched).as_slice(), "page {}", number);
                prop_assert_eq!(bed.received.is_set(at(number as u64)), expected.is_some());
            }
        }
    }
}

/// A sink that notes its calls.
#[derive(Debug, Default)]
struct Noted {
    calls: Arc<Mutex<Vec<Call>>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Call {
    Begin { extent: u32, zero: u64, others: u64 },
    Write { pages: u64, bytes: usize },
    Patch(u64),
    Mark(Mark),
}

impl Noted {
    fn note(&mut self, call: Call) -> Result<(), SinkError> {
        self.calls.lock().unwrap().push(call);
        Ok(())
    }
}

impl PageSink for Noted {
    fn page_size(&self) -> PageSize {
        PageSize::DEFAULT
    }
    fn begin(&mut self, at: ExtentAt, zero: u64, others: u64) -> Result<(), SinkError> {
        self.note(Call::Begin { extent: at.extent, zero, others })
    }
    fn write(&mut self, _at: ExtentAt, pages: u64, bytes: &[u8], _: &[u64]) -> Result<(), SinkError> {
        self.note(Call::Write { pages, bytes: bytes.len() })
    }
    fn patch(&mut self, page: PageAt, _delta: &Delta<'_>) -> Result<(), SinkError> {
        if page.page == 9 { Err(SinkError::NotReceived(page)) } else { self.note(Call::Patch(page.page)) }
    }
    fn mark(&mut self, mark: Mark) -> Result<(), SinkError> {
        self.note(Call::Mark(mark))
    }
}

#[tokio::test]
async fn any_sink_gets_each_batch_decoded_in_runs_with_the_marks_in_their_places() {
    let sink = Noted::default();
    let calls = sink.calls.clone();
    let meter = Meter::start(StageId::loader(3));
    let loader = Loader::new(3, sink, Arc::default(), meter);
    let ((input_end, input), (output, reports)) = (bounded(8), bounded(8));
    let changed = |page: u8| {
        let mut changed = text(page);
        changed[7] ^= 1;
        changed
    };
    let first = Frame::new(0, 1).raw(2, &text(2)).raw(3, &text(3)).zero(4).compressed(6, Codec::Lz4, &text(6));
    let second = Frame::new(1, 2).delta(0, &text(0), &changed(0));
    let refused = Frame::new(0, 2).delta(9, &text(9), &changed(9));
    input_end.put(Item::Batch(first.arrived(0))).await.unwrap();
    input_end.put(Item::Mark(Mark::Checkpoint(1))).await.unwrap();
    input_end.put(Item::Batch(second.arrived(0))).await.unwrap();
    input_end.put(Item::Batch(refused.arrived(77))).await.unwrap();
    let error = loader.run(input, output).await.unwrap_err();
    assert!(matches!(error.cause, Cause::Pages { offset: 77, fault: PageFault::NotHeld { page } } if page == at(9)));
    assert_eq!(reports.next().await, Some(Loaded { lane: 3, mark: Mark::Checkpoint(1) }));
    let calls = calls.lock().unwrap().clone();
    assert_eq!(
        calls,
        [
            Call::Begin { extent: 0, zero: 1 << 4, others: 0b100_1100 },
            Call::Write { pages: 0b1100, bytes: 2 * PAGE },
            Call::Write { pages: 1 << 6, bytes: PAGE },
            Call::Mark(Mark::Checkpoint(1)),
            Call::Begin { extent: 1, zero: 0, others: 1 },
            Call::Patch(64),
            Call::Begin { extent: 0, zero: 0, others: 1 << 9 },
        ]
    );
}

#[test]
fn direct_takes_no_pages_after_direct_ends() {
    let mut bed = bed(true);
    bed.load(&Frame::new(0, 1).raw(1, &text(1))).unwrap();
    bed.loader.sink.mark(Mark::DirectEnds).unwrap();
    let refused = bed.refuses(&Frame::new(0, 1).zero(1).raw(2, &text(2)));
    assert_eq!(refused, PageFault::DirectEnded);
    assert_eq!((bed.page(1), bed.received()), (text(1), [0b10, 0]));
}
