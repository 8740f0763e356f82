use memferry_stages::wire::Message;
use memferry_stages::wire::messages::RunState;
use tokio::time::timeout;

use super::*;

const PATIENCE: Duration = Duration::from_secs(30);

/// A proxy, the end behind it, and a folder for its sockets.
struct Bench {
    proxy: Proxy,
    behind: Listener,
    folder: tempfile::TempDir,
}

impl Bench {
    async fn begin(is_unix: bool, steps: &[Step]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let [front, back] = ["front", "back"].map(|name| match is_unix {
            true => Address::Unix(folder.path().join(name)),
            false => Address::Tcp { host: "127.0.0.1".into(), port: 0 },
        });
        let behind = Listener::bind(&back).await.unwrap();
        let back = behind.address(&back).unwrap();
        let proxy = Proxy::begin(&front, back, Plan(steps.to_vec())).await.unwrap();
        Self { proxy, behind, folder }
    }

    /// Both ends of one connection through it.
    async fn connect(&self) -> [Socket; 2] {
        let source = Socket::connect(self.proxy.address()).await.unwrap();
        [source, timeout(PATIENCE, self.behind.accept()).await.expect("it is forwarded").unwrap()]
    }
}

/// Everything up to the end of the stream, or up to its error.
async fn read_all(socket: &Socket) -> (Vec<u8>, io::Result<()>) {
    let (mut all, mut part) = (Vec::new(), [0; 4096]);
    let reading = async {
        loop {
            match socket.read(&mut part).await {
                Ok(0) => return Ok(()),
                Ok(length) => all.extend_from_slice(&part[..length]),
                Err(error) => return Err(error),
            }
        }
    };
    let result = timeout(PATIENCE, reading).await.expect("it hangs");
    (all, result)
}

async fn read(socket: &Socket, length: usize) -> Vec<u8> {
    let (mut all, mut part) = (Vec::new(), [0; 4096]);
    while all.len() < length {
        let length = timeout(PATIENCE, socket.read(&mut part)).await.expect("it hangs").unwrap();
        assert!(length > 0, "the stream ended after {} bytes", all.len());
        all.extend_from_slice(&part[..length]);
    }
    all
}

#[tokio::test]
async fn it_forwards_both_ways_and_counts() {
    for is_unix in [false, true] {
        let bench = Bench::begin(is_unix, &[]).await;
        let [source, destination] = bench.connect().await;
        source.write_all(b"there").await.unwrap();
        assert_eq!(read(&destination, 5).await, b"there");
        destination.write_all(b"and back").await.unwrap();
        assert_eq!(read(&source, 8).await, b"and back");
        source.close_writing();
        assert_eq!(read_all(&destination).await.0, b"");
        destination.write_all(b"!").await.unwrap();
        drop(destination);
        assert_eq!(read_all(&source).await.0, b"!");
        assert_eq!([Direction::ToDestination, Direction::ToSource].map(|way| bench.proxy.forwarded(way)), [5, 9]);
        assert_eq!((bench.proxy.faults(), bench.proxy.greeting()), (vec![], b"there".to_vec()));
    }
}

#[tokio::test]
async fn a_cut_comes_after_its_bytes_and_closes_every_connection() {
    for is_unix in [false, true] {
        for direction in [Direction::ToDestination, Direction::ToSource] {
            let steps = [7, 3].map(|bytes| Step::new(When::Bytes(direction, bytes), Fault::Cut));
            let bench = Bench::begin(is_unix, &steps).await;
            for cut in 1..=2 {
                let [other, _other_end] = bench.connect().await;
                let [source, destination] = bench.connect().await;
                let (from, to) = if direction == Direction::ToDestination {
                    (&source, &destination)
                } else {
                    (&destination, &source)
                };
                from.write_all(b"0123456789").await.unwrap();
                let (arrived, end) = read_all(to).await;
                assert!(b"0123456".starts_with(&arrived), "{arrived:?}");
                // A Unix socket has no reset: what it took arrives.
                assert!(is_unix || end.is_err(), "{end:?}");
                assert!(!is_unix || arrived.len() == [7, 3][cut - 1]);
                assert!(is_unix || read_all(&other).await.1.is_err());
                assert_eq!(bench.proxy.breaks(), cut);
            }
            assert_eq!(bench.proxy.forwarded(direction), 10);
        }
    }
}

#[tokio::test]
async fn one_connection_of_several_is_cut() {
    let bench = Bench::begin(false, &[Step::new(When::Bytes(Direction::ToSource, 1), Fault::CutOne)]).await;
    let [first, first_end] = bench.connect().await;
    let [second, second_end] = bench.connect().await;
    second_end.write_all(b"ab").await.unwrap();
    assert!(read_all(&second).await.1.is_err());
    first.write_all(b"still here").await.unwrap();
    assert_eq!(read(&first_end, 10).await, b"still here");
}

fn frames() -> [Vec<u8>; 3] {
    [Message::Heartbeat(Vec::new()), Message::Go(RunState::Running), Message::Settled].map(|it| it.encode(0).to_vec())
}

