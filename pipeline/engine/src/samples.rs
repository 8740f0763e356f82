//! A scripted migration as a list of events, for the tests of observers.

use std::time::Duration;

use memferry_stages::batch::RoundKind;
use memferry_stages::exclusions::ExcludedPages;
use memferry_stages::meter::Reading;
use memferry_stages::missing::MissingCounts;
use memferry_stages::page_hashes::Coverage;
use memferry_stages::stage_id::StageId;
use memferry_stages::tally::{PageTally, RoundTally};

use crate::bottleneck::{Bottleneck, Cause};
use crate::control::{Change, Changed};
use crate::controller::forecast::{FixedCost, Forecast};
use crate::controller::reason::{Met, Reason, Stalled};
use crate::controller::{Decided, Decision};
use crate::events::{
    BlockFacts, DowntimeParts, Ended, Event, Outages, Outcome, Phase, Postcopy, Progress, Role, TurnedAwayKind,
};
use crate::settings::PostcopyAfter;

fn reading(stage: StageId, busy: u64, input: u64, output: u64) -> Reading {
    let [busy, input_wait, output_wait] = [busy, input, output].map(Duration::from_millis);
    Reading {
        stage,
        busy,
        input_wait,
        output_wait,
        limit_wait: Duration::ZERO,
        batches: 4096,
        pages: 262_144,
        bytes: 0,
    }
}

/// How the scripted migration ended.
#[must_use]
pub fn ended(role: Role) -> Ended {
    let ms = Duration::from_millis;
    Ended {
        outcome: Outcome::Completed,
        error: None,
        verified: Some(true),
        checked: Some(Coverage { checked: 196_608, of: 262_144 }),
        total: ms(2500),
        setup: ms(100),
        downtime: Some(ms(213)),
        parts: DowntimeParts {
            pause: ms(2),
            state: ms(5),
            final_sync: ms(3),
            final_transfer: ms(88),
            load: ms(2),
            verify: ms(100),
            durable: ms(1),
            prepare: ms(3),
            start: ms(4),
            handover: ms(5),
            resume: Duration::ZERO,
        },
        forecast: Some(Forecast {
            remaining_bytes: 90_000.0,
            transfer: ms(91),
            fixed: FixedCost {
                pause: ms(1),
                state: ms(1),
                sync: ms(2),
                load: ms(1),
                verify: ms(110),
                durable: ms(1),
                prepare: ms(1),
                start: ms(2),
                handover: ms(2),
            },
        }),
        wire_bytes: 512 << 20,
        excluded: match role {
            Role::Source => ExcludedPages { hinted: 5000, dropped: 3, unplugged: 2048, ignored: 0 },
            Role::Destination => ExcludedPages::default(),
        },
        memory_peak: 10 << 20,
        stages: match role {
            Role::Source => vec![reading(StageId::SCANNER, 100, 0, 2200), reading(StageId::encoder(0), 2200, 50, 50)],
            Role::Destination => vec![reading(StageId::loader(0), 700, 1600, 0)],
        },
        bottleneck: Bottleneck::made_up(match role {
            Role::Source => {
                &[(Cause::Processor, 0.96), (Cause::Limit, 0.0), (Cause::Destination, 0.125), (Cause::Wire, 0.25)]
            }
            Role::Destination => &[(Cause::Processor, 0.3), (Cause::Source, 0.7)],
        }),
        cpu: ms(4600),
        resume_failed: false,
        outages: Outages { lost: 1, time: ms(2300), put_back_bytes: 3 << 20, paused: ms(12) },
        postcopy: None,
    }
}

/// What happened at a destination that was started before all of its pages were there.
#[must_use]
pub fn postcopy() -> Postcopy {
    let mut counts = MissingCounts::default();
    (counts.faults, counts.requests, counts.zeros) = (6001, 5678, 12);
    (counts.placed, counts.discarded, counts.retries) = (24_583, 8, 1);
    Postcopy {
        missing_pages: 24_691,
        time: Duration::from_millis(4210),
        urgent_pages: counts.requests,
        discarded_ahead: Duration::from_micros(3200),
        discarded_paused: Duration::from_micros(410),
        faults: Some(counts),
    }
}

