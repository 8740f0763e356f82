//! A proxy between the two ends of a migration, over TCP or Unix sockets, that cuts, stalls, half-closes and refuses
//! connections.
//!
//! A [`Plan`] says which fault comes next and where: after a number of bytes, or at a frame of a kind. A test can also
//! inject faults by hand. The proxy counts what it forwards.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fastrand::Rng;
use memferry::settings::LEAST_PEER_TIMEOUT;
use memferry_stages::wire::{HEAD_BYTES, Kind};
use memferry_transports::Address;
use memferry_transports::memory::Direction;
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

/// Bytes that one direction of a connection holds at most between reading and writing them.
pub const HELD: usize = 16 << 10;
/// How long to wait before an address that is taken is tried again.
const TAKEN: Duration = Duration::from_millis(5);

/// The place at which a fault comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// After this many bytes of the direction, over all connections, counted from the fault before it.
    Bytes(Direction, u64),
    /// At the next frame of this kind, of which nothing is forwarded before the fault.
    Before(Kind),
    /// At the next frame of this kind, which is forwarded whole before the fault.
    After(Kind),
}

impl When {
    fn direction(self) -> Direction {
        match self {
            Self::Bytes(direction, _) => direction,
            // Kinds from 32 on belong to the return path; see `Kind`.
            Self::Before(kind) | Self::After(kind) if kind as u8 >= 32 => Direction::ToSource,
            Self::Before(_) | Self::After(_) => Direction::ToDestination,
        }
    }
}

/// A fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// None: bytes of the next fault are counted from here.
    Mark,
    /// Every connection is cut, in both directions. TCP connections are reset.
    Cut,
    /// Every connection is cut this long after the place, and bytes are forwarded until then.
    CutAfter(Duration),
    /// The connection on which it comes is cut.
    CutOne,
    /// Nothing is forwarded for this long.
    Stall(Duration),
    /// Nothing is forwarded for this long, then every connection is cut.
    StallAndCut(Duration),
    /// The connection on which it comes is shut down in the direction in which it comes.
    HalfClose,
}

impl Fault {
    /// May it break a connection? A stall does where a peer may not be silent for so long.
    #[must_use]
    pub fn breaks(self) -> bool {
        match self {
            Self::Mark => false,
            Self::Stall(time) => time >= LEAST_PEER_TIMEOUT,
            _ => true,
        }
    }
}

/// Whether the proxy accepts connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// Connections are forwarded.
    Open,
    /// Connections are accepted, and closed at once.
    Closes,
    /// Nobody listens.
    Absent,
}

/// One fault of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Its place.
    pub when: When,
    /// The fault.
    pub fault: Fault,
    /// How connections are refused from then on, and for how long.
    pub refusal: Option<(Door, Duration)>,
}

impl Step {
    /// A fault after which connections are accepted at once.
    #[must_use]
    pub fn new(when: When, fault: Fault) -> Self {
        Self { when, fault, refusal: None }
    }

    /// The same fault, and connections are refused for this long.
    #[must_use]
    pub fn refusing(self, door: Door, time: Duration) -> Self {
        Self { refusal: Some((door, time)), ..self }
    }

    /// A fault within the pages of a migration. `bytes` is about what the migration sends.
    fn drawn(draw: &mut Rng, bytes: u64) -> Self {
        const KINDS: [Kind; 6] =
            [Kind::RoundComplete, Kind::LaneEnds, Kind::Digests, Kind::End, Kind::Loaded, Kind::Go];
        let when = match draw.u8(..10) {
            0..6 => When::Bytes(Direction::ToDestination, draw.u64(..bytes)),
            6 | 7 => When::Bytes(Direction::ToSource, draw.u64(..500)),
            8 => When::Before(KINDS[draw.usize(..KINDS.len())]),
            _ => When::After(KINDS[draw.usize(..KINDS.len())]),
        };
        let time = Duration::from_micros(draw.u64(..60_000));
        let fault = match draw.u8(..10) {
            0..4 => Fault::Cut,
            4 => Fault::CutOne,
            5 => Fault::CutAfter(time / 10),
            6 => Fault::Stall(time),
            7 => Fault::StallAndCut(time),
            _ => Fault::HalfClose,
        };
        let step = Self::new(when, fault);
        match draw.u8(..4) {
            0 => step.refusing(Door::Closes, time * 2),
            1 => step.refusing(Door::Absent, time * 2),
            _ => step,
        }
    }
}

