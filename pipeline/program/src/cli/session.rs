//! The three commands that migrate: `run`, `send`, `recv`.
//!
//! Each follows the same steps: create the guest, migrate it, report the outcome, write the report files, host what
//! lives here.

use std::fmt::Display;
use std::future::Future;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use memferry_transports::{Address, Listener, Transport};
use memferry_transports_tls::ClientCertificates;
use tokio_util::sync::CancellationToken;

use super::args::Migrate;
use super::console;
use super::hosting::{self, Arriving, Builder, Built, Home, Hosted};
use super::outlets::Outlets;
use super::reports::{Ending, Reports};
use super::signals::Signals;
use super::verdict::{FAILED, cancelled_before_it_began, exit_code, joint, never_begun};
use crate::api::{Reach, Server};
use crate::config::Config;
use crate::log::LogObserver;
use crate::metrics::MetricsObserver;
use memferry::control::Control;
use memferry::events::{Ended, Event, Observer, Observers, Outcome, Role};
use memferry::guest::GuestError;
use memferry::migration::{self, DataPlane};
use memferry_report::account::{Account, Accountant};
use memferry_report::todo::{Conclusion, conclusions};
use memferry_report::{Ends, held_up, table};

/// How long one end may take to detect that the other has ended, before it is cancelled.
const FIND_OUT: Duration = Duration::from_secs(2);
/// How long `run` hosts the guest at its destination, unless an option says otherwise.
const SHOW_ALIVE: Duration = Duration::from_secs(1);

const CANCELLING: &str = "cancelling; once more to end at once";
const ENDING: &str = "ending";

/// A command in progress.
pub(super) struct Session {
    config: Config,
    options: Migrate,
    role: Ends,
    accountant: Arc<Accountant>,
    observers: Vec<Arc<dyn Observer>>,
    signals: Signals,
    control: Control,
    plane: DataPlane,
    outlets: Outlets,
    /// Makes the source's transports.
    reach: Reach,
}

impl Session {
    /// Prepares a command: `role` is the ends that it hosts, `watch` the end whose progress is shown.
    pub(super) fn new(
        config: Config,
        options: Migrate,
        role: Ends,
        watch: Role,
        outlets: Outlets,
    ) -> std::io::Result<Self> {
        let (signals, cancel) = Signals::listen(CANCELLING)?;
        let accountant = Arc::new(Accountant::default());
        let mut observers: Vec<Arc<dyn Observer>> = vec![
            Arc::new(signals.clone()),
            accountant.clone(),
            Arc::new(LogObserver),
            Arc::new(MetricsObserver::new()),
        ];
        if !options.quiet {
            observers.push(console::progress(watch));
        }
        let (control, plane) = (cancel.into(), DataPlane::new()?);
        let reach = reach(&config);
        Ok(Self { config, options, role, accountant, observers, signals, control, plane, outlets, reach })
    }

    /// Opens the file of events if the options name one.
    pub(super) fn open_events(&mut self) -> Result<(), String> {
        self.outlets.open_events(&self.options)?;
        self.observers.extend(self.outlets.observers());
        Ok(())
    }

    /// Serves the control API if the options request it.
    pub(super) async fn serve_control(&self) -> std::io::Result<Option<Server>> {
        match &self.options.control {
            Some(address) => Server::listen(address, self.control.clone(), self.reach.clone()).await.map(Some),
            None => Ok(None),
        }
    }

    /// `memferry run`
    pub(super) async fn run(self) -> u8 {
        let guests = match self.unless_cancelled(self.both_guests()).await {
            Ok(guests) => guests,
            Err(ended) => return self.could_not_begin(Role::Source, ended),
        };
        let (source, destination) = guests;
        let mut arrived = None;
        let cancel = self.control.token();
        let stored = self.config.transport_to(&self.config.address()).capabilities().stored;
        let (sent, received) = if stored {
            self.one_after_the_other(&source, destination, &mut arrived, &cancel).await
        } else {
            self.side_by_side(&source, destination, &mut arrived, &cancel).await
        };
        let verdict = match &received {
            Some(received) => joint(&sent, received, cancel.is_cancelled()),
            None => sent,
        };
        // A user who ends a run that has moved its guest is done with the guest as well. This does not hold
        // for `recv`, where the guest is the only copy of one that others use.
        let stop = match verdict.outcome {
            Outcome::Completed => self.signals.arm_after_success(ENDING),
            _ => self.signals.arm(ENDING),
        };
        let account = self.accountant.account(Role::Source);
        let far = self.accountant.account(Role::Destination);
        self.conclude(&verdict, &account, received.is_some().then_some(&far));
        let home = arrived.as_ref().map_or(&source.home, |arrived| &arrived.home);
        let host_for = Some(self.options.host_for.unwrap_or(SHOW_ALIVE));
        self.host(home, host_for, stop, exit_code(&verdict)).await
    }

