//! The examples, built and run as whoever reads them would.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};

/// The program of an example, in the profile of this test.
fn example(name: &str) -> PathBuf {
    let mut build = Command::new(env!("CARGO"));
    build.args(["build", "--quiet", "--package", "memferry", "--example", name]);
    build.args((!cfg!(debug_assertions)).then_some("--release"));
    assert!(build.status().unwrap().success(), "example {name} is built");
    let test = std::env::current_exe().unwrap();
    test.parent().unwrap().parent().unwrap().join("examples").join(name)
}

fn said(output: &Output) -> String {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    format!("{out}{err}")
}

#[test]
fn embed_moves_its_guest() {
    let output = Command::new(example("embed")).output().unwrap();
    let said = said(&output);
    assert!(output.status.success() && said.contains("moved: it runs there"), "{said}");
}

#[test]
fn embed_goes_on_after_ctrl_c() {
    let mut embed = Command::new(example("embed")).arg("2000").stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(embed.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.any(|line| line.contains("left")));
    kill_process(Pid::from_child(&embed), Signal::INT).unwrap();
    let last = lines.last().unwrap();
    assert!(embed.wait().unwrap().success());
    assert!(last.contains("Cancelled") && last.contains("Running here"), "{last}");
}

#[test]
fn every_acknowledged_write_to_the_store_is_there_after_its_move() {
    let output = Command::new(example("kv")).output().unwrap();
    let said = said(&output);
    assert!(output.status.success() && said.contains(" 0 of them without"), "{said}");
    println!("{said}");
}
