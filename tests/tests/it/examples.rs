//! The examples, run as a reader would run them. `cargo test` builds them with everything else.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};

/// The program of an example, built beside this test.
///
/// # Panics
/// If it was not built since its code changed: `cargo test --test examples` alone does not build it.
fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let example = test.parent().unwrap().parent().unwrap().join("examples").join(name);
    let advice = format!("{} is not up to date: run cargo build --examples first", example.display());
    let made = fs::metadata(&example).and_then(|file| file.modified()).expect(&advice);
    // The sources that cargo lists for it.
    let from = fs::read_to_string(example.with_extension("d")).expect(&advice);
    let from = from.lines().next().and_then(|line| line.split_once(": ")).expect(&advice).1.replace("\\ ", "\0");
    let is_older =
        |file: &str| fs::metadata(file.replace('\0', " ")).and_then(|file| file.modified()).is_ok_and(|at| at <= made);
    assert!(from.split_whitespace().all(is_older), "{advice}");
    example
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
fn embed_continues_after_ctrl_c() {
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
