//! Where a migration's events go besides the screen: a file of lines (`--events`), Prometheus (`--metrics`). They are
//! opened before the migration begins, so that an error there costs nothing.

use std::path::Path;
use std::sync::Arc;

use super::args::Migrate;
use crate::event_file::EventFile;
use crate::metrics::prometheus;
use memferry::events::Observer;
use memferry_stages::untrusted::Untrusted;

/// The open outlets. Metrics are served for as long as the program lives.
#[derive(Debug, Default)]
pub(super) struct Outlets {
    events: Option<Arc<EventFile>>,
}

impl Outlets {
    /// Serves metrics if the options request it, on the caller's runtime, before there are any figures. Prints the
    /// address; a quiet program prints it only if the system chose the port, because it cannot be known otherwise.
    ///
    /// # Errors
    /// Why the metrics cannot be served.
    pub(super) async fn open(options: &Migrate) -> Result<Self, String> {
        if let Some(address) = &options.metrics {
            let url = prometheus::serve(address).await?;
            if !options.quiet || address.ends_with(":0") {
                message!("memferry: figures for Prometheus at {url}");
            }
        }
        Ok(Self::default())
    }

    /// Opens the file of events, if the options name one. This is the last check that may fail, since it empties the
    /// file.
    ///
    /// # Errors
    /// Why the file cannot be opened.
    pub(super) fn open_events(&mut self, options: &Migrate) -> Result<(), String> {
        let create = |file: &Path| {
            EventFile::create(file)
                .map(Arc::new)
                .map_err(|error| format!("--events {} cannot be written: {error}", Untrusted::from(file)))
        };
        self.events = options.events.as_deref().map(create).transpose()?;
        Ok(())
    }

    pub(super) fn observers(&self) -> Option<Arc<dyn Observer>> {
        self.events.clone().map(|events| events as Arc<dyn Observer>)
    }

    /// Is standard output reserved for lines of events?
    pub(super) fn have_stdout(&self) -> bool {
        self.events.as_ref().is_some_and(|events| events.is_stdout())
    }

    /// Writes the last line after the final event. Reports missing events, if there are any.
    pub(super) fn close(&self) -> Option<String> {
        self.events.as_ref()?.close()
    }
}
