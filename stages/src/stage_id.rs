//! Which stage something is about: its kind, and the lane or the connection that it serves.

use std::fmt;

/// A kind of stage. Kinds are ordered by the way of a page through them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum StageKind {
    /// [`BitmapSync`](crate::bitmap_sync::BitmapSync)
    BitmapSync,
    /// [`Scanner`](crate::scanner::Scanner)
    Scanner,
    /// [`ZeroDetector`](crate::zero_detector::ZeroDetector)
    ZeroDetector,
    /// [`Encoder`](crate::encoder::Encoder)
    Encoder,
    /// [`Sender`](crate::sender::Sender)
    Sender,
    /// [`PageServer`](crate::page_server::PageServer)
    PageServer,
    /// [`Receiver`](crate::receiver::Receiver)
    Receiver,
    /// [`Loader`](crate::loader::Loader)
    Loader,
    /// The [`Loader`](crate::loader::Loader) of pages that were asked for.
    UrgentLoader,
    /// [`PageRequester`](crate::page_requester::PageRequester)
    PageRequester,
    /// A [`Sender`](crate::sender::Sender) of the destination, which carries answers only.
    Answers,
}

impl StageKind {
    /// Every kind.
    pub const ALL: [Self; 11] = [
        Self::BitmapSync,
        Self::Scanner,
        Self::ZeroDetector,
        Self::Encoder,
        Self::Sender,
        Self::PageServer,
        Self::Receiver,
        Self::Loader,
        Self::UrgentLoader,
        Self::PageRequester,
        Self::Answers,
    ];

    /// Its name: in errors, in reports and as a label.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::BitmapSync => "bitmap sync",
            Self::Scanner => "scanner",
            Self::ZeroDetector => "zero detector",
            Self::Encoder => "encoder",
            Self::Sender => "sender",
            Self::PageServer => "page server",
            Self::Receiver => "receiver",
            Self::Loader => "loader",
            Self::UrgentLoader => "urgent loader",
            Self::PageRequester => "page requester",
            Self::Answers => "answers",
        }
    }

    /// The kind of this name, for a reader of reports and events.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

impl fmt::Display for StageKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Where a stage runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StageAt {
    /// There is one of it.
    Alone,
    /// There is one for each lane.
    Lane(u16),
    /// There is one for each connection.
    Connection(u16),
}

impl StageAt {
    /// The number of the lane or the connection.
    #[must_use]
    pub fn number(self) -> Option<u16> {
        match self {
            Self::Alone => None,
            Self::Lane(number) | Self::Connection(number) => Some(number),
        }
    }
}

impl fmt::Display for StageAt {
    /// "lane 1", "connection 0", or nothing.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Alone => Ok(()),
            Self::Lane(lane) => write!(f, "lane {lane}"),
            Self::Connection(connection) => write!(f, "connection {connection}"),
        }
    }
}

/// The identity of a stage. Displays as "scanner", "encoder of lane 1", "sender of connection 0".
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StageId {
    /// Its kind.
    pub kind: StageKind,
    /// Where it runs.
    pub at: StageAt,
}

impl StageId {
    /// The bitmap sync.
    pub const BITMAP_SYNC: Self = Self::alone(StageKind::BitmapSync);
    /// The scanner.
    pub const SCANNER: Self = Self::alone(StageKind::Scanner);
    /// The stage that sends the pages that a destination asks for.
    pub const PAGE_SERVER: Self = Self::alone(StageKind::PageServer);
    /// The stage that loads the pages that were asked for.
    pub const URGENT_LOADER: Self = Self::alone(StageKind::UrgentLoader);
    /// The stage that asks for pages.
    pub const PAGE_REQUESTER: Self = Self::alone(StageKind::PageRequester);
    /// The stage that sends a destination's answers.
    pub const ANSWERS: Self = Self::alone(StageKind::Answers);

    const fn alone(kind: StageKind) -> Self {
        Self { kind, at: StageAt::Alone }
    }

    /// The zero detector of a lane.
    #[must_use]
    pub const fn zero_detector(lane: u16) -> Self {
        Self { kind: StageKind::ZeroDetector, at: StageAt::Lane(lane) }
    }

    /// The encoder of a lane.
    #[must_use]
    pub const fn encoder(lane: u16) -> Self {
        Self { kind: StageKind::Encoder, at: StageAt::Lane(lane) }
    }

    /// The sender of a connection.
    #[must_use]
    pub const fn sender(connection: u16) -> Self {
        Self { kind: StageKind::Sender, at: StageAt::Connection(connection) }
    }

    /// The receiver of a connection.
    #[must_use]
    pub const fn receiver(connection: u16) -> Self {
        Self { kind: StageKind::Receiver, at: StageAt::Connection(connection) }
    }

    /// The loader of a lane.
    #[must_use]
    pub const fn loader(lane: u16) -> Self {
        Self { kind: StageKind::Loader, at: StageAt::Lane(lane) }
    }
}

impl fmt::Display for StageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.at {
            StageAt::Alone => self.kind.fmt(f),
            at => write!(f, "{} of {at}", self.kind),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_kinds_and_read_back() {
        for kind in StageKind::ALL {
            assert_eq!(StageKind::from_name(kind.name()), Some(kind));
        }
        assert!(StageKind::ALL.is_sorted());
        assert_eq!(StageKind::from_name("Scanner"), None);
    }

    #[test]
    fn an_identity_says_where_it_is() {
        let shown = [StageId::SCANNER, StageId::zero_detector(2), StageId::sender(0)].map(|stage| stage.to_string());
        assert_eq!(shown, ["scanner", "zero detector of lane 2", "sender of connection 0"]);
    }
}
