//! A migration that receives requests over its control socket: from the program's own commands, and from malicious
//! clients.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use memferry::transports::Address;
use memferry_cli::api::client;
use rustix::process::Signal;
use serde_json::Value;

use crate::harness::{Ended, Running, Scene, until};
use crate::openapi::OpenApi;

/// 2 MiB of noise that is written twenty times faster than it is sent, with a limit that is never met: the migration
/// ends on request only.
const ENDLESS: &str = r#"
[guest.workload]
memory = "2 MiB"
fill = { random = 1.0 }
dirty_log = "software"

[[guest.workload.writers]]
pattern = "uniform"
pages_per_second = 20_000
bytes = 4000

[encoder]
compress = "none"

[transport]
address = "tcp:127.0.0.1:0"

[migration]
max_bandwidth = "4 MiB/s"
downtime_limit = "1us"
max_rounds = 1_000_000
verify = false
"#;

const SOCKET: &str = "control.sock";

/// A migration within one process that receives requests.
struct Asked {
    scene: Scene,
    program: Running,
}

impl Asked {
    fn begin(options: &[&str]) -> Self {
        let scene = Scene::new();
        scene.write("endless.toml", ENDLESS);
        let program = Self::start(&scene, options);
        Self { scene, program }
    }

    /// Starts it and waits until a request succeeds.
    fn start(scene: &Scene, options: &[&str]) -> Running {
        let arguments = ["run", "endless.toml", "--control", SOCKET, "--report", "run.json"];
        let program = scene.start(&[&arguments, options].concat());
        until("a round is sent, and something decided after it", || {
            let status = scene.run(&["status", SOCKET, "--json"]);
            status.code == 0 && {
                let status: Value = serde_json::from_str(&status.stdout).unwrap();
                status["rounds"].as_u64() > Some(0) && status["decision"].is_object() && status["progress"].is_object()
            }
        });
        program
    }

    fn ask(&self, arguments: &[&str]) -> Ended {
        self.scene.run(&[&arguments[..1], &[SOCKET], &arguments[1..]].concat())
    }

    fn address(&self) -> Address {
        Address::Unix(self.scene.path(SOCKET))
    }

