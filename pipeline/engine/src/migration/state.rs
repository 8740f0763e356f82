//! Guest state on the wire: sections are cut into chunks at the source, and reassembled within bounds at the
//! destination.

use bytes::Bytes;
use memferry_stages::wire::messages::{MAX_STATE_CHUNK, StateChunk, StatePhase};

use super::error::MigrationError;
use crate::guest::{GuestError, GuestState, StateSection};
use crate::values::Size;

/// The overhead of a section besides its name and its bytes.
const SECTION_BYTES: u64 = 128;

/// The memory that guest state may take, both parts together, and how much of it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Room {
    most: u64,
    taken: u64,
}

impl Room {
    pub(super) fn new(most: u64) -> Self {
        Self { most, taken: 0 }
    }

    pub(super) fn taken(self) -> u64 {
        self.taken
    }

    /// Reserves the given number of bytes.
    ///
    /// # Errors
    /// The least size of the state, if it exceeds the limit.
    fn take(&mut self, bytes: u64) -> Result<(), String> {
        let taken = self.taken.saturating_add(bytes);
        if taken > self.most {
            let most = Size(self.most);
            return Err(format!(
                "the guest's state takes {taken} bytes or more, and {most} are allowed; raise [migration] max_state at both ends"
            ));
        }
        self.taken = taken;
        Ok(())
    }
}

fn of_section(name: &str) -> u64 {
    SECTION_BYTES + name.len() as u64
}

/// The chunks of a guest's state, in order.
///
/// # Errors
/// When the guest's state exceeds the limit, or a section has a name that cannot be sent.
pub(super) fn chunks(phase: StatePhase, state: GuestState, room: &mut Room) -> Result<Vec<StateChunk>, MigrationError> {
    let total = state.sections.iter().map(|section| of_section(section.name.raw()) + section.bytes.len() as u64).sum();
    room.take(total).map_err(GuestError)?;
    let mut chunks = Vec::new();
    for section in state.sections {
        if !(1..=255).contains(&section.name.len()) {
            return Err(GuestError(format!("a section of its state has the name {:?}", section.name)).into());
        }
        chunks.extend(cut(phase, section));
    }
    Ok(chunks)
}

fn cut(phase: StatePhase, section: StateSection) -> impl Iterator<Item = StateChunk> {
    let bytes = Bytes::from(section.bytes);
    let count = bytes.len().div_ceil(MAX_STATE_CHUNK).max(1);
    (0..count).map(move |index| {
        let start = index * MAX_STATE_CHUNK;
        StateChunk {
            phase,
            name: section.name.clone(),
            version: section.version,
            end: index + 1 == count,
            bytes: bytes.slice(start..bytes.len().min(start + MAX_STATE_CHUNK)),
        }
    })
}

/// Reassembles chunks. The [`Room`] bounds the peer's data.
#[derive(Debug)]
pub(super) struct Assembly {
    phase: StatePhase,
    state: GuestState,
    open: bool,
    room: Room,
}

impl Assembly {
    pub(super) fn new(phase: StatePhase, room: Room) -> Self {
        Self { phase, state: GuestState::default(), open: false, room }
    }

    /// How much of the memory for guest state is used.
    pub(super) fn room(&self) -> Room {
        self.room
    }

    /// The next chunk.
    ///
    /// # Errors
    /// When it belongs to the other part, follows no chunk of its section, or exceeds the limit.
    pub(super) fn add(&mut self, chunk: StateChunk) -> Result<(), MigrationError> {
        let wrong = |what: String| Err(MigrationError::Protocol(what));
        if chunk.phase != self.phase {
            return wrong(format!("state of the {:?} part came in the {:?} part", chunk.phase, self.phase));
        }
        let of_section = if self.open { 0 } else { of_section(chunk.name.raw()) };
        self.room.take(of_section + chunk.bytes.len() as u64).map_err(MigrationError::TooLarge)?;
        if !self.open {
            let section = StateSection { name: chunk.name.clone(), version: chunk.version, bytes: Vec::new() };
            self.state.sections.push(section);
        }
        let section = self.state.sections.last_mut().expect("one is open");
        if (&section.name, section.version) != (&chunk.name, chunk.version) {
            return wrong(format!("state section {:?} came in the middle of {:?}", chunk.name, section.name));
        }
        // No more is allocated than the limit allows.
        section.bytes.reserve_exact(chunk.bytes.len());
        section.bytes.extend_from_slice(&chunk.bytes);
        self.open = !chunk.end;
        Ok(())
    }