/// The faults of a proxy, in order. A fault whose place never comes is the last one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan(pub Vec<Step>);

impl Plan {
    /// A mark at the first page: the setup is over.
    pub const FIRST_PAGE: Step = Step { when: When::Before(Kind::Pages), fault: Fault::Mark, refusal: None };

    /// One to three faults that the seed decides, after the first page. `bytes` is about what the migration sends.
    #[must_use]
    pub fn drawn(seed: u64, bytes: u64) -> Self {
        let mut draw = Rng::with_seed(seed);
        let count = draw.usize(1..4);
        let steps = (0..count).map(|_| Step::drawn(&mut draw, bytes));
        Self(std::iter::once(Self::FIRST_PAGE).chain(steps).collect())
    }
}

/// The proxy. Dropped, it closes everything.
pub struct Proxy {
    address: Address,
    shared: Arc<Shared>,
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.shared.state();
        write!(
            f,
            "a proxy at {}: {:?} bytes, faults {:?}, left {:?}",
            self.address, state.forwarded, state.faults, state.plan
        )
    }
}

struct Shared {
    target: Address,
    state: Mutex<State>,
    door: watch::Sender<Timed<Door>>,
    stall: watch::Sender<Timed<bool>>,
    /// Cancelled when the proxy is dropped.
    over: CancellationToken,
}

/// A value, and the time until which it holds. Without a time it holds until it is changed.
#[derive(Clone, Copy)]
struct Timed<T> {
    value: T,
    until: Option<Instant>,
}

impl<T: Copy> Timed<T> {
    /// The value, or `later` after its time.
    fn or(self, later: T) -> T {
        if self.until.is_some_and(|until| until <= Instant::now()) { later } else { self.value }
    }

    /// Returns at its time.
    async fn is_over(self) {
        match self.until {
            Some(until) => sleep_until(until).await,
            None => std::future::pending().await,
        }
    }
}

struct State {
    plan: VecDeque<Step>,
    faults: Vec<Fault>,
    /// Bytes by direction since the latest fault.
    since: [u64; 2],
    forwarded: [u64; 2],
    /// Cancelled when all present connections are cut.
    cut: CancellationToken,
    /// The first bytes of the first connection to the destination.
    greeting: Vec<u8>,
}

