//! Measures how long a thread waits for a page that is still at the source: the whole way of a fault, from the access to the value, beside
//! what it cannot be faster than.
//!
//! ```text
//! cargo run --release -p memferry-tests --example touch [-- MIB]
//! ```
//!
//! A guest is started at its destination before any page is sent, and one thread touches its pages in a random order, once with and once
//! without the background that sends the others. *bare* is a blocking ping-pong of 64 bytes and 4 KiB over the same kind of socket. All
//! threads share processor 0, unless `SPREAD` is set: where the kernel puts them decides more than what they do.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use fastrand::Rng;
use memferry::dirty_log::DirtyLog;
use memferry::guest::{DestinationGuest, Guest, GuestError, GuestState, RunState, SourceGuest};
use memferry::memory::GuestMemory;
use memferry::settings::{EncoderSettings, Mode, PostcopySettings, RecoverySettings, SourceSettings};
use memferry_stages::dirty_log::SoftwareLog;
use memferry_stages::geometry::{BlockInfo, PageSize};
use memferry_stages::memory::{MappedMemory, RamBlock};
use memferry_stages::missing;
use memferry_tests::run::keeping;
use memferry_tests::{migrate, skipped, source_settings};
use memferry_transports::{Address, open};
use tokio_util::sync::CancellationToken;

const PAGE: usize = 4096;

/// Memory, and what happens when it is started: every page is touched.
#[derive(Debug)]
struct Touched {
    memory: Arc<MappedMemory>,
    waits: Mutex<Option<JoinHandle<Vec<Duration>>>>,
}

impl Touched {
    fn new(bytes: usize, fill: bool) -> Arc<Self> {
        let memory = Arc::new(MappedMemory::anonymous(bytes).expect("memory"));
        if fill {
            let mut content = vec![0; PAGE];
            let mut random = Rng::with_seed(5);
            for page in 0..bytes / PAGE {
                random.fill(&mut content);
                memory.store(page * PAGE, &content);
            }
        }
        Arc::new(Self { memory, waits: Mutex::default() })
    }
}

impl Guest for Touched {
    fn memory(&self) -> GuestMemory {
        let info = BlockInfo::new("ram", self.memory.len() as u64);
        let block = RamBlock { info, memory: self.memory.clone(), fresh: true };
        GuestMemory::new(PageSize::DEFAULT, vec![block]).expect("a block")
    }

    fn can_be_userfaulted(&self) -> Result<(), GuestError> {
        Ok(())
    }

    fn mapping_is_exclusive(&self) -> Result<(), GuestError> {
        Ok(())
    }
}

impl SourceGuest for Touched {
    fn run_state(&self) -> RunState {
        RunState::Running
    }

    fn dirty_logs(&self) -> Result<Vec<Arc<dyn DirtyLog>>, GuestError> {
        Ok(vec![Arc::new(SoftwareLog::new(self.memory().layout()))])
    }

    fn pause(&self) -> Result<(), GuestError> {
        Ok(())
    }

    fn resume(&self) -> Result<(), GuestError> {
        Ok(())
    }

    fn save(&self) -> Result<GuestState, GuestError> {
        Ok(GuestState::default())
    }
}

impl DestinationGuest for Touched {
    fn prepare(&self, _state: &GuestState) -> Result<(), GuestError> {
        Ok(())
    }

    fn start(&self, _run_state: RunState) -> Result<(), GuestError> {
        let memory = self.memory.clone();
        *self.waits.lock().expect("no panic") = Some(std::thread::spawn(move || touch_all(&memory)));
        Ok(())
    }
}

/// How long each access took.
fn touch_all(memory: &MappedMemory) -> Vec<Duration> {
    let mut pages: Vec<usize> = (0..memory.len() / PAGE).collect();
    Rng::with_seed(9).shuffle(&mut pages);
    let touch = |page: usize| {
        let began = Instant::now();
        let mut byte = [0];
        memory.load(page * PAGE, &mut byte);
        began.elapsed()
    };
    pages.into_iter().map(touch).collect()
}

fn main() {
    if let Err(why) = missing::supported() {
        return skipped(why);
    }
    let mib: usize = std::env::args().nth(1).and_then(|mib| mib.parse().ok()).unwrap_or(32);
    if std::env::var_os("SPREAD").is_none() {
        let mut one = rustix::thread::CpuSet::new();
        one.set(0);
        rustix::thread::sched_setaffinity(None, &one).expect("processor 0 is ours");
    }
    report("bare ping-pong", &ping_pong(mib << 8));
    for background in [false, true] {
        let waits = migrated(mib << 20, background);
        // An access to a page that is there takes no time.
        let waited: Vec<_> = waits.iter().copied().filter(|wait| *wait > Duration::from_micros(3)).collect();
        report(if background { "with the background" } else { "asked for one by one" }, &waited);
    }
}

fn report(what: &str, waits: &[Duration]) {
    let mut sorted = waits.to_vec();
    sorted.sort_unstable();
    let at = |percent: usize| sorted.get(sorted.len() * percent / 100).copied().unwrap_or_default();
    let [p50, p99, all] = [at(50), at(99), waits.iter().sum()];
    println!("{what}: {} waits, p50 {p50:.1?}, p99 {p99:.1?}, {all:.1?} in all", waits.len());
}

fn migrated(bytes: usize, background: bool) -> Vec<Duration> {
    let source = Touched::new(bytes, true);
    let destination = Touched::new(bytes, false);
    let built = destination.clone();
    let (builder, _) = keeping(move |_: PageSize, _: &[BlockInfo], _: &GuestState| Ok::<_, GuestError>(built));
    let settings = SourceSettings {
        mode: Mode::Postcopy,
        postcopy: PostcopySettings { background },
        recovery: RecoverySettings::default(),
        encoder: EncoderSettings { compress: None, xbzrle: None },
        ..source_settings(1, 1)
    };
    let address: Address = "tcp:127.0.0.1:0".parse().expect("an address");
    let transport = Arc::from(open(&address, Duration::from_secs(10)));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("threads");
    let ends = runtime.block_on(migrate(source, builder, transport, settings, CancellationToken::new()));
    assert_eq!(ends.source.error, None);
    let waits = destination.waits.lock().expect("no panic").take();
    waits.expect("it was started").join().expect("it touches every page")
}

/// Requests of 64 bytes, answers of a page.
fn ping_pong(count: usize) -> Vec<Duration> {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound");
    let answers = std::thread::spawn(move || {
        let (mut socket, _) = listener.accept().expect("a connection");
        socket.set_nodelay(true).expect("a socket");
        let mut request = [0; 64];
        while socket.read_exact(&mut request).is_ok() {
            socket.write_all(&[7; PAGE]).expect("the peer reads");
        }
    });
    let mut socket = TcpStream::connect(address).expect("it listens");
    socket.set_nodelay(true).expect("a socket");
    let mut page = [0; PAGE];
    let round = |_| {
        let began = Instant::now();
        socket.write_all(&[1; 64]).expect("the peer reads");
        socket.read_exact(&mut page).expect("the peer answers");
        began.elapsed()
    };
    let waits = (0..count).map(round).collect();
    drop(socket);
    answers.join().expect("it ends with the connection");
    waits
}
