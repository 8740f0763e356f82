//! Screens drawn from the events of a real migration (`tests/recorded.jsonl`: a guest whose dirty rate is above the
//! bandwidth, throttled until the migration converges; thinned out).

use ratatui::Terminal;
use ratatui::backend::TestBackend;

use super::model::{Model, greatest};
use super::view::{self, Theme};
use super::words::EventLines;
use memferry::events::{Phase, Role};
use memferry_report::event_json::{EventJson, EventLine};
use memferry_report::series::MOST_SAMPLES;

fn recorded() -> Vec<EventLine> {
    include_str!("tests/recorded.jsonl").lines().map(|line| EventLine::from_json(line).unwrap()).collect()
}

/// The state after this many milliseconds of the recorded migration.
fn after(ms: f64) -> Model {
    let mut model = Model::default();
    recorded().iter().filter(|line| line.ms <= ms).for_each(|line| model.take(line));
    model
}

fn drawn(model: &Model, width: u16, height: u16) -> Terminal<TestBackend> {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| view::draw(frame, model, Theme { colours: false })).unwrap();
    terminal
}

fn screen(model: &Model, width: u16, height: u16) -> String {
    let screen = drawn(model, width, height).backend().to_string();
    screen.lines().map(|line| line.trim_matches('"').trim_end().to_owned() + "\n").collect()
}

/// In the middle of it.
fn middle() -> f64 {
    recorded().last().unwrap().ms * 0.6
}

#[test]
fn the_screen_of_80_columns() {
    insta::assert_snapshot!(screen(&after(middle()), 80, 24));
}

#[test]
fn the_screen_of_120_columns() {
    insta::assert_snapshot!(screen(&after(middle()), 120, 40));
}

#[test]
fn the_screen_of_40_columns() {
    insta::assert_snapshot!(screen(&after(middle()), 40, 10));
}

#[test]
fn the_screen_at_the_end() {
    let model = after(f64::INFINITY);
    assert!(model.is_over());
    insta::assert_snapshot!(screen(&model, 80, 24));
}

#[test]
fn the_screen_before_anything() {
    insta::assert_snapshot!(screen(&Model::default(), 80, 24).trim_end(), @"source     WAITING  nothing heard yet                                      0.0 s");
}

#[test]
fn the_lines_where_there_is_no_screen() {
    let mut view = EventLines::default();
    let lines: Vec<_> = recorded().iter().filter_map(|line| view.line(line)).collect();
    insta::assert_snapshot!(lines.join("\n"));
}

/// The recorded migration, whose connection is lost in the middle, and not made again yet.
fn disconnected(events: &[EventJson]) -> (Model, String) {
    let (mut model, mut view, mut lines) = (after(middle()), EventLines::default(), Vec::new());
    for (event, ms) in events.iter().zip([0.0, 500.0, 4000.0, 5000.0]) {
        let line = EventLine { ms: middle() + ms, role: Some(Role::Source), event: event.clone() };
        model.take(&line);
        lines.extend(view.line(&line).map(|line| line[10..].to_owned()));
    }
    (model, lines.join("\n"))
}

