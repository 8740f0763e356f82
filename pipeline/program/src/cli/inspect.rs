//! `memferry inspect`: the contents of a stream in a file, and its first damage.
//!
//! Reads a stream from its first byte with the rules of a destination, for the order of its frames as for their content: it
//! decodes every page, and has no memory to write it to. It returns an [`Inspection`] that displays as a table. What only a
//! destination can know is not checked: its settings, what its guest says of the state, and whether digests match.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use memferry_stages::batch::{Arrived, Mark, PageEncoding, PageFault};
use memferry_stages::decoder::Decoder;
use memferry_stages::dialect::{Deframed, Deframer};
use memferry_stages::geometry::{BulkMap, ExtentAt, LaneMap, Layout, PageSize};
use memferry_stages::untrusted::Untrusted;
use memferry_stages::wire::messages::{RunState, StateChunk, StatePhase};
use memferry_stages::wire::{
    Features, FrameReader, Hello, Incoming, Kind, Message, Preface, ReadError, WireDeframer, WireError,
};
use tokio::io::AsyncRead;

use memferry::human;

/// The contents of a stream.
#[derive(Debug, Default)]
pub struct Inspection {
    hello: Option<Hello>,
    layout: Option<Layout>,
    rounds: BTreeMap<u32, RoundCounts>,
    sections: Vec<Section>,
    end: Option<RunState>,
    bytes: u64,
    frames: u64,
    damage: Option<Damage>,
}

#[derive(Debug, Default)]
struct RoundCounts {
    frames: u64,
    zero: u64,
    raw: u64,
    compressed: u64,
    xbzrle: u64,
    unchanged: u64,
    bytes: u64,
}

#[derive(Debug)]
struct Section {
    phase: StatePhase,
    name: Untrusted,
    version: u32,
    bytes: u64,
}

/// Why a stream is not complete.
#[derive(Debug, thiserror::Error)]
enum Damage {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("frame at byte {offset} of {stream}: {fault}")]
    Pages { offset: u64, stream: String, fault: PageFault },
    #[error("{stream} ends at byte {end} without its end mark: it was cut off")]
    CutOff { stream: String, end: u64 },
}

impl Damage {
    /// The current frame of the stream may not be where it is.
    fn misplaced<R: AsyncRead + Unpin>(reader: &FrameReader<R>, kind: Kind, why: &'static str) -> Self {
        Self::Read(reader.fail(WireError::OutOfPlace { kind, why }).into())
    }

    fn cut_off<R: AsyncRead + Unpin>(reader: &FrameReader<R>) -> Self {
        Self::CutOff { stream: reader.stream().to_owned(), end: reader.bytes_read() }
    }
}

/// The pages so far, as a destination would have them.
struct Pages {
    decoder: Decoder,
    /// Those of each extent that came.
    received: HashMap<ExtentAt, u64>,
    payload: Vec<u8>,
}

