//! A source that returns after a lost connection proves on each connection that it is the one whose guest is received here.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use memferry_stages::wire::hello::Hello;
use memferry_stages::wire::reader::Incoming;
use memferry_stages::wire::{ConnectionRole, Meeting, Message, Nonce, Prover, Secret};
use memferry_transports::Identity;
use tokio::io::AsyncWriteExt;

use super::refusal::{Earlier, Refusal};
use crate::migration::connection::{Reader, Writer};

/// The source whose guest is received, once it has sent its secret. Shared with the tasks that greet connections.
#[derive(Debug, Default)]
pub(in crate::migration) struct Known(Mutex<Option<Member>>);

/// What a source must know, and be, to return.
#[derive(Clone, Debug)]
struct Member {
    hello: Hello,
    /// Whose certificate all of its connections show, where the transport has certificates.
    identity: Option<Identity>,
    secret: Secret,
    /// How long it tries to return.
    awaited: Duration,
    /// The latest attempt that was complete.
    latest: u32,
}

impl Known {
    /// The source of this Hello, which is this peer, returns with this secret.
    pub(in crate::migration) fn learn(
        &self,
        hello: &Hello,
        identity: Option<Identity>,
        secret: Secret,
        awaited: Duration,
    ) {
        *self.member() = Some(Member { hello: unnumbered(hello), identity, secret, awaited, latest: hello.attempt });
    }

    /// How long the source tries to return; zero if it does not.
    pub(in crate::migration) fn awaited(&self) -> Duration {
        self.member().as_ref().map_or(Duration::ZERO, |member| member.awaited)
    }

    /// A connection of this Hello and this peer may prove itself, with this secret.
    fn admit(&self, hello: &Hello, identity: Option<Identity>) -> Result<Secret, Refusal> {
        let member = self.member();
        let Some(Member { hello: first, identity: known, secret, latest, .. }) =
            member.as_ref().filter(|known| known.hello.session == hello.session)
        else {
            return Err(Refusal::NotLost);
        };
        if hello.attempt <= *latest {
            return Err(Refusal::OldAttempt { attempt: hello.attempt, latest: *latest });
        }
        if identity != *known {
            return Err(Refusal::OtherPeer(Earlier::LostSource));
        }
        if unnumbered(hello) != *first {
            return Err(Refusal::Contradicts);
        }
        Ok(secret.clone())
    }

    /// All connections of this attempt have come. False if a later one was faster.
    pub(super) fn begin(&self, attempt: u32) -> bool {
        match self.member().as_mut() {
            Some(member) if member.latest < attempt => {
                member.latest = attempt;
                true
            }
            _ => false,
        }
    }

    fn member(&self) -> MutexGuard<'_, Option<Member>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What all connections of all attempts have in common.
pub(super) fn unnumbered(hello: &Hello) -> Hello {
    Hello { attempt: 1, nonce: Nonce::default(), connection: 0, role: ConnectionRole::Bulk, ..hello.clone() }
}

/// Both ends prove that they have the secret. This end is first: what it proves is of no use to anybody else.
///
/// # Errors
/// Why the connection is refused.
pub(super) async fn prove(
    known: &Known,
    hello: &Hello,
    identity: Option<Identity>,
    reader: &mut Reader,
    writer: &mut Option<Writer>,
) -> Result<(), Refusal> {
    let secret = known.admit(hello, identity)?;
    let Some(writer) = writer else { return Err(Refusal::NotLost) };
    let nonce = Nonce::random().map_err(|_| Refusal::NotProven)?;
    let meeting = Meeting::of(hello, nonce);
    let challenge = Message::Challenge { nonce, proof: secret.prove(Prover::Destination, &meeting) };
    writer.write_all(&challenge.encode(0)).await.map_err(|_| Refusal::Ended)?;
    match reader.next().await {
        Ok(Some(Incoming::Message { message: Message::Proof(proof), .. }))
            if secret.is_proven(Prover::Source, &meeting, &proof) =>
        {
            Ok(())
        }
        Ok(Some(_)) => Err(Refusal::NotProven),
        Ok(None) => Err(Refusal::Ended),
        Err(error) => Err(Refusal::Unreadable(error.into())),
    }
}