impl Proxy {
    /// Listens on an address, and forwards to `target` by the plan. For port 0 the system chooses a port.
    ///
    /// # Errors
    /// If it cannot listen there.
    pub async fn begin(address: &Address, target: Address, plan: Plan) -> io::Result<Self> {
        let listener = Listener::bind(address).await?;
        let state = State {
            plan: plan.0.into(),
            faults: Vec::new(),
            since: [0; 2],
            forwarded: [0; 2],
            cut: CancellationToken::new(),
            greeting: Vec::new(),
        };
        let shared = Arc::new(Shared {
            target,
            state: Mutex::new(state),
            door: watch::Sender::new(Timed { value: Door::Open, until: None }),
            stall: watch::Sender::new(Timed { value: false, until: None }),
            over: CancellationToken::new(),
        });
        let address = listener.address(address)?;
        let (serving, own) = (shared.clone(), address.clone());
        tokio::spawn(async move {
            tokio::select! {
                biased;
                () = serving.over.cancelled() => {}
                () = serving.clone().serve(listener, own) => {}
            }
        });
        Ok(Self { address, shared })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Bytes that it has forwarded in a direction.
    #[must_use]
    pub fn forwarded(&self, direction: Direction) -> u64 {
        self.shared.state().forwarded[direction as usize]
    }

    /// The faults so far, by the plan or by hand.
    #[must_use]
    pub fn faults(&self) -> Vec<Fault> {
        self.shared.state().faults.clone()
    }

    /// How many of the faults may have broken a connection.
    #[must_use]
    pub fn breaks(&self) -> usize {
        self.faults().into_iter().filter(|fault| fault.breaks()).count()
    }

    /// The first bytes of the first connection: its Hello, once that was forwarded.
    #[must_use]
    pub fn greeting(&self) -> Vec<u8> {
        self.shared.state().greeting.clone()
    }

    /// Cuts every connection.
    pub fn cut(&self) {
        self.shared.note(Fault::Cut);
        self.shared.renew_cut().cancel();
    }

    /// Opens or closes the door until it is changed.
    pub fn set_door(&self, door: Door) {
        self.shared.door.send_replace(Timed { value: door, until: None });
    }

    /// Forwards nothing until it is released.
    pub fn stall(&self) {
        self.shared.note(Fault::Stall(Duration::MAX));
        self.shared.stall.send_replace(Timed { value: true, until: None });
    }

    /// Forwards again.
    pub fn release(&self) {
        self.shared.stall.send_replace(Timed { value: false, until: None });
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.over.cancel();
        self.shared.renew_cut().cancel();
        if let Address::Unix(path) = &self.address {
            drop(std::fs::remove_file(path));
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, fault: Fault) {
        self.state().faults.push(fault);
    }

    /// The token of the present connections; later ones have another.
    fn renew_cut(&self) -> CancellationToken {
        std::mem::replace(&mut self.state().cut, CancellationToken::new())
    }

    async fn serve(self: Arc<Self>, listener: Listener, address: Address) {
        let mut listener = Some(listener);
        let mut door = self.door.subscribe();
        loop {
            let now = *door.borrow_and_update();
            if now.or(Door::Open) == Door::Absent {
                if listener.take().is_some() {
                    Listener::remove(&address);
                }
                tokio::select! {
                    _ = door.changed() => {}
                    () = now.is_over() => {}
                }
                continue;
            }
            let Some(listening) = &listener else {
                // Another program may have the port for a moment.
                match Listener::bind(&address).await {
                    Ok(bound) => listener = Some(bound),
                    Err(_) => sleep(TAKEN).await,
                }
                continue;
            };
            tokio::select! {
                accepted = listening.accept() => match accepted {
                    Ok(source) if self.door.borrow().or(Door::Open) == Door::Open => {
                        tokio::spawn(self.clone().forward(source));
                    }
                    Ok(source) => source.reset(),
                    Err(_) => sleep(TAKEN).await,
                },
                _ = door.changed() => {}
                () = now.is_over(), if now.or(Door::Open) != Door::Open => {}
            }
        }
    }

    /// Forwards one connection, both ways, until both are over or it is cut.
    async fn forward(self: Arc<Self>, source: Socket) {
        let cut = self.state().cut.child_token();
        let Ok(destination) = Socket::connect(&self.target).await else { return source.reset() };
        let both = async {
            tokio::join!(
                self.pump(Direction::ToDestination, &source, &destination, &cut),
                self.pump(Direction::ToSource, &destination, &source, &cut),
            );
        };
        tokio::select! {
            biased;
            () = cut.cancelled() => {
                source.reset();
                destination.reset();
            }
            () = both => {}
        }
    }

    /// Forwards one direction of a connection until it is closed.
    async fn pump(&self, direction: Direction, from: &Socket, to: &Socket, cut: &CancellationToken) {
        let mut frames = Frames::default();
        let mut buffer = vec![0; HELD];
        let mut stall = self.stall.subscribe();
        loop {
            let mut bytes = match from.read(&mut buffer).await {
                Ok(0) => return to.close_writing(),
                Ok(length) => &buffer[..length],
                Err(_) => return cut.cancel(),
            };
            while !bytes.is_empty() {
                until_released(&mut stall).await;
                let (admitted, step) = self.admit(direction, &mut frames, bytes);
                // An end that does not read any more may still send.
                if to.write_all(&bytes[..admitted]).await.is_err() {
                    return;
                }
                bytes = &bytes[admitted..];
                let Some(step) = step else { continue };
                self.perform(step, cut);
                if step.fault == Fault::HalfClose {
                    return to.close_writing();
                }
                if cut.is_cancelled() {
                    return std::future::pending().await;
                }
            }
        }
    }

    /// How many of these bytes may be forwarded before the next step of the plan, and that step if its place is there.
    fn admit(&self, direction: Direction, frames: &mut Frames, bytes: &[u8]) -> (usize, Option<Step>) {
        let mut state = self.state();
        let index = direction as usize;
        let place = match state.plan.front().map(|step| step.when) {
            Some(when) if when.direction() != direction => frames.follow(bytes),
            Some(When::Bytes(_, after)) => {
                let left = usize::try_from(after.saturating_sub(state.since[index])).unwrap_or(usize::MAX);
                frames.follow(&bytes[..left.min(bytes.len())]);
                (left <= bytes.len()).then_some(left)
            }
            Some(When::Before(kind)) => frames.find(bytes, |edge| edge == Edge::Begins(kind as u8)),
            Some(When::After(kind)) => frames.find(bytes, |edge| edge == Edge::Ended(kind as u8)),
            None => frames.follow(bytes),
        };
        let admitted = place.unwrap_or(bytes.len());
        if state.greeting.len() < HELD && direction == Direction::ToDestination {
            state.greeting.extend_from_slice(&bytes[..admitted]);
        }
        state.forwarded[index] += admitted as u64;
        state.since[index] += admitted as u64;
        let step = place.and_then(|_| state.plan.pop_front());
        if step.is_some() {
            state.since = [0; 2];
        }
        (admitted, step)
    }

    fn perform(&self, step: Step, connection: &CancellationToken) {
        self.note(step.fault);
        if let Some((value, time)) = step.refusal {
            self.door.send_replace(Timed { value, until: Some(Instant::now() + time) });
        }
        match step.fault {
            Fault::Mark | Fault::HalfClose => {}
            Fault::Cut => self.renew_cut().cancel(),
            Fault::CutOne => connection.cancel(),
            Fault::CutAfter(time) => self.cut_after(time),
            Fault::Stall(time) => self.stall_for(time),
            Fault::StallAndCut(time) => {
                self.stall_for(time);
                self.cut_after(time);
            }
        }
    }

    fn stall_for(&self, time: Duration) {
        self.stall.send_replace(Timed { value: true, until: Some(Instant::now() + time) });
    }

    /// Cuts the present connections after this time.
    fn cut_after(&self, time: Duration) {
        let (present, over) = (self.renew_cut(), self.over.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = sleep(time) => {}
                () = over.cancelled() => {}
            }
            present.cancel();
        });
    }
}