impl Inspection {
    /// Is the stream complete?
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.damage.is_none()
    }

    /// Reads a stream to its end or to its first damage. `name` identifies it in messages.
    pub async fn of(stream: impl AsyncRead + Unpin + Send, name: &str) -> Self {
        let mut reader = FrameReader::new(stream, name.to_owned(), PageSize::new(65536).expect("the largest"));
        let mut inspection = Self::default();
        let walked = match inspection.preface(&mut reader).await {
            Ok((layout, lanes, features)) => {
                let mut deframer =
                    WireDeframer::new(0, BulkMap::new(lanes.lanes(), 1), reader, layout, lanes, features);
                let walked = inspection.walk(&mut deframer).await;
                inspection.measure(deframer.reader());
                walked
            }
            Err(damage) => {
                inspection.measure(&reader);
                Err(damage)
            }
        };
        inspection.damage = walked.err();
        inspection
    }

    fn measure<R: AsyncRead + Unpin>(&mut self, reader: &FrameReader<R>) {
        (self.bytes, self.frames) = (reader.bytes_read(), reader.frames());
    }

    /// Reads the stream up to its blocks.
    async fn preface<R: AsyncRead + Unpin>(
        &mut self,
        reader: &mut FrameReader<R>,
    ) -> Result<(Layout, LaneMap, Features), Damage> {
        let mut preface = Preface::default();
        while let Some(incoming) = reader.next().await? {
            preface.check(&incoming).map_err(|error| ReadError::from(reader.fail(error)))?;
            let Incoming::Message { message, .. } = incoming else { continue };
            match (message, &self.hello) {
                (Message::Hello(hello), _) if hello.connections > 1 => {
                    return Err(Damage::misplaced(reader, Kind::Hello, "a file holds one connection"));
                }
                (Message::Hello(hello), _) => {
                    reader.set_page_size(hello.page_size);
                    self.hello = Some(hello);
                }
                (Message::Blocks(blocks), Some(hello)) => {
                    let Ok(layout) = Layout::new(hello.page_size, blocks) else {
                        return Err(Damage::misplaced(reader, Kind::Blocks, "its blocks are no guest's"));
                    };
                    self.layout = Some(layout.clone());
                    let features = Features::from_list(&hello.features);
                    let features = features.map_err(|error| ReadError::from(reader.fail(error)))?;
                    return Ok((layout, LaneMap::new(hello.lanes, hello.page_size), features));
                }
                (message, _) => self.message(reader, message)?,
            }
        }
        Err(Damage::cut_off(reader))
    }

    /// Reads the stream from its blocks to its end.
    async fn walk<R: AsyncRead + Unpin + Send>(&mut self, deframer: &mut WireDeframer<R>) -> Result<(), Damage> {
        let page_size = self.layout.as_ref().map_or(PageSize::DEFAULT, Layout::page_size);
        let mut pages = Pages { decoder: Decoder::new(page_size), received: HashMap::new(), payload: Vec::new() };
        while let Some(deframed) = deframer.next().await? {
            match deframed {
                Deframed::Batch { arrived, bytes, .. } => {
                    pages.add(deframer, &arrived).await?;
                    self.count(&arrived, bytes);
                }
                Deframed::Mark { mark: Mark::RoundComplete(tally), .. } => {
                    self.rounds.entry(tally.round).or_default().unchanged += tally.pages.unchanged;
                }
                Deframed::Mark { .. } => {}
                Deframed::Message(message) => self.message(deframer.reader(), message)?,
            }
        }
        if self.end.is_some() { Ok(()) } else { Err(Damage::cut_off(deframer.reader())) }
    }

    fn count(&mut self, arrived: &Arrived, bytes: u64) {
        let round = self.rounds.entry(arrived.round).or_default();
        round.frames += 1;
        round.zero += u64::from(arrived.zero.count_ones());
        round.bytes += bytes;
        for (encoding, _) in &arrived.pages {
            *round.counter(*encoding) += 1;
        }
    }

    /// Notes a message whose place was checked.
    fn message<R: AsyncRead + Unpin>(&mut self, reader: &FrameReader<R>, message: Message) -> Result<(), Damage> {
        match message {
            Message::State(chunk) => self.state(chunk),
            Message::End { frames, .. } if frames != self.pages_frames() => {
                let why = "it counts another number of Pages frames before it";
                return Err(Damage::misplaced(reader, Kind::End, why));
            }
            Message::End { run_state, .. } => self.end = Some(run_state),
            Message::Abort(_) => return Err(Damage::misplaced(reader, Kind::Abort, "the source gave up")),
            Message::Go(_) => return Err(Damage::misplaced(reader, Kind::Go, "a stored stream has no handover")),
            _ => {}
        }
        Ok(())
    }

    fn pages_frames(&self) -> u64 {
        self.rounds.values().map(|round| round.frames).sum()
    }

    fn state(&mut self, chunk: StateChunk) {
        let bytes = chunk.bytes.len() as u64;
        match self.sections.last_mut().filter(|last| last.phase == chunk.phase && last.name == chunk.name) {
            Some(section) => section.bytes += bytes,
            None => {
                let section = Section { phase: chunk.phase, name: chunk.name, version: chunk.version, bytes };
                self.sections.push(section);
            }
        }
    }
}

impl Pages {
    /// Reads the payload of a batch and checks it as a loader would.
    async fn add<R: AsyncRead + Unpin + Send>(
        &mut self,
        deframer: &mut WireDeframer<R>,
        arrived: &Arrived,
    ) -> Result<(), Damage> {
        self.payload.resize(arrived.payload_bytes(), 0);
        deframer.payload(&mut self.payload).await?;
        let received = self.received.entry(arrived.at).or_default();
        let checked = self.decoder.check(arrived, &self.payload, *received);
        let stream = || deframer.reader().stream().to_owned();
        *received = checked.map_err(|fault| Damage::Pages { offset: arrived.offset, stream: stream(), fault })?;
        Ok(())
    }
}

impl RoundCounts {
    fn counter(&mut self, encoding: PageEncoding) -> &mut u64 {
        match encoding {
            PageEncoding::Raw => &mut self.raw,
            PageEncoding::Snap | PageEncoding::Lz4 | PageEncoding::Zstd | PageEncoding::Grouped => &mut self.compressed,
            PageEncoding::Xbzrle => &mut self.xbzrle,
        }
    }
}

