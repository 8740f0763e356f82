//! The bytes of connections after their handshake.

use std::io::{ErrorKind, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use memferry_transports::tcp::TcpTransport;
use memferry_transports::unix::UnixTransport;
use memferry_transports::{Capabilities, Connection, Listener, Transport};
use memferry_transports_tls::{TlsSettings, TlsTransport, trial};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadBuf};
use tokio::time::timeout;

use crate::authority::{Authority, Ends, HANG, Made};

fn ends(ours: &Authority) -> (TlsSettings, TlsSettings) {
    (ours.settings(&Made::of_source()), ours.settings(&Made::of_destination()))
}

/// Bytes that do not repeat at a short distance.
fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 7 + at / 251 + at / 65_536).to_le_bytes()[0]).collect()
}

/// Writes everything through vectored writes of odd slices, and flushes nothing.
async fn write_vectored(connection: &mut Connection, bytes: &[u8]) {
    let writer = connection.writer.as_mut().unwrap();
    assert!(writer.is_write_vectored(), "many frames go in one system call");
    let mut written = 0;
    while written < bytes.len() {
        let slices: Vec<_> = bytes[written..].chunks(4093).take(300).map(IoSlice::new).collect();
        written += writer.write_vectored(&slices).await.unwrap();
    }
}

async fn read(connection: &mut Connection, bytes: usize) -> Vec<u8> {
    let mut buffer = vec![0; bytes];
    let reading = connection.reader.as_mut().unwrap().read_exact(&mut buffer);
    timeout(HANG, reading).await.expect("what was written does not come").unwrap();
    buffer
}

async fn both_directions(transport: &dyn Transport) {
    let bytes = pattern(3 << 20);
    let mut listener = transport.listen().await.unwrap();
    let address: memferry_transports::Address = listener.local_address().parse().unwrap();
    assert!(address.beneath().is_some(), "{address}");
    for _ in 0..2 {
        let (source, destination) = tokio::join!(transport.connect(), listener.accept_ready());
        let (mut source, mut destination) = (source.unwrap(), destination.unwrap());
        let forth = async {
            write_vectored(&mut source, &bytes).await;
            read(&mut source, bytes.len()).await
        };
        let back = async {
            let came = read(&mut destination, bytes.len()).await;
            write_vectored(&mut destination, &came).await;
        };
        let (came, ()) = tokio::join!(forth, back);
        assert!(came == bytes, "bytes differ over {}", transport.address());
        for (one, other) in [(&mut source, &mut destination)] {
            one.writer.as_mut().unwrap().shutdown().await.unwrap();
            assert_eq!(other.reader.as_mut().unwrap().read(&mut [0; 9]).await.unwrap(), 0, "an orderly end");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_arrive_in_both_directions_over_sockets_without_a_flush() {
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path().join("pki");
    trial::write(&directory, &["dest.example".into()]).unwrap();
    // The name is that of the address: 127.0.0.1, and localhost for a socket of this host.
    let settings = TlsSettings { directory: Some(directory), ..TlsSettings::default() };
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let beneath: [Box<dyn Transport>; 2] = [
        Box::new(TcpTransport::new("127.0.0.1", port, HANG)),
        Box::new(UnixTransport::new(folder.path().join("s"), HANG)),
    ];
    for beneath in beneath {
        both_directions(&TlsTransport::new(beneath, settings.clone(), HANG)).await;
    }
}

/// A reader that is slower than the writer: what the connection beneath has not taken is written without another write.
#[tokio::test]
async fn what_is_left_of_a_write_follows_by_itself() {
    let ours = Authority::new("ours");
    let (source, destination) = ends(&ours);
    let (mut source, mut destination) = Ends::new(source, destination).connected().await;
    let bytes = pattern(200_000);
    // The pipe beneath holds 64 KiB, TLS holds the rest.
    let written = source.writer.as_mut().unwrap().write(&bytes).await.unwrap();
    assert!(written > 100_000, "{written} bytes");
    assert!(read(&mut destination, written).await == bytes[..written]);
}

#[tokio::test]
async fn the_end_without_a_notice_is_an_error_wherever_it_comes() {
    let ours = Authority::new("ours");
    let (source, destination) = ends(&ours);
    for bytes in [0, 1, 16_384, 50_000] {
        let (mut source, mut destination) = Ends::new(source.clone(), destination.clone()).connected().await;
        let mut writer = source.writer.take().unwrap();
        writer.write_all(&pattern(bytes)).await.unwrap();
        writer.flush().await.unwrap();
        drop(writer);
        let mut came = Vec::new();
        let error = destination.reader.as_mut().unwrap().read_to_end(&mut came).await.expect_err("cut");
        assert_eq!((came.len(), error.kind()), (bytes, ErrorKind::UnexpectedEof));
        assert!(error.to_string().contains("close_notify"), "{error}");

        // The other direction is as it was, until it has its own end.
        destination.writer.as_mut().unwrap().write_all(b"bye").await.unwrap();
        destination.writer.as_mut().unwrap().shutdown().await.unwrap();
        let mut came = Vec::new();
        source.reader.as_mut().unwrap().read_to_end(&mut came).await.unwrap();
        assert_eq!(came, b"bye");
    }
}

/// Memory whose destination reads one byte differently.
#[derive(Debug)]
struct Tampering {
    beneath: Box<dyn Transport>,
    at: usize,
}

struct Flipped {
    reader: Box<dyn AsyncRead + Send + Unpin>,
    left: usize,
}

impl AsyncRead for Flipped {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.reader).poll_read(context, buffer);
        let came = &mut buffer.filled_mut()[before..];
        if let Some(byte) = came.get_mut(self.left) {
            *byte ^= 1;
        }
        self.left = self.left.checked_sub(came.len()).unwrap_or(usize::MAX);
        polled
    }
}

#[derive(Debug)]
struct TamperingListener(Box<dyn Listener>, usize);

impl Listener for TamperingListener {
    fn accept(&mut self) -> BoxFuture<'_, std::io::Result<memferry_transports::Arrival>> {
        async move {
            let left = self.1;
            Ok(self.0.accept().await?.then(move |mut connection| async move {
                connection.reader = connection.reader.map(|reader| Box::new(Flipped { reader, left }) as _);
                Ok(connection)
            }))
        }
        .boxed()
    }

    fn local_address(&self) -> String {
        self.0.local_address()
    }
}

