//! The whole pipeline compared with bare sockets in one run: incompressible memory, from cold source memory to cold
//! destination memory.
//!
//! The control uses two threads and one connection for each lane. It writes the source's bytes in chunks of 256 KiB
//! and reads them into untouched memory, without any processing (`memferry_tests::bare`). The difference is
//! memferry's cost: the dirty bitmap, the zero test, the copy, checksums on both sides, frames, and the last
//! handshake. Both run in turn, and medians are compared.
//!
//! Destination memory is mapped and untouched in all runs, and most of the time is spent touching it. memferry
//! requests huge pages for it; the control touches it page by page as it reads (`bare`), or has huge pages as well
//! (`bare, huge`). On a virtual machine the host may back memory only when it is touched, a cost that belongs to
//! neither. So before each run as much memory as it needs is touched and freed.
//!
//! The same over TLS, compared with bare rustls: its own streams over the same sockets, with the same certificates, one thread at each
//! end of each connection.
//!
//! Then the cost or benefit of the codecs over the same two lanes of TCP: each is compared with no codec, on
//! compressible memory, on incompressible memory, and on pages that alternate. `wire` is page bytes over wire bytes.
//!
//! ```text
//! cargo bench -p memferry-tests --bench pipeline
//! cargo bench -p memferry-tests --bench pipeline -- codecs              (or: sockets, tls, or a part of a row's name)
//! ```

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use memferry::events::Outcome;
use memferry::settings::{EncoderSettings, SourceSettings, Verify};
use memferry_stages::codec::{Codec, ZSTD_DEFAULT_LEVEL};
use memferry_stages::geometry::PageSize;
use memferry_tests::{Ends, TestGuest, bare, migrate, source_settings, warm_memory};
use memferry_transports::{Address, Transport, open};
use memferry_transports_tls::{TlsSettings, TlsTransport, trial};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};
use tokio_util::sync::CancellationToken;

const BYTES: usize = 1 << 30;
const RUNS: usize = 5;

fn main() {
    // `cargo test --benches` runs this too: then with less memory and one run, to check that it works.
    let (bytes, runs) =
        if std::env::args().any(|argument| argument == "--bench") { (BYTES, RUNS) } else { (64 << 20, 1) };
    sockets(bytes, runs);
    tls(bytes, runs);
    codecs(bytes / 4, runs);
    verification(bytes, runs);
}

/// Is the row selected, by a part of its name or of its table's name?
fn wanted(table: &str, row: &str) -> bool {
    let mut filters = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).peekable();
    filters.peek().is_none() || filters.any(|filter| table.contains(&filter) || row.contains(&filter))
}

fn sockets(bytes: usize, runs: usize) {
    println!("{} MiB of incompressible memory, median of {runs} runs, page bytes a second", bytes >> 20);
    println!("{:<30}{:>12}{:>12}{:>8}{:>14}{:>8}", "", "memferry", "bare", "ratio", "bare, huge", "ratio");
    let dir = tempfile::tempdir().expect("a folder for sockets");
    let socket = dir.path().join("socket");
    let unix = format!("unix:{}", socket.display());
    for (lanes, connections, checksum) in
        [(1, 1, true), (1, 1, false), (2, 2, true), (2, 2, false), (4, 4, true), (4, 4, false)]
    {
        let settings = settings(lanes, connections, checksum);
        let name = |socket: &str| format!("{socket}, {lanes} lanes{}", if checksum { "" } else { ", no checksum" });
        let tcp = |touch| bare_tcp(bytes, connections, touch);
        compare(&name("tcp"), runs, bytes, "tcp:127.0.0.1:0", &settings, tcp);
        compare(&name("unix"), runs, bytes, &unix, &settings, |touch| bare_unix(bytes, connections, &socket, touch));
    }
}

