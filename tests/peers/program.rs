//! The memferry program as an operator uses it: `send` and `recv` of an image file.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::Fallible;
use crate::image::Image;
use crate::moved::{Moved, Spent};
use crate::process::{Process, Usage};

/// How often the memory of the two programs is sampled: the figures are lost when the programs have ended.
const LOOK: Duration = Duration::from_millis(2);

/// The path of the program, as the build of this bench places it.
pub(crate) fn find() -> Result<PathBuf, String> {
    let own = std::env::current_exe().map_err(|error| error.to_string())?;
    // target/release/deps/peers-… beside target/release/memferry
    let program = own.ancestors().nth(2).map(|folder| folder.join("memferry")).filter(|path| path.exists());
    program.ok_or_else(|| "the program is not built: cargo build --release".into())
}

/// Moves an image from file to file, and checks that it arrived unchanged. All resources of the two programs count,
/// from their start to their end.
pub(crate) fn move_image(image: &Image, folder: &Path, address: &str, lanes: u16) -> Fallible<Moved> {
    let (copy, report) = (folder.join("received"), folder.join("report.json"));
    let mut recv = command("recv", folder, image.path(), &copy, address, lanes)?;
    let mut recv = Process::spawn(recv.stderr(Stdio::piped()))?;
    let mut said = BufReader::new(recv.child().stderr.take().ok_or("a pipe was asked for")?);
    let address = listens_at(&mut said)?;
    let began = Instant::now();
    let mut send = command("send", folder, image.path(), &copy, &address, lanes)?;
    let mut send = Process::spawn(send.args(["--quiet", "--report"]).arg(&report).stderr(Stdio::inherit()))?;
    let [source, destination] = watch([&send, &recv])?;
    let clock = began.elapsed();
    if !send.wait()?.success() || !recv.wait()?.success() {
        return Err("the program failed".into());
    }
    image.check(image.hash_of(&copy)?)?;
    let report: Value = serde_json::from_slice(&fs::read(report)?)?;
    let milliseconds = |name: &str| Duration::from_secs_f64(report[name].as_f64().unwrap_or(0.0) / 1000.0);
    let arrived = std::os::unix::fs::MetadataExt::blocks(&copy.metadata()?) * 512;
    fs::remove_file(copy)?;
    Ok(Moved {
        completed: true,
        total: milliseconds("total_ms"),
        clock,
        wire_bytes: report["wire_bytes"].as_u64().unwrap_or(0),
        rounds: report["rounds"].as_array().map_or(0, |rounds| rounds.len() as u64),
        downtime: milliseconds("downtime_ms"),
        written: 0,
        source,
        destination,
        arrived,
    })
}

fn command(end: &str, folder: &Path, image: &Path, copy: &Path, address: &str, lanes: u16) -> Fallible<Command> {
    let path = if end == "send" { image } else { copy };
    let pipeline =
        if end == "send" { format!("[pipeline]\nlanes = {lanes}\nconnections = {lanes}\n") } else { String::new() };
    let config = format!(
        "[guest.file]\nimages = [{{ id = \"ram\", path = {path:?} }}]\n{pipeline}[encoder]\ncompress = \"none\"\ndelta = \"none\"\n\
         [transport]\naddress = {address:?}\n[migration]\nverify = false\n"
    );
    let file = folder.join(format!("{end}.toml"));
    fs::write(&file, config)?;
    let mut command = Command::new(find()?);
    command.arg(end).arg(file).stdin(Stdio::null()).stdout(Stdio::null());
    Ok(command)
}

/// The address after "waiting at", which `recv` prints first.
fn listens_at(said: &mut impl BufRead) -> Fallible<String> {
    let mut line = String::new();
    said.read_line(&mut line)?;
    let address = line.trim_end().rsplit_once("waiting at ").map(|(_, address)| address.to_owned());
    address.ok_or_else(|| format!("recv says {line:?}, not where it waits").into())
}

/// Samples both programs until they have ended.
fn watch(ends: [&Process; 2]) -> Fallible<[Spent; 2]> {
    let mut spent = [Spent::default(); 2];
    loop {
        let has_ended = [ends[0].has_ended()?, ends[1].has_ended()?];
        for (spent, end) in spent.iter_mut().zip(ends) {
            let look = Spent::between(Usage::default(), end.usage()?);
            *spent = Spent { cpu: look.cpu, peak: spent.peak.max(look.peak), grown: spent.grown.max(look.grown) };
        }
        if has_ended == [true, true] {
            return Ok(spent);
        }
        sleep(LOOK);
    }
}
