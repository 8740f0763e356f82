//! The driver of one end: waits for the next input, steps the course, performs its actions.
//!
//! ```text
//!            input, now                 actions
//!  world ───────────────▶ course ───────────────────▶ world
//!  (stages, peer, guest,  (pure: decides)             (orders, messages, calls into the guest)
//!   operator, clock)
//! ```
//!
//! An end of a real migration is a [`World`], and so is the model in virtual time that the courses are tested in: both
//! are driven by this loop.

use std::time::Duration;

use super::error::{MigrationError, guarded};

/// The course of one end as a value: inputs and the time in, actions out. No I/O, no clock, no tasks.
pub(super) trait Course {
    /// What happened.
    type Input;
    /// What is to be done.
    type Action;

    /// The first actions.
    fn begin(&mut self) -> Vec<Self::Action>;

    /// The input for a failure of this end.
    fn failed(error: MigrationError) -> Self::Input;

    /// Handles one input. `now` is the time since the migration began.
    ///
    /// An action that [`World::perform`] answers is the last of its list: the rest depends on the answer.
    fn step(&mut self, input: Self::Input, now: Duration) -> Vec<Self::Action>;

    /// The input for the moment that [`Course::wakes_at`] named.
    fn wake(&mut self, now: Duration) -> Vec<Self::Action>;

    /// When the course waits no longer, if it waits for a limited time.
    fn wakes_at(&self) -> Option<Duration>;

    /// Is nothing left to be done?
    fn is_over(&self) -> bool;
}

/// What a course acts on.
pub(super) trait World<C: Course> {
    /// The time since the migration began.
    fn now(&self) -> Duration;

    /// Waits for the next input. Safe to race in a `select!`.
    fn next(&mut self, course: &C) -> impl Future<Output = C::Input> + Send;

    /// Performs an action. A question, such as a call into the guest, has its answer as a result, and so has an action
    /// that fails. No other input is taken meanwhile.
    fn perform(&mut self, action: C::Action, course: &C) -> impl Future<Output = Option<C::Input>> + Send;
}

/// Drives a course from its beginning to its end. A panic, in the course or in the world, is one more failure that the
/// course handles: it must not leave a paused guest that nothing resumes.
///
/// # Errors
/// If it panics again, and the course does not end.
pub(super) async fn drive<C: Course>(course: &mut C, world: &mut impl World<C>) -> Result<(), MigrationError> {
    let begun = course.begin();
    let Err(mistake) = guarded(drive_on(begun, course, world)).await else { return Ok(()) };
    if course.is_over() {
        return Err(mistake);
    }
    let now = world.now();
    let ending = guarded(async { Ok(course.step(C::failed(mistake), now)) }).await?;
    guarded(drive_on(ending, course, world)).await
}

async fn drive_on<C: Course>(
    mut actions: Vec<C::Action>,
    course: &mut C,
    world: &mut impl World<C>,
) -> Result<(), MigrationError> {
    loop {
        perform_all(actions, course, world).await;
        if course.is_over() {
            return Ok(());
        }
        actions = next_actions(course, world).await;
    }
}

async fn next_actions<C: Course>(course: &mut C, world: &mut impl World<C>) -> Vec<C::Action> {
    let Some(at) = course.wakes_at() else {
        let input = world.next(course).await;
        return course.step(input, world.now());
    };
    let patience = at.saturating_sub(world.now());
    match tokio::time::timeout(patience, world.next(course)).await {
        Ok(input) => course.step(input, world.now()),
        Err(_) => course.wake(world.now()),
    }
}

/// Performs the actions, and those that answers lead to. An answer replaces what is left of its list: a question is the
/// last of a list, and after a failure nothing of the list may follow. The last list of a course is performed to its end:
/// once the course is over no answer changes anything.
async fn perform_all<C: Course>(actions: Vec<C::Action>, course: &mut C, world: &mut impl World<C>) {
    let mut actions = actions.into_iter();
    while let Some(action) = actions.next() {
        let answer = world.perform(action, course).await;
        if let Some(answer) = answer.filter(|_| !course.is_over()) {
            actions = course.step(answer, world.now()).into_iter();
        }
    }
}
