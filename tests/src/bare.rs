//! Bare sockets: the kernel's cost of moving memory. No frames, no checks, no copies except the kernel's own.
//!
//! Each connection carries one part of the memory, in chunks, and has one thread at each end.

use std::io::{self, Read, Write};

/// Bytes of one write, and of one read.
const CHUNK: usize = 256 << 10;

/// Writes the memory, one part on each connection.
///
/// # Errors
/// If a connection fails.
///
/// # Panics
/// If there is no connection.
pub fn send<W: Write + Send>(memory: &[u8], connections: &mut [W]) -> io::Result<()> {
    let parts = memory.chunks(memory.len().div_ceil(connections.len()));
    on_threads(connections.iter_mut().zip(parts), |(out, part)| {
        part.chunks(CHUNK).try_for_each(|chunk| out.write_all(chunk))
    })
}

/// Reads what [`send`] writes on the same number of connections, directly to its place.
///
/// # Errors
/// If a connection fails.
///
/// # Panics
/// If there is no connection.
pub fn receive<R: Read + Send>(connections: &mut [R], memory: &mut [u8]) -> io::Result<()> {
    let parts = memory.chunks_mut(memory.len().div_ceil(connections.len()));
    on_threads(connections.iter_mut().zip(parts), |(inn, part)| {
        part.chunks_mut(CHUNK).try_for_each(|chunk| inn.read_exact(chunk))
    })
}

/// Processes each item on a thread of its own.
fn on_threads<T: Send>(
    items: impl Iterator<Item = T>,
    work: impl Fn(T) -> io::Result<()> + Copy + Send,
) -> io::Result<()> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = items.map(|item| scope.spawn(move || work(item))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("it does not panic"))
    })
}