async fn until_released(stall: &mut watch::Receiver<Timed<bool>>) {
    loop {
        let now = *stall.borrow_and_update();
        if !now.or(false) {
            return;
        }
        tokio::select! {
            _ = stall.changed() => {}
            () = now.is_over() => {}
        }
    }
}

/// A place between two frames, with the kind of one of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Edge {
    /// A frame of this kind begins.
    Begins(u8),
    /// A frame of this kind has ended.
    Ended(u8),
}

/// Follows the frames of one direction of a connection, by their heads alone. Bytes that are no frames do no harm.
#[derive(Debug, Default)]
struct Frames {
    head: [u8; HEAD_BYTES],
    /// Bytes of the head that have come.
    have: usize,
    /// Bytes of the body that have not come.
    left: usize,
}

impl Frames {
    /// Follows all of these bytes: there is no place to find.
    fn follow(&mut self, bytes: &[u8]) -> Option<usize> {
        self.find(bytes, |_| false)
    }

    /// Follows the bytes up to a place between two frames, or to their end, and returns the place.
    fn find(&mut self, bytes: &[u8], is_it: impl Fn(Edge) -> bool) -> Option<usize> {
        let mut at = 0;
        while at < bytes.len() {
            if self.have == 0 && is_it(Edge::Begins(bytes[at])) {
                return Some(at);
            }
            at += self.advance(&bytes[at..]);
            if self.have == 0 && is_it(Edge::Ended(self.head[0])) {
                return Some(at);
            }
        }
        None
    }