#[test]
fn a_lost_connection_is_shown_until_it_is_made_again() {
    let lost = EventJson::Disconnected { attempt: 1, why: "the destination closed it".into() };
    let phase = EventJson::Phase { phase: Phase::Disconnected };
    let tried = EventJson::NotReached { tries: 3, why: "connection refused".into(), again_in_ms: 2000.0 };
    let again = EventJson::Reconnected { attempt: 2, outage_ms: 5000.0, put_back_bytes: 3 << 20 };
    let events = [lost, phase, tried, again];
    let first = |model: &Model| screen(model, 110, 3).lines().next().unwrap().trim_end().to_owned();
    let (model, _) = disconnected(&events[..3]);
    let line = first(&model);
    assert!(
        line.starts_with("source     DISCONNECTED  for 4.0 s, the guest runs at the source: connection refused"),
        "{line}"
    );
    let (model, lines) = disconnected(&events);
    assert!(!first(&model).contains("refused"), "{}", first(&model));
    insta::assert_snapshot!(lines, @r"
    source: connection 1 is lost: the destination closed it
    source: disconnected
    source: not connected again: connection refused; next try in 2.00 s
    source: connected again after 5.00 s (attempt 2), 3.00 MiB are sent again
    ");
}

#[test]
fn postcopy_says_where_the_guest_runs_and_what_remains() {
    let at_source = |event| EventLine { ms: middle() + 10.0, role: Some(Role::Source), event };
    let mut model = after(middle());
    model.take(&at_source(EventJson::HandedOver));
    model.take(&at_source(EventJson::Phase { phase: Phase::Postcopy }));
    let top = |model: &Model| screen(model, 100, 7);
    insta::assert_snapshot!(top(&model), @r"
    source     POSTCOPY  the guest runs at the destination and needs both ends                    46.2 s
    done       ██████████████░░░░░░░░░░░░░░░░░░░░░░░  39 %  58.5 MiB of 96.0 MiB left, does not converge
    wire       2.58 MiB/s     ▁▁▄▄▄▄▄▅▆▆▆█▂▄▆▇▇▆▂▁▁▁ ▂▁▁
    dirtied    3.85 MiB/s               ▃▃▃▃▃▃████████▂▂
    left       58.5 MiB      █▇▇▆▅▅▄▃▂▁ ▅▄▃▂▁ ▅▄▃▃▂▂▁ ▅▄
    downtime   over: what is left follows while the guest runs   throttled 50 %   memory ≤ 7.77 MiB
    held up    max_bandwidth 87 %, processor 9 %, guest 7 %, destination 0 %, wire 0 %
    ");
    let lost = EventJson::Disconnected { attempt: 1, why: "it closed".into() };
    [lost, EventJson::Phase { phase: Phase::Disconnected }].into_iter().for_each(|event| model.take(&at_source(event)));
    let first = top(&model).lines().next().unwrap().to_owned();
    assert!(first.contains("the guest runs at the destination and needs both ends: "), "{first}");
    let again = EventJson::Reconnected { attempt: 2, outage_ms: 5000.0, put_back_bytes: 0 };
    [again, EventJson::Phase { phase: Phase::Postcopy }].into_iter().for_each(|event| model.take(&at_source(event)));
    assert!(top(&model).contains("over: what is left follows"), "{}", top(&model));
}

#[test]
fn no_size_is_too_small() {
    let (begin, middle, end) = (Model::default(), after(middle()), after(f64::INFINITY));
    for width in (0..=100).chain([200, 500]) {
        for height in (0..=30).chain([60, 200]) {
            for model in [&begin, &middle, &end] {
                drawn(model, width, height);
            }
        }
    }
}

#[test]
fn the_state_comes_first_however_small() {
    for height in 1..=24 {
        let screen = screen(&after(middle()), 40, height);
        assert!(screen.starts_with("source     ACTIVE  round"), "{screen}");
    }
}

#[test]
fn colours_are_used_only_where_they_are_wanted() {
    for colours in [true, false] {
        let mut terminal = Terminal::new(TestBackend::new(80, 24)).unwrap();
        terminal.draw(|frame| view::draw(frame, &after(middle()), Theme { colours })).unwrap();
        let cells = terminal.backend().buffer().content();
        let coloured = cells.iter().any(|cell| cell.fg != ratatui::style::Color::Reset);
        assert_eq!(coloured, colours);
    }
}

#[test]
fn figures_that_are_nonsense_are_shown_and_harm_nothing() {
    let mut model = after(middle());
    for line in recorded() {
        let EventJson::Progress(mut now) = line.event else { continue };
        now.remaining_bytes = Some(u64::MAX);
        now.total_bytes = 0;
        now.wire_bytes_per_s = u64::MAX;
        now.expected_downtime_ms = Some(-1e300);
        now.downtime_limit_ms = Some(1e300);
        now.throttle_percent = 255;
        now.stages.iter_mut().for_each(|stage| {
            stage.busy_ms = -1e308;
            stage.input_wait_ms = 1e308;
            stage.output_wait_ms = 1e308;
            stage.name = "a\u{1b}[2Jb\n".repeat(50).into();
        });
        model.take(&EventLine { ms: -5.0, event: EventJson::Progress(now), ..line });
    }
    for width in [1, 10, 40, 80, 300] {
        screen(&model, width, 24);
    }
}

#[test]
fn what_comes_from_outside_does_not_move_the_cursor() {
    let mut model = after(middle());
    let mut last = recorded().pop().unwrap();
    let hostile = "\u{1b}[2J\u{7}gone\r\n";
    last.event = EventJson::Warning { what: hostile.into() };
    model.take(&last);
    assert!(!screen(&model, 80, 24).contains('\u{1b}'));
    let line = EventLines::default().line(&last).unwrap();
    assert!(line.contains("gone") && !line.chars().any(char::is_control), "{line:?}");
}

#[test]
fn histories_are_bounded() {
    let mut model = Model::default();
    let progress: Vec<_> = recorded().into_iter().filter(|line| matches!(line.event, EventJson::Progress(_))).collect();
    for line in progress.iter().cycle().take(5000) {
        model.take(line);
    }
    let all = greatest(model.shown().1.history.samples(), 10_000, |sample| sample.remaining);
    assert!((MOST_SAMPLES / 2..=MOST_SAMPLES).contains(&all.len()), "{} samples", all.len());
    assert_eq!(greatest(model.shown().1.history.samples(), 50, |sample| sample.remaining).len(), 50);
}

#[test]
fn a_migration_after_another_begins_anew() {
    let mut model = after(f64::INFINITY);
    let mut again = recorded().into_iter().find(|line| line.role.is_some()).unwrap();
    again.event = EventJson::Phase { phase: Phase::Setup };
    model.take(&again);
    assert!(!model.is_over());
    let (_, end) = model.shown();
    assert!(end.ended.is_none() && end.rounds.is_empty() && end.now.is_none());
}