    /// `memferry send`
    pub(super) async fn send(self) -> u8 {
        let guest = match self.unless_cancelled(Hosted::source(&self.config, &self.control.token())).await {
            Ok(guest) => guest,
            Err(ended) => return self.could_not_begin(Role::Source, ended),
        };
        let ended = self.send_over(&guest, &self.config.address(), self.control.clone()).await;
        let stop = self.signals.arm(ENDING);
        self.conclude(&ended, &self.accountant.account(Role::Source), None);
        let stays = ended.outcome != Outcome::Completed || guest.home.runs_here();
        self.host_if(stays, &guest.home, stop, exit_code(&ended)).await
    }

    /// `memferry recv`
    pub(super) async fn receive(self) -> u8 {
        let (builder, listener) = match self.unless_cancelled(self.destination_ready()).await {
            Ok(ready) => ready,
            Err(ended) => return self.could_not_begin(Role::Destination, ended),
        };
        self.warning_of_strangers(&listener.local_address()).iter().for_each(|warning| self.note(warning));
        self.note(&format!("waiting at {}", listener.local_address()));
        let mut arrived = None;
        let ended = self.receive_from(builder, listener, self.control.clone(), &mut arrived).await;
        let stop = self.signals.arm(ENDING);
        self.conclude(&ended, &self.accountant.account(Role::Destination), None);
        match arrived {
            Some(arrived) => self.host_if(true, &arrived.home, stop, exit_code(&ended)).await,
            None => exit_code(&ended),
        }
    }

    /// Runs a step before the migration until it is cancelled; the rest of the step is not waited for.
    async fn unless_cancelled<T, E: Display>(&self, begin: impl Future<Output = Result<T, E>>) -> Result<T, Ended> {
        let cancel = self.control.token();
        tokio::select! {
            biased;
            () = cancel.cancelled() => Err(cancelled_before_it_began()),
            begun = begin => begun.map_err(|error| never_begun(error.to_string())),
        }
    }

    async fn both_guests(&self) -> Result<(Hosted, Builder), GuestError> {
        let cancel = self.control.token();
        Ok((Hosted::source(&self.config, &cancel).await?, hosting::destination(&self.config, true).await?))
    }

    /// Who may send a guest to this address, if that is anybody.
    fn warning_of_strangers(&self, address: &str) -> Option<String> {
        let settings = self.config.tls();
        let is_open = settings.is_none_or(|tls| tls.client_certificates == ClientCertificates::None);
        let (Address::Tcp { host, .. } | Address::TlsTcp { host, .. }) = address.parse().ok()? else { return None };
        let is_local = host == "localhost" || host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
        (is_open && !is_local).then(|| {
            format!("anybody who reaches {address} may send it a guest: tls: with certificates at both ends authenticates the source (docs/security.md)")
        })
    }

    async fn destination_ready(&self) -> Result<(Builder, Box<dyn Listener>), String> {
        let builder = hosting::destination(&self.config, false).await.map_err(|error| error.to_string())?;
        let transport = self.config.transport_to(&self.config.address());
        Ok((builder, transport.listen().await.map_err(|error| error.to_string())?))
    }

    /// Over a transport that stores the stream: it is read back when it is complete.
    async fn one_after_the_other(
        &self,
        source: &Hosted,
        destination: Builder,
        arrived: &mut Option<Arc<Arriving>>,
        cancel: &CancellationToken,
    ) -> (Ended, Option<Ended>) {
        let sent = self.send_over(source, &self.config.address(), self.control.clone()).await;
        if sent.outcome != Outcome::Completed {
            return (sent, None);
        }
        let transport = self.config.transport_to(&self.config.address());
        let received = match transport.listen().await {
            Ok(listener) => self.receive_from(destination, listener, cancel.clone(), arrived).await,
            Err(error) => self.end(Role::Destination, never_begun(error.to_string())),
        };
        (sent, Some(received))
    }

