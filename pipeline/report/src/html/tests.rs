//! Pages of scripted migrations: complete, consistent with their figures, and safe for any text in them.

use memferry_stages::meter::Reading;
use proptest::prelude::*;
use roxmltree::{Document, Node};

use super::*;
use crate::postcopy::{PostcopyReport, sample};
use crate::series::Series;
use crate::todo;
use memferry::bottleneck::Bottleneck;
use memferry::control::{Change, Changed};
use memferry::controller::Decision;
use memferry::controller::reason::Reason;
use memferry::events::{BlockFacts, Ended, Event, Outages, Outcome, Progress, Role, TurnedAwayKind};
use memferry::samples::{ended, every_event, script};
use memferry::settings::After;
use memferry::stage_id::StageId;

/// The inputs of a page.
struct Scene {
    role: Ends,
    account: Account,
    settings: SourceSettings,
    configuration: String,
    /// What replaces that of the account.
    postcopy: Option<PostcopyReport>,
}

impl Scene {
    /// The scripted migration: one event every 100 ms, with progress figures.
    fn new(role: Ends) -> Self {
        let end = if role == Ends::Destination { Role::Destination } else { Role::Source };
        let mut scene = Self::empty(role);
        let mut at = 0;
        for event in script(end) {
            scene.account.enter(&event, Duration::from_millis(at));
            at += 100;
            if scene.account.status.ended.is_none() && !scene.account.status.blocks.is_empty() {
                scene.account.enter(&progress(at), Duration::from_millis(at));
            }
        }
        // The script loses no connection.
        scene.ending(|ended| ended.outages = Outages::default())
    }

    fn empty(role: Ends) -> Self {
        let configuration = "[guest.workload]\nmemory = \"1 GiB\"\n".to_owned();
        Self { role, account: Account::default(), settings: SourceSettings::default(), configuration, postcopy: None }
    }

    /// The same migration with a different end.
    fn ending(mut self, change: impl FnOnce(&mut Ended)) -> Self {
        change(self.account.status.ended.get_or_insert_with(|| ended(Role::Source)));
        self
    }

    /// The downtime limit comes from the settings.
    fn without_samples(mut self) -> Self {
        self.account.series = Series::default();
        self
    }

