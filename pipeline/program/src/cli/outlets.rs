//! Where a migration's events go besides the screen: a file of lines (`--events`), Prometheus (`--metrics`). They are opened
//! before anything begins, so that what cannot be opened costs nothing.

use std::path::Path;
use std::sync::Arc;

use super::args::Migrate;
use crate::event_file::EventFile;
use crate::metrics::prometheus;
use memferry::events::Observer;

/// What is open. The figures are served for as long as the program lives.
#[derive(Debug, Default)]
pub(super) struct Outlets {
    events: Option<Arc<EventFile>>,
}

impl Outlets {
    /// Serves figures if the options say so, on the runtime of the caller; before there are any. Says where, which a quiet
    /// program does only where nobody could know it: at a port that the system chose.
    ///
    /// # Errors
    /// Why they cannot be served.
    pub(super) async fn open(options: &Migrate) -> Result<Self, String> {
        if let Some(address) = &options.metrics {
            let url = prometheus::serve(address).await?;
            if !options.quiet || address.ends_with(":0") {
                tell!("memferry: figures for Prometheus at {url}");
            }
        }
        Ok(Self::default())
    }

    /// Opens the file of events, if the options name one. Last of all that may be refused, since it empties the file.
    ///
    /// # Errors
    /// Why it cannot be opened.
    pub(super) fn open_events(&mut self, options: &Migrate) -> Result<(), String> {
        let create = |file: &Path| {
            EventFile::create(file)
                .map(Arc::new)
                .map_err(|error| format!("--events {} cannot be written: {error}", file.display()))
        };
        self.events = options.events.as_deref().map(create).transpose()?;
        Ok(())
    }

    pub(super) fn observers(&self) -> Option<Arc<dyn Observer>> {
        self.events.clone().map(|events| events as Arc<dyn Observer>)
    }

    /// Are lines of events all that standard output is to hold?
    pub(super) fn have_stdout(&self) -> bool {
        self.events.as_ref().is_some_and(|events| events.is_stdout())
    }

    /// Nothing happens any more: the last line is written. What is missing, if anything is.
    pub(super) fn close(&self) -> Option<String> {
        self.events.as_ref()?.close()
    }
}
