//! QEMU: two processes, and a migration from one to the other.

use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::Fallible;
use crate::image::Image;
use crate::moved::{Moved, Spent};
use crate::process::{Process, Usage};
use crate::qmp::Qmp;

/// The program.
pub(crate) const PROGRAM: &str = "qemu-system-x86_64";

/// The settings of a migration.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tuning {
    /// The capability to enable, if any.
    pub(crate) capability: Option<&'static str>,
    /// The number of connections, with multifd.
    pub(crate) channels: u16,
    /// Bytes per second; 0 is unlimited.
    pub(crate) max_bandwidth: u64,
    /// The downtime limit.
    pub(crate) downtime_limit: Duration,
    /// The time after which it is cancelled.
    pub(crate) deadline: Duration,
}

impl Tuning {
    /// Without a bandwidth limit.
    pub(crate) fn fast(capability: Option<&'static str>, channels: u16) -> Self {
        let (downtime_limit, deadline) = (Duration::from_millis(300), Duration::from_secs(120));
        Self { capability, channels, max_bandwidth: 0, downtime_limit, deadline }
    }
}

/// The version from the first line of `--version`; `None` if the program does not exist.
pub(crate) fn version() -> Option<String> {
    let output = Command::new(PROGRAM).arg("--version").stderr(Stdio::null()).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let words = text.split_whitespace().skip_while(|word| *word != "version").nth(1);
    words.map(|version| format!("QEMU {version}"))
}

/// The subset of these capabilities that it has.
pub(crate) fn capabilities(folder: &Path) -> Fallible<Vec<String>> {
    let mut qemu = Qemu::start(folder, "asked", &["-machine", "none"])?;
    let answer = qemu.execute("query-migrate-capabilities", json!({}))?;
    let names = answer.as_array().into_iter().flatten();
    Ok(names.filter_map(|entry| entry["capability"].as_str()).map(str::to_owned).collect())
}

/// Moves an image: from a machine without processor and devices whose memory is the file, to one with fresh memory.
pub(crate) fn move_image(image: &Image, folder: &Path, address: &str, tuning: &Tuning) -> Fallible<Moved> {
    let size = image.bytes();
    let megabytes = format!("{}M", size >> 20);
    let machine = ["-machine", "none,memory-backend=ram", "-m", &megabytes, "-S", "-object"];
    let mapped = format!("memory-backend-file,id=ram,mem-path={},share=on,size={size}", image.path().display());
    let fresh = format!("memory-backend-ram,id=ram,size={size}");
    let mut source = Qemu::start(folder, "source", &[&machine[..], &[&mapped]].concat())?;
    let mut destination =
        Qemu::start(folder, "destination", &[&machine[..], &[&fresh, "-incoming", "defer"]].concat())?;
    let moved = migrate(&mut source, &mut destination, address, tuning)?;
    if moved.completed { Ok(moved) } else { Err("QEMU did not complete in time".into()) }
}

/// Moves the guest of one QEMU to another that was started with `-incoming defer`.
pub(crate) fn migrate(source: &mut Qemu, destination: &mut Qemu, address: &str, tuning: &Tuning) -> Fallible<Moved> {
    source.tune(tuning)?;
    destination.tune(tuning)?;
    destination.execute("migrate-incoming", json!({ "uri": address }))?;
    let uri = destination.listens_at(address)?;
    let before = (source.usage()?, destination.usage()?);
    let began = Instant::now();
    source.execute("migrate", json!({ "uri": uri }))?;
    let completed = match source.qmp.migration_end(began + tuning.deadline)? {
        Some(status) if status == "completed" => true,
        Some(status) => return Err(format!("QEMU's migration: {status}").into()),
        None => false,
    };
    let arrival = if completed { destination.qmp.migration_end(began + tuning.deadline)? } else { None };
    let clock = began.elapsed();
    if completed && arrival.as_deref() != Some("completed") {
        return Err(format!("QEMU's destination: {arrival:?}").into());
    }
    let after = (source.usage()?, destination.usage()?);
    let info = source.figures()?;
    if !completed {
        source.execute("migrate_cancel", json!({}))?;
    }
    let destination = Spent::between(before.1, after.1);
    Ok(Moved {
        completed,
        total: milliseconds(&info["total-time"]),
        clock,
        wire_bytes: info["ram"]["transferred"].as_u64().unwrap_or(0),
        rounds: info["ram"]["dirty-sync-count"].as_u64().unwrap_or(0),
        downtime: milliseconds(&info["downtime"]),
        written: 0,
        source: Spent::between(before.0, after.0),
        destination,
        arrived: destination.grown,
    })
}

fn milliseconds(value: &Value) -> Duration {
    Duration::from_millis(value.as_u64().unwrap_or(0))
}

/// One QEMU with its control connection.
#[derive(Debug)]
pub(crate) struct Qemu {
    process: Process,
    qmp: Qmp,
}

impl Qemu {
    /// Starts a QEMU without default devices, whose guest is emulated.
    pub(crate) fn start(folder: &Path, name: &str, arguments: &[&str]) -> Fallible<Self> {
        let socket = folder.join(format!("{name}.qmp"));
        let control = format!("unix:{},server=on,wait=off", socket.display());
        let mut command = Command::new(PROGRAM);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg", "-qmp", &control]);
        let process = Process::spawn(command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()))?;
        let qmp = Qmp::connect(&socket, &process)?;
        Ok(Self { process, qmp })
    }

    /// Executes a command.
    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> Fallible<Value> {
        self.qmp.execute(command, arguments)
    }

    /// The figures of a migration. They are complete some time after QEMU reports completion: the total time is set
    /// last.
    fn figures(&mut self) -> Fallible<Value> {
        for _ in 0..100 {
            let info = self.execute("query-migrate", json!({}))?;
            if info["total-time"].as_u64().is_some_and(|time| time > 0) {
                return Ok(info);
            }
            sleep(Duration::from_millis(1));
        }
        Err("QEMU does not say how long it took".into())
    }

    fn usage(&self) -> Fallible<Usage> {
        self.process.usage()
    }

    fn tune(&mut self, tuning: &Tuning) -> Fallible<()> {
        let on = |name: &str| json!({ "capability": name, "state": true });
        let capabilities: Vec<_> = [Some("events"), tuning.capability].into_iter().flatten().map(on).collect();
        self.execute("migrate-set-capabilities", json!({ "capabilities": capabilities }))?;
        let limit = u64::try_from(tuning.downtime_limit.as_millis())?;
        let parameters = json!({
            "max-bandwidth": tuning.max_bandwidth,
            "downtime-limit": limit,
            "multifd-channels": tuning.channels,
            "xbzrle-cache-size": crate::running::CACHE_BYTES,
        });
        self.execute("migrate-set-parameters", parameters)?;
        Ok(())
    }

    /// The address on which it waits for a migration: port 0 of TCP is replaced by the actual port.
    fn listens_at(&mut self, address: &str) -> Fallible<String> {
        if !address.starts_with("tcp:") {
            return Ok(address.to_owned());
        }
        let info = self.execute("query-migrate", json!({}))?;
        let port = info["socket-address"][0]["port"].as_str().ok_or("QEMU does not say its port")?;
        Ok(format!("tcp:127.0.0.1:{port}"))
    }
}