    /// All sections received.
    ///
    /// # Errors
    /// When the last section is incomplete.
    pub(super) fn finish(self) -> Result<GuestState, MigrationError> {
        if self.open {
            return Err(MigrationError::Protocol("the last section of state has no end".into()));
        }
        Ok(self.state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOM: Room = Room { most: 16 << 20, taken: 0 };

    fn section(name: &str, bytes: usize) -> StateSection {
        StateSection { name: name.into(), version: 3, bytes: (0..bytes).map(|index| index.to_le_bytes()[0]).collect() }
    }

    #[test]
    fn sections_of_any_size_come_out_as_they_went_in() {
        let sizes = [0, 1, MAX_STATE_CHUNK, MAX_STATE_CHUNK + 1, 3 * MAX_STATE_CHUNK];
        let sections = sizes.iter().enumerate().map(|(index, &size)| section(&format!("s{index}"), size));
        let state = GuestState { sections: sections.collect() };
        let (mut room, mut assembly) = (ROOM, Assembly::new(StatePhase::Device, ROOM));
        for chunk in chunks(StatePhase::Device, state.clone(), &mut room).unwrap() {
            assert!(chunk.bytes.len() <= MAX_STATE_CHUNK);
            assembly.add(chunk).unwrap();
        }
        assert_eq!(assembly.room(), room, "both ends count alike");
        assert_eq!(assembly.finish().unwrap(), state);
    }

    #[test]
    fn chunks_out_of_order_are_refused() {
        let state = GuestState { sections: vec![section("a", MAX_STATE_CHUNK + 1), section("b", 1)] };
        let sent = chunks(StatePhase::Device, state, &mut ROOM.clone()).unwrap();
        let mut assembly = Assembly::new(StatePhase::Device, ROOM);
        assembly.add(sent[0].clone()).unwrap();
        assert!(assembly.add(sent[2].clone()).unwrap_err().to_string().contains("in the middle of"));
        let mut assembly = Assembly::new(StatePhase::Device, ROOM);
        assembly.add(sent[0].clone()).unwrap();
        assert!(assembly.finish().unwrap_err().to_string().contains("has no end"));
        let error = Assembly::new(StatePhase::Setup, ROOM).add(sent[0].clone()).unwrap_err();
        assert!(error.to_string().contains("part"));
    }

    #[test]
    fn a_peer_cannot_make_us_hold_more_than_the_bound() {
        let chunk = StateChunk {
            phase: StatePhase::Device,
            name: "flood".into(),
            version: 1,
            end: false,
            bytes: Bytes::from(vec![0; MAX_STATE_CHUNK]),
        };
        let mut assembly = Assembly::new(StatePhase::Device, ROOM);
        let error = (0..).find_map(|_| assembly.add(chunk.clone()).err()).unwrap();
        assert!(error.to_string().contains("raise [migration] max_state"), "{error}");
        let bytes = &assembly.state.sections[0].bytes;
        assert!(bytes.len() as u64 <= ROOM.most && bytes.capacity() as u64 <= ROOM.most);
    }

    #[test]
    fn empty_sections_and_both_parts_count() {
        let empty =
            StateChunk { phase: StatePhase::Setup, name: "s".into(), version: 1, end: true, bytes: Bytes::new() };
        let mut setup = Assembly::new(StatePhase::Setup, Room::new(3 * (SECTION_BYTES + 1)));
        setup.add(empty.clone()).unwrap();
        let mut device = Assembly::new(StatePhase::Device, setup.room());
        let empty = StateChunk { phase: StatePhase::Device, ..empty };
        device.add(empty.clone()).unwrap();
        device.add(empty.clone()).unwrap();
        assert!(matches!(device.add(empty), Err(MigrationError::TooLarge(_))));
        assert_eq!(device.room().taken(), 3 * (SECTION_BYTES + 1));
    }

    #[test]
    fn a_source_holds_no_more_than_it_may_send() {
        let state = |bytes| GuestState { sections: vec![section("a", bytes)] };
        let mut room = Room::new(SECTION_BYTES + 1 + 1000);
        chunks(StatePhase::Setup, state(1000), &mut room).unwrap();
        let error = chunks(StatePhase::Device, state(0), &mut room).unwrap_err().to_string();
        assert!(error.contains("max_state"), "{error}");
    }

    #[test]
    fn a_guest_with_too_much_state_is_refused_before_anything_is_sent() {
        let state = GuestState { sections: vec![section("", 1)] };
        assert!(chunks(StatePhase::Device, state, &mut ROOM.clone()).is_err());
    }
}