fn tls(bytes: usize, runs: usize) {
    println!("\n{} MiB of incompressible memory over TLS, median of {runs} runs, page bytes a second", bytes >> 20);
    println!("{:<30}{:>12}{:>12}{:>8}{:>14}{:>8}", "", "memferry", "rustls", "ratio", "rustls, huge", "ratio");
    let directory = tempfile::tempdir().expect("a folder for certificates");
    trial::write(directory.path(), &["localhost".into()]).expect("certificates");
    let settings_of_tls = TlsSettings { directory: Some(directory.path().to_owned()), ..TlsSettings::default() };
    for (lanes, checksum) in [(1, true), (1, false), (2, false), (4, false)] {
        let name = format!("tls, {lanes} lanes{}", if checksum { "" } else { ", no checksum" });
        let beneath = || {
            let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port");
            plain(&format!("tcp:{free}"))
        };
        let transport = || -> Box<dyn Transport> {
            Box::new(TlsTransport::new(beneath(), settings_of_tls.clone(), Duration::from_secs(5)))
        };
        let bare = |touch| bare_tls(bytes, lanes, directory.path(), touch);
        compare_with("tls", &name, runs, bytes, &transport, &settings(lanes, lanes, checksum), bare);
    }
}

/// How the control touches the destination's memory for the first time.
#[derive(Clone, Copy)]
enum Touch {
    Pages,
    HugePages,
}

fn settings(lanes: u16, connections: u16, checksum: bool) -> SourceSettings {
    SourceSettings {
        encoder: EncoderSettings { compress: None, xbzrle: None },
        checksum,
        verify: Verify::Off,
        ..source_settings(lanes, connections)
    }
}

/// Each codec and no codec, in turn, on the same memory.
fn codecs(bytes: usize, runs: usize) {
    println!("\n{} MiB, tcp, 2 lanes, median of {runs} runs, page bytes a second", bytes >> 20);
    println!("{:<34}{:>12}{:>12}{:>8}{:>8}", "", "memferry", "no codec", "ratio", "wire");
    let zstd = Codec::Zstd { level: ZSTD_DEFAULT_LEVEL };
    for (kind, pages) in contents() {
        for codec in [Codec::Snap, Codec::Lz4, zstd] {
            let name = format!("{kind}, {codec}");
            if !wanted("codecs", &name) {
                continue;
            }
            let (mut coded, mut plain, mut wire) = (Vec::new(), Vec::new(), 0);
            for _ in 0..runs {
                for (compress, times) in [(None, &mut plain), (Some(codec), &mut coded)] {
                    let settings = settings(2, 2, true);
                    let encoder = EncoderSettings { compress, ..settings.encoder.clone() };
                    let source = TestGuest::repeating(PageSize::DEFAULT, bytes as u64, &pages);
                    let (time, ends) =
                        memferry(bytes, source, "tcp:127.0.0.1:0", &SourceSettings { encoder, ..settings });
                    times.push(time);
                    wire = ends.source.wire_bytes;
                }
            }
            let (coded, plain) = (rate(bytes, &mut coded), rate(bytes, &mut plain));
            let saved = bytes as f64 / wire as f64;
            println!("{name:<34}{coded:>7.2} GB/s{plain:>7.2} GB/s{:>8.2}{saved:>8.2}", coded / plain);
        }
    }
}

/// Each way of comparing the memories and none, in turn, on incompressible memory.
fn verification(bytes: usize, runs: usize) {
    println!("\n{} MiB of incompressible memory, tcp, 2 lanes, median of {runs} runs", bytes >> 20);
    println!("{:<34}{:>12}{:>12}{:>8}{:>12}{:>12}", "", "memferry", "none", "ratio", "verify", "downtime");
    for (name, verify) in [("page hashes", Verify::Pages), ("full digests", Verify::Full)] {
        if !wanted("verification", name) {
            continue;
        }
        let (mut compared, mut plain, mut parts) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..runs {
            for (verify, times) in [(Verify::Off, &mut plain), (verify, &mut compared)] {
                let settings = SourceSettings { verify, ..settings(2, 2, true) };
                let source = TestGuest::incompressible(PageSize::DEFAULT, bytes as u64);
                let (time, ends) = memferry(bytes, source, "tcp:127.0.0.1:0", &settings);
                times.push(time);
                if verify.is_on() {
                    parts.push((ends.source.parts.verify, ends.source.downtime.unwrap_or_default()));
                }
            }
        }
        let (compared, plain) = (rate(bytes, &mut compared), rate(bytes, &mut plain));
        parts.sort_unstable();
        let (part, downtime) = parts[parts.len() / 2];
        let ratio = compared / plain;
        println!("{name:<34}{compared:>7.2} GB/s{plain:>7.2} GB/s{ratio:>8.2}{part:>12.2?}{downtime:>12.2?}");
    }
}