impl fmt::Display for Inspection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(hello) = &self.hello {
            self.fmt_hello(f, hello)?;
        }
        if let Some(layout) = &self.layout {
            writeln!(f, "\n{:<24} {:>10} {:>14} {:>18}", "block", "bytes", "pages", "guest address")?;
            for (index, block) in layout.blocks().iter().enumerate() {
                let pages = layout.block_pages(u32::try_from(index).expect("few blocks"));
                let (bytes, pages) = (human::bytes(block.length), human::count(pages));
                let ignored = if block.ignored { "  ignored" } else { "" };
                writeln!(f, "{:<24} {bytes:>10} {pages:>14} {:>#18x}{ignored}", block.id, block.guest_address)?;
            }
        }
        self.fmt_rounds(f)?;
        self.fmt_sections(f)?;
        match (&self.damage, self.end) {
            (Some(damage), _) => write!(f, "\ndamaged: {damage}"),
            (None, Some(RunState::Running)) => write!(f, "\nwhole: the end mark is there; the guest ran"),
            (None, _) => write!(f, "\nwhole: the end mark is there; the guest was paused"),
        }
    }
}

impl Inspection {
    fn fmt_hello(&self, f: &mut fmt::Formatter<'_>, hello: &Hello) -> fmt::Result {
        let features = hello.features.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        writeln!(f, "protocol    {}", hello.version)?;
        writeln!(f, "session     {}", hello.session)?;
        writeln!(f, "connection  {} of {}, {}", hello.connection, hello.connections, hello.role)?;
        writeln!(f, "lanes       {} on {} bulk connections", hello.lanes, hello.bulk)?;
        writeln!(f, "page size   {}", human::bytes(hello.page_size.bytes() as u64))?;
        writeln!(f, "features    {}", if features.is_empty() { "none" } else { &features })?;
        writeln!(f, "stream      {} in {} frames", human::bytes(self.bytes), human::count(self.frames))
    }

    fn fmt_rounds(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.rounds.is_empty() {
            return Ok(());
        }
        let heads = ["frames", "zero", "raw", "compressed", "xbzrle", "unchanged", "bytes"];
        write!(f, "\nround")?;
        heads.iter().try_for_each(|head| write!(f, " {head:>11}"))?;
        for (round, counts) in &self.rounds {
            write!(f, "\n{round:>5}")?;
            let pages = [counts.frames, counts.zero, counts.raw, counts.compressed, counts.xbzrle, counts.unchanged];
            pages.iter().try_for_each(|count| write!(f, " {:>11}", human::count(*count)))?;
            write!(f, " {:>11}", human::bytes(counts.bytes))?;
        }
        writeln!(f)
    }

