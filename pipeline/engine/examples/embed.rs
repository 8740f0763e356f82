//! A VMM that moves its guest to another process. It starts a second copy of itself as the destination, and sends the
//! guest there over TCP.
//!
//! `cargo run --example embed` takes a moment. `cargo run --example embed 2000` sends 2000 bytes a second, which leaves
//! time for Ctrl-C: the migration is cancelled, and the guest continues to run here.

use std::error::Error;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use memferry::dirty_log::{DirtyLog, HashLog};
use memferry::events::{Event, Observers, Queued, Role};
use memferry::geometry::{BlockInfo, PageSize};
use memferry::guest::{DestinationGuest, Guest, GuestError, GuestState, RunState, SourceGuest, StateSection};
use memferry::memory::{GuestMemory, MappedMemory, RamBlock};
use memferry::migration::{CancellationToken, DataPlane, SendError, receive, send};
use memferry::settings::{DestinationSettings, OnDeadline, SourceSettings};
use memferry::transports::open;

/// A guest with one block of RAM and one vCPU.
#[derive(Debug)]
struct Vmm {
    ram: Arc<MappedMemory>,
    memory: GuestMemory,
    /// The vCPU runs between two steps only while it can take this lock.
    cpu: Mutex<Cpu>,
}

#[derive(Debug)]
struct Cpu {
    state: RunState,
    steps: usize,
}

impl Vmm {
    /// A guest whose vCPU is paused.
    fn new(page_size: PageSize, info: BlockInfo) -> Result<Arc<Self>, GuestError> {
        let ram = Arc::new(MappedMemory::anonymous(info.length.try_into().expect("64 bits"))?);
        let block = RamBlock { info, memory: ram.clone(), fresh: true };
        let memory = GuestMemory::new(page_size, vec![block])?;
        let cpu = Mutex::new(Cpu { state: RunState::Paused, steps: 0 });
        let vmm = Arc::new(Self { ram, memory, cpu });
        let vcpu = vmm.clone();
        thread::spawn(move || vcpu.run());
        Ok(vmm)
    }

    /// Builds a guest for the blocks that a destination receives.
    fn build(page_size: PageSize, blocks: &[BlockInfo], _: &GuestState) -> Result<Arc<Self>, GuestError> {
        match blocks {
            [info] => Self::new(page_size, info.clone()),
            _ => Err(GuestError(format!("{} blocks came, one is expected", blocks.len()))),
        }
    }

    /// The vCPU: each step writes its number to a page.
    fn run(&self) {
        loop {
            thread::sleep(Duration::from_micros(20));
            let mut cpu = self.cpu();
            if cpu.state == RunState::Running {
                cpu.steps += 1;
                let page = cpu.steps * 7919 % (self.ram.len() / 4096);
                self.ram.store(page * 4096, &cpu.steps.to_le_bytes());
            }
        }
    }

    fn cpu(&self) -> MutexGuard<'_, Cpu> {
        self.cpu.lock().expect("no step panics")
    }
}

impl Guest for Vmm {
    fn memory(&self) -> GuestMemory {
        self.memory.clone()
    }
}

impl SourceGuest for Vmm {
    fn run_state(&self) -> RunState {
        self.cpu().state
    }

    fn dirty_logs(&self) -> Result<Vec<Arc<dyn DirtyLog>>, GuestError> {
        Ok(vec![Arc::new(HashLog::new(self.memory()))])
    }

    fn pause(&self) -> Result<(), GuestError> {
        self.cpu().state = RunState::Paused;
        Ok(())
    }

    fn resume(&self) -> Result<(), GuestError> {
        self.cpu().state = RunState::Running;
        Ok(())
    }

    fn save(&self) -> Result<GuestState, GuestError> {
        let bytes = self.cpu().steps.to_le_bytes().to_vec();
        Ok(GuestState { sections: vec![StateSection { name: "vcpu".into(), version: 1, bytes }] })
    }
}

impl DestinationGuest for Vmm {
    fn prepare(&self, state: &GuestState) -> Result<(), GuestError> {
        let steps = state.sections.first().and_then(|section| section.bytes.as_slice().try_into().ok());
        self.cpu().steps = usize::from_le_bytes(steps.ok_or_else(|| GuestError("no vCPU came".into()))?);
        Ok(())
    }

    fn start(&self, run_state: RunState) -> Result<(), GuestError> {
        self.cpu().state = run_state;
        Ok(())
    }
}

/// A second copy of this program, as the destination, and the address at which it listens.
fn start_destination() -> Result<(Child, String), Box<dyn Error>> {
    let mut command = Command::new(std::env::current_exe()?);
    // Ctrl-C is for the source alone.
    let mut child = command.arg("destination").process_group(0).stdout(Stdio::piped()).spawn()?;
    let mut address = String::new();
    BufReader::new(child.stdout.take().expect("it is piped")).read_line(&mut address)?;
    Ok((child, address.trim().to_owned()))
}

async fn destination() -> Result<(), Box<dyn Error>> {
    let listener = open(&"tcp:127.0.0.1:0".parse()?, Duration::ZERO).listen().await?;
    println!("{}", listener.local_address());
    let unwatched = Observers::none(Role::Destination);
    let (settings, never) = (DestinationSettings::default(), CancellationToken::new());
    match receive(Vmm::build, listener, settings, &DataPlane::new()?, unwatched, never).await {
        Ok(received) => eprintln!("destination: the guest arrived, and is {:?}", received.guest.run_state()),
        Err(error) => eprintln!("destination: {error}"),
    }
    Ok(())
}

async fn source(max_bandwidth: Option<u64>) -> Result<(), Box<dyn Error>> {
    let guest = Vmm::new(PageSize::DEFAULT, BlockInfo::new("ram", 64 << 20))?;
    guest.resume()?;
    let (mut child, address) = start_destination()?;
    let transport = open(&address.parse()?, Duration::from_secs(10));

    let cancel = CancellationToken::new();
    let ctrl_c = cancel.clone();
    tokio::spawn(async move { tokio::signal::ctrl_c().await.map(|()| ctrl_c.cancel()) });

    // Output goes through a queue: a terminal may block, and the migration does not wait for it.
    let progress = Arc::new(Queued::new(|_: Role, event: &Event| {
        if let Event::Progress(now) = event {
            println!("round {}: {} KiB left", now.round, now.remaining_bytes.unwrap_or(0) >> 10);
        }
    })?);
    let observers = Observers::new(Role::Source, vec![progress.clone()]);

    let settings = SourceSettings { max_bandwidth, on_deadline: OnDeadline::SwitchOver, ..SourceSettings::default() };
    let sent = send(guest.clone(), transport.into(), settings, &DataPlane::new()?, observers, cancel).await;
    progress.flush(Duration::from_secs(1));
    let Cpu { state, steps } = *guest.cpu();
    match sent {
        Ok(sent) => {
            println!("moved: it runs there; here it made {steps} steps, and was paused {:?}", sent.ended.downtime)
        }
        Err(SendError::Cancelled { .. }) => println!("Cancelled: it is {state:?} here, at step {steps}"),
        // Two guests must never run: check the destination before resuming this one.
        Err(SendError::Unconfirmed { source, .. }) => println!("it may run there: {source}; it stays {state:?} here"),
        Err(SendError::ResumeFailed { source, .. }) => println!("it runs nowhere: {source}"),
        Err(error) => println!("{error}; it is {state:?} here, at step {steps}"),
    }
    child.wait()?;
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    match std::env::args().nth(1).as_deref() {
        Some("destination") => destination().await,
        Some(rate) => source(Some(rate.parse()?)).await,
        None => source(None).await,
    }
}
