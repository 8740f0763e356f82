//! The running stages of one end of a migration, and why they ended.

use std::collections::HashMap;
use std::future::Future;
use std::time::Duration;

use memferry_stages::error::StageError;
use tokio::runtime::Handle;
use tokio::task::{Id, JoinError, JoinSet};

use super::error::panic_words;

/// How long stages are waited for when they shall end. Only one that hangs in a read or a write needs longer, and it cannot be
/// helped.
const STAGES_END: Duration = Duration::from_secs(5);

/// Stages on the data plane. Dropping it ends them all at their next wait.
#[derive(Debug)]
pub(super) struct StageSet {
    plane: Handle,
    tasks: JoinSet<Result<(), StageError>>,
    names: HashMap<Id, String>,
}

/// A stage that ended.
#[derive(Debug)]
pub(super) struct StageEnd {
    /// "sender 0", as it was spawned.
    pub(super) name: String,
    /// How.
    pub(super) result: Result<(), Failure>,
}

/// Why a stage ended before its time.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// It returned an error.
    #[error("{0}")]
    Stage(#[from] StageError),
    /// It panicked: a mistake of ours, kept from taking the guest down with it.
    #[error("the {name} stopped at a mistake in memferry: {panic}")]
    Panicked {
        /// Which stage.
        name: String,
        /// What it said.
        panic: String,
    },
}

impl Failure {
    /// Is it only the echo of a neighbour's end?
    fn is_echo(&self) -> bool {
        matches!(self, Self::Stage(error) if error.is_closed())
    }
}

impl StageSet {
    pub(super) fn new(plane: &Handle) -> Self {
        Self { plane: plane.clone(), tasks: JoinSet::new(), names: HashMap::new() }
    }

    /// Starts a stage.
    pub(super) fn spawn(
        &mut self,
        name: impl Into<String>,
        stage: impl Future<Output = Result<(), StageError>> + Send + 'static,
    ) {
        let task = self.tasks.spawn_on(stage, &self.plane);
        self.names.insert(task.id(), name.into());
    }

    /// The next stage that ends, well or not. Waits for ever when none is left.
    pub(super) async fn next_end(&mut self) -> StageEnd {
        match self.tasks.join_next_with_id().await {
            None => std::future::pending().await,
            Some(Ok((id, result))) => StageEnd { name: self.name(id), result: result.map_err(Failure::from) },
            Some(Err(error)) => {
                let name = self.name(error.id());
                StageEnd { result: Err(panicked(&name, error)), name }
            }
        }
    }

    /// The failure that came first in truth: when a stage fails its neighbours end too, and may be seen before it.
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

    /// Ends every stage: when this returns, none of them touches memory or logs any more.
    pub(super) async fn end(&mut self) {
        drop(tokio::time::timeout(STAGES_END, self.tasks.shutdown()).await);
    }

    fn name(&mut self, id: Id) -> String {
        self.names.remove(&id).expect("every task has a name")
    }
}

fn panicked(name: &str, error: JoinError) -> Failure {
    let panic = match error.try_into_panic() {
        Ok(panic) => panic_words(&*panic),
        Err(error) => error.to_string(),
    };
    Failure::Panicked { name: name.to_owned(), panic }
}