/// The events of one end of the scripted migration.
#[must_use]
pub fn script(role: Role) -> Vec<Event> {
    let first = RoundTally {
        round: 1,
        batches: 4096,
        pages: PageTally {
            all: 262_144,
            zero: 100_000,
            raw: 12_144,
            compressed: 150_000,
            bytes_in: 1 << 30,
            bytes_out: 512 << 20,
            ..PageTally::default()
        },
        ..RoundTally::default()
    };
    let last = RoundTally {
        round: 2,
        kind: RoundKind::Final,
        batches: 20,
        pages: PageTally {
            all: 1000,
            raw: 10,
            xbzrle: 890,
            unchanged: 100,
            xbzrle_misses: 7,
            xbzrle_overflows: 3,
            bytes_in: 4_096_000,
            bytes_out: 68_000,
            ..PageTally::default()
        },
    };
    let blocks = vec![BlockFacts { id: "ram".into(), bytes: 1 << 30, page_size: 4096 }];
    let sync = |dirty_pages| Event::Synced { after_round: 1, dirty_pages, duration: Duration::from_millis(2) };
    vec![
        Event::Phase(Phase::Setup),
        Event::Connected { peer: "127.0.0.1:41234".into() },
        Event::Guest { blocks, pages: 262_144, memory_bound: 64 << 20 },
        Event::Phase(Phase::Active),
        Event::RoundScanned { round: 1 },
        Event::RoundSent { tally: first, duration: Duration::from_millis(2100) },
        sync(900),
        Event::Decided(Decided {
            round: 1,
            decision: Decision::SwitchOver,
            reason: Reason::Met(Met::WithinLimit),
            limit: Duration::from_millis(300),
            forecast: ended(role).forecast,
        }),
        Event::Phase(Phase::Switchover),
        Event::Paused,
        sync(100),
        Event::RoundSent { tally: last, duration: Duration::from_millis(90) },
        Event::Phase(Phase::Completed),
        Event::Ended(Box::new(ended(role))),
    ]
}

/// One event of every kind, and of every decision.
#[must_use]
pub fn every_event() -> Vec<Event> {
    let ms = Duration::from_millis;
    let stall = Reason::Stall(Stalled::NoNewLeast { rounds: 2 });
    let decided = |(decision, reason)| {
        let forecast = ended(Role::Source).forecast;
        Event::Decided(Decided { round: 3, decision, reason, limit: ms(300), forecast })
    };
    let progress = Progress {
        round: 2,
        remaining_bytes: Some(123 << 20),
        total_bytes: 1 << 30,
        wire_bytes: 345 << 20,
        wire_rate: 103_000_000.4,
        page_rate: 206_000_000.0,
        dirty_rate: Some(35_700_000.0),
        expected_downtime: Some(ms(1240)),
        downtime_limit: ms(300),
        throttle: 20,
        stages: ended(Role::Source).stages,
        bottleneck: ended(Role::Source).bottleneck,
        cpu: ms(1200),
    };
    let mut events = script(Role::Source);
    events.retain(|event| !matches!(event, Event::Decided(_) | Event::Phase(_) | Event::Ended(_)));
    let phases = [
        Phase::Setup,
        Phase::Active,
        Phase::Switchover,
        Phase::Postcopy,
        Phase::Failed,
        Phase::Unconfirmed,
        Phase::Lost,
    ];
    events.extend(phases.map(Event::Phase));
    let decisions = [
        (Decision::AnotherRound, Reason::AboveLimit),
        (Decision::Throttle(20), stall),
        (Decision::RaiseLimit(ms(400)), stall),
        (Decision::SwitchOver, Reason::Operator),
        (Decision::Postcopy, Reason::PostcopyDue(PostcopyAfter::Rounds(3))),
        (Decision::GiveUp, stall),
    ];
    events.extend(decisions.map(decided));
    events.push(Event::Excluded(ended(Role::Source).excluded));
    events.push(Event::Progress(progress));
    events.push(Event::Progress(Progress { round: 1, stages: Vec::new(), ..Progress::default() }));
    events.push(Event::TurnedAway {
        kind: TurnedAwayKind::Protocol,
        peer: "10.0.0.9:1".into(),
        why: "no Hello\n".into(),
        count: 1,
    });
    events.push(Event::Warning("the guest cannot be throttled".into()));
    events.push(Event::Resumed);
    events.push(Event::Ended(Box::new(ended(Role::Source))));
    events.push(Event::Ended(Box::new(Ended {
        outcome: Outcome::Cancelled,
        error: Some("cancelled".into()),
        verified: None,
        checked: None,
        downtime: None,
        forecast: None,
        ..ended(Role::Source)
    })));
    events.push(Event::Ended(Box::new(Ended {
        outcome: Outcome::Lost,
        error: Some("cancelled by the operator".into()),
        postcopy: Some(postcopy()),
        ..ended(Role::Destination)
    })));
    events.push(Event::Changed(Changed {
        round: 2,
        from: Change::DowntimeLimit(ms(300)),
        to: Change::DowntimeLimit(ms(50)),
        memory_bound: 64 << 20,
    }));
    events.push(Event::HandedOver);
    events.push(Event::Disconnected { attempt: 1, why: "the connection was lost: the destination closed it".into() });
    events.push(Event::NotReached { tries: 2, why: "connection refused".into(), again_in: ms(1000) });
    events.push(Event::Reconnected { attempt: 2, outage: ms(2300), put_back_bytes: 3 << 20 });
    events.push(Event::Phase(Phase::Disconnected));
    events
}
