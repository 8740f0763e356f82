use memferry_stages::stage_id::StageId;

use super::*;

const MS: Duration = Duration::from_millis(1);

/// The reading of a stage that was busy, and waited for input, room and the limit, for the given milliseconds each.
fn reading(stage: StageId, [busy, input, output, limit]: [u32; 4]) -> Reading {
    Reading {
        stage,
        busy: busy * MS,
        input_wait: input * MS,
        output_wait: output * MS,
        limit_wait: limit * MS,
        batches: 1,
        pages: 64,
        bytes: 0,
    }
}

fn shares(stages: &[Reading], cpu: u32, destination: DestinationTime, cores: usize) -> Bottleneck {
    Times::of(stages, cpu * MS, Some(destination)).shares(NonZeroUsize::new(cores).unwrap())
}

fn percent(bottleneck: &Bottleneck) -> [Option<u32>; 6] {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "shares")]
    Cause::ALL.map(|cause| bottleneck.share(cause).map(|share| (share * 100.0).round() as u32))
}

const NO_ANSWER: DestinationTime = DestinationTime { worked: Duration::ZERO, silent: Duration::ZERO };

#[test]
fn a_limit_is_named_where_the_senders_wait_for_it() {
    let stages = [reading(StageId::SCANNER, [10, 50, 940, 0]), reading(StageId::sender(0), [20, 60, 30, 890])];
    let limited = shares(&stages, 40, NO_ANSWER, 2);
    assert_eq!(percent(&limited), [Some(2), Some(89), Some(0), Some(3), Some(5), None]);
    assert_eq!(limited.to_string(), "max_bandwidth 89 %, guest 5 %, wire 3 %, processor 2 %, destination 0 %");
}

#[test]
fn waits_for_the_transport_are_the_wires_as_far_as_the_destination_does_not_work() {
    let stages = [reading(StageId::SCANNER, [10, 0, 990, 0]), reading(StageId::sender(0), [50, 0, 950, 0])];
    let slow_wire = DestinationTime { worked: 100 * MS, silent: Duration::ZERO };
    assert_eq!(percent(&shares(&stages, 60, slow_wire, 2)), [Some(3), Some(0), Some(10), Some(85), Some(0), None]);
    let slow_destination = DestinationTime { worked: 940 * MS, silent: Duration::ZERO };
    assert_eq!(
        percent(&shares(&stages, 60, slow_destination, 2)),
        [Some(3), Some(0), Some(94), Some(1), Some(0), None]
    );
    let stopped = DestinationTime { worked: 100 * MS, silent: 800 * MS };
    assert_eq!(percent(&shares(&stages, 60, stopped, 2)), [Some(3), Some(0), Some(90), Some(5), Some(0), None]);
}

#[test]
fn a_destination_that_works_and_holds_nobody_up_has_no_share() {
    let stages = [reading(StageId::SCANNER, [900, 0, 100, 0]), reading(StageId::sender(0), [400, 600, 0, 0])];
    let busy = DestinationTime { worked: 800 * MS, silent: Duration::ZERO };
    assert_eq!(shares(&stages, 0, busy, 2).share(Cause::Destination), Some(0.0));
}

#[test]
fn more_busy_stages_than_cores_are_a_full_processor() {
    let busy = (0..4).map(|lane| reading(StageId::encoder(lane), [900, 50, 50, 0]));
    let stages: Vec<_> = busy.chain([reading(StageId::sender(0), [100, 500, 400, 0])]).collect();
    assert_eq!(shares(&stages, 1900, NO_ANSWER, 2).share(Cause::Processor), Some(1.0));
    assert_eq!(percent(&shares(&stages, 0, NO_ANSWER, 8))[0], Some(46));
    // Other stages in the process count too.
    assert_eq!(percent(&shares(&stages, 7200, NO_ANSWER, 8))[0], Some(90));
}

