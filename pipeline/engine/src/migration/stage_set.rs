//! The running stages of one end of a migration, and why they ended.

use std::collections::HashMap;
use std::future::Future;
use std::time::Duration;

use memferry_stages::error::StageError;
use memferry_stages::stage_id::{StageId, StageKind};
use tokio::runtime::Handle;
use tokio::task::{AbortHandle, Id, JoinError, JoinSet};

use super::error::{Failure, panic_words};

/// How long stages may take to end when they are asked to. Only a stage that hangs in a read or a write needs longer,
/// and that cannot be interrupted.
const STAGES_END: Duration = Duration::from_secs(5);

/// Stages on the data plane. Dropping it ends them all at their next wait.
#[derive(Debug)]
pub(super) struct StageSet {
    plane: Handle,
    tasks: JoinSet<Result<(), StageError>>,
    /// Those that have not ended.
    running: HashMap<Id, (StageId, AbortHandle)>,
}

/// A stage that ended.
#[derive(Debug)]
pub(super) struct StageEnd {
    /// The stage.
    pub(super) stage: StageId,
    /// Its result.
    pub(super) result: Result<(), Failure>,
}

impl StageSet {
    pub(super) fn new(plane: &Handle) -> Self {
        Self { plane: plane.clone(), tasks: JoinSet::new(), running: HashMap::new() }
    }

    /// Starts a stage.
    pub(super) fn spawn(&mut self, id: StageId, stage: impl Future<Output = Result<(), StageError>> + Send + 'static) {
        let plane = self.plane.clone();
        self.spawn_on(id, stage, &plane);
    }

    /// Starts a stage on a runtime of its own.
    pub(super) fn spawn_on(
        &mut self,
        id: StageId,
        stage: impl Future<Output = Result<(), StageError>> + Send + 'static,
        runtime: &Handle,
    ) {
        let task = self.tasks.spawn_on(stage, runtime);
        self.running.insert(task.id(), (id, task));
    }

    /// The next stage that ends, with or without an error. Never returns when none is left.
    pub(super) async fn next_end(&mut self) -> StageEnd {
        match self.tasks.join_next_with_id().await {
            None => std::future::pending().await,
            Some(Ok((id, result))) => StageEnd { stage: self.ended(id), result: result.map_err(Failure::from) },
            Some(Err(error)) => {
                let stage = self.ended(error.id());
                StageEnd { stage, result: Err(panicked(stage, error)) }
            }
        }
    }

    /// The failure that came first in time. When a stage fails its neighbours end too, and may be reported before it.
    pub(super) async fn root_cause(&mut self, seen: Failure) -> Failure {
        let mut cause = seen;
        let patience = tokio::time::sleep(Duration::from_millis(300));
        tokio::pin!(patience);
        while cause.is_echo() {
            tokio::select! {
                () = &mut patience => break,
                end = self.next_end() => if let Err(failure) = end.result { cause = failure },
            }
        }
        cause
    }

    /// Ends the stages of a kind at their next wait.
    pub(super) fn abort(&mut self, kind: StageKind) {
        self.running.values().filter(|(id, _)| id.kind == kind).for_each(|(_, task)| task.abort());
    }

    /// Waits until no stage of a kind runs, at most [`STAGES_END`].
    pub(super) async fn all_ended(&mut self, kind: StageKind) {
        let ended = async {
            while self.running.values().any(|(id, _)| id.kind == kind) {
                drop(self.next_end().await);
            }
        };
        drop(tokio::time::timeout(STAGES_END, ended).await);
    }

    /// Ends every stage: once this returns, no stage accesses memory or logs.
    pub(super) async fn end(&mut self) {
        drop(tokio::time::timeout(STAGES_END, self.tasks.shutdown()).await);
    }

    fn ended(&mut self, id: Id) -> StageId {
        self.running.remove(&id).expect("every task is a stage").0
    }
}

fn panicked(stage: StageId, error: JoinError) -> Failure {
    let panic = match error.try_into_panic() {
        Ok(panic) => panic_words(&*panic),
        Err(error) => error.to_string(),
    };
    Failure::Panicked { stage, panic }
}
