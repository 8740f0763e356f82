//! QMP: QEMU's control protocol, a JSON value on each line, over a Unix socket.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::Fallible;
use crate::process::Process;

/// The time limit for an answer of QEMU.
const PATIENCE: Duration = Duration::from_secs(20);

/// A control connection.
#[derive(Debug)]
pub(crate) struct Qmp {
    stream: BufReader<UnixStream>,
    line: Vec<u8>,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Connects to a QEMU that has just been started, and ends its capabilities negotiation mode.
    pub(crate) fn connect(path: &Path, process: &Process) -> Fallible<Self> {
        let began = Instant::now();
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) if began.elapsed() > PATIENCE => return Err(format!("QEMU's control: {error}").into()),
                Err(_) if process.has_ended()? => return Err("QEMU has ended at once".into()),
                Err(_) => sleep(Duration::from_millis(5)),
            }
        };
        let mut qmp = Self { stream: BufReader::new(stream), line: Vec::new(), events: VecDeque::new() };
        qmp.hear(Instant::now() + PATIENCE)?.ok_or("QEMU does not greet")?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Executes a command, and returns its result.
    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> Fallible<Value> {
        let line = json!({ "execute": command, "arguments": arguments }).to_string() + "\n";
        self.stream.get_mut().write_all(line.as_bytes())?;
        let until = Instant::now() + PATIENCE;
        loop {
            let mut said = self.hear(until)?.ok_or_else(|| format!("QEMU does not answer {command}"))?;
            if let Some(error) = said.get("error") {
                return Err(format!("QEMU, {command}: {}", error["desc"]).into());
            }
            match said.get_mut("return") {
                Some(answer) => return Ok(answer.take()),
                None => self.events.push_back(said),
            }
        }
    }

    /// Waits for the event that a migration has ended, which QEMU sends if the capability `events` is on; `None` on
    /// timeout.
    pub(crate) fn migration_end(&mut self, until: Instant) -> Fallible<Option<String>> {
        loop {
            let Some(event) = self.events.pop_front().map_or_else(|| self.hear(until), |event| Ok(Some(event)))? else {
                return Ok(None);
            };
            let status = event["data"]["status"].as_str().unwrap_or_default();
            if event["event"] == "MIGRATION" && matches!(status, "completed" | "failed" | "cancelled") {
                return Ok(Some(status.to_owned()));
            }
        }
    }

    /// The next message from QEMU.
    fn hear(&mut self, until: Instant) -> Fallible<Option<Value>> {
        let rest = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        self.stream.get_ref().set_read_timeout(Some(rest))?;
        match self.stream.read_until(b'\n', &mut self.line) {
            Ok(_) if self.line.ends_with(b"\n") => {
                let value = serde_json::from_slice(&self.line)?;
                self.line.clear();
                Ok(Some(value))
            }
            Ok(_) => Err("QEMU has ended".into()),
            // A partial line is retained, and continued by the next read.
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}
