//! A VMM that moves its own memory. Ctrl-C cancels: `cargo run --example embed 2000`, bytes a second, leaves time to try.
use memferry::dirty_log::{DirtyLog, HashLog};
use memferry::events::{Event, Observers, Phase, Queued, Role};
use memferry::geometry::{BlockInfo, PageSize};
use memferry::guest::{Guest, GuestError, GuestState, RunState, StateSection};
use memferry::memory::{GuestMemory, MappedMemory, RamBlock};
use memferry::migration::{CancellationToken, DataPlane, receive, send};
use memferry::settings::{DestinationSettings, OnDeadline, SourceSettings};
use memferry::transports::{Transport, memory::MemoryTransport};
use std::sync::{Arc, Mutex, OnceLock};

/// RAM, and a vCPU: whether it runs, and how many steps it has made.
#[derive(Debug)]
struct Vmm {
    ram: OnceLock<(Arc<MappedMemory>, GuestMemory)>,
    cpu: Mutex<(RunState, usize)>,
}

impl Vmm {
    fn vcpu(&self) {
        loop {
            std::thread::sleep(std::time::Duration::from_micros(20));
            let mut cpu = self.cpu.lock().unwrap(); // While somebody else holds it, no step is in flight.
            if let (RunState::Running, Some((ram, _))) = (cpu.0, self.ram.get()) {
                cpu.1 += 1;
                ram.store(cpu.1 * 7919 % 4096 * 4096, &cpu.1.to_le_bytes());
            }
        }
    }
}

impl Guest for Vmm {
    fn memory(&self) -> GuestMemory {
        self.ram.get().expect("built").1.clone()
    }
    fn run_state(&self) -> RunState {
        self.cpu.lock().unwrap().0
    }
    fn dirty_logs(&self) -> Result<Vec<Arc<dyn DirtyLog>>, GuestError> {
        Ok(vec![Arc::new(HashLog::new(self.memory()))])
    }
    fn pause(&self) -> Result<(), GuestError> {
        self.start(RunState::Paused)
    }
    fn resume(&self) -> Result<(), GuestError> {
        self.start(RunState::Running)
    }
    fn save(&self) -> Result<GuestState, GuestError> {
        let bytes = self.cpu.lock().unwrap().1.to_le_bytes().to_vec();
        Ok(GuestState { sections: vec![StateSection { name: "vcpu".into(), version: 1, bytes }] })
    }
    fn build(&self, page_size: PageSize, blocks: &[BlockInfo], _: &GuestState) -> Result<(), GuestError> {
        let [info] = blocks else { return Err(GuestError(format!("{} blocks, one is expected", blocks.len()))) };
        let ram = Arc::new(MappedMemory::anonymous(info.length.try_into().expect("64 bits"))?);
        let block = RamBlock { info: info.clone(), memory: ram.clone(), fresh: true };
        let memory = GuestMemory::new(page_size, vec![block])?;
        self.ram.set((ram, memory)).map_err(|_| GuestError("built already".into()))
    }
    fn prepare(&self, state: &GuestState) -> Result<(), GuestError> {
        let steps = state.sections.first().and_then(|section| section.bytes.as_slice().try_into().ok());
        self.cpu.lock().unwrap().1 = usize::from_le_bytes(steps.ok_or_else(|| GuestError("no vCPU came".into()))?);
        Ok(())
    }
    fn start(&self, run_state: RunState) -> Result<(), GuestError> {
        self.cpu.lock().unwrap().0 = run_state;
        Ok(())
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let vmm = |run_state| Arc::new(Vmm { ram: OnceLock::new(), cpu: Mutex::new((run_state, 0)) });
    let (here, there) = (vmm(RunState::Running), vmm(RunState::Paused));
    here.build(PageSize::DEFAULT, &[BlockInfo::new("ram", 64 << 20)], &GuestState::default())?;
    let _vcpus = [here.clone(), there.clone()].map(|vmm| std::thread::spawn(move || vmm.vcpu()));
    let cancel = CancellationToken::new();
    let ctrl_c = cancel.clone();
    tokio::spawn(async move { tokio::signal::ctrl_c().await.map(|()| ctrl_c.cancel()) });
    let watch = Arc::new(Queued::new(|_: Role, event: &Event| match event {
        Event::Progress(now) => println!("round {}: {} KiB left", now.round, now.remaining_bytes >> 10),
        Event::Decided(decided) => println!("{decided}"),
        _ => {}
    })?); // It prints, and a terminal may block: the migration does not wait for it.
    let max_bandwidth = std::env::args().nth(1).map(|rate| rate.parse()).transpose()?;
    let settings = SourceSettings { max_bandwidth, on_deadline: OnDeadline::SwitchOver, ..SourceSettings::default() };
    let transport = Arc::new(MemoryTransport::new(1 << 20)); // Between hosts: transports::open("tcp:host:port", …).
    let (listener, plane) = (transport.listen().await?, DataPlane::new()?);
    let (ours, theirs) = (Observers::new(Role::Source, vec![watch.clone()]), Observers::none(Role::Destination));
    let sending = send(here.clone(), transport, settings, &plane, ours, cancel.clone());
    let receiving = receive(there.clone(), listener, DestinationSettings::default(), &plane, theirs, cancel);
    let (sent, _) = tokio::join!(sending, receiving);
    watch.flush(std::time::Duration::from_secs(1));
    let (why, left, arrived) = (sent.error.unwrap_or_default(), here.cpu.lock().unwrap(), there.cpu.lock().unwrap());
    match sent.phase {
        Phase::Completed => println!("moved: it runs there, at step {}, and was paused {:?}", arrived.1, sent.downtime),
        phase => println!("{phase:?}: {why}; it is {:?} here, at step {}", left.0, left.1),
    }
    Ok(())
}
