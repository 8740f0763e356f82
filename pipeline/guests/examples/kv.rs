//! A key-value store in a region, moved to another process under load: every acknowledged write is there afterwards.
//!
//! ```text
//! kv                          the whole demo: starts both processes below, and clients that never stop writing
//! kv serve SOCKET             serves an empty store; "move SOCKET" on a client's line sends it away
//! kv receive FROM SOCKET      waits for a store at FROM, and serves it at SOCKET
//! ```
//! A client's lines are `set KEY VALUE`, `get KEY` and `count`.
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use memferry::events::{Observers, Role};
use memferry::migration::{CancellationToken, Sent};
use memferry::settings::{DestinationSettings, SourceSettings};
use memferry::transports::{Transport, unix::UnixTransport};
use memferry_guests::region::{Access, Region};
use tokio::runtime::Handle;

type Fallible<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

const REGION_BYTES: usize = 64 << 20;
/// A slot: length of the key (0: free), length of the value, key, value.
const SLOT: usize = 64;
const KEY: usize = 24;
const PATIENCE: Duration = Duration::from_secs(60);

// ---- the store: an open hash table in the region; the number of its keys is the region's state ----

fn count(access: &Access<'_>) -> u64 {
    access.state("count").and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes)
}

/// The slot of a key, or the slot to insert it at.
fn find(access: &Access<'_>, slots: usize, key: &str) -> (usize, bool) {
    let mut hasher = DefaultHasher::new();
    key.hash(&mut hasher);
    let mut slot = usize::try_from(hasher.finish() % slots as u64).expect("less than slots");
    loop {
        let [length, _, rest @ ..] = access.load::<SLOT>(slot * SLOT);
        if length == 0 || rest.get(..length.into()) == Some(key.as_bytes()) {
            return (slot * SLOT, length != 0);
        }
        slot = (slot + 1) % slots;
    }
}

fn get(access: &Access<'_>, slots: usize, key: &str) -> Option<String> {
    let (at, found) = find(access, slots, key);
    let [_, length, rest @ ..] = access.load::<SLOT>(at);
    let value = rest[KEY..].get(..length.into()).filter(|_| found)?;
    Some(String::from_utf8_lossy(value).into_owned())
}

fn set(access: &mut Access<'_>, slots: usize, key: &str, value: &str) -> Result<(), &'static str> {
    let lengths = (u8::try_from(key.len()), u8::try_from(value.len()));
    let (Ok(key_length @ ..=24), Ok(value_length @ ..=38)) = lengths else {
        return Err("a key has at most 24 bytes, a value 38");
    };
    let (at, found) = find(access, slots, key);
    let keys = count(access) + u64::from(!found);
    if keys > slots as u64 / 2 {
        return Err("the store is full");
    }
    let mut slot = [0; SLOT];
    (slot[0], slot[1]) = (key_length, value_length);
    slot[2..][..key.len()].copy_from_slice(key.as_bytes());
    slot[2 + KEY..][..value.len()].copy_from_slice(value.as_bytes());
    access.write(at, &slot);
    access.set_state("count", keys.to_le_bytes().to_vec());
    Ok(())
}

// ---- the server ----

fn answer(region: &Region, runtime: &Handle, line: &str) -> String {
    let words: Vec<_> = line.split_whitespace().collect();
    if let ["move", to] = words[..] {
        return move_to(region, runtime, Path::new(to));
    }
    let slots = region.len() / SLOT;
    // Waits while the region is being handed over.
    let mut access = match region.access() {
        Ok(access) => access,
        Err(gone) => return format!("gone: {gone}"),
    };
    match words[..] {
        ["set", key, value] => {
            set(&mut access, slots, key, value).map_or_else(|why| format!("no: {why}"), |()| "ok".into())
        }
        ["get", key] => get(&access, slots, key).unwrap_or_default(),
        ["count"] => count(&access).to_string(),
        _ => "no: set KEY VALUE, get KEY, count or move SOCKET".into(),
    }
}

fn move_to(region: &Region, runtime: &Handle, to: &Path) -> String {
    let transport = Arc::new(UnixTransport::new(to, PATIENCE));
    let watched = Observers::none(Role::Source);
    let sending = region.send(transport, SourceSettings::default(), watched, CancellationToken::new());
    match runtime.block_on(sending) {
        Ok(Sent { ended, .. }) => {
            let (total, paused, bytes) = (ended.total, ended.downtime.unwrap_or_default(), ended.wire_bytes);
            format!("moved in {total:.0?}, {bytes} bytes on the wire, writers waited {paused:.1?}")
        }
        Err(error) => format!("not moved: {error}"),
    }
}

/// Serves until standard input ends.
fn serve(region: Region, at: &Path) -> Fallible<()> {
    let (listener, runtime) = (UnixListener::bind(at)?, Handle::current());
    println!("ready; writes are found by {:?}", region.tracking());
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let (region, runtime) = (region.clone(), runtime.clone());
            thread::spawn(move || -> io::Result<()> {
                let mut replies = client.try_clone()?;
                for line in BufReader::new(client).lines() {
                    writeln!(replies, "{}", answer(&region, &runtime, &line?))?;
                }
                Ok(())
            });
        }
    });
    io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

