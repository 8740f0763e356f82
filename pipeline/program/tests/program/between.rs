//! A stand-in for the wire between two programs: it passes frames on, and what a test waits for is that a frame is there.
//!
//! A source connects to it as to its destination. Each frame is asked about before it is passed on: the answer may take as long as
//! a test likes, and neither end gets further meanwhile. So a moment of a migration is a frame, at whatever speed it comes.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use memferry_stages::geometry::PageSize;
use memferry_stages::wire::{FrameHead, HEAD_BYTES, Kind};

/// What becomes of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pass {
    /// It is passed on.
    On,
    /// The connection is cut, and it is lost.
    Cut,
}

/// Asked about each frame, in either direction.
type Ask = dyn FnMut(Kind) -> Pass + Send;

/// Listens in front of a destination, and gives the setting with which a source finds it. Of one migration over one connection.
pub(crate) fn between(destination: &str, ask: impl FnMut(Kind) -> Pass + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let setting = format!("transport.address=tcp:{}", listener.local_addr().unwrap());
    let destination = destination.strip_prefix("transport.address=tcp:").unwrap().to_owned();
    let ask: Arc<Mutex<Ask>> = Arc::new(Mutex::new(ask));
    thread::spawn(move || {
        let (source, _) = listener.accept().unwrap();
        let destination = TcpStream::connect(destination).unwrap();
        for end in [&source, &destination] {
            end.set_nodelay(true).unwrap();
        }
        let (back_from, back_to) = (destination.try_clone().unwrap(), source.try_clone().unwrap());
        let asked = ask.clone();
        thread::spawn(move || pass(back_from, back_to, &asked));
        pass(source, destination, &ask);
    });
    setting
}

/// Passes frames on until an end closes, or is to be cut off.
fn pass(mut from: TcpStream, mut to: TcpStream, ask: &Mutex<Ask>) {
    if matches!(pass_frames(&mut from, &mut to, ask), Ok(Pass::Cut)) {
        // Nothing goes either way.
        for end in [&from, &to] {
            drop(end.shutdown(Shutdown::Both));
        }
    } else {
        // What the other direction still has to say is heard.
        drop(to.shutdown(Shutdown::Write));
        drop(from.shutdown(Shutdown::Read));
    }
}

fn pass_frames(from: &mut TcpStream, to: &mut TcpStream, ask: &Mutex<Ask>) -> io::Result<Pass> {
    loop {
        let mut frame = vec![0; HEAD_BYTES];
        match from.read(&mut frame[..1])? {
            0 => return Ok(Pass::On),
            _ => from.read_exact(&mut frame[1..])?,
        }
        let head = FrameHead::parse(frame.first_chunk().unwrap(), PageSize::DEFAULT).unwrap();
        frame.resize(HEAD_BYTES + usize::try_from(head.length).unwrap(), 0);
        from.read_exact(&mut frame[HEAD_BYTES..])?;
        let kind = Kind::from_u8(frame[0]).unwrap();
        // Whoever holds a frame back holds back the other direction, too.
        if (ask.lock().unwrap())(kind) == Pass::Cut {
            return Ok(Pass::Cut);
        }
        to.write_all(&frame)?;
    }
}