    /// Follows the bytes to the end of a head or of a body at most.
    fn advance(&mut self, bytes: &[u8]) -> usize {
        let taken;
        if self.have < HEAD_BYTES {
            taken = bytes.len().min(HEAD_BYTES - self.have);
            self.head[self.have..self.have + taken].copy_from_slice(&bytes[..taken]);
            self.have += taken;
            if self.have == HEAD_BYTES {
                let length = self.head[4..8].try_into().expect("four bytes");
                self.left = u32::from_le_bytes(length) as usize;
            }
        } else {
            taken = bytes.len().min(self.left);
            self.left -= taken;
        }
        if self.have == HEAD_BYTES && self.left == 0 {
            self.have = 0;
        }
        taken
    }
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    async fn bind(address: &Address) -> io::Result<Self> {
        match address {
            Address::Tcp { host, port } => Ok(Self::Tcp(TcpListener::bind((host.as_str(), *port)).await?)),
            Address::Unix(path) => Ok(Self::Unix(UnixListener::bind(path)?)),
            Address::File(_) | Address::TlsTcp { .. } | Address::TlsUnix(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// The address, with the port that the system chose.
    fn address(&self, asked: &Address) -> io::Result<Address> {
        Ok(match (self, asked) {
            (Self::Tcp(listener), Address::Tcp { host, .. }) => {
                Address::Tcp { host: host.clone(), port: listener.local_addr()?.port() }
            }
            _ => asked.clone(),
        })
    }

    /// Removes what a listener leaves behind.
    fn remove(address: &Address) {
        if let Address::Unix(path) = address {
            remove_socket(path);
        }
    }

    async fn accept(&self) -> io::Result<Socket> {
        Ok(match self {
            Self::Tcp(listener) => Socket::tcp(listener.accept().await?.0)?,
            Self::Unix(listener) => Socket::Unix(listener.accept().await?.0),
        })
    }
}

fn remove_socket(path: &Path) {
    std::fs::remove_file(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    async fn connect(address: &Address) -> io::Result<Self> {
        match address {
            Address::Tcp { host, port } => Self::tcp(TcpStream::connect((host.as_str(), *port)).await?),
            Address::Unix(path) => Ok(Self::Unix(UnixStream::connect(path).await?)),
            Address::File(_) | Address::TlsTcp { .. } | Address::TlsUnix(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn tcp(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        Ok(Self::Tcp(stream))
    }

    async fn read(&self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = match self {
                Self::Tcp(stream) => {
                    stream.readable().await?;
                    stream.try_read(into)
                }
                Self::Unix(stream) => {
                    stream.readable().await?;
                    stream.try_read(into)
                }
            };
            if !matches!(&read, Err(error) if error.kind() == io::ErrorKind::WouldBlock) {
                return read;
            }
        }
    }

    async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let written = match self {
                Self::Tcp(stream) => {
                    stream.writable().await?;
                    stream.try_write(bytes)
                }
                Self::Unix(stream) => {
                    stream.writable().await?;
                    stream.try_write(bytes)
                }
            };
            match written {
                Ok(written) => bytes = &bytes[written..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn close_writing(&self) {
        // A peer that is gone needs no end of the stream.
        drop(match self {
            Self::Tcp(stream) => SockRef::from(stream).shutdown(std::net::Shutdown::Write),
            Self::Unix(stream) => SockRef::from(stream).shutdown(std::net::Shutdown::Write),
        });
    }

    /// Closes it without delivering what waits to be sent. The peer's next call fails.
    fn reset(self) {
        if let Self::Tcp(stream) = &self {
            drop(SockRef::from(stream).set_linger(Some(Duration::ZERO)));
        }
    }
}

#[cfg(test)]
mod tests;