#[test]
fn both_ends_in_one_process_share_its_processors() {
    let source = shares(&[reading(StageId::sender(0), [900, 50, 50, 0])], 500, NO_ANSWER, 2);
    let destination = shares(&[reading(StageId::receiver(0), [700, 300, 0, 0])], 500, NO_ANSWER, 2);
    assert_eq!(percent(&source.beside(&destination))[0], Some(80));
    assert_eq!(percent(&source.beside(&source).beside(&source))[0], Some(100));
}

#[test]
fn nothing_to_send_is_the_guests_and_slow_stages_are_not() {
    let sender = reading(StageId::sender(0), [100, 900, 0, 0]);
    let idle = [reading(StageId::SCANNER, [50, 950, 0, 0]), sender.clone()];
    assert_eq!(percent(&shares(&idle, 0, NO_ANSWER, 2))[4], Some(90));
    let held_by_the_encoder = [reading(StageId::SCANNER, [50, 0, 950, 0]), sender];
    assert_eq!(percent(&shares(&held_by_the_encoder, 0, NO_ANSWER, 2))[4], Some(0));
}

#[test]
fn a_destination_knows_its_own_share_and_what_is_before_it() {
    let stages = [reading(StageId::receiver(0), [100, 800, 100, 0]), reading(StageId::loader(0), [300, 700, 0, 0])];
    let known = shares(&stages, 0, NO_ANSWER, 2);
    assert_eq!(percent(&known), [Some(20), None, Some(20), None, None, Some(80)]);
    assert_eq!(known.to_string(), "source and wire 80 %, processor 20 %, destination 20 %");
}

#[test]
fn without_stages_nothing_is_known() {
    assert_eq!(shares(&[], 10, NO_ANSWER, 2), Bottleneck::default());
    assert_eq!(Bottleneck::default().to_string(), "");
}

#[test]
fn the_latest_shares_forget_what_was_before() {
    let mut watch = Watch::begin(true);
    let at = |limit: u32, output: u32| [reading(StageId::sender(0), [0, 0, output, limit])];
    assert_eq!(watch.latest(&at(1000, 0)).share(Cause::Limit), Some(1.0));
    for look in 1..=50 {
        watch.latest(&at(1000, look));
    }
    assert_eq!(watch.latest(&at(1000, 51)).share(Cause::Limit), Some(0.0));
    assert_eq!(percent(&watch.all(&at(1000, 1000)))[1], Some(50));
}

#[test]
fn a_silence_counts_once_it_is_long() {
    let [short, long] = [SILENCE - MS, SILENCE].map(counted_silence);
    assert_eq!((short, long), (Duration::ZERO, SILENCE));
    let mut watch = Watch::begin(true);
    watch.heard = Instant::now().checked_sub(4 * SILENCE).unwrap();
    let blocked = [reading(StageId::sender(0), [0, 0, 1000, 0])];
    assert!(watch.all(&blocked).share(Cause::Destination).unwrap() >= 0.99);
    watch.hear(&[]);
    assert!(watch.destination.unwrap().silent >= 4 * SILENCE);
    // A stream that is stored has no destination yet.
    let stored = Watch::begin(false);
    assert_eq!(percent(&stored.all(&blocked))[1..], [Some(0), None, Some(100), Some(0), None]);
}

#[test]
fn what_the_destination_reports_is_what_the_source_counts() {
    let receivers =
        [reading(StageId::receiver(0), [300, 600, 100, 0]), reading(StageId::receiver(1), [0, 800, 200, 0])];
    let mut watch = Watch::begin(true);
    let unknown = Figure { name: "something".into(), value: u64::MAX };
    watch.hear(&[unknown, figure_of(&receivers)]);
    assert_eq!(watch.destination.unwrap().worked, 300 * MS);
    // A peer may send any value.
    watch.hear(&[Figure { name: WORKED.into(), value: u64::MAX }]);
    let blocked = [reading(StageId::sender(0), [0, 0, 1000, 0])];
    assert_eq!(percent(&watch.all(&blocked))[1..], [Some(0), Some(100), Some(0), Some(0), None]);
    watch.hear(&[figure_of(&receivers)]);
}
