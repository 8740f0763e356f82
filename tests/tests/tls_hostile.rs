//! Hostile clients at a TLS port: silent ones, garbage, half a handshake, plaintext, certificates of a stranger. Memory stays flat, and
//! the real migration completes beside them.
//!
//! A binary of its own, with one test: it measures the resident memory of the whole process. `soak tls` makes 10,000 of them.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use memferry::events::Outcome;
use memferry_stages::geometry::PageSize;
use memferry_tests::run::{self, Recorder, destination_settings, source_settings};
use memferry_tests::skip::skipped;
use memferry_tests::sparse::Held;
use memferry_tests::{TestGuest, sample};
use memferry_transports::tcp::TcpTransport;
use memferry_transports::{Address, Transport, open};
use memferry_transports_tls::{TlsSettings, TlsTransport, trial};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// How many clients there are unless the environment sets another number.
const CLIENTS: u64 = 400;
/// The most that may be connected at once, within the descriptors of a process.
const AT_ONCE: u64 = 200;
/// What the process may grow by while clients come and go, once as many as are greeted at once were there: in KiB.
const GROWTH: u64 = 16 << 10;
const CONNECT: Duration = Duration::from_secs(30);
/// No test here takes this long unless it hangs: ten thousand clients take their time.
const HANG: Duration = Duration::from_secs(1200);

fn certificates(folder: &Path, name: &str) -> TlsSettings {
    let directory = folder.join(name);
    trial::write(&directory, &["localhost".into()]).unwrap();
    TlsSettings { directory: Some(directory), ..TlsSettings::default() }
}

/// The first bytes of a real client's handshake.
async fn client_hello(stranger: &TlsSettings) -> Vec<u8> {
    let catching = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = catching.local_addr().unwrap().port();
    let tcp = TcpTransport::new("127.0.0.1", port, Duration::ZERO);
    let client = TlsTransport::new(Box::new(tcp), stranger.clone(), Duration::ZERO);
    let connecting = tokio::spawn(async move { drop(client.connect().await) });
    let (mut stream, _) = catching.accept().await.unwrap();
    let mut hello = vec![0; 4096];
    let bytes = stream.read(&mut hello).await.unwrap();
    hello.truncate(bytes);
    drop(stream);
    connecting.abort();
    hello
}

/// A client of the kind that its number is.
async fn client(number: u64, port: u16, hello: Arc<Vec<u8>>, stranger: TlsSettings) {
    let mut random = fastrand::Rng::with_seed(number);
    let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)).await else { return };
    let mut noise = vec![0; random.usize(1..3000)];
    random.fill(&mut noise);
    let part = random.usize(1..hello.len());
    let bytes = match number % 6 {
        0 => &[][..],
        1 => &noise[..],
        2 => &hello[..],
        3 => &hello[..part],
        4 => b"mferry, in the clear, and long enough for a head of a frame",
        _ => {
            drop(stream);
            let tcp = TcpTransport::new("127.0.0.1", port, Duration::ZERO);
            let client = TlsTransport::new(Box::new(tcp), stranger, Duration::ZERO);
            // It refuses the destination's certificate, as the destination would refuse its own.
            drop(timeout(Duration::from_secs(2), client.connect()).await);
            return;
        }
    };
    drop(stream.write_all(bytes).await);
    // It stays until it is dropped, or for a while.
    let mut byte = [0; 64];
    drop(timeout(Duration::from_millis(500), stream.read(&mut byte)).await);
}

/// Numbered clients, a bounded number of them at once.
async fn clients(numbers: std::ops::Range<u64>, port: u16, hello: &Arc<Vec<u8>>, stranger: &TlsSettings) {
    let mut tasks = tokio::task::JoinSet::new();
    for number in numbers {
        if tasks.len() as u64 >= AT_ONCE {
            tasks.join_next().await;
        }
        tasks.spawn(client(number, port, hello.clone(), stranger.clone()));
    }
    while tasks.join_next().await.is_some() {}
}

#[test]
fn hostile_clients_cost_no_memory_and_the_real_source_gets_through() {
    if Held::here().is_none() {
        return skipped("there is no /proc that says what is resident");
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async { timeout(HANG, hostile()).await.expect("it hangs") });
}

async fn hostile() {
    let count = sample::count(CLIENTS);
    let folder = tempfile::tempdir().unwrap();
    let (ours, stranger) = (certificates(folder.path(), "ours"), certificates(folder.path(), "stranger"));
    let over = |address: &Address| {
        Box::new(TlsTransport::new(open(address, CONNECT), ours.clone(), CONNECT)) as Box<dyn Transport>
    };
    let listener = over(&Address::Tcp { host: "127.0.0.1".into(), port: 0 }).listen().await.unwrap();
    let address: Address = listener.local_address().parse().unwrap();
    let Some(beneath @ Address::Tcp { port, .. }) = address.beneath() else { panic!("{address}") };
    let hello = Arc::new(client_hello(&stranger).await);

    let recorder = Arc::new(Recorder::default());
    let (source, destination) =
        (TestGuest::source(PageSize::DEFAULT, &[8 << 20]).running(1), Arc::new(TestGuest::destination()));
    let (cancel_source, cancel_destination) = (CancellationToken::new(), CancellationToken::new());
    let receiving = run::destination(
        destination.clone(),
        listener,
        destination_settings(),
        recorder.clone(),
        cancel_destination.clone(),
    );
    let receiving = tokio::spawn(receiving);

    clients(0..count / 2, port, &hello, &stranger).await;
    let before = Held::here().expect("it was there");
    clients(count / 2..count, port, &hello, &stranger).await;
    let after = Held::here().expect("it was there");
    let grown = after.resident.saturating_sub(before.resident);
    assert!(grown <= GROWTH, "{grown} KiB more are resident after {} more clients", count - count / 2);

    // The real source comes while others do.
    let others = {
        let (hello, stranger) = (hello.clone(), stranger.clone());
        tokio::spawn(async move { clients(count..2 * count, port, &hello, &stranger).await })
    };
    let transport: Arc<dyn Transport> = over(&beneath).into();
    let sent = run::source(source.clone(), transport, source_settings(4, 4), recorder.clone(), cancel_source).await;
    let received = receiving.await.unwrap();
    others.abort();
    assert_eq!((sent.outcome, received.outcome), (Outcome::Completed, Outcome::Completed), "{sent:?} {received:?}");
    assert_eq!(sent.verified, Some(true));
}