    fn fmt_sections(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.sections.is_empty() {
            return Ok(());
        }
        writeln!(f, "\n{:<24} {:>8} {:>8} {:>10}", "state section", "part", "version", "bytes")?;
        for Section { phase, name, version, bytes } in &self.sections {
            let part = match phase {
                StatePhase::Setup => "setup",
                StatePhase::Device => "device",
            };
            writeln!(f, "{name:<24} {part:>8} {version:>8} {:>10}", human::bytes(*bytes))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use memferry_stages::batch::RoundKind;
    use memferry_stages::codec::{Codec, Compressor};
    use memferry_stages::geometry::BlockInfo;
    use memferry_stages::tally::{PageTally, RoundTally};
    use memferry_stages::wire::{PagesHead, SessionId};

    /// A stream of one round: one raw page, one zero page.
    fn stream() -> Vec<u8> {
        let features = Features { checksum: true, ..Features::default() };
        stream_of(features, 0b11, 0b10, vec![(PageEncoding::Raw, 4096)], &[9; 4096])
    }

    /// A stream of one round of one frame.
    fn stream_of(features: Features, mask: u64, zero: u64, pages: Vec<(PageEncoding, u32)>, payload: &[u8]) -> Vec<u8> {
        let hello = Hello::bulk(SessionId([7; 16]), 0, 1, 1, PageSize::DEFAULT, features.to_list());
        let block = BlockInfo { guest_address: 0x4000_0000, ..BlockInfo::new("ram", 1 << 20) };
        let pages = PagesHead { at: ExtentAt { block: 0, extent: 0 }, round: 1, mask, zero, payload_hash: 0, pages }
            .with_hash_of(payload);
        let section = |end| StateChunk {
            phase: StatePhase::Device,
            name: "cpu".into(),
            version: 3,
            end,
            bytes: vec![1; 10].into(),
        };
        let head: [&[u8]; 4] =
            [&Message::Hello(hello).encode(0), &Message::Blocks(vec![block]).encode(0), &pages.to_bytes(0), payload];
        let tail: [&[u8]; 5] = [
            &Message::RoundComplete(RoundTally {
                pages: PageTally { unchanged: 5, ..PageTally::default() },
                ..RoundTally::new(1, RoundKind::Final)
            })
            .encode(0),
            &Message::LaneEnds.encode(0),
            &Message::State(section(false)).encode(0),
            &Message::State(section(true)).encode(0),
            &Message::End { run_state: RunState::Running, frames: 1 }.encode(0),
        ];
        [head.concat(), tail.concat()].concat()
    }

    fn inspect(bytes: &[u8]) -> Inspection {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(Inspection::of(bytes, "guest.memferry"))
    }

    #[test]
    fn a_whole_stream_is_laid_out() {
        let inspection = inspect(&stream());
        assert!(inspection.is_whole(), "{inspection}");
        insta::assert_snapshot!(inspection, @r"
        protocol    4
        session     07070707070707070707070707070707
        connection  0 of 1, bulk
        lanes       1 on 1 bulk connections
        page size   4.00 KiB
        features    payload-xxh3
        stream      4.49 KiB in 8 frames

        block                         bytes          pages      guest address
        ram                        1.00 MiB            256         0x40000000

        round      frames        zero         raw  compressed      xbzrle   unchanged       bytes
            1           1           1           1           0           0           5    4.07 KiB

        state section                part  version      bytes
        cpu                        device        3       20 B

        whole: the end mark is there; the guest ran
        ");
    }

    /// Every feature that a stored stream may have: its source does not return.
    const STORED: Features = Features { recovery: false, ..Features::ALL };

    /// Pages of one byte, compressed together.
    fn compressed(codec: Codec, pages: usize) -> Vec<u8> {
        let mut out = vec![0; pages * 4096 - 1];
        let bytes = Compressor::new(codec).compress(&vec![9; pages * 4096], &mut out).unwrap();
        out.truncate(bytes);
        out
    }

    #[test]
    fn each_page_of_a_group_counts_as_compressed() {
        let (group, alone) = (compressed(Codec::Zstd { level: 1 }, 3), compressed(Codec::Lz4, 1));
        let length = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap();
        let (grouped, raw) = ((PageEncoding::Grouped, 0), (PageEncoding::Raw, 4096));
        let (first, last) = ((PageEncoding::Zstd, length(&group)), (PageEncoding::Lz4, length(&alone)));
        let pages = vec![first, grouped, raw, grouped, last];
        let payload = [&group[..], &[9; 4096], &alone].concat();
        let inspection = inspect(&stream_of(STORED, 0b11_1111, 0b10, pages.clone(), &payload));
        assert!(inspection.is_whole(), "{inspection}");
        let round = &inspection.rounds[&1];
        assert_eq!((round.zero, round.raw, round.compressed, round.xbzrle), (1, 1, 4, 0));

        let alone = Features { groups: false, ..STORED };
        let inspection = inspect(&stream_of(alone, 0b11_1111, 0b10, pages, &payload));
        assert!(inspection.to_string().contains("page 2 of block 0 is coded as grouped, which was not agreed on"));
    }

    #[test]
    fn a_page_that_no_destination_could_decode_is_damage() {
        let inspection = inspect(&stream_of(STORED, 1, 0, vec![(PageEncoding::Lz4, 100)], &[0xff; 100]));
        assert!(inspection.to_string().contains("page 0 of block 0 cannot be decoded: lz4"), "{inspection}");
        let inspection = inspect(&stream_of(STORED, 1, 0, vec![(PageEncoding::Xbzrle, 3)], &[0, 1, 7]));
        assert!(inspection.to_string().contains("which was not loaded before"), "{inspection}");
    }

    #[test]
    fn a_stream_cut_anywhere_is_damaged_and_says_where() {
        let bytes = stream();
        for length in 0..bytes.len() {
            let inspection = inspect(&bytes[..length]);
            assert!(!inspection.is_whole(), "cut at {length}");
            assert!(inspection.to_string().contains(&format!("byte {length}")), "cut at {length}: {inspection}");
        }
    }

    #[test]
    fn a_flipped_bit_anywhere_is_damage() {
        let mut bytes = stream();
        for at in 0..bytes.len() {
            bytes[at] ^= 1 << (at % 8);
            let inspection = inspect(&bytes);
            assert!(!inspection.is_whole(), "byte {at}");
            assert!(inspection.to_string().contains("damaged: frame at byte "), "byte {at}: {inspection}");
            bytes[at] ^= 1 << (at % 8);
        }
    }

    #[test]
    fn what_follows_the_end_mark_is_damage() {
        let mut bytes = stream();
        bytes.extend_from_slice(&Message::LaneEnds.encode(0));
        assert!(inspect(&bytes).to_string().contains("it follows the end mark"));
    }
}
