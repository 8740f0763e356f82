//! Descriptors are released, and a shortage of them is transient. One test, since descriptors belong to the whole process.

use std::fs;
use std::time::Duration;

use memferry_transports::{Transport, is_shortage, open};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

fn open_descriptors() -> usize {
    fs::read_dir("/proc/self/fd").expect("proc").count() - 1
}

fn transport(address: &str) -> Box<dyn Transport> {
    open(&address.parse().expect("an address"), Duration::ZERO)
}

async fn failed_connects_leave_nothing_open() {
    let port = transport("tcp:127.0.0.1:0").listen().await.expect("a port").local_address();
    let addresses = [port.as_str(), "unix:/no/such/socket", "file:/no/such/stream"];
    transport("tcp:localhost:1").connect().await.expect_err("nobody listens");
    let before = open_descriptors();
    for _ in 0..100 {
        for address in addresses {
            transport(address).connect().await.expect_err("nobody listens");
        }
    }
    assert_eq!(open_descriptors(), before);
}

async fn a_listener_outlives_a_want_of_descriptors(address: &str) {
    let mut listener = transport(address).listen().await.expect("listening");
    let source = transport(&listener.local_address());
    let _source = source.connect().await.expect("the backlog has room");
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(0), maximum: limit.maximum }).expect("lowered");
    let starved = listener.accept().await;
    setrlimit(Resource::Nofile, limit).expect("raised");
    let error = starved.expect_err("no descriptor");
    assert!(is_shortage(&error), "{error}");
    let accepted = tokio::time::timeout(Duration::from_secs(60), listener.accept()).await;
    accepted.expect("in time").expect("accepted");
}

#[tokio::test]
async fn descriptors() {
    failed_connects_leave_nothing_open().await;
    a_listener_outlives_a_want_of_descriptors("tcp:127.0.0.1:0").await;
    let directory = tempfile::tempdir().expect("a directory");
    a_listener_outlives_a_want_of_descriptors(&format!("unix:{}", directory.path().join("s").display())).await;
}
