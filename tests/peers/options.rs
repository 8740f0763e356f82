//! The command-line options.

use bytesize::ByteSize;

use crate::Fallible;

/// The usage text.
pub(crate) const HELP: &str = "\
memferry beside QEMU.

  --still            still guests only
  --running          running guests only
  --size SIZE        memory of a still guest, as in \"512 MiB\" [1 GiB]
  --runs N           most runs of each, of which the median is taken [5]
  --only SUBSTRING   only what has this in its name, such as unix, text, multifd or \"tcp, untouched: memferry\";
                     given more than once, all of them must be in it";

/// The parsed options.
#[derive(Debug)]
pub(crate) struct Options {
    /// Bytes of a still guest.
    pub(crate) size: u64,
    /// The maximum number of runs of each contestant.
    pub(crate) runs: usize,
    /// Are still guests moved?
    pub(crate) still: bool,
    /// Are running guests moved?
    pub(crate) running: bool,
    /// Is this only a test that the bench works?
    pub(crate) is_test: bool,
    only: Vec<String>,
}

impl Options {
    /// Parses the arguments; `None` requests help.
    pub(crate) fn parse(arguments: Vec<String>) -> Fallible<Option<Self>> {
        // `cargo test --benches` runs this too, without --bench: then with less memory and one run, to check that it
        // works.
        let is_test = !arguments.iter().any(|argument| argument == "--bench");
        let (size, runs) = if is_test { (64 << 20, 1) } else { (1 << 30, 5) };
        let mut options = Self { size, runs, still: false, running: false, is_test, only: Vec::new() };
        let mut arguments = arguments.into_iter();
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or_else(|| format!("{argument} needs a value"));
            match argument.as_str() {
                "--bench" => {}
                "--still" => options.still = true,
                "--running" => options.running = true,
                "--size" => options.size = size_of(&value()?)?,
                "--runs" => {
                    options.runs = value()?.parse().ok().filter(|&runs| runs > 0).ok_or("--runs needs 1 or more")?
                }
                "--only" => options.only.push(value()?.to_lowercase()),
                "--help" | "-h" => return Ok(None),
                _ => return Err(format!("there is no option {argument}; see --help").into()),
            }
        }
        if !options.still && !options.running {
            (options.still, options.running) = (true, true);
        }
        Ok(Some(options))
    }

    /// Is this name selected?
    pub(crate) fn wants(&self, name: &str) -> bool {
        let name = name.to_lowercase();
        self.only.iter().all(|only| name.contains(only))
    }
}

fn size_of(text: &str) -> Fallible<u64> {
    let size: ByteSize = text.parse().map_err(|error| format!("--size {text}: {error}"))?;
    // Whole extents for memferry, whole megabytes for QEMU.
    let fits = size.0 >= 16 << 20 && size.0.is_multiple_of(1 << 20);
    if fits { Ok(size.0) } else { Err(format!("--size {text}: whole megabytes, 16 or more").into()) }
}
