//! memferry as a VMM embeds it, and bare sockets: two processes of this program, and the resources that they use.

use std::env;
use std::io::{BufRead, BufReader, Write};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::Fallible;
use crate::end::{COMMAND, Expected, How, Order, Reply, Verdict, What};
use crate::floor::Sockets;
use crate::image::Image;
use crate::moved::{Moved, Spent};
use crate::process::{Process, Usage};
use crate::running::WARM_UP;

impl How {
    /// Without a bandwidth limit, with checksums, on this many lanes.
    pub(crate) fn fast(lanes: u16) -> Self {
        Self {
            lanes,
            compress: crate::end::Compress::None,
            xbzrle: None,
            verify: false,
            max_bandwidth: None,
            downtime_limit: Duration::from_millis(300),
            deadline: None,
            throttles: false,
        }
    }
}

/// Moves an image, and checks that it arrived unchanged.
pub(crate) fn move_image(image: &Image, address: &str, how: How) -> Fallible<Moved> {
    let receive = Order::Receive { address: address.to_owned(), what: Expected::Image };
    let send = |address| Order::Send { address, what: What::Image(image.path().to_owned()), how };
    whole(image, migrate(&receive, send, Duration::ZERO, how.deadline)?)
}

/// Moves an image over bare sockets, and checks that it arrived unchanged.
pub(crate) fn move_bare(image: &Image, address: &str, sockets: Sockets) -> Fallible<Moved> {
    let (bytes, connections) = (usize::try_from(image.bytes())?, sockets.connections);
    let receive = Order::ReceiveBare { address: address.to_owned(), bytes, connections };
    let send = |address| Order::SendBare { address, image: image.path().to_owned(), sockets };
    whole(image, migrate(&receive, send, Duration::ZERO, None)?)
}

/// Checks that this image arrived.
fn whole(image: &Image, (moved, arrived): (Moved, Option<Reply>)) -> Fallible<Moved> {
    match arrived {
        Some(Reply::Hash(hash)) => image.check(hash)?,
        other => return Err(format!("the destination says {other:?}, not a hash").into()),
    }
    Ok(moved)
}

/// Moves a workload while it writes. If it arrives, no page is stale.
pub(crate) fn move_workload(pace: crate::boot::Pace, address: &str, how: How) -> Fallible<Moved> {
    let receive = Order::Receive { address: address.to_owned(), what: Expected::Workload };
    let send = |address| Order::Send { address, what: What::Workload(pace), how };
    let (moved, arrived) = migrate(&receive, send, WARM_UP, how.deadline)?;
    match arrived {
        None | Some(Reply::StalePages(0)) => Ok(moved),
        other => Err(format!("the destination says {other:?}, not that no page is stale").into()),
    }
}

/// Runs both ends, the source with the address on which the destination listens. For a completed migration, returns
/// what the destination reports about its memory.
fn migrate(
    receive: &Order,
    send: impl FnOnce(String) -> Order,
    warm_up: Duration,
    deadline: Option<Duration>,
) -> Fallible<(Moved, Option<Reply>)> {
    let mut destination = End::start(receive)?;
    let mut source = End::start(&send(destination.ready()?))?;
    source.ready()?;
    sleep(warm_up);
    let before = (source.usage()?, destination.usage()?);
    let began = Instant::now();
    destination.proceed()?;
    source.proceed()?;
    let sent = source.verdict()?;
    let moved = |sent: &Verdict, clock, source, destination: Spent| Moved {
        completed: sent.completed,
        total: sent.total,
        clock,
        wire_bytes: sent.wire_bytes,
        rounds: sent.rounds,
        downtime: sent.downtime,
        written: sent.written,
        source,
        destination,
        arrived: destination.grown,
    };
    let source_spent = Spent::between(before.0, source.usage()?);
    if !sent.completed {
        return match deadline {
            Some(deadline) if sent.total >= deadline => {
                Ok((moved(&sent, began.elapsed(), source_spent, Spent::default()), None))
            }
            _ => Err(format!("the source: {}", sent.error.unwrap_or_default()).into()),
        };
    }
    let received = destination.verdict()?;
    let clock = began.elapsed();
    if !received.completed {
        return Err(format!("the destination: {}", received.error.unwrap_or_default()).into());
    }
    let destination_spent = Spent::between(before.1, destination.usage()?);
    if env::var_os("STAGES").is_some() {
        sent.stages.iter().chain(&received.stages).for_each(|stage| eprintln!("    {stage}"));
    }
    destination.proceed()?;
    Ok((moved(&sent, clock, source_spent, destination_spent), Some(destination.hear()?)))
}

/// One end, as seen from the bench.
struct End {
    process: Process,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl End {
    fn start(order: &Order) -> Fallible<Self> {
        let mut command = Command::new(env::current_exe()?);
        command.args([COMMAND, &serde_json::to_string(order)?]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = Process::spawn(&mut command)?;
        let input = process.child().stdin.take().ok_or("a pipe was asked for")?;
        let output = process.child().stdout.take().ok_or("a pipe was asked for")?;
        Ok(Self { process, input, output: BufReader::new(output) })
    }

    fn usage(&self) -> Fallible<Usage> {
        self.process.usage()
    }

    fn proceed(&mut self) -> Fallible<()> {
        Ok(self.input.write_all(b"\n")?)
    }

    fn hear(&mut self) -> Fallible<Reply> {
        let mut line = String::new();
        match self.output.read_line(&mut line)? {
            0 => Err("an end ended before its time".into()),
            _ => Ok(serde_json::from_str(&line)?),
        }
    }

    fn ready(&mut self) -> Fallible<String> {
        match self.hear()? {
            Reply::Ready(address) => Ok(address),
            other => Err(format!("an end says {other:?}, not that it is ready").into()),
        }
    }

    fn verdict(&mut self) -> Fallible<Verdict> {
        match self.hear()? {
            Reply::Done(verdict) => Ok(verdict),
            other => Err(format!("an end says {other:?}, not that it is done").into()),
        }
    }
}
