//! The link between two ends: what travels over a [`Wire`] in each direction, and how it is lost.

use std::time::Duration;

use memferry_stages::wire::Message;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::memory::Frame;
use crate::model::link::{Link, Wire};

/// What travels.
#[derive(Clone, Debug)]
pub(super) enum Packet {
    Hello,
    Message(Message),
    /// Pages of a lane.
    Pages(u16, Vec<Frame>),
    /// A lane's round is complete.
    RoundComplete,
    /// The lane's last frame was sent.
    LaneOver,
    /// The lane writes directly no more.
    DirectEnds,
    /// Pages that the destination does not hold.
    Missing(Vec<bool>),
    /// Pages that were asked for.
    Urgent(Vec<Frame>),
    /// Pages that the destination holds.
    Received(Vec<bool>),
    /// The versions of all pages, in place of their digests.
    Digests(Vec<Option<u32>>),
}

/// What an end finds at its side of the link.
#[derive(Debug)]
pub(super) enum Found {
    Packet(Packet),
    /// The link is cut.
    Lost,
    /// Nothing has come for too long.
    Silent,
}

/// One end's side.
#[derive(Debug)]
pub(super) struct Port {
    out: mpsc::UnboundedSender<(Instant, Found)>,
    incoming: mpsc::UnboundedReceiver<(Instant, Found)>,
    /// What has come, and is on its way until then.
    next: Option<(Instant, Found)>,
    /// What this end sends, since the link was made.
    wire: Wire,
    made: Instant,
    peer_timeout: Duration,
    is_cut: bool,
    is_muted: bool,
    /// Is the stream stored? Then nothing reads it meanwhile.
    is_stored: bool,
    /// Was the end of the link reported?
    is_over: bool,
}

/// Both sides of a link.
pub(super) fn link(link: Link, peer_timeout: Duration, is_stored: bool) -> [Port; 2] {
    let (there, here) = (mpsc::unbounded_channel(), mpsc::unbounded_channel());
    let port = |out, incoming| Port {
        out,
        incoming,
        next: None,
        wire: Wire::new(link, 2),
        made: Instant::now(),
        peer_timeout,
        is_cut: false,
        is_muted: false,
        is_stored,
        is_over: false,
    };
    [port(there.0, here.1), port(here.0, there.1)]
}

impl Port {
    /// Sends a packet of this size over a connection. Returns when it has left this end.
    pub(super) fn send(&mut self, connection: usize, packet: Packet, bytes: u64) -> Instant {
        let left = self.made + self.wire.send(connection, self.made.elapsed(), bytes);
        if !self.is_cut && !self.is_muted {
            // The peer may be gone.
            drop(self.out.send((left + self.wire.link().latency, Found::Packet(packet))));
        }
        left
    }

    /// When everything has arrived that this end has sent.
    fn all_arrived(&self) -> Instant {
        (self.made + self.wire.all_arrived()).max(Instant::now())
    }

    /// Caps what this end sends.
    pub(super) fn set_cap(&mut self, bytes_per_second: Option<u64>) {
        self.wire.set_cap(self.made.elapsed(), bytes_per_second);
    }

    /// The link is cut: what is on its way to the peer still arrives, and nothing after it. Each end notices.
    pub(super) fn cut(&mut self) {
        if !self.is_cut {
            self.is_cut = true;
            drop(self.out.send((self.all_arrived(), Found::Lost)));
            self.next = Some((Instant::now(), Found::Lost));
        }
    }

    /// From here on nothing this end sends arrives, and neither end is notified.
    pub(super) fn mute(&mut self) {
        if !self.is_muted && !self.is_stored {
            self.is_muted = true;
            drop(self.out.send((Instant::now() + self.peer_timeout, Found::Silent)));
        }
    }

    /// This end is over: it sends its last message, and closes its side.
    pub(super) fn close(&mut self, farewell: Option<Message>) {
        if let Some(message) = farewell {
            self.send(0, Packet::Message(message), 20);
        }
        if !self.is_cut && !self.is_muted {
            drop(self.out.send((self.all_arrived(), Found::Lost)));
        }
    }

    /// This end has no connection any more.
    pub(super) fn end(&mut self) {
        self.close(None);
        self.next = None;
        self.is_over = true;
    }

    /// The process of this end is stopped for this time: the peer receives nothing from it.
    pub(super) fn stops(&self, time: Duration) {
        if time >= self.peer_timeout && !self.is_cut && !self.is_muted && !self.is_stored {
            drop(self.out.send((Instant::now() + self.peer_timeout, Found::Silent)));
        }
    }

    /// What comes next; the end of the link once. Safe to race in a `select!`.
    pub(super) async fn next(&mut self) -> Found {
        if self.is_over {
            return std::future::pending().await;
        }
        if self.next.is_none() {
            // The peer closes its side with everything it sent before.
            let at = Instant::now() + self.wire.link().latency;
            self.next = Some(self.incoming.recv().await.unwrap_or((at, Found::Lost)));
        }
        if let Some((at, _)) = &self.next {
            tokio::time::sleep_until(*at).await;
        }
        let found = self.next.take().map_or(Found::Lost, |(_, found)| found);
        self.is_over = !matches!(found, Found::Packet(_));
        found
    }
}
