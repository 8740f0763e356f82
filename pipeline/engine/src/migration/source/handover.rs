//! The handover: the last handshake with a destination, or the end of a file.

use memferry_stages::geometry::{Layout, PageAt};
use memferry_stages::sender::Control;
use memferry_stages::stage_id::StageKind;
use memferry_stages::wire::Message;

use super::Source;
use super::spent::Part;
use crate::events::Event;
use crate::migration::error::{Loss, MigrationError};
use crate::migration::flow::{Flow, Signal};
use crate::migration::handshake::{Happening, SourceHandshake, SourceStep, Verdict};
use crate::migration::{blocking, digests};
use crate::settings::After;

impl Source {
    /// The last handshake: see [`handshake`](crate::migration::handshake).
    pub(super) async fn hand_over(&mut self, flow: &mut Flow) -> Result<Verdict, MigrationError> {
        let mut handshake = SourceHandshake::AwaitingLoaded { verify: self.settings.verify };
        // The destination's work since the last byte was sent: load it, and compare digests if they are required.
        self.spent.on(if self.settings.verify { Part::Verify } else { Part::Transfer });
        let mut give_up = tokio::time::Instant::now() + self.settings.handover_timeout;
        loop {
            let happening = match tokio::time::timeout_at(give_up, flow.next()).await {
                Err(_) => Happening::TimedOut,
                Ok(signal) => match self.happening(flow, signal).await {
                    Some(happening) => happening,
                    None => continue,
                },
            };
            match handshake.step(happening) {
                SourceStep::Wait => {}
                SourceStep::NamePage(message) => self.name_page(&message).await,
                SourceStep::HandOver => {
                    self.spent.on(Part::Handover);
                    self.verified = self.settings.verify.then_some(true);
                    self.commit().await?;
                    give_up = tokio::time::Instant::now() + self.settings.handover_timeout;
                    self.go_said = true;
                    self.observers.tell(&Event::HandedOver);
                    // A closed queue needs no handling here: the sender's failure follows, and counts as after Go.
                    flow.say(&Message::Go(self.was)).await.ok();
                }
                SourceStep::TooLate => {
                    let what = "cancel comes too late: the destination may run the guest already";
                    self.observers.tell(&Event::Warning(what.into()));
                }
                SourceStep::End(verdict) => return Ok(verdict),
            }
        }
    }

    /// From here on nothing here resumes the guest on its own. Until this has succeeded no part of Go leaves.
    async fn commit(&self) -> Result<(), MigrationError> {
        let (guest, destination) = (self.guest.clone(), self.transport.address());
        Ok(blocking(move || guest.committed(&destination)).await?)
    }

    /// The meaning of a signal for the last handshake; `None` if it has none.
    async fn happening(&mut self, flow: &mut Flow, signal: Signal) -> Option<Happening> {
        match signal {
            Signal::Said(Message::Progress(acknowledged)) => match self.acknowledge(flow, &acknowledged) {
                Ok(()) => None,
                Err(error) => Some(Happening::Broke(error.to_string())),
            },
            Signal::Said(Message::Heartbeat(figures)) => {
                self.hear(&figures);
                None
            }
            Signal::Said(message) => Some(Happening::Said(message)),
            Signal::Lost(loss) => Some(Happening::Lost(loss)),
            Signal::Silent(silence) => Some(Happening::Lost(Loss::Silent(silence))),
            Signal::Broke(failure) => Some(match flow.last_words(failure).await {
                Ok(words) => Happening::Said(words),
                Err(cause) => Happening::Broke(cause.to_string()),
            }),
            Signal::Cancel => Some(Happening::Cancel),
            Signal::Asked(request) => {
                self.refuse(request);
                None
            }
            Signal::Tick => {
                self.report_progress(flow, &self.standing_now(flow));
                None
            }
            Signal::Scanned(_) | Signal::Synced(_) | Signal::Sent(_) | Signal::StageDone(_) => None,
        }
    }

    /// The destination sent its hashes of a stretch that differs: finds the first page that differs.
    async fn name_page(&mut self, message: &Message) {
        let Message::PageHashes { first, hashes } = message else { return };
        let (memory, first, hashes) = (self.memory.clone(), *first, hashes.clone());
        let left_out = self.left_out.clone();
        let found = blocking(move || digests::first_differing_page(&memory, &left_out, first, &hashes)).await;
        let layout = self.layout();
        self.differing_page = Some(match found {
            Ok(Some(at)) => describe_page(layout, at),
            Ok(None) => "no page differs any more: the memory of one side changes while it is paused".into(),
            Err(error) => format!("the differing page cannot be named: {error}"),
        });
    }

    /// A file has no return path: syncing its end mark to disk and renaming the file take the place of Go.
    pub(super) async fn complete_file(&mut self, flow: &mut Flow) -> Result<Verdict, MigrationError> {
        self.spent.on(Part::Handover);
        if self.settings.after == Some(After::Pause) {
            self.commit().await?;
        }
        if flow.graph.control[0].put(Control::Finish).await.is_err() {
            return Err(self.broken(flow).await);
        }
        loop {
            match flow.next().await {
                Signal::StageDone(stage) if stage.kind == StageKind::Sender => break,
                Signal::Broke(failure) => return Err(flow.explain(failure).await),
                Signal::Cancel => {
                    let what = "cancel comes too late: the file is being completed";
                    self.observers.tell(&Event::Warning(what.into()));
                }
                Signal::Tick => self.report_progress(flow, &self.standing_now(flow)),
                _ => {}
            }
        }
        Ok(Verdict::Completed)
    }
}

fn describe_page(layout: &Layout, at: PageAt) -> String {
    let block = &layout.blocks()[at.block as usize];
    let offset = at.page * layout.page_size().bytes() as u64;
    format!("the first page that differs is page {} of block {:?}, at byte {offset:#x}", at.page, block.id)
}
