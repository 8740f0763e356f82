//! `memferry inspect`: the contents of a stream in a file, and its first damage.
//!
//! Reads a stream from its first byte, checks every frame and every payload, and returns an [`Inspection`] that
//! displays as a table. A stream is complete if its end mark follows the last frame and has the right count of Pages
//! frames.

use std::collections::BTreeMap;
use std::fmt;

use memferry_stages::geometry::{LaneMap, Layout, PageSize};
use memferry_stages::untrusted::Untrusted;
use memferry_stages::wire::hello::feature;
use memferry_stages::wire::messages::{RunState, StatePhase};
use memferry_stages::wire::{
    FrameReader, HEAD_BYTES, Hello, Incoming, Kind, Message, PageEncoding, PagesFrame, ReadError, WireError,
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
    damage: Option<String>,
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

impl Inspection {
    /// Is the stream complete?
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.damage.is_none()
    }

    /// Reads a stream to its end or to its first damage. `name` identifies it in messages.
    pub async fn of(stream: impl AsyncRead + Unpin, name: &str) -> Self {
        let mut reader = FrameReader::new(stream, name.to_owned(), PageSize::new(65536).expect("the largest"));
        let mut inspection = Self::default();
        let walked = inspection.walk(&mut reader).await;
        inspection.bytes = reader.bytes_read();
        inspection.frames = reader.frames();
        inspection.damage = match walked {
            Ok(()) if inspection.end.is_none() => {
                Some(format!("{name} ends at byte {} without its end mark: it was cut off", reader.bytes_read()))
            }
            Ok(()) => None,
            Err(error) => Some(error.to_string()),
        };
        inspection
    }

    async fn walk<R: AsyncRead + Unpin>(&mut self, reader: &mut FrameReader<R>) -> Result<(), ReadError> {
        let mut payload = Vec::new();
        while let Some(incoming) = reader.next().await? {
            if self.end.is_some() {
                return Err(reader.fail(out_of_place(&incoming, "it follows the end mark")).into());
            }
            match incoming {
                Incoming::Pages(frame) => self.pages(reader, &frame, &mut payload).await?,
                Incoming::Message { message, .. } => self.message(reader, message)?,
            }
        }
        Ok(())
    }

    async fn pages<R: AsyncRead + Unpin>(
        &mut self,
        reader: &mut FrameReader<R>,
        frame: &PagesFrame,
        payload: &mut Vec<u8>,
    ) -> Result<(), ReadError> {
        let (Some(layout), Some(hello)) = (&self.layout, &self.hello) else {
            return Err(reader
                .fail(WireError::OutOfPlace { kind: Kind::Pages, why: "no blocks came before it" })
                .into());
        };
        let head = reader.parse_pages(frame, layout)?;
        let right = LaneMap::new(hello.lanes, layout.page_size()).lane(head.at);
        if frame.lane != right {
            return Err(reader.fail(WireError::WrongLane { at: head.at, lane: frame.lane, right }).into());
        }
        payload.resize(head.payload_bytes(), 0);
        reader.read_payload(payload).await?;
        if has(hello, feature::CHECKSUM) {
            head.check_payload(payload).map_err(|error| reader.fail(error))?;
        }
        let round = self.rounds.entry(head.round).or_default();
        round.frames += 1;
        round.zero += u64::from(head.zero.count_ones());
        round.bytes += u64::from(frame.frame_length) + HEAD_BYTES as u64;
        for (encoding, _) in head.pages {
            *round.counter(encoding) += 1;
        }
        Ok(())
    }

    fn message<R: AsyncRead + Unpin>(
        &mut self,
        reader: &mut FrameReader<R>,
        message: Message,
    ) -> Result<(), ReadError> {
        let misplaced = |kind, why| Err(reader.fail(WireError::OutOfPlace { kind, why }).into());
        if self.hello.is_none() && !matches!(message, Message::Hello(_)) {
            return misplaced(message.kind(), "a stream begins with Hello");
        }
        match message {
            Message::Hello(_) if self.hello.is_some() => return misplaced(Kind::Hello, "it came twice"),
            Message::Hello(hello) => {
                reader.set_page_size(hello.page_size);
                self.hello = Some(hello);
            }
            Message::Blocks(blocks) => {
                let page_size = self.hello.as_ref().expect("checked above").page_size;
                match Layout::new(page_size, blocks) {
                    Ok(layout) => self.layout = Some(layout),
                    Err(_) => return misplaced(Kind::Blocks, "its blocks are no guest's"),
                }
            }
            Message::State(chunk) => self.state(chunk),
            Message::RoundComplete(tally) => {
                self.rounds.entry(tally.round).or_default().unchanged += tally.pages.unchanged;
            }
            Message::End { frames, .. } if frames != self.pages_frames() => {
                return misplaced(Kind::End, "it counts another number of Pages frames before it");
            }
            Message::End { run_state, .. } => self.end = Some(run_state),
            _ => {}
        }
        Ok(())
    }

    fn pages_frames(&self) -> u64 {
        self.rounds.values().map(|round| round.frames).sum()
    }

    fn state(&mut self, chunk: memferry_stages::wire::messages::StateChunk) {
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

impl RoundCounts {
    fn counter(&mut self, encoding: PageEncoding) -> &mut u64 {
        match encoding {
            PageEncoding::Raw => &mut self.raw,
            PageEncoding::Snap | PageEncoding::Lz4 | PageEncoding::Zstd | PageEncoding::Grouped => &mut self.compressed,
            PageEncoding::Xbzrle => &mut self.xbzrle,
        }
    }
}

fn has(hello: &Hello, feature: &str) -> bool {
    hello.features.iter().any(|known| known.raw() == feature)
}

fn out_of_place(incoming: &Incoming, why: &'static str) -> WireError {
    let kind = match incoming {
        Incoming::Pages(_) => Kind::Pages,
        Incoming::Message { message, .. } => message.kind(),
    };
    WireError::OutOfPlace { kind, why }
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
        writeln!(f, "lanes       {} on {} connections", hello.lanes, hello.connections)?;
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
    use memferry_stages::geometry::{BlockInfo, ExtentAt};
    use memferry_stages::tally::{PageTally, RoundTally};
    use memferry_stages::wire::messages::StateChunk;
    use memferry_stages::wire::pages::payload_hash;
    use memferry_stages::wire::{PROTOCOL_VERSION, PagesHead, SessionId};

    /// A stream of one round: one raw page, one zero page.
    fn stream() -> Vec<u8> {
        stream_of(0b11, 0b10, vec![(PageEncoding::Raw, 4096)], &[9; 4096])
    }

    /// A stream of one round of one frame.
    fn stream_of(mask: u64, zero: u64, pages: Vec<(PageEncoding, u32)>, payload: &[u8]) -> Vec<u8> {
        let hello = Hello {
            version: PROTOCOL_VERSION,
            session: SessionId([7; 16]),
            connection: 0,
            connections: 1,
            lanes: 1,
            page_size: PageSize::DEFAULT,
            features: vec![feature::CHECKSUM.into()],
        };
        let block = BlockInfo { guest_address: 0x4000_0000, ..BlockInfo::new("ram", 1 << 20) };
        let pages = PagesHead {
            at: ExtentAt { block: 0, extent: 0 },
            round: 1,
            mask,
            zero,
            payload_hash: payload_hash(payload),
            pages,
        };
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
                ..RoundTally::new(1, true)
            })
            .encode(0),
            &Message::Switchover.encode(0),
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
        protocol    2
        session     07070707070707070707070707070707
        lanes       1 on 1 connections
        page size   4.00 KiB
        features    payload-xxh3
        stream      4.46 KiB in 8 frames

        block                         bytes          pages      guest address
        ram                        1.00 MiB            256         0x40000000

        round      frames        zero         raw  compressed      xbzrle   unchanged       bytes
            1           1           1           1           0           0           5    4.07 KiB

        state section                part  version      bytes
        cpu                        device        3       20 B

        whole: the end mark is there; the guest ran
        ");
    }

    #[test]
    fn each_page_of_a_group_counts_as_compressed() {
        let (grouped, raw) = ((PageEncoding::Grouped, 0), (PageEncoding::Raw, 4096));
        let pages = vec![(PageEncoding::Zstd, 300), grouped, raw, grouped, (PageEncoding::Lz4, 20)];
        let inspection = inspect(&stream_of(0b11_1111, 0b10, pages, &[9; 4096 + 320]));
        assert!(inspection.is_whole(), "{inspection}");
        let round = &inspection.rounds[&1];
        assert_eq!((round.zero, round.raw, round.compressed, round.xbzrle), (1, 1, 4, 0));
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
        bytes.extend_from_slice(&Message::Switchover.encode(0));
        assert!(inspect(&bytes).to_string().contains("it follows the end mark"));
    }
}
