//! A proxy between two programs, which forwards frames and lets a test wait for a frame.
//!
//! A source connects to the proxy as to its destination. The test is asked about each frame before it is forwarded.
//! It may take any time to answer, and neither end makes progress meanwhile. So a frame marks a moment of a
//! migration, whatever the speed of the machine.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use memferry_stages::geometry::PageSize;
use memferry_stages::wire::{FrameHead, HEAD_BYTES, Kind};

/// What happens to a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pass {
    /// It is forwarded.
    On,
    /// The connection is cut, and the frame is lost.
    Cut,
}

/// Called for each frame, in either direction.
type Ask = dyn FnMut(Kind) -> Pass + Send;

/// Listens in front of a destination, and returns the setting for the source to connect here. Serves one migration
/// over one connection.
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

/// Forwards frames until an end closes, or until the connection is to be cut.
fn pass(mut from: TcpStream, mut to: TcpStream, ask: &Mutex<Ask>) {
    if matches!(pass_frames(&mut from, &mut to, ask), Ok(Pass::Cut)) {
        // Both directions are cut.
        for end in [&from, &to] {
            drop(end.shutdown(Shutdown::Both));
        }
    } else {
        // The other direction may still deliver its frames.
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
        // A frame that is delayed here delays the other direction, too.
        if (ask.lock().unwrap())(kind) == Pass::Cut {
            return Ok(Pass::Cut);
        }
        to.write_all(&frame)?;
    }
}
