//! The frames that a sender has gathered and not completely written.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::Pin;

use tokio::io::AsyncWrite;

use crate::encoder::Outgoing;

/// The number of waiting bytes from which a sender gathers no further frame.
pub(super) const GATHER_BYTES: usize = 1 << 20;
/// The most slices of one vectored write; a frame has one or two.
const GATHER_SLICES: usize = 64;
/// The most frames that are gathered.
pub(super) const GATHER_FRAMES: usize = GATHER_SLICES / 2;

/// Frames in order; the first may be partially written.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    frames: VecDeque<Outgoing>,
    /// Bytes written, counted from the start of the first frame.
    written: usize,
    /// Bytes of all frames that are not written.
    left: usize,
}

impl Backlog {
    pub(super) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    pub(super) fn has_room(&self) -> bool {
        self.left < GATHER_BYTES && self.frames.len() < GATHER_FRAMES
    }

    /// Bytes that wait to be written.
    pub(super) fn left(&self) -> usize {
        self.left
    }

    /// Unwritten bytes of the first frame, if it was begun; 0 between two frames.
    pub(super) fn left_of_begun(&self) -> usize {
        match self.frames.front() {
            Some(first) if self.written > 0 => frame_bytes(first) - self.written,
            _ => 0,
        }
    }

    pub(super) fn push(&mut self, frame: Outgoing) {
        assert!(!frame.head.is_empty(), "a frame without a head");
        self.left += frame_bytes(&frame);
        self.frames.push_back(frame);
    }

    /// Writes at most `limit` bytes, as many as the writer takes at once. Returns their number, never 0. If this is dropped before
    /// its end, nothing was written.
    pub(super) async fn write_some<W>(&mut self, writer: &mut W, limit: usize) -> io::Result<usize>
    where
        W: AsyncWrite + Unpin,
    {
        let mut slices = [IoSlice::new(&[]); GATHER_SLICES];
        let count = self.gather(&mut slices, limit);
        let slices = &slices[..count];
        let bytes = poll_fn(|context| Pin::new(&mut *writer).poll_write_vectored(context, slices)).await?;
        if bytes == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.written += bytes;
        self.left -= bytes;
        Ok(bytes)
    }

    /// Removes the first frame if it is completely written.
    pub(super) fn pop_written(&mut self) -> Option<Outgoing> {
        let length = self.frames.front().map(frame_bytes)?;
        if self.written < length {
            return None;
        }
        self.written -= length;
        self.frames.pop_front()
    }

    /// Lays out the first `limit` bytes that are not written, and returns the number of slices they take.
    fn gather<'a>(&'a self, slices: &mut [IoSlice<'a>; GATHER_SLICES], limit: usize) -> usize {
        let (mut skip, mut room, mut count) = (self.written, limit, 0);
        for frame in &self.frames {
            for part in [&frame.head[..], frame.payload.as_deref().unwrap_or_default()] {
                let skipped = skip.min(part.len());
                let part = &part[skipped..];
                skip -= skipped;
                let part = &part[..part.len().min(room)];
                room -= part.len();
                if !part.is_empty() {
                    slices[count] = IoSlice::new(part);
                    count += 1;
                }
            }
            if room == 0 {
                break;
            }
        }
        count
    }
}

fn frame_bytes(frame: &Outgoing) -> usize {
    frame.head.len() + frame.payload.as_ref().map_or(0, |payload| payload.len())
}
