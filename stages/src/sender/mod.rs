//! Sender: writes the frames of one connection's lanes, many in one system call when many wait.
//!
//! ```text
//! encoders ── Outgoing (bulk) ──▶ ┌────────┐
//!                                 │ sender │ ══▶ writer          marks of what is written ──▶ controller
//! controller ── Control ────────▶ └────────┘
//! ```
//!
//! It takes frames, and promises:
//! - Frames are never interleaved, and those of bulk keep their order. Waiting frames are gathered, up to 1 MiB or 32 frames,
//!   and written in one vectored write.
//! - Bulk is bounded by the [`TokenBucket`], where there is one, to the byte.
//! - Control goes ahead of queued bulk and does not wait for the bandwidth cap. It is written between two frames, so it waits for
//!   the rest of the frame in progress, which is written at once, without the cap. Both are charged to the bucket afterwards, so
//!   that the cap counts every byte that is written. So control waits for the transport to take one frame at most, and never for
//!   a small bandwidth.
//! - A mark is reported after its frame's last byte was handed to the writer; with durable rounds, after a flush that
//!   follows the last of the connection's lanes.
//! - [`Control::Finish`] ends the stream at the end of a frame: queued bulk is dropped, and the writer is shut
//!   down. A sender that ends in any other way drops the writer without a shutdown: nothing looks complete.
//!
//! Between frames it holds only what it has gathered: a slow transport fills that, then the queue, and then the
//! encoders wait. Its meter counts the bytes written, control included; each write counts as a batch.

mod backlog;

use std::sync::Arc;

use bytes::Bytes;
use tokio::io::{AsyncWrite, AsyncWriteExt};

use crate::batch::Mark;
use crate::encoder::Outgoing;
use crate::error::{Cause, StageError};
use crate::geometry::MAX_LANES;
use crate::meter::{Meter, Wait};
use crate::pending::pending;
use crate::queue::{Closed, Inlet, Outlet};
use crate::scanner::Background;
use crate::stage::Stage;
use crate::stage_id::StageId;
use crate::token_bucket::{Share, TokenBucket};
use backlog::Backlog;

/// A message of the controller to a sender.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Control {
    /// A whole control frame, to be sent ahead of queued bulk.
    Frame(Bytes),
    /// The end: shut the writer down (a file is flushed and takes its name, a socket ends its stream) and return.
    /// Queued bulk is dropped.
    Finish,
}

/// A report of a sender: everything of the lane up to this mark was written (with durable rounds: a round's end is reported once it
/// is flushed). The receiver must take reports until the sender has ended, since it waits for room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sent {
    /// The lane.
    pub lane: u16,
    /// The mark.
    pub mark: Mark,
}

/// The stage: see the module.
#[derive(Debug)]
pub struct Sender<W> {
    writer: W,
    /// The cap, and this connection's share of its turns.
    bucket: Option<(Arc<TokenBucket>, Share)>,
    /// Bytes that the bucket has granted and that are not written yet.
    granted: usize,
    backlog: Backlog,
    bulk_open: bool,
    marks: Marks,
    /// Where frames of pages are reported that are written.
    background: Option<Arc<Background>>,
    stage: Stage,
}

/// The result of one step of a sender.
enum Step {
    /// A message of the controller.
    Control(Control),
    /// A first frame, or the end of bulk.
    Bulk(Option<Outgoing>),
    /// This many bytes of the backlog were written.
    Wrote(usize),
}

impl<W: AsyncWrite + Unpin + Send> Sender<W> {
    /// The sender of a connection that carries `lanes_here` lanes, and its share of the bandwidth if that is capped. With
    /// `durable_rounds` (a stored stream) the writer is flushed at each round's end, before it is reported.
    #[must_use]
    pub fn new(
        connection: u16,
        writer: W,
        bucket: Option<(Arc<TokenBucket>, Share)>,
        durable_rounds: bool,
        lanes_here: usize,
        meter: Arc<Meter>,
    ) -> Self {
        bucket.iter().for_each(|(bucket, _)| meter.limited_by(bucket.clone()));
        Self {
            writer,
            bucket,
            granted: 0,
            backlog: Backlog::default(),
            bulk_open: true,
            marks: Marks::new(durable_rounds.then_some(lanes_here)),
            background: None,
            stage: Stage::new(StageId::sender(connection), meter),
        }
    }

    /// Reports each frame of pages that is written to a scanner that waits for it.
    #[must_use]
    pub fn with_background(mut self, background: Arc<Background>) -> Self {
        self.background = Some(background);
        self
    }

    /// Runs until [`Control::Finish`]. After the end of bulk, control is still written.
    ///
    /// # Errors
    /// When the writer fails; when the controller has ended: its control queue is closed without a Finish, or the receiver of
    /// marks was dropped.
    pub async fn run(
        mut self,
        control: Inlet<Control>,
        bulk: Inlet<Outgoing>,
        sent: Outlet<Sent>,
    ) -> Result<(), StageError> {
        self.work(&control, &bulk, &sent).await.map_err(|cause| self.stage.fails(cause))
    }

    async fn work(
        &mut self,
        control: &Inlet<Control>,
        bulk: &Inlet<Outgoing>,
        sent: &Outlet<Sent>,
    ) -> Result<(), Cause> {
        loop {
            while self.backlog.has_room()
                && let Some(frame) = bulk.try_next()
            {
                self.backlog.push(frame);
            }
            match self.step(control, bulk).await? {
                Step::Bulk(Some(frame)) => self.backlog.push(frame),
                Step::Bulk(None) => self.bulk_open = false,
                Step::Wrote(bytes) => self.wrote(bytes, sent).await?,
                Step::Control(Control::Frame(frame)) => {
                    self.end_frame(sent).await?;
                    self.write_control(&frame).await?;
                }
                Step::Control(Control::Finish) => {
                    self.end_frame(sent).await?;
                    return self.shut_down().await;
                }
            }
        }
    }

