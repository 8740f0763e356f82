//! Faults in a configuration, shown at their place in the text.
//!
//! A [`Fault`] names a key by its dotted path. The key's place, in the file or in a `--set`, is looked up when the
//! fault is shown, so the tables do not have to store their origin.

use std::fmt;
use std::ops::Range;

use annotate_snippets::{AnnotationKind, Level, Origin, Renderer, Snippet};
use memferry_stages::untrusted::shown_lines;

/// One fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The key with the fault: `pipeline.connections`, `guest.workload.writers.0.bytes`.
    pub path: String,
    /// What is wrong.
    pub what: String,
    /// What to write instead.
    pub help: Option<String>,
    /// Is the key's name wrong, rather than its value?
    pub names_key: bool,
}

impl Fault {
    /// `what` is wrong at `path`.
    pub(super) fn bare(path: impl Into<String>, what: impl Into<String>) -> Self {
        Self { path: path.into(), what: what.into(), help: None, names_key: false }
    }

    /// `what` is wrong at `path`; `help` says what would be right.
    pub fn new(path: impl Into<String>, what: impl Into<String>, help: impl Into<String>) -> Self {
        Self { help: Some(help.into()), ..Self::bare(path, what) }
    }
}

/// A fault with the text that contains it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Shown {
    pub(super) fault: Fault,
    /// A file's name, or "--set".
    pub(super) origin: String,
    pub(super) text: String,
    /// The byte range in `text`; `None` if there is no such place.
    pub(super) span: Option<Range<usize>>,
}

impl Shown {
    fn render(&self, renderer: &Renderer) -> String {
        let [what, origin] = [&self.fault.what, &self.origin].map(|text| shown_lines(text));
        let help = self.fault.help.as_deref().map(shown_lines);
        let title = Level::ERROR.primary_title(&*what);
        let mut group = match &self.span {
            Some(span) => title.element(
                Snippet::source(self.text.as_str())
                    .path(&*origin)
                    .annotation(AnnotationKind::Primary.span(span.clone())),
            ),
            None => title.element(Origin::path(&*origin)),
        };
        if let Some(help) = &help {
            group = group.element(Level::HELP.message(&**help));
        }
        renderer.render(&[group])
    }
}

/// All faults of a configuration. It displays the lines in question with the remedies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError(pub(super) Vec<Shown>);

impl ConfigError {
    /// A fault without a line: a file that cannot be read.
    pub(super) fn without_place(origin: &str, what: String, help: Option<String>) -> Self {
        let fault = Fault { help, ..Fault::bare("", what) };
        Self(vec![Shown { fault, origin: origin.to_owned(), text: String::new(), span: None }])
    }

    /// The text for an operator, coloured or plain.
    #[must_use]
    pub fn render(&self, coloured: bool) -> String {
        let renderer = if coloured { Renderer::styled() } else { Renderer::plain() };
        self.0.iter().map(|shown| shown.render(&renderer)).collect::<Vec<_>>().join("\n\n")
    }

    /// The faults without their places.
    pub fn faults(&self) -> impl Iterator<Item = &Fault> {
        self.0.iter().map(|shown| &shown.fault)
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.render(false))
    }
}

impl std::error::Error for ConfigError {}