    /// Over a connection: both ends at the same time, to the address that the listener is bound to.
    async fn side_by_side(
        &self,
        source: &Hosted,
        destination: Builder,
        arrived: &mut Option<Arc<Arriving>>,
        cancel: &CancellationToken,
    ) -> (Ended, Option<Ended>) {
        let listener = match self.config.transport_to(&self.config.address()).listen().await {
            Ok(listener) => listener,
            Err(error) => return (self.end(Role::Source, never_begun(error.to_string())), None),
        };
        let address: Address = listener.local_address().parse().expect("a listener knows its address");
        let (source_cancel, destination_cancel) = (cancel.child_token(), cancel.child_token());
        let send = self.send_over(source, &address, self.control.also_ended_by(source_cancel.clone()));
        let receive = self.receive_from(destination, listener, destination_cancel.clone(), arrived);
        let (sent, received) = both(send, source_cancel.clone(), receive, destination_cancel).await;
        // A source that was not cancelled gave up at its limits: the destination only reports that.
        let gave_up = sent.outcome == Outcome::Cancelled && !source_cancel.is_cancelled();
        (sent, (!gave_up).then_some(received))
    }

    async fn send_over(&self, guest: &Hosted, address: &Address, control: Control) -> Ended {
        let (settings, observers) = (self.config.source(), self.observers(Role::Source));
        let transport = (self.reach)(address);
        let sent = migration::send(guest.guest.clone(), transport, settings, &self.plane, observers, control).await;
        let ended = match sent {
            Ok(sent) => sent.ended,
            Err(error) => error.ended().cloned().unwrap_or_else(|| never_begun(error.to_string())),
        };
        self.end(Role::Source, ended)
    }

    /// Stores the guest in `arrived`, if it arrives.
    async fn receive_from(
        &self,
        builder: Builder,
        listener: Box<dyn Listener>,
        control: impl Into<Control>,
        arrived: &mut Option<Arc<Arriving>>,
    ) -> Ended {
        let (settings, observers) = (self.config.destination(), self.observers(Role::Destination));
        let built = Built::default();
        let builder = hosting::keeping(builder, built.clone());
        let received = migration::receive(builder, listener, settings, &self.plane, observers, control).await;
        let ended = match received {
            Ok(received) => {
                *arrived = Some(received.guest);
                received.ended
            }
            Err(error) => error.ended().cloned().unwrap_or_else(|| never_begun(error.to_string())),
        };
        if ended.outcome == Outcome::Lost {
            // Its threads may wait for pages that do not come: dropping it would wait for them.
            std::mem::forget(built);
        }
        self.end(Role::Destination, ended)
    }

    fn observers(&self, role: Role) -> Observers {
        Observers::new(role, self.observers.clone())
    }

    /// Ensures that every observer receives the end of the migration.
    fn end(&self, role: Role, ended: Ended) -> Ended {
        if self.accountant.account(role).status.ended.is_none() {
            self.observers(role).notify(&Event::Ended(Box::new(ended.clone())));
        }
        ended
    }

    fn could_not_begin(&self, role: Role, ended: Ended) -> u8 {
        let ended = self.end(role, ended);
        self.conclude(&ended, &self.accountant.account(role), None);
        exit_code(&ended)
    }

    /// Reports the outcome and writes the report files. Lost reports are named last and do not change the exit code:
    /// a guest that has moved must not look to a script as if it had not.
    fn conclude(&self, verdict: &Ended, account: &Account, far: Option<&Account>) {
        let conclusions = self.conclusions(account, far);
        let ending = Ending { role: self.role, verdict, account, far, conclusions: &conclusions };
        let reports = Reports::begin(&self.options.report, &self.config, &ending);
        self.print(&table::verdict(verdict, account));
        let summary = table::summary(self.role, account, far);
        if !self.options.quiet && !summary.is_empty() {
            self.print(&format!("\n{}", summary.trim_end()));
            conclusions.iter().for_each(|conclusion| self.print(&format!("{:<11} {conclusion}", "to do")));
        }
        let mut lost = reports.finish();
        lost.extend(self.outlets.close());
        if !lost.is_empty() {
            message!("memferry: LOST: {}; the verdict stands: {}", lost.join("; "), verdict.outcome);
        }
    }

