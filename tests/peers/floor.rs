//! The lower bound: an image that is moved from one process to another by bare sockets alone.
//!
//! The source writes from the mapped file; the destination reads into fresh memory for which huge pages were
//! requested. The source's clock stops when the destination has acknowledged, with one byte, that all bytes have
//! arrived.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::slice;
use std::time::{Duration, Instant};

use memferry_stages::memory::MappedMemory;
use memferry_tests::bare;
use memferry_transports::Address;
use serde::{Deserialize, Serialize};
use socket2::SockRef;
use xxhash_rust::xxh3::xxh3_128;

use crate::Fallible;
use crate::end::{Reply, Verdict, reply, wait_for_line};

/// The kind of sockets.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Sockets {
    /// The number of connections.
    pub(crate) connections: u8,
    /// The send buffer of each connection, for TCP only; `None`: the kernel tunes it. Within a host a small buffer
    /// keeps sent data in the processor's cache until it is read.
    pub(crate) send_buffer: Option<usize>,
}

/// The source's end.
pub(crate) fn send(address: &str, image: &Path, sockets: Sockets) -> Fallible<()> {
    let memory = MappedMemory::file(OpenOptions::new().read(true).write(true).open(image)?)?;
    // SAFETY: the image does not change while it is sent, and is mapped until the end of this function.
    let bytes = unsafe { slice::from_raw_parts(memory.as_ptr(), memory.len()) };
    reply(&Reply::Ready(address.to_owned()))?;
    wait_for_line()?;
    let began = Instant::now();
    let mut sockets = connect(&address.parse()?, sockets)?;
    bare::send(bytes, &mut sockets)?;
    sockets[0].read_exact(&mut [0])?;
    reply(&Reply::Done(verdict(began.elapsed(), bytes.len())))?;
    wait_for_line()
}

/// The destination's end.
pub(crate) fn receive(address: &str, bytes: usize, connections: u8) -> Fallible<()> {
    let memory = MappedMemory::anonymous(bytes)?;
    // Huge pages are an optimization: without them the result is the same.
    drop(memory.advise_huge());
    // SAFETY: the memory is not accessed elsewhere, and is mapped until the end of this function.
    let into = unsafe { slice::from_raw_parts_mut(memory.as_ptr(), memory.len()) };
    let listening = Listening::at(&address.parse()?)?;
    reply(&Reply::Ready(listening.address()?))?;
    wait_for_line()?;
    let began = Instant::now();
    let mut sockets = listening.accept(connections)?;
    bare::receive(&mut sockets, into)?;
    sockets[0].write_all(&[0])?;
    reply(&Reply::Done(verdict(began.elapsed(), bytes)))?;
    wait_for_line()?;
    reply(&Reply::Hash(xxh3_128(into)))?;
    wait_for_line()
}

fn verdict(total: Duration, bytes: usize) -> Verdict {
    Verdict {
        completed: true,
        error: None,
        total,
        downtime: total,
        wire_bytes: bytes as u64,
        rounds: 1,
        written: 0,
        stages: Vec::new(),
    }
}

trait Socket: Read + Write + Send {}

impl Socket for TcpStream {}
impl Socket for UnixStream {}

/// Each connection begins with its number, because connections may be accepted in a different order from that of
/// their creation.
fn connect(address: &Address, sockets: Sockets) -> Fallible<Vec<Box<dyn Socket>>> {
    let connect = |number: u8| -> Fallible<Box<dyn Socket>> {
        let mut socket: Box<dyn Socket> = match address {
            Address::Tcp { host, port } => {
                let socket = TcpStream::connect((host.as_str(), *port))?;
                socket.set_nodelay(true)?;
                sockets.send_buffer.map_or(Ok(()), |bytes| SockRef::from(&socket).set_send_buffer_size(bytes))?;
                Box::new(socket)
            }
            Address::Unix(path) => Box::new(UnixStream::connect(path)?),
            Address::File(_) | Address::TlsTcp { .. } | Address::TlsUnix(_) => {
                return Err("this is no plain socket".into());
            }
        };
        socket.write_all(&[number])?;
        Ok(socket)
    };
    (0..sockets.connections).map(connect).collect()
}

enum Listening {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listening {
    fn at(address: &Address) -> Fallible<Self> {
        match address {
            Address::Tcp { host, port } => Ok(Self::Tcp(TcpListener::bind((host.as_str(), *port))?)),
            Address::Unix(path) => {
                // The socket of a previous run.
                drop(std::fs::remove_file(path));
                Ok(Self::Unix(UnixListener::bind(path)?))
            }
            Address::File(_) | Address::TlsTcp { .. } | Address::TlsUnix(_) => Err("this is no plain socket".into()),
        }
    }

    fn address(&self) -> Fallible<String> {
        Ok(match self {
            Self::Tcp(listener) => format!("tcp:{}", listener.local_addr()?),
            Self::Unix(listener) => {
                let address = listener.local_addr()?;
                format!("unix:{}", address.as_pathname().ok_or("it listens at a path")?.display())
            }
        })
    }

    fn accept(&self, connections: u8) -> Fallible<Vec<Box<dyn Socket>>> {
        let accept = |_| -> Fallible<(u8, Box<dyn Socket>)> {
            let mut socket: Box<dyn Socket> = match self {
                Self::Tcp(listener) => Box::new(listener.accept()?.0),
                Self::Unix(listener) => Box::new(listener.accept()?.0),
            };
            let mut number = [0];
            socket.read_exact(&mut number)?;
            Ok((number[0], socket))
        };
        let mut sockets = (0..connections).map(accept).collect::<Fallible<Vec<_>>>()?;
        sockets.sort_by_key(|(number, _)| *number);
        Ok(sockets.into_iter().map(|(_, socket)| socket).collect())
    }
}