    /// Waits for the next event: control first, then room in the writer, or bulk if the backlog is empty.
    async fn step(&mut self, control: &Inlet<Control>, bulk: &Inlet<Outgoing>) -> Result<Step, Cause> {
        let meter = self.stage.meter.clone();
        if self.backlog.is_empty() {
            let first = async {
                tokio::select! {
                    biased;
                    control = control.next() => control.map(Step::Control).ok_or(Cause::Closed(Closed)),
                    frame = bulk.next(), if self.bulk_open => Ok(Step::Bulk(frame)),
                }
            };
            return pending(first, &meter, Wait::Input).await;
        }
        let first = async {
            tokio::select! {
                biased;
                control = control.next() => control.map(Step::Control).ok_or(Cause::Closed(Closed)),
                bytes = self.write_bulk() => bytes.map(Step::Wrote),
            }
        };
        pending(first, &meter, Wait::Output).await
    }

    /// Writes as much of the backlog as the bucket grants and the writer takes. If this is dropped before its end, nothing was
    /// written, and the granted bytes stay granted.
    async fn write_bulk(&mut self) -> Result<usize, Cause> {
        let Some((bucket, share)) = self.bucket.as_ref().filter(|(bucket, _)| bucket.is_limited()) else {
            // A grant without a limit is not saved: a limit that is set takes effect at the next write.
            self.granted = 0;
            let most = self.backlog.left();
            return self.backlog.write_some(&mut self.writer, most).await.map_err(Cause::Transport);
        };
        if self.granted == 0 {
            let take = bucket.take(self.backlog.left(), *share);
            self.granted = pending(take, &self.stage.meter, Wait::Limit).await;
        }
        let bytes = self.backlog.write_some(&mut self.writer, self.granted).await.map_err(Cause::Transport)?;
        self.granted -= bytes;
        Ok(bytes)
    }

    /// Writes the rest of the frame in progress, without waiting for the bucket.
    async fn end_frame(&mut self, sent: &Outlet<Sent>) -> Result<(), Cause> {
        while self.backlog.left_of_begun() > 0 {
            let most = self.backlog.left_of_begun();
            let write = self.backlog.write_some(&mut self.writer, most);
            let bytes = pending(write, &self.stage.meter, Wait::Output).await;
            let bytes = bytes.map_err(Cause::Transport)?;
            let granted = bytes.min(self.granted);
            self.granted -= granted;
            if let Some((bucket, _)) = &self.bucket {
                bucket.charge(bytes - granted);
            }
            self.wrote(bytes, sent).await?;
        }
        Ok(())
    }

    async fn write_control(&mut self, frame: &Bytes) -> Result<(), Cause> {
        let write = self.writer.write_all(frame);
        pending(write, &self.stage.meter, Wait::Output).await.map_err(Cause::Transport)?;
        if let Some((bucket, _)) = &self.bucket {
            bucket.charge(frame.len());
        }
        self.stage.meter.count_control(frame.len() as u64);
        Ok(())
    }

    async fn shut_down(&mut self) -> Result<(), Cause> {
        let shutdown = self.writer.shutdown();
        pending(shutdown, &self.stage.meter, Wait::Output).await.map_err(Cause::Transport)
    }

    /// Counts written bytes of the backlog, drops the frames that they complete, and reports their marks.
    async fn wrote(&mut self, bytes: usize, sent: &Outlet<Sent>) -> Result<(), Cause> {
        self.stage.meter.count(0, bytes as u64);
        while let Some(frame) = self.backlog.pop_written() {
            let Some(mark) = frame.mark else {
                self.background.iter().for_each(|background| background.frame_sent());
                continue;
            };
            match self.marks.reached(frame.lane, mark) {
                Reached::Later => continue,
                Reached::AfterFlush => self.flush().await?,
                Reached::Now => {}
            }
            for mark in self.marks.held.drain(..) {
                sent.put(mark).await?;
            }
        }
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), Cause> {
        let flush = self.writer.flush();
        pending(flush, &self.stage.meter, Wait::Output).await.map_err(Cause::Transport)
    }
}

/// Marks that are written and not reported: with durable rounds they wait for the round's end in every lane.
#[derive(Debug)]
struct Marks {
    held: Vec<Sent>,
    /// How many lanes make a round durable, where rounds are.
    durable_lanes: Option<usize>,
    /// The last round that ended, by lane.
    rounds: [u32; MAX_LANES as usize],
}

/// When the held marks may be reported.
enum Reached {
    Now,
    AfterFlush,
    Later,
}

impl Marks {
    fn new(durable_lanes: Option<usize>) -> Self {
        Self { held: Vec::new(), durable_lanes, rounds: [0; MAX_LANES as usize] }
    }

    /// Holds a mark whose frame is written. Returns when all held marks may be reported.
    fn reached(&mut self, lane: u16, mark: Mark) -> Reached {
        let others_wait = !self.held.is_empty();
        self.held.push(Sent { lane, mark });
        match mark {
            Mark::RoundComplete(tally) => {
                let Some(lanes) = self.durable_lanes else { return Reached::Now };
                self.rounds[usize::from(lane)] = tally.round;
                let ended = self.rounds.iter().filter(|&&round| round >= tally.round).count();
                if ended == lanes { Reached::AfterFlush } else { Reached::Later }
            }
            _ if others_wait => Reached::Later,
            _ => Reached::Now,
        }
    }
}

#[cfg(test)]
mod tests;
