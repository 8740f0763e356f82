//! The contract of every transport: bytes arrive complete and in order, either end may start first, errors name the place.

#[path = "../../tests/src/skip.rs"]
pub mod skip;

use std::io::{ErrorKind, IoSlice};
use std::time::{Duration, Instant};

use memferry_transports::memory::MemoryTransport;
use memferry_transports::{Address, Connection, Transport, open};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use skip::skipped;

const PATIENCE: Duration = Duration::from_secs(60);

fn parse(text: &str) -> Box<dyn Transport> {
    open(&text.parse::<Address>().expect(text), PATIENCE)
}

/// A port that was free a moment ago.
async fn tcp_on(host: &str) -> Box<dyn Transport> {
    let listener = parse(&format!("tcp:{host}:0")).listen().await.expect("a port");
    parse(&listener.local_address())
}

async fn with_return_path(directory: &tempfile::TempDir) -> Vec<Box<dyn Transport>> {
    let socket = format!("unix:{}", directory.path().join("s").display());
    vec![tcp_on("127.0.0.1").await, parse(&socket), Box::new(MemoryTransport::new(5000))]
}

/// Bytes that do not repeat at a short distance.
fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 7 + at / 251 + at / 65_536).to_le_bytes()[0]).collect()
}

/// Writes everything through vectored writes of odd slices.
async fn write_vectored(connection: &mut Connection, bytes: &[u8]) {
    let writer = connection.writer.as_mut().expect("a writer");
    assert!(writer.is_write_vectored(), "many frames go in one system call");
    let mut written = 0;
    while written < bytes.len() {
        let rest = &bytes[written..];
        let slices: Vec<_> = rest.chunks(4093).take(300).map(IoSlice::new).collect();
        let once = writer.write_vectored(&slices).await.expect("written");
        assert!(once > 0);
        written += once;
    }
    writer.shutdown().await.expect("shut down");
}

async fn read_all(connection: &mut Connection) -> Vec<u8> {
    let mut bytes = Vec::new();
    connection.reader.as_mut().expect("a reader").read_to_end(&mut bytes).await.expect("read");
    bytes
}

async fn both_directions(transport: &dyn Transport, connections: usize) {
    let mut listener = transport.listen().await.expect("listening");
    let bytes = pattern(3 << 20);
    for _ in 0..connections {
        let (source, destination) = tokio::join!(transport.connect(), listener.accept_ready());
        let (mut source, mut destination) = (source.expect("connected"), destination.expect("accepted"));
        let (received, answer) = tokio::join!(
            async {
                write_vectored(&mut source, &bytes).await;
                read_all(&mut source).await
            },
            async {
                let received = read_all(&mut destination).await;
                write_vectored(&mut destination, &received[1..]).await;
                received
            }
        );
        assert!(answer == bytes && received == bytes[1..], "bytes differ over {}", transport.address());
    }
}