/// In whatever pieces the frames come.
#[tokio::test]
async fn a_fault_comes_before_or_after_a_frame() {
    let [first, go, last] = frames();
    let all = [first.as_slice(), &go, &last].concat();
    for (when, until) in [
        (When::Before(Kind::Go), first.len()),
        (When::After(Kind::Go), first.len() + go.len()),
        (When::Before(Kind::Secret), all.len()),
    ] {
        for piece in [1, 15, 16, 17, 1000] {
            let bench = Bench::begin(true, &[Step::new(when, Fault::HalfClose)]).await;
            let [source, destination] = bench.connect().await;
            for piece in all.chunks(piece) {
                source.write_all(piece).await.unwrap();
            }
            source.close_writing();
            assert_eq!(read_all(&destination).await.0, all[..until], "{when:?}, {piece}");
            // The other direction lives.
            destination.write_all(b"x").await.unwrap();
            assert_eq!(read(&source, 1).await, b"x");
        }
    }
}

#[tokio::test]
async fn bytes_are_counted_from_the_fault_before() {
    let [first, go, last] = frames();
    let mark = Step::new(When::After(Kind::Go), Fault::Mark);
    let cut = Step::new(When::Bytes(Direction::ToDestination, 5), Fault::HalfClose);
    let bench = Bench::begin(true, &[mark, cut]).await;
    let [source, destination] = bench.connect().await;
    source.write_all(&[first.as_slice(), &go, &last].concat()).await.unwrap();
    assert_eq!(read_all(&destination).await.0, [first.as_slice(), &go, &last[..5]].concat());
    assert_eq!((bench.proxy.faults(), bench.proxy.breaks()), (vec![Fault::Mark, Fault::HalfClose], 1));
}

#[tokio::test]
async fn while_it_refuses_connections_are_closed_or_nobody_listens() {
    for is_unix in [false, true] {
        let bench = Bench::begin(is_unix, &[]).await;
        let [source, _destination] = bench.connect().await;
        bench.proxy.set_door(Door::Closes);
        assert_eq!(read_all(&Socket::connect(bench.proxy.address()).await.unwrap()).await.0, b"");
        bench.proxy.set_door(Door::Absent);
        let begun = Instant::now();
        while Socket::connect(bench.proxy.address()).await.is_ok() {
            assert!(begun.elapsed() < PATIENCE, "somebody listens");
            sleep(Duration::from_millis(1)).await;
        }
        // Connections that are there stay.
        bench.proxy.cut();
        read_all(&source).await.1.unwrap_or_default();
        bench.proxy.set_door(Door::Open);
        while Socket::connect(bench.proxy.address()).await.is_err() {
            assert!(begun.elapsed() < PATIENCE, "nobody listens");
            sleep(Duration::from_millis(1)).await;
        }
        let path = bench.folder.path().join("front");
        assert_eq!(path.exists(), is_unix);
        drop(bench.proxy);
        assert!(!path.exists());
    }
}

#[tokio::test]
async fn a_refusal_of_a_plan_ends() {
    let cut = Step::new(When::Bytes(Direction::ToDestination, 1), Fault::Cut);
    let bench = Bench::begin(false, &[cut.refusing(Door::Closes, Duration::from_millis(50))]).await;
    let [source, _destination] = bench.connect().await;
    source.write_all(b"a").await.unwrap();
    assert!(read_all(&source).await.1.is_err());
    let begun = Instant::now();
    loop {
        assert!(begun.elapsed() < PATIENCE, "it refuses for ever");
        let source = Socket::connect(bench.proxy.address()).await.unwrap();
        if let Ok(Ok(destination)) = timeout(Duration::from_millis(20), bench.behind.accept()).await {
            source.write_all(b"b").await.unwrap();
            assert_eq!(read(&destination, 1).await, b"b");
            return;
        }
    }
}

#[tokio::test]
async fn a_stall_delays_and_loses_nothing() {
    let bench = Bench::begin(true, &[]).await;
    let [source, destination] = bench.connect().await;
    bench.proxy.stall();
    source.write_all(b"later").await.unwrap();
    let early = timeout(Duration::from_millis(50), destination.read(&mut [0; 8])).await;
    assert!(early.is_err(), "{early:?}");
    bench.proxy.release();
    assert_eq!(read(&destination, 5).await, b"later");
}

#[tokio::test]
async fn a_stall_of_a_plan_ends_by_itself_or_by_a_cut() {
    let time = Duration::from_millis(30);
    for (fault, arrives) in [(Fault::Stall(time), "ab"), (Fault::StallAndCut(time), "a")] {
        let bench = Bench::begin(true, &[Step::new(When::Bytes(Direction::ToDestination, 1), fault)]).await;
        let [source, destination] = bench.connect().await;
        source.write_all(b"ab").await.unwrap();
        source.close_writing();
        let arrived = read_all(&destination).await.0;
        // The stall and the cut end at one time, by two clocks.
        assert!(arrived == arrives.as_bytes() || arrived == b"ab" && fault.breaks(), "{arrived:?}");
    }
}

#[test]
fn a_seed_decides_a_plan() {
    assert_eq!(Plan::drawn(7, 1 << 20), Plan::drawn(7, 1 << 20));
    let plans: Vec<_> = (0..200).map(|seed| Plan::drawn(seed, 1 << 20)).collect();
    assert!(plans.iter().all(|plan| (2..=4).contains(&plan.0.len()) && plan.0[0] == Plan::FIRST_PAGE));
    let has = |is_it: fn(&Step) -> bool| plans.iter().flat_map(|plan| &plan.0).any(is_it);
    assert!(has(|step| step.fault == Fault::HalfClose) && has(|step| step.fault == Fault::CutOne));
    assert!(has(|step| matches!(step.fault, Fault::Stall(_))) && has(|step| step.when == When::Before(Kind::Go)));
    assert!(has(|step| matches!(step.refusal, Some((Door::Absent, _)))));
}
