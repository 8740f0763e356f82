//! The memory transport's faults act exactly to the byte.

use std::io::ErrorKind;
use std::time::Duration;

use memferry_transports::memory::{Direction, MemoryTransport};
use memferry_transports::{Connection, Listener, Transport};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

const SHORT: Duration = Duration::from_millis(30);

async fn connected(transport: &MemoryTransport) -> (Box<dyn Listener>, Connection, Connection) {
    let mut listener = transport.listen().await.expect("listening");
    let (source, destination) = tokio::join!(transport.connect(), listener.accept_ready());
    (listener, source.expect("connected"), destination.expect("accepted"))
}

async fn write(connection: &mut Connection, bytes: &[u8]) -> Result<(), ErrorKind> {
    connection.writer.as_mut().expect("a writer").write_all(bytes).await.map_err(|error| error.kind())
}

async fn read(connection: &mut Connection, count: usize) -> Result<Vec<u8>, ErrorKind> {
    let mut bytes = vec![0; count];
    let read = connection.reader.as_mut().expect("a reader").read_exact(&mut bytes).await;
    read.map(|_| bytes).map_err(|error| error.kind())
}

#[tokio::test]
async fn a_cut_loses_what_is_in_flight_and_resets_both_ends() {
    let transport = MemoryTransport::new(100);
    let (mut listener, mut source, mut destination) = connected(&transport).await;
    write(&mut source, b"in flight").await.expect("written");
    transport.faults().cut();
    assert_eq!(read(&mut destination, 1).await, Err(ErrorKind::ConnectionReset));
    assert_eq!(read(&mut source, 1).await, Err(ErrorKind::ConnectionReset));
    assert_eq!(write(&mut source, b"x").await, Err(ErrorKind::ConnectionReset));
    assert_eq!(write(&mut destination, b"x").await, Err(ErrorKind::ConnectionReset));

    let (source, destination) = tokio::join!(transport.connect(), listener.accept_ready());
    let (mut source, mut destination) = (source.expect("connected"), destination.expect("accepted"));
    write(&mut source, b"again").await.expect("written");
    assert_eq!(read(&mut destination, 5).await.as_deref(), Ok(&b"again"[..]));
}

#[tokio::test]
async fn a_cut_wakes_waiting_tasks() {
    let transport = MemoryTransport::new(4);
    let (_listener, mut source, mut destination) = connected(&transport).await;
    transport.faults().stall(Direction::ToDestination);
    let writer = tokio::spawn(async move { write(&mut source, b"12345678").await });
    let reader = tokio::spawn(async move { read(&mut destination, 1).await });
    tokio::time::sleep(SHORT).await;
    assert!(!writer.is_finished() && !reader.is_finished());
    transport.faults().cut_after(Direction::ToSource, 0);
    for waiting in [writer.await.map(|end| end.err()), reader.await.map(|end| end.err())] {
        assert_eq!(waiting.expect("no panic"), Some(ErrorKind::ConnectionReset));
    }
}

#[tokio::test]
async fn a_cut_comes_after_an_exact_number_of_bytes() {
    for bytes in 1..60_u64 {
        let transport = MemoryTransport::new(7);
        let (_listener, mut source, mut destination) = connected(&transport).await;
        write(&mut source, b"abc").await.expect("written");
        read(&mut destination, 3).await.expect("delivered");
        transport.faults().cut_after(Direction::ToDestination, bytes);
        let writer = tokio::spawn(async move { write(&mut source, &[5; 100]).await });
        let mut received = Vec::new();
        let end = destination.reader.as_mut().expect("a reader").read_to_end(&mut received).await;
        assert_eq!(end.map_err(|error| error.kind()), Err(ErrorKind::ConnectionReset));
        assert_eq!(received.len() as u64, bytes);
        assert_eq!(transport.faults().delivered(Direction::ToDestination), bytes + 3);
        assert_eq!(writer.await.expect("no panic"), Err(ErrorKind::ConnectionReset));
        assert_eq!(
            write(&mut destination, b"x").await,
            Err(ErrorKind::ConnectionReset),
            "the other direction is cut too"
        );
    }
}

#[tokio::test]
async fn a_stall_holds_one_direction_until_its_release() {
    let transport = MemoryTransport::new(4);
    let faults = transport.faults();
    faults.stall(Direction::ToDestination);
    let (_listener, mut source, mut destination) = connected(&transport).await;
    write(&mut source, b"1234").await.expect("the buffer takes it");
    assert!(timeout(SHORT, write(&mut source, b"5")).await.is_err(), "the buffer is full");
    assert!(timeout(SHORT, read(&mut destination, 1)).await.is_err(), "nothing moves");
    write(&mut destination, b"back").await.expect("written");
    assert_eq!(read(&mut source, 4).await.as_deref(), Ok(&b"back"[..]), "the other direction continues");

    let waiting = tokio::spawn(async move { read(&mut destination, 4).await });
    tokio::time::sleep(SHORT).await;
    assert!(!waiting.is_finished());
    faults.release(Direction::ToDestination);
    let read = timeout(Duration::from_secs(60), waiting).await.expect("woken").expect("no panic");
    assert_eq!(read.as_deref(), Ok(&b"1234"[..]));
}

#[tokio::test]
async fn a_stall_holds_the_end_of_a_stream_back() {
    let transport = MemoryTransport::new(4);
    let (_listener, source, mut destination) = connected(&transport).await;
    transport.faults().stall(Direction::ToDestination);
    drop(source);
    assert!(timeout(SHORT, read(&mut destination, 1)).await.is_err());
    transport.faults().release(Direction::ToDestination);
    assert_eq!(read(&mut destination, 1).await, Err(ErrorKind::UnexpectedEof));
}

#[tokio::test]
async fn one_listener_at_a_time_and_another_after_it() {
    let transport = MemoryTransport::new(4);
    let first = transport.listen().await.expect("listening");
    assert_eq!(transport.listen().await.expect_err("one").kind(), ErrorKind::AddrInUse);
    drop(first);
    assert!(timeout(SHORT, transport.connect()).await.is_err(), "nobody listens");
    let (_listener, mut source, mut destination) = connected(&transport.clone()).await;
    write(&mut source, b"ok").await.expect("written");
    assert_eq!(read(&mut destination, 2).await.as_deref(), Ok(&b"ok"[..]));
}