#[tokio::test]
async fn bytes_arrive_in_both_directions() {
    let directory = tempfile::tempdir().expect("a directory");
    for transport in with_return_path(&directory).await {
        timeout(PATIENCE, both_directions(&*transport, 3)).await.expect("in time");
        assert!(transport.capabilities().return_path && transport.capabilities().max_connections > 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_are_independent() {
    let directory = tempfile::tempdir().expect("a directory");
    for transport in with_return_path(&directory).await {
        let mut listener = transport.listen().await.expect("listening");
        let mut pairs = Vec::new();
        for _ in 0..4 {
            let (source, destination) = tokio::join!(transport.connect(), listener.accept_ready());
            pairs.push((source.expect("connected"), destination.expect("accepted")));
        }
        for (number, (source, _)) in pairs.iter_mut().enumerate() {
            source.writer.as_mut().expect("a writer").write_u64(number as u64).await.expect("written");
        }
        for (number, (_, destination)) in pairs.iter_mut().enumerate().rev() {
            let read = destination.reader.as_mut().expect("a reader").read_u64().await.expect("read");
            assert_eq!(read, number as u64);
        }
    }
}

#[tokio::test]
async fn the_source_may_start_first() {
    let directory = tempfile::tempdir().expect("a directory");
    for transport in with_return_path(&directory).await {
        let late = async {
            tokio::time::sleep(Duration::from_millis(120)).await;
            transport.listen().await.expect("listening").accept_ready().await.expect("accepted")
        };
        let (source, mut destination) = tokio::join!(transport.connect(), late);
        source.expect("connected").writer.expect("a writer").write_u8(9).await.expect("written");
        assert_eq!(destination.reader.as_mut().expect("a reader").read_u8().await.expect("read"), 9);
    }
}

#[tokio::test]
async fn a_dropped_end_is_noticed() {
    let directory = tempfile::tempdir().expect("a directory");
    for transport in with_return_path(&directory).await {
        let mut listener = transport.listen().await.expect("listening");
        let (source, destination) = tokio::join!(transport.connect(), listener.accept_ready());
        let mut source = source.expect("connected");
        drop(destination.expect("accepted"));
        assert!(read_all(&mut source).await.is_empty());
        let mut writer = source.writer.take().expect("a writer");
        let error = loop {
            if let Err(error) = writer.write_all(&[0; 4096]).await {
                break error;
            }
        };
        assert!(matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset), "{error}");
    }
}

#[tokio::test]
async fn connecting_ends_in_time_with_the_cause() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut nobody = vec![
        (format!("unix:{}", directory.path().join("none").display()), ErrorKind::NotFound),
        (tcp_on("127.0.0.1").await.address(), ErrorKind::ConnectionRefused),
        (tcp_on("localhost").await.address(), ErrorKind::ConnectionRefused),
    ];
    match tokio::net::TcpListener::bind("[::1]:0").await {
        Ok(_) => nobody.push((tcp_on("[::1]").await.address(), ErrorKind::ConnectionRefused)),
        Err(error) => skipped(format_args!("no IPv6 on this host ({error})")),
    }
    for (address, kind) in nobody {
        let begun = Instant::now();
        let transport = open(&address.parse().expect("an address"), Duration::from_millis(300));
        let error = timeout(PATIENCE, transport.connect()).await.expect("in time").expect_err("nobody listens");
        assert!(begun.elapsed() >= Duration::from_millis(300));
        let message = error.to_string();
        assert_eq!(error.kind(), kind, "{message}");
        assert!(message.contains(&address) && message.contains(": tried for "), "{message}");
    }
}

#[tokio::test]
async fn a_name_that_does_not_resolve_is_named() {
    let transport = open(&"tcp:no-such-host.invalid:7777".parse().expect("an address"), Duration::from_millis(200));
    let message = timeout(PATIENCE, transport.connect()).await.expect("in time").expect_err("no such host").to_string();
    assert!(message.contains("\"no-such-host.invalid\" does not resolve"), "{message}");
    let message = transport.listen().await.expect_err("no such host").to_string();
    assert!(message.contains("does not resolve"), "{message}");
}

#[tokio::test]
async fn host_names_and_ipv6_work() {
    both_directions(&*tcp_on("localhost").await, 1).await;
    if let Err(error) = tokio::net::TcpListener::bind("[::1]:0").await {
        skipped(format_args!("no IPv6 on this host ({error})"));
        return;
    }
    let transport = tcp_on("[::1]").await;
    assert!(transport.address().starts_with("tcp:[::1]:"));
    both_directions(&*transport, 1).await;
}

#[tokio::test]
async fn a_tcp_port_in_use_is_an_error_with_advice() {
    let first = parse("tcp:127.0.0.1:0").listen().await.expect("listening");
    let error = parse(&first.local_address()).listen().await.expect_err("in use");
    assert_eq!(error.kind(), ErrorKind::AddrInUse);
    let message = error.to_string();
    assert!(message.contains(&first.local_address()) && message.contains("use another port"), "{message}");
}

#[tokio::test]
async fn a_tcp_port_can_be_listened_to_again_at_once() {
    let transport = tcp_on("127.0.0.1").await;
    for _ in 0..3 {
        let mut listener = transport.listen().await.expect("listening");
        let (source, destination) = tokio::join!(transport.connect(), listener.accept_ready());
        // The listening end closes first: its port lingers in TIME_WAIT.
        drop(destination.expect("accepted"));
        assert!(read_all(&mut source.expect("connected")).await.is_empty());
    }
}

#[tokio::test]
async fn port_0_is_for_listeners() {
    let error = parse("tcp:127.0.0.1:0").connect().await.expect_err("no port");
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
}
