//! TLS as an operator sets it up, and what else protects a guest's memory.

use std::fs;

use crate::harness::Scene;

const WORKLOAD: &str = "[guest.workload]\nmemory = \"4 MiB\"\n";

/// A workload that moves over TLS, with the certificates of `memferry certs`.
fn scene() -> Scene {
    let scene = Scene::new();
    scene.run(&["certs", "pki", "--host", "dest.example"]).expect(0).says(&["made in pki", "for trials"]);
    let tls = "[transport.tls]\ndirectory = \"pki\"\n";
    scene.write("tls.toml", format!("{WORKLOAD}[transport]\naddress = \"tls:127.0.0.1:0\"\n{tls}"));
    scene.write("plain.toml", format!("{WORKLOAD}[transport]\naddress = \"tcp:127.0.0.1:0\"\n"));
    scene
}

#[test]
fn certificates_of_the_program_carry_a_migration() {
    let scene = scene();
    scene.run(&["certs", "pki", "--host", "dest.example"]).expect(1).says(&["is there already"]);
    scene.run(&["run", "tls.toml", "--host-for", "0s"]).expect(0).says(&["completed", "verified"]);
    let named = ["transport.tls.peer_name=dest.example", "transport.tls.allow=[\"dest.example\"]"];
    scene.start_with(&["run", "tls.toml", "--host-for", "0s"], &named).end().expect(0).says(&["verified"]);
    let sets = ["transport.tls.peer_name=other.example", "transport.connect_timeout=1s"];
    let refused = scene.start_with(&["run", "tls.toml", "--host-for", "0s"], &sets).end();
    refused.expect(1).says(&["the one that is wanted is other.example", "dest.example"]);
    scene.run(&["check", "tls.toml"]).expect(0);
    scene.run(&["probe", "tls.toml"]).expect(0);
}

#[test]
fn a_plain_end_and_one_with_tls_say_what_to_write() {
    let scene = scene();
    for (here, there, words) in [
        ("plain.toml", "tls.toml", "the destination does not speak TLS"),
        ("tls.toml", "plain.toml", "the peer speaks TLS here: write tls: in the address at both ends"),
    ] {
        let destination = scene.start(&["recv", here, "--host-for", "0s"]);
        let address = destination.until_it_says("waiting at ").rsplit(' ').next().unwrap().to_owned();
        let other =
            if here == "plain.toml" { address.replace("tcp:", "tls:") } else { address.replace("tls:", "tcp:") };
        let sets = [format!("transport.address={other}"), "transport.connect_timeout=1s".into()];
        let sets: Vec<_> = sets.iter().map(String::as_str).collect();
        let source = scene.start_with(&["send", there, "--host-for", "0s"], &sets).end();
        source.expect(1).says(&[words]);
    }
}

#[test]
fn an_open_port_is_warned_of_once() {
    let scene = scene();
    let warning = "may send it a guest";
    for (config, address, warned) in [
        ("plain.toml", "tcp:0.0.0.0:0", true),
        ("plain.toml", "tcp:127.0.0.1:0", false),
        ("tls.toml", "tls:0.0.0.0:0", false),
    ] {
        let destination = scene.start_with(&["recv", config], &[&format!("transport.address={address}")]);
        destination.until_it_says("waiting at ");
        destination.signal(rustix::process::Signal::TERM);
        let ended = destination.end();
        assert_eq!(ended.to_string().matches(warning).count(), usize::from(warned), "{address}: {ended}");
    }
}

#[test]
fn core_dumps_can_be_switched_off() {
    let scene = scene();
    let destination = scene.start(&["recv", "plain.toml", "--no-core"]);
    destination.until_it_says("waiting at ");
    let of = |file: &str| fs::read_to_string(format!("/proc/{}/{file}", destination.id())).unwrap();
    let limits = of("limits");
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert!(core.split_whitespace().skip(4).take(2).all(|limit| limit == "1" || limit == "0"), "{core}");
    assert_eq!(of("coredump_filter").trim(), "00000000");
}