    /// Suggestions from a source's figures.
    fn conclusions(&self, account: &Account, far: Option<&Account>) -> Vec<Conclusion> {
        let Some(ended) = account.status.ended.as_ref().filter(|_| !account.decided.is_empty()) else {
            return Vec::new();
        };
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let far = far.and_then(|far| far.status.ended.as_ref());
        conclusions(&self.config.source(), account, &held_up(ended, far), cores)
    }

    /// Hosts a guest that lives in this program, for the time in the options, or else until a signal.
    async fn host_if(&self, stays: bool, home: &Home, stop: CancellationToken, code: u8) -> u8 {
        if !stays || !home.lives_here() {
            return code;
        }
        if self.options.host_for.is_none() && !stop.is_cancelled() {
            self.note("the guest is hosted here: Ctrl-C ends it");
        }
        self.host(home, self.options.host_for, stop, code).await
    }

    /// Until the time is over or `stop` is cancelled, possibly by a signal since the end of the migration. A page
    /// that differs from what the guest wrote turns any exit code into a failure.
    async fn host(&self, home: &Home, time: Option<Duration>, stop: CancellationToken, code: u8) -> u8 {
        let Some(health) = home.live(time, stop).await else { return code };
        if !self.options.quiet || !health.is_sound {
            self.print(&health.line);
        }
        if health.is_sound { code } else { FAILED }
    }

    /// Writes to standard output, or to standard error if events are written there or the write fails.
    fn print(&self, text: &str) {
        if self.outlets.have_stdout() || !console::print(text) {
            message!("{text}");
        }
    }

    fn note(&self, line: &str) {
        if !self.options.quiet {
            message!("memferry: {line}");
        }
    }
}

/// Makes the transports of a source: those of the configuration, with the faults that it asks for.
fn reach(config: &Config) -> Reach {
    let (config, cuts) = (config.clone(), config.cuts());
    Arc::new(move |address| {
        let transport: Arc<dyn Transport> = Arc::from(config.transport_to(address));
        match &cuts {
            Some(cuts) => cuts.on(transport),
            None => transport,
        }
    })
}

/// Runs both ends at once. When one ends without success, the other detects it soon; if it does not, it is cancelled.
async fn both(
    send: impl Future<Output = Ended>,
    cancel_send: CancellationToken,
    receive: impl Future<Output = Ended>,
    cancel_receive: CancellationToken,
) -> (Ended, Ended) {
    let (mut send, mut receive) = (std::pin::pin!(send), std::pin::pin!(receive));
    tokio::select! {
        sent = &mut send => {
            let received = finish(&sent, receive, cancel_receive).await;
            (sent, received)
        }
        received = &mut receive => (finish(&received, send, cancel_send).await, received),
    }
}

async fn finish(ended: &Ended, mut rest: impl Future<Output = Ended> + Unpin, cancel: CancellationToken) -> Ended {
    if ended.outcome == Outcome::Completed {
        return rest.await;
    }
    match tokio::time::timeout(FIND_OUT, &mut rest).await {
        Ok(rest) => rest,
        Err(_) => {
            cancel.cancel();
            rest.await
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed() -> Ended {
        never_begun("it broke".into())
    }

    #[tokio::test]
    async fn an_end_that_does_not_find_out_is_cancelled() {
        let (cancel_send, cancel_receive) = (CancellationToken::new(), CancellationToken::new());
        let waiting = cancel_receive.clone();
        let receive = async move {
            waiting.cancelled().await;
            Ended { outcome: Outcome::Cancelled, ..failed() }
        };
        let (sent, received) = both(async { failed() }, cancel_send.clone(), receive, cancel_receive).await;
        assert_eq!((sent.outcome, received.outcome), (Outcome::Failed, Outcome::Cancelled));
        assert!(!cancel_send.is_cancelled());
    }

    #[tokio::test]
    async fn an_end_that_finds_out_is_left_alone() {
        let (cancel_send, cancel_receive) = (CancellationToken::new(), CancellationToken::new());
        let (sent, received) = both(async { failed() }, cancel_send, async { failed() }, cancel_receive.clone()).await;
        assert_eq!((sent.outcome, received.outcome), (Outcome::Failed, Outcome::Failed));
        assert!(!cancel_receive.is_cancelled());
    }
}
