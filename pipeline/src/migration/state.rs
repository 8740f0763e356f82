//! Guest state on the wire: sections cut into chunks at the source, put together again, within bounds, at the
//! destination.

use bytes::Bytes;
use memferry_stages::wire::messages::{MAX_STATE_BYTES, MAX_STATE_CHUNK, StateChunk, StatePhase};

use super::error::MigrationError;
use crate::guest::{GuestError, GuestState, StateSection};

/// The chunks of a guest's state, in order.
///
/// # Errors
/// When the guest's state is larger than a destination would take, or a section has a name that cannot travel.
pub(super) fn chunks(phase: StatePhase, state: GuestState) -> Result<Vec<StateChunk>, MigrationError> {
    let total: u64 = state.sections.iter().map(|section| section.bytes.len() as u64).sum();
    if total > MAX_STATE_BYTES {
        return Err(GuestError(format!("its state has {total} bytes, at most {MAX_STATE_BYTES} can travel")).into());
    }
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

/// Puts chunks together. What the peer sends is bounded: no more than [`MAX_STATE_BYTES`] and [`MAX_SECTIONS`] are kept.
#[derive(Debug)]
pub(super) struct Assembly {
    phase: StatePhase,
    state: GuestState,
    open: bool,
    bytes: u64,
}

/// The most sections of state.
const MAX_SECTIONS: usize = 4096;

impl Assembly {
    pub(super) fn new(phase: StatePhase) -> Self {
        Self { phase, state: GuestState::default(), open: false, bytes: 0 }
    }

    /// The next chunk.
    ///
    /// # Errors
    /// When it is of the other part, follows no chunk of its section, or is too much.
    pub(super) fn add(&mut self, chunk: StateChunk) -> Result<(), MigrationError> {
        let wrong = |what: String| Err(MigrationError::Protocol(what));
        if chunk.phase != self.phase {
            return wrong(format!("state of the {:?} part came in the {:?} part", chunk.phase, self.phase));
        }
        self.bytes += chunk.bytes.len() as u64;
        if self.bytes > MAX_STATE_BYTES {
            return wrong(format!("more than {MAX_STATE_BYTES} bytes of state"));
        }
        if !self.open {
            if self.state.sections.len() == MAX_SECTIONS {
                return wrong(format!("more than {MAX_SECTIONS} sections of state"));
            }
            let section = StateSection { name: chunk.name.clone(), version: chunk.version, bytes: Vec::new() };
            self.state.sections.push(section);
        }
        let section = self.state.sections.last_mut().expect("one is open");
        if (&section.name, section.version) != (&chunk.name, chunk.version) {
            return wrong(format!("state section {:?} came in the middle of {:?}", chunk.name, section.name));
        }
        section.bytes.extend_from_slice(&chunk.bytes);
        self.open = !chunk.end;
        Ok(())
    }

    /// Everything that came.
    ///
    /// # Errors
    /// When the last section has no end.
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

    fn section(name: &str, bytes: usize) -> StateSection {
        StateSection { name: name.into(), version: 3, bytes: (0..bytes).map(|index| index.to_le_bytes()[0]).collect() }
    }

    #[test]
    fn sections_of_any_size_come_out_as_they_went_in() {
        let sizes = [0, 1, MAX_STATE_CHUNK, MAX_STATE_CHUNK + 1, 3 * MAX_STATE_CHUNK];
        let sections = sizes.iter().enumerate().map(|(index, &size)| section(&format!("s{index}"), size));
        let state = GuestState { sections: sections.collect() };
        let mut assembly = Assembly::new(StatePhase::Device);
        for chunk in chunks(StatePhase::Device, state.clone()).unwrap() {
            assert!(chunk.bytes.len() <= MAX_STATE_CHUNK);
            assembly.add(chunk).unwrap();
        }
        assert_eq!(assembly.finish().unwrap(), state);
    }

    #[test]
    fn chunks_out_of_turn_are_refused() {
        let state = GuestState { sections: vec![section("a", MAX_STATE_CHUNK + 1), section("b", 1)] };
        let sent = chunks(StatePhase::Device, state).unwrap();
        let mut assembly = Assembly::new(StatePhase::Device);
        assembly.add(sent[0].clone()).unwrap();
        assert!(assembly.add(sent[2].clone()).unwrap_err().to_string().contains("in the middle of"));
        let mut assembly = Assembly::new(StatePhase::Device);
        assembly.add(sent[0].clone()).unwrap();
        assert!(assembly.finish().unwrap_err().to_string().contains("has no end"));
        let error = Assembly::new(StatePhase::Setup).add(sent[0].clone()).unwrap_err();
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
        let mut assembly = Assembly::new(StatePhase::Device);
        let error = (0..).find_map(|_| assembly.add(chunk.clone()).err()).unwrap();
        assert!(error.to_string().contains("bytes of state"));
        assert!(assembly.state.sections[0].bytes.len() as u64 <= MAX_STATE_BYTES);
    }

    #[test]
    fn a_guest_with_too_much_state_is_told_before_anything_is_sent() {
        let state = GuestState { sections: vec![section("", 1)] };
        assert!(chunks(StatePhase::Device, state).is_err());
    }
}