/// 16 MiB of each kind of memory.
fn contents() -> [(&'static str, Vec<u8>); 3] {
    const CONTENT: usize = 16 << 20;
    let mut noise = 1_u64;
    let mut next = move || {
        noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        noise.rotate_left(23)
    };
    let words = ["memory ", "page ", "of ", "the ", "guest ", "dirty ", "round ", "lane ", "\n"];
    let mut text: Vec<u8> = Vec::with_capacity(CONTENT + 8);
    while text.len() < CONTENT {
        text.extend(words[usize::try_from(next() % 9).expect("a few")].bytes());
    }
    text.truncate(CONTENT);
    let random: Vec<u8> = (0..CONTENT / 8).flat_map(|_| next().to_le_bytes()).collect();
    let pages = random.chunks_exact(4096).zip(text.chunks_exact(4096)).enumerate();
    let turns = pages.flat_map(|(page, (random, text))| if page % 2 == 0 { text } else { random }.iter().copied());
    let turns = turns.collect();
    [("incompressible", random), ("text", text), ("pages in turns", turns)]
}

fn rate(bytes: usize, times: &mut [Duration]) -> f64 {
    times.sort();
    bytes as f64 / times[times.len() / 2].as_secs_f64() / 1e9
}

fn compare(
    name: &str,
    runs: usize,
    bytes: usize,
    address: &str,
    settings: &SourceSettings,
    bare: impl Fn(Touch) -> Duration,
) {
    compare_with("sockets", name, runs, bytes, &|| plain(address), settings, bare);
}

fn compare_with(
    table: &str,
    name: &str,
    runs: usize,
    bytes: usize,
    transport: &dyn Fn() -> Box<dyn Transport>,
    settings: &SourceSettings,
    bare: impl Fn(Touch) -> Duration,
) {
    if !wanted(table, name) {
        return;
    }
    let (mut ours, mut plain, mut huge, mut last) = (Vec::new(), Vec::new(), Vec::new(), None);
    for _ in 0..runs {
        plain.push(bare(Touch::Pages));
        let source = TestGuest::incompressible(PageSize::DEFAULT, bytes as u64);
        let (time, ends) = memferry_over(transport(), bytes, source, settings);
        ours.push(time);
        huge.push(bare(Touch::HugePages));
        last = Some(ends);
    }
    let [ours, plain, huge] = [ours, plain, huge].map(|mut times| rate(bytes, &mut times));
    let (to_plain, to_huge) = (ours / plain, ours / huge);
    println!("{name:<30}{ours:>7.2} GB/s{plain:>7.2} GB/s{to_plain:>8.2}{huge:>9.2} GB/s{to_huge:>8.2}");
    if std::env::var_os("STAGES").is_some() {
        print_stages(&last.expect("at least one run"));
    }
}

/// Makes the host back as much memory as a run needs.
fn warm_the_host(bytes: usize) {
    warm_memory(bytes * 5 / 2).expect("memory");
}

/// How the stages of the last run spent their time, with `STAGES=1`.
fn print_stages(ends: &Ends) {
    for stage in ends.source.stages.iter().chain(&ends.destination.stages) {
        let lane = stage.stage.at.number().map_or(String::new(), |lane| lane.to_string());
        let (busy, input, output) = (stage.busy, stage.input_wait, stage.output_wait);
        println!(
            "    {:<16}{lane:<4} busy {busy:>10.1?}  waits for input {input:>10.1?}  for output {output:>10.1?}",
            stage.stage.kind.name()
        );
    }
}

fn plain(address: &str) -> Box<dyn Transport> {
    open(&address.parse::<Address>().expect("a good address"), Duration::from_secs(5))
}

fn memferry(bytes: usize, source: TestGuest, address: &str, settings: &SourceSettings) -> (Duration, Ends) {
    memferry_over(plain(address), bytes, source, settings)
}

fn memferry_over(
    transport: Box<dyn Transport>,
    bytes: usize,
    source: TestGuest,
    settings: &SourceSettings,
) -> (Duration, Ends) {
    let source = Arc::new(source);
    let destination = Arc::new(TestGuest::destination());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("threads");
    warm_the_host(bytes);
    let began = Instant::now();
    let moving = migrate(source, destination, transport.into(), settings.clone(), CancellationToken::new());
    let ends = runtime.block_on(moving);
    let time = began.elapsed();
    assert_eq!(ends.destination.outcome, Outcome::Completed, "{:?}", ends.destination.error);
    (time, ends)
}

/// Memory with content, written page by page, so that no page is cached or shared.
fn cold_source(bytes: usize) -> Vec<u8> {
    let mut memory = vec![0; bytes];
    let mut noise = 1_u64;
    for word in memory.chunks_exact_mut(8) {
        noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        word.copy_from_slice(&noise.to_le_bytes());
    }
    memory
}

fn bare_tcp(bytes: usize, connections: u16, touch: Touch) -> Duration {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("it has one");
    let connect = || {
        let out = TcpStream::connect(address).expect("it listens");
        out.set_nodelay(true).expect("a socket");
        (out, listener.accept().expect("it comes").0)
    };
    bare_sockets(bytes, (0..connections).map(|_| connect()).collect(), touch)
}

fn bare_unix(bytes: usize, connections: u16, path: &std::path::Path, touch: Touch) -> Duration {
    drop(std::fs::remove_file(path));
    let listener = UnixListener::bind(path).expect("a path");
    let connect = || (UnixStream::connect(path).expect("it listens"), listener.accept().expect("it comes").0);
    let time = bare_sockets(bytes, (0..connections).map(|_| connect()).collect(), touch);
    drop(std::fs::remove_file(path));
    time
}

/// TLS 1.3 by rustls alone, with both ends' certificates from a directory.
fn bare_tls(bytes: usize, connections: u16, directory: &std::path::Path, touch: Touch) -> Duration {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let certificate = |name| CertificateDer::from_pem_file(directory.join(name)).expect("a certificate");
    let key = |name| PrivateKeyDer::from_pem_file(directory.join(name)).expect("a key");
    let mut roots = RootCertStore::empty();
    roots.add(certificate("ca-cert.pem")).expect("an authority");
    let roots = Arc::new(roots);
    let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone()).build().expect("roots");
    let client = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .with_root_certificates(roots)
        .with_client_auth_cert(vec![certificate("client-cert.pem")], key("client-key.pem"))
        .expect("a certificate with its key");
    let server = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![certificate("server-cert.pem")], key("server-key.pem"))
        .expect("a certificate with its key");
    let (client, server) = (Arc::new(client), Arc::new(server));
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("it has one");
    let connect = || {
        let mut out = TcpStream::connect(address).expect("it listens");
        out.set_nodelay(true).expect("a socket");
        let mut inn = listener.accept().expect("it comes").0;
        let name = "localhost".try_into().expect("a name");
        let mut source = ClientConnection::new(client.clone(), name).expect("a client");
        let mut destination = ServerConnection::new(server.clone()).expect("a server");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while source.is_handshaking() {
                    source.complete_io(&mut out).expect("a handshake");
                }
            });
            while destination.is_handshaking() {
                destination.complete_io(&mut inn).expect("a handshake");
            }
        });
        (rustls::StreamOwned::new(source, out), rustls::StreamOwned::new(destination, inn))
    };
    bare_sockets(bytes, (0..connections).map(|_| connect()).collect(), touch)
}

/// Moves the bytes over bare sockets.
fn bare_sockets<W: Write + Send, R: Read + Send>(bytes: usize, connections: Vec<(W, R)>, touch: Touch) -> Duration {
    let source = cold_source(bytes);
    let mut destination = vec![0_u8; bytes];
    if let Touch::HugePages = touch {
        let page = destination.as_ptr().align_offset(4096);
        // SAFETY: the range lies in the vector, which is not accessed elsewhere; the advice does not change content.
        let advised = unsafe {
            let start = destination.as_mut_ptr().add(page).cast();
            rustix::mm::madvise(start, bytes - page, rustix::mm::Advice::LinuxHugepage)
        };
        advised.unwrap_or_else(|error| println!("no huge pages here: {error}"));
    }
    warm_the_host(bytes);
    let (mut out, mut inn): (Vec<_>, Vec<_>) = connections.into_iter().unzip();
    let began = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| bare::send(&source, &mut out).expect("a reader"));
        bare::receive(&mut inn, &mut destination).expect("a writer");
    });
    let time = began.elapsed();
    assert!(source == destination, "the bare socket moved something else");
    time
}