impl Transport for Tampering {
    fn capabilities(&self) -> Capabilities {
        self.beneath.capabilities()
    }

    fn address(&self) -> String {
        self.beneath.address()
    }

    fn connect(&self) -> BoxFuture<'_, std::io::Result<Connection>> {
        self.beneath.connect()
    }

    fn listen(&self) -> BoxFuture<'_, std::io::Result<Box<dyn Listener>>> {
        async move { Ok(Box::new(TamperingListener(self.beneath.listen().await?, self.at)) as Box<dyn Listener>) }
            .boxed()
    }
}

#[tokio::test]
async fn a_byte_that_was_changed_on_its_way_never_arrives() {
    let ours = Authority::new("ours");
    let (source, destination) = ends(&ours);
    let bytes = pattern(100_000);
    let mut in_stream = 0;
    for at in (0..60_000).step_by(1499) {
        let ends = Ends::new(source.clone(), TlsSettings::default());
        let beneath = Box::new(Tampering { beneath: Box::new(ends.memory.clone()), at });
        let tampered = TlsTransport::new(beneath, destination.clone(), Duration::ZERO);
        let mut listener = tampered.listen().await.unwrap();
        let (at_source, at_destination) =
            timeout(HANG, async { tokio::join!(ends.source.connect(), listener.accept_ready()) }).await.unwrap();
        // In the handshake, one of the two ends refuses.
        let (Ok(mut at_source), Ok(mut at_destination)) = (at_source, at_destination) else { continue };
        let writing =
            tokio::spawn(async move { drop(at_source.writer.as_mut().unwrap().write_all(&pattern(100_000)).await) });
        let mut came = Vec::new();
        let error = at_destination.reader.as_mut().unwrap().read_to_end(&mut came).await.expect_err("not authentic");
        assert!(bytes.starts_with(&came) && came.len() < 60_000, "{} bytes", came.len());
        // Where a record's length was changed, its end may not come.
        assert!(matches!(error.kind(), ErrorKind::InvalidData | ErrorKind::UnexpectedEof), "{error}");
        in_stream += 1;
        writing.abort();
    }
    assert!(in_stream > 20, "{in_stream}");
}