async fn receive_store(from: &Path, at: &Path) -> Fallible<()> {
    let listener = UnixTransport::new(from, PATIENCE).listen().await?;
    println!("waiting");
    let watched = Observers::none(Role::Destination);
    let settings = DestinationSettings::default();
    let received = Region::receive(listener, 1 << 30, settings, watched, CancellationToken::new()).await;
    serve(received?, at)
}

// ---- the demo: two servers, and clients that know which writes were acknowledged ----

/// A connection for requests and answers; the server at the other end may change.
struct Client(BufReader<UnixStream>);

impl Client {
    fn connect(to: &Path) -> io::Result<Self> {
        let since = Instant::now();
        loop {
            match UnixStream::connect(to) {
                Err(_) if since.elapsed() < PATIENCE => thread::sleep(Duration::from_millis(1)),
                connected => return Ok(Self(BufReader::new(connected?))),
            }
        }
    }

    fn ask(&mut self, line: &str) -> io::Result<String> {
        writeln!(self.0.get_mut(), "{line}")?;
        let mut reply = String::new();
        self.0.read_line(&mut reply)?;
        Ok(reply.trim_end().to_owned())
    }
}

/// The state of a client: the last acknowledged value of each key.
type Known = HashMap<String, u64>;

/// The addresses of the stores, how many writes each has acknowledged, and when that is enough.
struct Shared {
    sockets: [PathBuf; 2],
    acknowledged: [AtomicU64; 2],
    stop: AtomicBool,
}

/// Waits until clients have had this many more writes acknowledged at a server.
fn wait_for_writes(shared: &Shared, place: usize, more: u64) -> Fallible<()> {
    let (count, since) = (&shared.acknowledged[place], Instant::now());
    let enough = count.load(Ordering::Relaxed) + more;
    while count.load(Ordering::Relaxed) < enough {
        if since.elapsed() > PATIENCE {
            return Err("the clients have stopped writing".into());
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Writes until it is stopped. A write that is not acknowledged is repeated at the server that has the store now.
fn write_all_the_time(name: usize, shared: &Shared) -> io::Result<Known> {
    let (mut known, mut place) = (Known::default(), 0);
    let mut client = Client::connect(&shared.sockets[place])?;
    for value in 1.. {
        let key = format!("client{name}-key{}", value * 7919 % 5000);
        while client.ask(&format!("set {key} {value}"))? != "ok" {
            place = 1;
            client = Client::connect(&shared.sockets[place])?;
        }
        known.insert(key, value);
        shared.acknowledged[place].fetch_add(1, Ordering::Relaxed);
        if shared.stop.load(Ordering::Relaxed) {
            break;
        }
    }
    Ok(known)
}

fn start(words: &[&Path]) -> Fallible<(Child, String)> {
    let mut command = Command::new(std::env::current_exe()?);
    let mut child = command.args(words).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut said = String::new();
    BufReader::new(child.stdout.as_mut().expect("piped")).read_line(&mut said)?;
    Ok((child, said.trim_end().to_owned()))
}

fn story() -> Fallible<()> {
    let folder = std::env::temp_dir().join(format!("memferry-kv-{}", std::process::id()));
    std::fs::create_dir(&folder)?;
    let [here, there, between] = ["here", "there", "between"].map(|name| folder.join(name));
    let (first, said) = start(&["serve".as_ref(), &here])?;
    println!("process {} serves: {said}", first.id());
    let sockets = [here.clone(), there.clone()];
    let shared = Arc::new(Shared { sockets, acknowledged: Default::default(), stop: AtomicBool::new(false) });
    let clients: Vec<_> = (0..4)
        .map(|name| {
            let shared = shared.clone();
            thread::spawn(move || write_all_the_time(name, &shared))
        })
        .collect();
    wait_for_writes(&shared, 0, 1000)?;
    let (second, _waiting) = start(&["receive".as_ref(), &between, &there])?;
    println!("process {} waits for the store, while 4 clients write", second.id());
    println!("{}", Client::connect(&here)?.ask(&format!("move {}", between.display()))?);
    wait_for_writes(&shared, 1, 1000)?;
    shared.stop.store(true, Ordering::Relaxed);

    let (mut server, mut lost) = (Client::connect(&there)?, 0);
    for client in clients {
        let known = client.join().expect("a client does not panic")?;
        for (key, value) in known {
            lost += u64::from(server.ask(&format!("get {key}"))? != value.to_string());
        }
    }
    let keys = server.ask("count")?;
    let [before, after] = shared.acknowledged.each_ref().map(|count| count.load(Ordering::Relaxed));
    println!("{before} writes were acknowledged before the move and {after} after it");
    println!("{keys} keys, {lost} of them without their last acknowledged value");
    for mut process in [first, second] {
        drop(process.stdin.take());
        process.wait()?;
    }
    std::fs::remove_dir_all(&folder)?;
    if lost > 0 { Err("the move failed".into()) } else { Ok(()) }
}

#[tokio::main]
async fn main() -> Fallible<()> {
    let words: Vec<_> = std::env::args().skip(1).collect();
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    match words[..] {
        [] => story(),
        ["serve", at] => serve(Region::new(REGION_BYTES)?, at.as_ref()),
        ["receive", from, at] => receive_store(from.as_ref(), at.as_ref()).await,
        _ => Err("usage: kv, kv serve SOCKET, kv receive FROM SOCKET".into()),
    }
}
