//! Configuration: one TOML file that describes a run.
//!
//! [`load`] reads a file and the `--set`s of a command line. It returns a [`Config`] that satisfies every rule, or a
//! [`ConfigError`] that shows each line in question with the remedy. [`settings`] converts a configuration to the
//! plain values that a migration and its guests take.

mod explain;
mod fault;
mod overrides;
mod place;
mod rules;
pub mod settings;
pub mod tables;
mod tls;

use std::io;
use std::path::Path;

use toml_edit::{Document, DocumentMut};

use fault::Shown;
pub use fault::{ConfigError, Fault};
use overrides::Override;
pub use tables::Config;
pub(crate) use tls::warnings;

use memferry::settings::RecoverySettings;
use memferry_stages::untrusted::Untrusted;
use memferry_transports::whole_file;

/// The longest configuration, in bytes.
const MOST_BYTES: u64 = 1 << 20;

/// The purpose for which a configuration is read: some rules apply at one end only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Both ends in one process.
    Run,
    /// The source.
    Send,
    /// The destination.
    Receive,
    /// For inspection only.
    Check,
    /// The settings alone, on a host that may have none of the files.
    Plan,
}

/// Reads a configuration file, applies the `--set`s, and checks the result.
///
/// # Errors
/// [`ConfigError`] with all faults.
pub fn load(file: &Path, sets: &[String], purpose: Purpose) -> Result<Config, ConfigError> {
    let name = Untrusted::from(file).to_string();
    let help = "name a TOML file: configs/quickstart.toml is one to begin with";
    let text = whole_file::read(file, MOST_BYTES)
        .and_then(|bytes| String::from_utf8(bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error)));
    let text = text.map_err(|error| {
        ConfigError::without_place(&name, format!("the configuration cannot be read: {error}"), Some(help.into()))
    })?;
    parse(&name, &text, sets, purpose)
}

/// Checks a configuration against the size of a guest that it does not specify, such as one of files.
///
/// # Errors
/// What does not fit, and what to write.
pub(crate) fn fits(config: &Config, guest_bytes: u64) -> Result<(), String> {
    match rules::cache_beyond(config, guest_bytes) {
        None => Ok(()),
        Some(Fault { path, what, help, .. }) => Err(format!("{path}: {what}; {}", help.unwrap_or_default())),
    }
}

/// As [`load`], for a text in memory; `name` identifies it in messages.
///
/// # Errors
/// As [`load`].
pub fn parse(name: &str, text: &str, sets: &[String], purpose: Purpose) -> Result<Config, ConfigError> {
    let original = Document::parse(text).map_err(|error| not_toml(name, text, &error))?;
    let sets = sets
        .iter()
        .map(|set| Override::parse(set).map_err(|what| bad_set(set, what)))
        .collect::<Result<Vec<_>, _>>()?;
    let effective = with_sets(text, &sets)?;
    let source = Source { name, text, original: &original, sets: &sets };
    let mut config: Config = toml::from_str(&effective).map_err(|error| source.show([misread(&effective, &error)]))?;
    if !is_written(&effective, "migration.recovery") && rules::recovery_lacks(&config).is_some() {
        config.migration.recovery = RecoverySettings::OFF;
    }
    let faults = rules::check(&config, purpose);
    if faults.is_empty() { Ok(config) } else { Err(source.show(faults)) }
}

/// The text with the `--set`s applied.
fn with_sets(text: &str, sets: &[Override]) -> Result<String, ConfigError> {
    if sets.is_empty() {
        return Ok(text.to_owned());
    }
    let mut document: DocumentMut = text.parse().expect("it was parsed before");
    for set in sets {
        set.apply(&mut document).map_err(|what| bad_set(&set.text, what))?;
    }
    Ok(document.to_string())
}

/// Does the text have this key?
fn is_written(effective: &str, path: &str) -> bool {
    Document::parse(effective).is_ok_and(|document| place::exists(document.as_item(), path))
}

fn not_toml(name: &str, text: &str, error: &toml_edit::TomlError) -> ConfigError {
    let fault = Fault::bare("", format!("this is no TOML: {}", error.message()));
    ConfigError(vec![Shown { fault, origin: name.into(), text: text.into(), span: error.span() }])
}

fn bad_set(set: &str, what: String) -> ConfigError {
    let fault = Fault::new("", what, "write --set table.key=value, as in --set pipeline.lanes=4");
    ConfigError(vec![Shown { fault, origin: "--set".into(), text: set.into(), span: Some(0..set.len()) }])
}

/// The reader's error, as a fault of the key at which it stopped.
fn misread(effective: &str, error: &toml::de::Error) -> Fault {
    let document = Document::parse(effective).expect("it was written by toml_edit");
    let whole = |span: &std::ops::Range<usize>| span.start == 0 && span.end >= effective.trim_end().len();
    let path = match error.span().filter(|span| !whole(span)) {
        Some(span) => place::path_at(document.as_item(), span.start),
        None => String::new(),
    };
    explain::explain(error.message(), path)
}

/// The texts in which faults are located.
struct Source<'a> {
    name: &'a str,
    text: &'a str,
    original: &'a Document<&'a str>,
    sets: &'a [Override],
}

impl Source<'_> {
    fn show(&self, faults: impl IntoIterator<Item = Fault>) -> ConfigError {
        ConfigError(faults.into_iter().map(|fault| self.locate(fault)).collect())
    }

    /// The value comes from the last `--set` of the key, else from the file.
    fn locate(&self, fault: Fault) -> Shown {
        let only_set = !place::exists(self.original.as_item(), &fault.path);
        let comes_from = |set: &&Override| set.gives(&fault.path) || (only_set && set.lies_in(&fault.path));
        let set = self.sets.iter().rev().find(comes_from);
        match set {
            Some(set) => {
                let span = Some(0..set.text.len());
                Shown { fault, origin: "--set".into(), text: set.text.clone(), span }
            }
            None => {
                let span = place::span_of(self.original.as_item(), &fault.path, fault.names_key);
                Shown { fault, origin: self.name.into(), text: self.text.into(), span }
            }
        }
    }
}

#[cfg(test)]
mod tests;
