//! The crates that a VMM depends on through the engine: those that `memferry` needs with its default features. Dependencies between
//! crates and modules run one way.

mod circles;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

/// The most crates that the engine may need, itself and this workspace's crates included.
const MOST: usize = 80;
/// Crates for command lines, configuration files, pages, terminals and servers: they belong to the program.
const FORBIDDEN: [&str; 8] = ["clap", "crossterm", "hyper", "maud", "ratatui", "rustls", "serde_json", "toml"];

/// The names of the crates that a package needs to be built as a dependency, each once.
fn needed(package: &str) -> BTreeSet<String> {
    let arguments =
        ["tree", "--package", package, "--edges", "normal", "--prefix", "none", "--format", "{p}", "--offline"];
    let output = Command::new(env!("CARGO")).args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let tree = String::from_utf8(output.stdout).unwrap();
    // A repeated crate is marked with "(*)".
    let crates = tree.lines().filter_map(|line| line.split_once(' '));
    crates.map(|(name, rest)| format!("{name} {}", rest.split(' ').next().unwrap_or_default())).collect()
}

#[test]
fn the_engine_needs_few_crates_and_none_of_a_program() {
    let engine = needed("memferry");
    assert!(engine.len() <= MOST, "{} crates: {engine:?}", engine.len());
    let is_forbidden = |entry: &&String| FORBIDDEN.contains(&entry.split(' ').next().unwrap_or_default());
    assert_eq!(engine.iter().filter(is_forbidden).count(), 0, "{engine:?}");
}

/// Confirms that the check above detects these crates: the program needs them.
#[test]
fn the_program_needs_them() {
    let program = needed("memferry-cli");
    for name in ["clap", "hyper", "maud", "ratatui", "rustls", "toml"] {
        assert!(program.iter().any(|entry| entry.starts_with(&format!("{name} "))), "{name}: {program:?}");
    }
}

/// Each crate depends only on those below it.
#[test]
fn dependencies_between_the_crates_run_one_way() {
    let below = |package: &str| -> BTreeSet<_> {
        let own =
            |entry: String| entry.split(' ').next().filter(|name| name.starts_with("memferry")).map(str::to_owned);
        needed(package).into_iter().filter_map(own).filter(|name| name != package).collect()
    };
    let engine = BTreeSet::from(["memferry-stages", "memferry-transports"].map(str::to_owned));
    assert_eq!(below("memferry-stages"), BTreeSet::new());
    assert_eq!(below("memferry-transports"), BTreeSet::new());
    assert_eq!(below("memferry-transports-tls"), BTreeSet::from(["memferry-transports".to_owned()]));
    assert_eq!(below("memferry"), engine);
    for package in ["memferry-guests", "memferry-report"] {
        assert_eq!(below(package), engine.iter().cloned().chain(["memferry".into()]).collect(), "{package}");
    }
}

/// What encodes, decodes and places pages knows no stream: a dialect makes frames of what it gives.
#[test]
fn encoder_codec_and_loader_know_no_dialect() {
    let stages = Path::new(env!("CARGO_MANIFEST_DIR")).join("../stages/src");
    let mut left: Vec<_> =
        ["batch", "batch.rs", "codec.rs", "decoder.rs", "dialect.rs", "encoder", "loader", "loader.rs", "receiver.rs"]
            .map(|name| stages.join(name))
            .into();
    let mut files = 0;
    while let Some(path) = left.pop() {
        if path.is_dir() {
            left.extend(path.read_dir().unwrap().map(|entry| entry.unwrap().path()));
        } else if path.file_name() != Some("tests.rs".as_ref()) {
            let text = std::fs::read_to_string(&path).unwrap();
            let used = text.lines().find(|line| line.contains("wire::") && !line.trim_start().starts_with("//"));
            assert_eq!(used, None, "{}", path.display());
            files += 1;
        }
    }
    assert!(files > 15, "{files} files");
}