    /// Sends raw bytes and returns everything that is received.
    fn say(&self, bytes: &[u8]) -> String {
        let mut stream = UnixStream::connect(self.scene.path(SOCKET)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        // The server may answer and disconnect before it has read all of the request.
        drop(stream.write_all(bytes));
        let mut answer = Vec::new();
        drop(stream.read_to_end(&mut answer));
        String::from_utf8_lossy(&answer).into_owned()
    }

    fn request(&self, method: &str, path: &str, body: &str) -> String {
        let length = body.len();
        let head =
            format!("{method} {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n");
        self.say(format!("{head}{body}").as_bytes())
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

fn code(answer: &str) -> &str {
    answer.split(' ').nth(1).unwrap_or("none")
}

#[test]
fn an_operator_looks_changes_and_has_it_finish() {
    let asked = Asked::begin(&["--host-for", "0"]);
    asked.ask(&["status"]).expect(0).says(&[
        "active, source, for ",
        "left",
        "downtime_limit = 1us",
        "decided after round ",
    ]);
    asked
        .ask(&["set", "downtime_limit=2ms", "max_bandwidth=6 MiB/s"])
        .expect(0)
        .says(&["downtime_limit = 2ms", "max_bandwidth = 6 MiB/s"]);
    asked
        .ask(&["set", "downtime_limit=soon"])
        .expect(2)
        .says(&["downtime_limit: \"soon\" is wrong here; write a length"]);
    asked.ask(&["set", "throttle=20"]).expect(1).says(&["not among the steps of on_stall"]);
    asked.ask(&["set", "lanes=4"]).expect(2).says(&["\"lanes\" is no setting that can be changed", "max_bandwidth, "]);
    asked.ask(&["set", "max_bandwidth=1"]).expect(2).says(&["1 B/s is too slow", "64 KiB/s"]);
    let large = asked.ask(&["set", "xbzrle_cache=900 TiB"]).expect(1);
    large.says(&[
        "xbzrle_cache: an XBZRLE cache of 900 TiB is larger than the guest's memory, ",
        " or less, or leave it out",
    ]);
    let twice = asked.ask(&["set", "downtime_limit=3ms", "throttle=20", "downtime_limit=4ms"]);
    twice.expect(2).says(&["downtime_limit is given twice"]);
    asked.ask(&["set", "address=file:x"]).expect(2).says(&["address: a file has no return path"]);
    asked.ask(&["set", "address=unix:/x", "throttle=20"]).expect(2).says(&["address is given beside settings"]);
    // The open connection stays.
    asked.ask(&["set", "address=unix:/x"]).expect(0);
    asked.ask(&["set", "max_downtime=2ms"]).expect(0);
    asked
        .ask(&["switch-over"])
        .expect(1)
        .says(&["it does not switch over", "max_downtime is 2.00 ms: expected downtime"]);
    asked.ask(&["set", "max_downtime=none"]).expect(0).says(&["max_downtime = none"]);
    asked.ask(&["switch-over"]).expect(0).says(&["switch over: the operator asked for it; expected downtime "]);
    let Asked { scene, program } = asked;
    program.end().expect(0).says(&["max_bandwidth is changed from 4 MiB/s to 6 MiB/s"]);
    let report: Value = serde_json::from_slice(&scene.read("run.json")).unwrap();
    let changes = report["changes"].as_array().unwrap();
    assert_eq!(changes.len(), 4, "{changes:#?}");
    assert_eq!((&changes[3]["key"], &changes[3]["to"]), (&"max_downtime".into(), &"none".into()));
    assert!(changes[0]["round"].as_u64() > Some(0), "{changes:#?}");
    assert!(!scene.path(SOCKET).exists(), "the socket is removed");
}

#[test]
fn after_the_verdict_it_says_how_it_ended_as_long_as_the_guest_is_hosted() {
    let asked = Asked::begin(&["--host-for", "10m"]);
    asked.ask(&["cancel"]).expect(0).says(&["the guest continues at the source"]);
    until("it has ended", || asked.ask(&["status"]).stdout.starts_with("cancelled after "));
    asked.ask(&["cancel"]).expect(1).says(&["the migration is over"]);
    asked.ask(&["set", "deadline=none"]).expect(1).says(&["the migration is over"]);
    asked.program.signal(Signal::INT);
    asked.program.end().expect(130);
}

#[test]
fn every_answer_is_as_the_openapi_file_has_it() {
    let api = OpenApi::read();
    let asked = Asked::begin(&["--host-for", "10m"]);
    let address = asked.address();
    block_on(async {
        let mut lines = client::events(&address).await.unwrap();
        let status = client::status(&address).await.unwrap();
        assert!(status["progress"].is_object() && status["decision"].is_object(), "{status:#}");
        api.check("Status", &status);
        // The current settings can be sent back, and change nothing.
        let settings = status["settings"].as_object().unwrap();
        api.check("Status", &client::set(&address, settings).await.unwrap());
        let limit = serde_json::json!({ "downtime_limit": 20_000, "xbzrle_cache": "1 MiB" });
        let status = client::set(&address, limit.as_object().unwrap()).await.unwrap();
        assert_eq!(
            (&status["settings"]["downtime_limit"], &status["settings"]["xbzrle_cache"]),
            (&"20s".into(), &"1 MiB".into())
        );
        let mut kinds = Vec::new();
        while let Some(line) = lines.next().await.unwrap() {
            let line: Value = serde_json::from_str(&line).unwrap();
            api.check("EventLine", &line);
            kinds.push(line["event"].as_str().unwrap().to_owned());
        }
        assert_eq!((&*kinds[0], kinds.last().map(String::as_str)), ("phase", Some("ended")), "{kinds:?}");
        for kind in ["connected", "guest", "round_sent", "decided", "progress", "changed", "paused", "handed_over"] {
            assert!(kinds.iter().any(|known| known == kind), "{kind} is not among {kinds:?}");
        }
        let status = client::status(&address).await.unwrap();
        assert_eq!(status["phase"], "completed");
        api.check("Status", &status);
        // A later reader receives the same events, up to the end.
        let mut late = client::events(&address).await.unwrap();
        let mut last = None;
        while let Some(line) = late.next().await.unwrap() {
            last = Some(line);
        }
        assert!(last.unwrap().contains(r#""event":"ended""#));
    });
    for (method, path, body, expected) in [
        ("PATCH", "/migration", "{", "400"),
        ("PATCH", "/migration", r#"{ "deadline": null }"#, "409"),
        ("GET", "/", "", "404"),
        ("DELETE", "/migration", "", "405"),
        ("POST", "/migration/postcopy", "", "409"),
        ("GET", "/migration/postcopy", "", "405"),
    ] {
        let answer = asked.request(method, path, body);
        assert_eq!(code(&answer), expected, "{answer}");
        api.check("Error", &serde_json::from_str(answer.split("\r\n\r\n").nth(1).unwrap()).unwrap());
    }
    asked.program.signal(Signal::INT);
    asked.program.end().expect(0);
}

#[test]
fn a_hostile_client_gets_an_answer_and_holds_nothing_up() {
    let asked = Asked::begin(&[]);
    let silent: Vec<_> = (0..20).map(|_| UnixStream::connect(asked.scene.path(SOCKET)).unwrap()).collect();
    // A client that requests events and never reads them.
    let mut deaf = UnixStream::connect(asked.scene.path(SOCKET)).unwrap();
    deaf.write_all(b"GET /migration/events HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();

    assert_eq!(code(&asked.say(b"what is this\r\n\r\n")), "400");
    assert_eq!(code(&asked.say(&[b"GET /migration HTTP/1.1\r\nX: ".as_slice(), &[b'x'; 100_000]].concat())), "431");
    assert_eq!(code(&asked.say(&[b"GET /".as_slice(), &[b'x'; 100_000]].concat())), "431");
    let long = format!("{{ \"downtime_limit\": \"{}\" }}", "5".repeat(100_000));
    assert_eq!(code(&asked.request("PATCH", "/migration", &long)), "413");
    let deep = format!("{{ \"deadline\": {}{} }}", "[".repeat(8000), "]".repeat(8000));
    assert_eq!(code(&asked.request("PATCH", "/migration", &deep)), "400");
    for body in [
        "",
        "null",
        "[]",
        "{",
        r#"{ "max_bandwidth": 0 }"#,
        r#"{ "switchover_bandwidth": "1 B/s" }"#,
        r#"{ "deadline": "584 years" }"#,
        r#"{ "throttle": 1e9 }"#,
        r#"{ "xbzrle_cache": 18446744073709551615 }"#,
        "{ \"downtime_limit\": \"\u{0}\" }",
        r#"{ "downtime_limit": "5ms", "no_such": 1 }"#,
        r#"{ "downtime_limit": "5ms", "downtime_limit": "5ms" }"#,
    ] {
        let answer = asked.request("PATCH", "/migration", body);
        assert_eq!(code(&answer), "400", "{body}: {answer}");
    }
    assert_eq!(code(&asked.request("POST", "/migration", "")), "405");
    assert_eq!(code(&asked.request("GET", "/migration/cancel", "")), "405");
    assert_eq!(code(&asked.request("GET", "/migration/../../etc/passwd", "")), "404");
    // A body that never arrives.
    let slow = asked.say(b"PATCH /migration HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 100\r\n\r\n{");
    assert_eq!(code(&slow), "408", "{slow}");

    let status = block_on(client::status(&asked.address())).unwrap();
    assert_eq!((&status["phase"], &status["settings"]["downtime_limit"]), (&"active".into(), &"1us".into()));
    asked.ask(&["cancel"]).expect(0);
    asked.program.end().expect(130);
    drop((silent, deaf));
}

#[test]
fn the_socket_is_its_owners_a_dead_one_is_replaced_and_a_living_one_is_left_alone() {
    let scene = Scene::new();
    scene.write("endless.toml", ENDLESS);
    let path = scene.path(SOCKET);
    drop(UnixListener::bind(&path).unwrap());
    let dead = scene.run(&["status", SOCKET]).expect(1);
    dead.says(&["nobody listens there any more"]);
    let first = Asked::start(&scene, &[]);
    let found = fs::metadata(&path).unwrap();
    assert!(found.file_type().is_socket());
    assert_eq!(found.permissions().mode() & 0o777, 0o600);
    let second = scene.run(&["run", "endless.toml", "--control", SOCKET]).expect(2);
    second.says(&["--control: ", SOCKET]);
    scene.run(&["cancel", SOCKET]).expect(0);
    first.end().expect(130);
    assert!(!path.exists());
    // A killed program leaves its socket behind, which the next one replaces.
    let killed = Asked::start(&scene, &[]);
    killed.signal(Signal::KILL);
    killed.end();
    assert!(path.exists());
    let next = Asked::start(&scene, &[]);
    scene.run(&["cancel", SOCKET]).expect(0);
    next.end().expect(130);
}

#[test]
fn a_destination_is_watched_and_cancelled_but_not_changed() {
    let scene = Scene::new();
    scene.configure(&["ram"]);
    let destination = scene.start(&["recv", "recv.toml", "--control", SOCKET]);
    destination.until_it_says("waiting at ");
    scene.run(&["status", SOCKET]).expect(0).says(&["setup, destination, for "]);
    scene.run(&["set", SOCKET, "max_bandwidth=unlimited"]).expect(1).says(&["this is the destination", "ask there"]);
    scene.run(&["switch-over", SOCKET]).expect(1).says(&["this is the destination"]);
    scene.run(&["postcopy", SOCKET]).expect(1).says(&["this is the destination"]);
    scene.run(&["cancel", SOCKET]).expect(0);
    destination.end().expect(130);
}

#[test]
fn where_nobody_listens_it_says_what_to_check() {
    let scene = Scene::new();
    for command in ["status", "cancel", "switch-over", "postcopy"] {
        scene
            .run(&[command, "nowhere.sock"])
            .expect(1)
            .says(&["nowhere.sock", "was the migration started with --control"]);
    }
    scene.run(&["set", "nowhere.sock", "throttle=5"]).expect(1).says(&["no such socket"]);
    scene.run(&["set", "nowhere.sock"]).expect(2);
    scene.run(&["set", "nowhere.sock", "throttle"]).expect(2).says(&["there is no = in it"]);
    scene.run(&["status", "tcp:127.0.0.1:7"]).expect(2).says(&["no Unix socket"]);
    let other = UnixListener::bind(scene.path("other.sock")).unwrap();
    let strange = std::thread::spawn(move || other.accept().unwrap().0.write_all(b"220 mail.example\r\n").unwrap());
    scene.run(&["status", "other.sock"]).expect(1).says(&["no control API of a migration"]);
    strange.join().unwrap();
    assert!(!Path::new("nowhere.sock").exists());
}
