//! Heartbeats: an end shows its peer that it is alive, also while it has nothing else to send.
//!
//! The task is not a stage of the data plane. It runs beside the controller, so that no computation and no blocking call delays
//! it: no sync, no digest and no call into the guest.

use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval_at};

use crate::queue::Outlet;
use crate::sender::Control;
use crate::wire::Message;
use crate::wire::messages::Figure;

/// Time between two heartbeats. The protocol's text promises it to the peer.
pub const EVERY: Duration = Duration::from_millis(500);

/// Sends a heartbeat to `control` each [`EVERY`], with what `figures` returns at that moment, until the queue is closed.
///
/// While the queue is full, the frames that wait in it show the same: the heartbeat is skipped.
pub async fn send_heartbeats(control: Outlet<Control>, figures: impl Fn() -> Vec<Figure>) {
    let mut ticks = interval_at(Instant::now() + EVERY, EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let frame = Message::Heartbeat(figures()).encode(0);
        if control.offer(Control::Frame(frame)).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::{Inlet, bounded};

    fn figures() -> Vec<Figure> {
        vec![Figure { name: "a".into(), value: 7 }]
    }

    async fn is_next(frames: &Inlet<Control>) {
        assert_eq!(frames.next().await, Some(Control::Frame(Message::Heartbeat(figures()).encode(0))));
    }

    #[tokio::test(start_paused = true)]
    async fn one_is_sent_each_half_second_with_the_figures_of_that_moment() {
        let (control, frames) = bounded(1);
        let (_task, began) = (tokio::spawn(send_heartbeats(control, figures)), Instant::now());
        for beat in 1..=4 {
            is_next(&frames).await;
            assert_eq!(began.elapsed().as_millis(), 500 * beat);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn none_waits_for_room_and_the_task_ends_with_the_queue() {
        let (control, frames) = bounded(1);
        let task = tokio::spawn(send_heartbeats(control, figures));
        tokio::time::sleep(EVERY * 10).await;
        is_next(&frames).await;
        assert_eq!(frames.try_next(), None);
        drop(frames);
        task.await.expect("it ends well");
    }
}