    fn on<T>(&self, look: impl FnOnce(&Page<'_>) -> T) -> T {
        let Self { role, account, settings, configuration, postcopy } = self;
        let verdict = account.status.ended.as_ref().unwrap();
        let report = &mut Report::new(*role, verdict, account, None);
        if postcopy.is_some() {
            report.end.postcopy.clone_from(postcopy);
        }
        let conclusions = &todo::conclusions(settings, account, &Bottleneck::default(), 2);
        look(&Page {
            report,
            account,
            other: None,
            settings,
            configuration,
            conclusions,
            written: SystemTime::UNIX_EPOCH,
        })
    }

    fn page(&self) -> String {
        self.on(|page| page.render())
    }

    fn story(&self) -> String {
        let verdict::Story { tone, headline, guest, todo } = self.on(verdict::story);
        format!("{tone:?}: {headline}\n  {guest}\n  {todo}").replace('\u{a0}', " ")
    }
}

fn progress(at: u64) -> Event {
    Event::Progress(Progress {
        round: 1,
        remaining_bytes: Some(1 << 29),
        total_bytes: 1 << 30,
        wire_bytes: at << 18,
        dirty_rate: Some(3e7),
        expected_downtime: Some(Duration::from_millis(400)),
        downtime_limit: Duration::from_millis(300),
        ..Progress::default()
    })
}

fn failed(ended: &mut Ended, outcome: Outcome, error: &str) {
    (ended.outcome, ended.error, ended.verified, ended.downtime) = (outcome, Some(error.into()), None, None);
}

/// The page as XML. Of HTML's deviations it uses only the document type and void elements.
fn parsed<T>(page: &str, look: impl FnOnce(&Document<'_>) -> T) -> T {
    let body = page.strip_prefix("<!DOCTYPE html>").expect("a document type");
    let mut xml = String::new();
    for part in body.split_inclusive('>') {
        match part.strip_suffix('>').filter(|part| part.contains("<meta ")) {
            Some(void) => xml.extend([void, "/>"]),
            None => xml.push_str(part),
        }
    }
    look(&Document::parse(&xml).unwrap_or_else(|error| panic!("{error}: {page}")))
}

fn elements<'a>(document: &'a Document<'a>, name: &str) -> Vec<Node<'a, 'a>> {
    document.descendants().filter(|node| node.has_tag_name(name)).collect()
}

fn words(node: Node<'_, '_>) -> String {
    node.descendants().filter(Node::is_text).filter_map(|text| text.text()).collect::<Vec<_>>().join(" ")
}

/// Properties that every page has.
fn is_sound(page: &str) {
    parsed(page, |document| {
        assert_eq!(elements(document, "h1").len(), 1);
        for forbidden in ["script", "link", "img", "iframe", "object", "base", "form"] {
            assert!(elements(document, forbidden).is_empty(), "{forbidden}");
        }
        for node in document.descendants().filter(Node::is_element) {
            for attribute in node.attributes() {
                let name = attribute.name();
                assert!(
                    !name.starts_with("on") && !["src", "href", "style", "action"].contains(&name),
                    "{attribute:?}"
                );
                assert!(!attribute.value().contains("NaN") && !attribute.value().contains("inf"), "{attribute:?}");
            }
        }
        let ids: Vec<_> = document.descendants().filter_map(|node| node.attribute("id")).collect();
        for (index, id) in ids.iter().enumerate() {
            assert!(!ids[..index].contains(id), "{id} is there twice");
        }
        for section in elements(document, "section") {
            assert!(ids.contains(&section.attribute("aria-labelledby").unwrap()));
        }
        for svg in elements(document, "svg").into_iter().filter(|svg| svg.attribute("role") == Some("img")) {
            let label = svg.attribute("aria-label").unwrap();
            assert_eq!(svg.first_element_child().map(words).as_deref(), Some(label));
        }
        for head in elements(document, "th") {
            assert!(head.has_attribute("scope"));
        }
    });
    let style = &page[page.find("<style>").unwrap()..page.find("</style>").unwrap()];
    assert!(!style.contains("@import") && style.matches("url(").count() == style.matches("url(#").count());
}

#[test]
fn pages_of_both_ends_and_of_every_ending_are_whole() {
    for role in [Ends::Both, Ends::Source, Ends::Destination] {
        is_sound(&Scene::new(role).page());
        for outcome in [Outcome::Failed, Outcome::Cancelled, Outcome::Unconfirmed, Outcome::Lost] {
            is_sound(&Scene::new(role).ending(|ended| failed(ended, outcome, "disk full")).page());
        }
        let never = Scene::empty(role).ending(|ended| *ended = Ended { stages: Vec::new(), ..ended.clone() });
        is_sound(&never.page());
    }
}

#[test]
fn every_figure_of_the_rounds_and_stages_is_there() {
    let scene = Scene::new(Ends::Source);
    let report = scene.on(|page| serde_json::to_value(page.report).unwrap());
    let figures = |list: &str, skip: &[&str]| {
        let rows = report[list].as_array().unwrap().iter().map(|row| row.as_object().unwrap().clone());
        rows.flat_map(|row| row.into_iter().filter(|(name, value)| value.is_number() && !skip.contains(&name.as_str())))
            .map(|(_, value)| value.as_u64().map_or_else(|| value.as_f64().unwrap().to_string(), |n| n.to_string()))
            .collect::<Vec<_>>()
    };
    let page = scene.page();
    parsed(&page, |document| {
        let there: Vec<_> = elements(document, "data").iter().filter_map(|data| data.attribute("value")).collect();
        let all = [figures("rounds", &["round"]), figures("stages", &["lane"])].concat();
        assert!(all.len() > 30, "{all:?}");
        for figure in all {
            assert!(there.contains(&figure.as_str()), "{figure} is not among {there:?}");
        }
        let heads: Vec<_> = elements(document, "h2").into_iter().map(words).collect();
        insta::assert_snapshot!(heads.join("\n"), @r"
        The course
        Pages by encoding in each round
        The downtime and its parts
        How the stages spent their time
        What was decided, and why
        Warnings
        The guest
        The configuration used
        ");
    });
}

#[test]
fn settings_that_were_changed_are_listed() {
    let mut scene = Scene::new(Ends::Source);
    let limit = |ms| Change::DowntimeLimit(Duration::from_millis(ms));
    let changed = Changed { round: 2, from: limit(300), to: limit(50), memory_bound: 0 };
    scene.account.enter(&Event::Changed(changed), Duration::from_secs(1));
    parsed(&scene.page(), |document| {
        let rows: Vec<_> = elements(document, "tr").into_iter().map(words).collect();
        assert!(rows.iter().any(|row| row == "a 700 ms 2 downtime_limit 300ms 50ms"), "{rows:?}");
    });
}

#[test]
fn max_bandwidth_is_drawn_as_it_was_at_each_time() {
    const MIB: u64 = 1 << 20;
    let mut scene = Scene::new(Ends::Source);
    scene.settings.max_bandwidth = Some(64 * MIB);
    let changes = [(600, Some(64), Some(32)), (900, Some(32), None), (1200, None, Some(16))];
    for (at, from, to) in changes {
        let [from, to] = [from, to].map(|mib: Option<u64>| Change::MaxBandwidth(mib.map(|mib| mib * MIB)));
        let changed = Event::Changed(Changed { round: 1, from, to, memory_bound: 0 });
        scene.account.enter(&changed, Duration::from_millis(at));
    }
    let page = scene.page();
    is_sound(&page);
    assert!(
        page.contains("max_bandwidth, first 64.0 MiB/s, last 16.0 MiB/s") && page.contains("max_bandwidth = unlimited")
    );
    parsed(&page, |document| {
        let paths = elements(document, "path").into_iter().filter(|path| path.attribute("class") == Some("cap"));
        let drawn: Vec<_> = paths.filter_map(|path| path.attribute("d")).filter(|d| *d != "M0 5H18").collect();
        let [drawn] = drawn[..] else { panic!("{drawn:?}") };
        // From the first page at 300 ms to the verdict at 1300 ms: down at 600, away at 900, and there again at 1200.
        let places: Vec<_> = drawn.split(['M', 'H', 'V']).filter_map(|part| part.split(' ').next()).collect();
        assert_eq!(
            (places[1], places[2], places[4], places[5], places[6]),
            ("0.0", "300.0", "600.0", "900.0", "1000.0"),
            "{drawn}"
        );
        let flags: Vec<_> = elements(document, "text")
            .into_iter()
            .filter(|text| text.attribute("class") == Some("flag"))
            .map(words)
            .collect();
        assert!(["a", "b", "c"].iter().all(|name| flags.iter().any(|flag| flag == name)), "{flags:?}");
        assert!(
            elements(document, "line").iter().filter(|line| line.attribute("class") == Some("flag-change")).count()
                >= 9
        );
    });
}

/// 300 rounds and 16 lanes: the tables have all figures, and the charts show no more than is distinguishable.
#[test]
fn a_long_page_of_many_lanes_stays_readable() {
    const ROUNDS: u32 = 300;
    let mut scene = Scene::empty(Ends::Source);
    let [setup, middle, ended] = [0..4, 4..7, 7..14].map(|part| script(Role::Source)[part].to_vec());
    let mut at = 0;
    let mut enter = |event: &Event| {
        at += 10;
        scene.account.enter(event, Duration::from_millis(at));
        scene.account.enter(&progress(at), Duration::from_millis(at));
    };
    setup.iter().for_each(&mut enter);
    for number in 1..=ROUNDS {
        for event in &middle {
            let mut event = event.clone();
            match &mut event {
                Event::RoundSent { tally, .. } => tally.round = number,
                Event::Synced { after_round, .. } => *after_round = number,
                _ => {}
            }
            enter(&event);
        }
        let forecast = memferry::samples::ended(Role::Source).forecast;
        enter(&Event::Decided(Decided {
            round: number,
            decision: Decision::AnotherRound,
            reason: Reason::AboveLimit,
            limit: Duration::from_millis(300),
            forecast,
        }));
    }
    ended.iter().for_each(enter);
    let stages = &mut scene.account.status.ended.as_mut().unwrap().stages;
    let lanes = [StageId::zero_detector, StageId::encoder, StageId::sender].into_iter().flat_map(|id| {
        let of = stages[0].clone();
        (0..16).map(move |lane| Reading { stage: id(lane), ..of.clone() })
    });
    *stages = lanes.collect();
    let page = scene.page();
    is_sound(&page);
    parsed(&page, |document| {
        let of = |name: &str, class: &str| {
            elements(document, name).into_iter().filter(|node| node.attribute("class") == Some(class)).count()
        };
        assert!(of("line", "round") <= 5 * 85, "{} lines", of("line", "round"));
        assert!(of("circle", "found") <= 86 && of("circle", "decided") <= 86);
        for picture in elements(document, "svg").into_iter().filter(|svg| svg.attribute("class") == Some("columns")) {
            let columns: std::collections::HashSet<_> = picture
                .children()
                .filter_map(|part| part.attribute("x").filter(|_| part.has_tag_name("rect")))
                .collect();
            assert!((40..=60).contains(&columns.len()), "{}", columns.len());
        }
        let folded: Vec<_> = elements(document, "summary").into_iter().map(words).collect();
        assert_eq!(folded.len(), 3, "rounds, stages, decisions: {folded:?}");
        let rows = elements(document, "details")
            .into_iter()
            .flat_map(|details| details.descendants().filter(|node| node.has_tag_name("tr")))
            .count();
        assert!(rows >= 600, "{rows}");
    });
    assert!(page.contains("A column is the mean of 6 rounds."));
}

#[test]
fn the_bottleneck_is_named_and_marked() {
    parsed(&Scene::new(Ends::Source).page(), |document| {
        let marked: Vec<_> =
            elements(document, "tr").into_iter().filter(|row| row.attribute("class") == Some("blamed")).collect();
        assert_eq!(marked.len(), 1);
        assert!(words(marked[0]).starts_with("encoder"), "{}", words(marked[0]));
    });
    assert!(Scene::new(Ends::Source).page().contains("processor 96 %, wire 25 %, destination 12 %, max_bandwidth 0 %"));
}

#[test]
fn stories_say_what_happened_where_the_guest_is_and_what_to_do() {
    let gave_up = |mut scene: Scene| {
        scene.account.decided.last_mut().unwrap().decision = Decision::GiveUp;
        scene
    };
    let with = |settings: SourceSettings| Scene { settings, ..Scene::new(Ends::Source) };
    let stories = [
        Scene::new(Ends::Both),
        Scene::new(Ends::Source),
        Scene::new(Ends::Destination),
        with(SourceSettings { after: Some(After::Resume), ..SourceSettings::default() }),
        with(SourceSettings { after: Some(After::Pause), ..SourceSettings::default() }),
        Scene::new(Ends::Source).ending(|ended| ended.downtime = Some(Duration::from_millis(301))),
        with(SourceSettings { after: Some(After::Pause), downtime_limit: Duration::ZERO, ..SourceSettings::default() })
            .without_samples(),
        Scene::new(Ends::Source).ending(|ended| failed(ended, Outcome::Failed, "disk full")),
        Scene::empty(Ends::Source).ending(|ended| failed(ended, Outcome::Failed, "nobody listens")),
        Scene::new(Ends::Source).ending(|ended| failed(ended, Outcome::Cancelled, "cancelled at the source")),
        gave_up(Scene::new(Ends::Source).ending(|ended| failed(ended, Outcome::Cancelled, "gave up"))),
        Scene::new(Ends::Source).ending(|ended| failed(ended, Outcome::Unconfirmed, "lost")),
        Scene::new(Ends::Source).ending(|ended| ended.resume_failed = true),
        Scene::new(Ends::Destination).ending(|ended| failed(ended, Outcome::Failed, "lost")),
        Scene::new(Ends::Destination).ending(|ended| failed(ended, Outcome::Cancelled, "cancelled")),
    ];
    let stories: Vec<_> = stories.iter().map(Scene::story).collect();
    insta::assert_snapshot!(stories.join("\n"), @r#"
    Good: The guest has moved: 1.00 GiB in 2.50 s, of which it was paused for 213 ms.
      It is at its destination, which is in this program too, and continues there as it was.
      Nothing.
    Good: The guest has moved: 1.00 GiB in 2.50 s, of which it was paused for 213 ms.
      It is at the destination and continues there as it was. Here it is over.
      Nothing.
    Good: The guest has arrived: 1.00 GiB in 2.50 s, of which it was paused for 213 ms.
      It is here and continues as it was at its source.
      Nothing.
    Good: The snapshot is complete: 1.00 GiB in 2.50 s, of which it was paused for 213 ms.
      It continues here, at its source.
      Nothing.
    Good: The stream is complete: 1.00 GiB in 2.50 s, of which it was paused for 213 ms.
      It is paused here, and all of it is in the file.
      Start it from the file where it is to run (memferry recv). Resume it here only if it will run nowhere else.
    Warn: The guest has moved: 1.00 GiB in 2.50 s, of which it was paused for 301 ms.
      It is at the destination and continues there as it was. Here it is over.
      Nothing at once. It was paused for longer than the 300 ms allowed: below is what that time went to.
    Warn: The stream is complete: 1.00 GiB in 2.50 s, of which it was paused for 213 ms.
      It is paused here, and all of it is in the file.
      Start it from the file where it is to run (memferry recv). Resume it here only if it will run nowhere else. It was paused for longer than the 0 µs allowed: below is what that time went to. Calls into the guest took longer than the forecast counts on: expected_pause = "2ms", expected_prepare = "3ms", expected_start = "4ms" is what they took. Set the longest of several migrations.
    Bad: The migration failed; the guest is at its source.
      It is at its source, whole, in the state that it had.
      Put right what is named above, then start it again. Nothing has to be cleaned up.
    Bad: The migration did not begin; the guest is at its source.
      It is at its source, whole, in the state that it had.
      Put right what is named above, then start it again. Nothing has to be cleaned up.
    Warn: The migration was cancelled, and the guest continues at its source.
      It is at its source, whole, in the state that it had.
      Nothing. It can be started again at any time.
    Warn: The guest did not converge within its limits: the migration gave up, and the guest continues at its source.
      It is at its source, whole, in the state that it had.
      To move it all the same, allow more: a higher downtime_limit or max_bandwidth, a later deadline, steps in [convergence] on_stall, or on_deadline = "switch-over". Nothing has to be cleaned up.
    Bad: The guest was handed over, and nobody confirmed that it runs.
      It is paused here. It may run at the destination, 127.0.0.1:41234.
      Look at the destination. If the guest runs there, all is done: end it here. Only if it does not run there, and cannot start any more, resume it here.
    Bad: The guest is paused at its source, and nobody runs it.
      It is here, whole, and could not be resumed.
      Resume it here by its own means; then see why that failed.
    Bad: The guest did not arrive.
      It does not run here. Its source has it: the report there says in what state.
      Put right what is named here, or at the source, then start both ends again.
    Warn: The migration was cancelled before the guest was here.
      It does not run here. Its source has it: the report there says in what state.
      Nothing, if that was meant. Both ends can be started again at any time.
    "#);
}

#[test]
fn a_guest_that_was_paused_for_nothing_says_for_how_long() {
    let mut scene = Scene::new(Ends::Source).ending(|ended| failed(ended, Outcome::Failed, "disk full"));
    let paused = scene.account.series.first(Happened::Paused).unwrap();
    scene.account.enter(&Event::Resumed, paused + Duration::from_millis(420));
    assert!(scene.story().contains("It was paused for 420 ms meanwhile."), "{}", scene.story());
    assert!(scene.page().contains("the guest was paused"));
}

#[test]
fn lost_connections_are_listed_and_drawn_and_are_no_bandwidth() {
    let mut scene = Scene::new(Ends::Source);
    assert!(!scene.page().contains("Without one") && !scene.page().contains("there was no connection"));
    let begun = scene.account.series.first(Happened::Phase(Phase::Active)).unwrap();
    let (at, outage) = (begun + Duration::from_secs(5), Duration::from_secs(10));
    scene.account.enter(&progress(4000), at);
    scene.account.enter(&Event::Disconnected { attempt: 1, why: "it <closed>".into() }, at);
    scene.account.enter(&Event::Reconnected { attempt: 2, outage, put_back_bytes: 3 << 20 }, at + outage);
    scene.account.enter(&progress(8000), at + outage + Duration::from_secs(1));
    scene = scene.ending(|ended| ended.wire_bytes = 2000 << 20);
    let page = scene.page();
    is_sound(&page);
    assert!(page.contains("there was no connection") && page.contains("it &lt;closed&gt;"), "{page}");
    parsed(&page, |document| {
        let is_band = |node: &Node<'_, '_>| {
            let inside = node.parent().is_some_and(|svg| svg.attribute("class") == Some("panel"));
            inside && node.attribute("class") == Some("outage")
        };
        let bands = document.descendants().filter(is_band).count();
        assert!(bands >= 3, "one in each panel: {bands}");
        let row = elements(document, "tr").into_iter().map(words).find(|row| row.contains("it <closed>")).unwrap();
        assert_eq!(row, "1 5.00 s 10.0 s 0 3.00 MiB no it <closed>");
    });
    // 1000 MiB in the second after the outage, not in the eleven since the figure before it.
    scene.on(|page| {
        let rate = |rate: f64| (rate / f64::from(1 << 20)).round();
        let rates = super::timeline::rates_of(page);
        let after: Vec<_> = rates.iter().filter(|(then, _)| *then >= at).map(|(_, of)| rate(*of)).collect();
        assert_eq!(after[..3], [1000.0, 0.0, 1000.0], "{after:?}");
    });
}

#[test]
fn what_was_left_is_what_the_last_look_found() {
    let mut scene = Scene::new(Ends::Source).ending(|ended| failed(ended, Outcome::Failed, "disk full"));
    let left = |scene: &Scene| scene.on(|page| page.remaining().last().unwrap().1);
    let at = Duration::from_secs(9);
    scene.account.enter(&progress(1), at);
    assert_eq!(left(&scene), 1 << 29);
    scene.account.enter(&Event::Synced { after_round: 2, dirty_pages: 512, duration: at }, at + at);
    assert_eq!(left(&scene), 2 << 20);
    assert!(scene.page().contains("2.00 MiB"));
}

#[test]
fn what_comes_from_outside_stays_text() {
    let evil = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>&amp;</code>\u{202e}\u{7}\u{0}";
    let mut scene = Scene::new(Ends::Source).ending(|ended| failed(ended, Outcome::Failed, evil));
    let account = &mut scene.account;
    account.enter(&Event::Disconnected { attempt: 1, why: evil.into() }, Duration::from_secs(1));
    account.status.peer = Some(evil.into());
    account.status.blocks.push(BlockFacts { id: evil.into(), bytes: 4096, page_size: 4096 });
    account.enter(&Event::Warning(evil.into()), Duration::from_secs(1));
    let kind = TurnedAwayKind::Protocol;
    let away = Event::TurnedAway { kind, peer: evil.into(), why: evil.into(), count: 1 };
    account.enter(&away, Duration::from_secs(1));
    scene.configuration = evil.into();
    let page = scene.page();
    is_sound(&page);
    let shown = clean(evil);
    assert!(shown.ends_with(r"</code>\u{202e}\u{7}\u{0}") && !page.contains('\u{202e}'));
    parsed(&page, |document| {
        let times = words(document.root_element()).matches(&shown).count();
        assert_eq!(times, 8, "peer, error, block, warning, connection twice, lost connection, configuration");
    });
}

#[test]
fn notices_are_bounded() {
    let mut scene = Scene::new(Ends::Destination);
    for _ in 0..250 {
        let (kind, peer, why) = (TurnedAwayKind::Protocol, "a client".into(), "no Hello".into());
        scene.account.enter(&Event::TurnedAway { kind, peer, why, count: 1 }, Duration::ZERO);
    }
    let page = scene.page();
    assert_eq!(page.matches("a client was turned away: no Hello").count(), 100);
    assert!(page.contains("And 150 more.") && page.contains("Nothing. Read the warnings below."));
}

#[test]
fn a_migration_of_a_moment_has_its_picture() {
    let mut scene = Scene::empty(Ends::Source);
    for (at, event) in script(Role::Source).into_iter().enumerate() {
        scene.account.enter(&event, Duration::from_micros(at as u64 * 2500));
    }
    let page = scene.page();
    is_sound(&page);
    // From the first page at 7.5 ms to the verdict at 32.5 ms: 512 MiB in 25 ms.
    assert!(page.contains("Rates over time: at most 20.0 GiB/s on the wire"), "{page}");
    assert!(page.contains("Bytes remaining over time, from 1.00 GiB to 0 B; the least that a sync found is 400 KiB."));
}

#[test]
fn a_postcopy_is_drawn_with_how_long_threads_waited() {
    let scene = Scene { postcopy: Some(sample()), ..Scene::new(Ends::Both) };
    let page = scene.page();
    is_sound(&page);
    parsed(&page, |document| {
        let section =
            elements(document, "section").into_iter().find(|it| it.attribute("aria-labelledby") == Some("postcopy"));
        let section = section.expect("a section");
        let columns = section.descendants().filter(|node| node.attribute("class") == Some("busy")).count();
        assert_eq!(columns, sample().faults.unwrap().waits.histogram.len());
        let text = words(section);
        for figure in [
            "Half of them took up to",
            "256 µs",
            "1.28 ms",
            "4.12 ms",
            "1.81 s",
            "24,691",
            "5,678",
            "3.20 ms",
            "410 µs",
        ] {
            assert!(text.contains(figure), "{figure} in {text}");
        }
    });
    assert!(!Scene::new(Ends::Both).page().contains("Postcopy"));
}

#[test]
fn a_guest_that_was_lost_is_said_to_be_at_neither_end() {
    let lost = |role, postcopy| {
        let scene = Scene { postcopy, ..Scene::new(role).ending(|ended| ended.outcome = Outcome::Lost) };
        is_sound(&scene.page());
        scene.story()
    };
    let mut missing = sample();
    missing.faults.as_mut().unwrap().placed -= 100;
    insta::assert_snapshot!([lost(Ends::Source, None), lost(Ends::Destination, Some(missing))].join("\n"), @r"
    Bad: The guest is lost: it was started without all of its memory, and the rest did not come.
      It was started at the destination. Pages of it did not reach it. Here it is paused as it was at the switchover.
      End what is left of the guest at the destination. Resume it here only if nothing that it did since matters.
    Bad: The guest is lost: it was started without all of its memory, and the rest did not come.
      It was started here. 100 pages of it are missing, and threads that touch one wait for ever.
      End what is left of the guest here. Its source has it as it was at the switchover.
    ");
}

fn an_event() -> impl Strategy<Value = Event> {
    let script = [script(Role::Source), script(Role::Destination), every_event()].concat();
    prop_oneof![
        3 => (any::<Option<u64>>(), any::<u64>(), any::<Option<f64>>(), any::<Option<u64>>(), 0_u64..1000, 0_u8..=99).prop_map(
            |(remaining_bytes, wire_bytes, dirty_rate, expected, limit, throttle)| {
                Event::Progress(Progress {
                    remaining_bytes,
                    wire_bytes,
                    dirty_rate,
                    expected_downtime: expected.map(Duration::from_millis),
                    downtime_limit: Duration::from_millis(limit),
                    throttle,
                    ..Progress::default()
                })
            }
        ),
        2 => proptest::sample::select(script),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_page_can_be_made_of_anything_that_is_reported(
        events in proptest::collection::vec((an_event(), 0_u64..5_000_000), 0..60),
        role in proptest::sample::select(vec![Ends::Both, Ends::Source, Ends::Destination]),
    ) {
        let mut scene = Scene::empty(role);
        let mut at = Duration::ZERO;
        for (event, later) in events {
            at += Duration::from_micros(later);
            scene.account.enter(&event, at);
        }
        scene.account.enter(&Event::Ended(Box::new(ended(Role::Source))), at);
        is_sound(&scene.page());
    }
}
