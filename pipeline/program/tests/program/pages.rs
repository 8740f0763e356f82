//! Reports as people read them: a page beside the figures, for both ends and every outcome.

use crate::harness::{Scene, free_port};
use crate::reports::Report;

/// A page, with the least that a browser and a reader need.
#[track_caller]
fn page(scene: &Scene, name: &str) -> String {
    let text = String::from_utf8(scene.read(name)).unwrap();
    assert!(text.starts_with("<!DOCTYPE html>") && text.ends_with("</html>"), "{text}");
    for section in ["What was decided, and why", "The configuration used"] {
        assert!(text.contains(section), "{section} is missing");
    }
    assert!(!text.contains("<script") && !text.contains("src=") && !text.contains("href="));
    text
}

#[test]
fn a_page_shows_the_figures_of_the_report_beside_it() {
    let scene = Scene::new();
    scene.configure(&["ram"]);
    scene.write("from/ram", vec![7; 4 << 20]);
    let (destination, address) = scene.listening(&["transport.address=tcp:127.0.0.1:0"]);
    let reports = ["send", "send.toml", "--report", "send.html", "--report", "send.json"];
    scene.start_with(&reports, &[&address]).end().expect(0);
    destination.end().expect(0);

    let report = Report::read(&scene.path("send.json"));
    let page = page(&scene, "send.html");
    assert!(page.contains("The guest has moved: "));
    assert!(page.contains("id = &quot;ram&quot;") && page.contains("from/ram"), "{page}");
    for round in report.rounds() {
        for (name, figure) in round.as_object().unwrap().iter().filter(|(_, figure)| figure.is_u64()) {
            let shown = if name == "round" { format!(">{figure}<") } else { format!("<data value=\"{figure}\">") };
            assert!(page.contains(&shown), "{name} {figure} is missing");
        }
    }
    assert!(page.contains(report.at("/bottleneck").as_str().unwrap()));
}

#[test]
fn a_migration_that_found_nobody_has_a_page_too() {
    let scene = Scene::new();
    scene.configure(&["ram"]);
    scene.write("from/ram", vec![7; 1 << 20]);
    let address = format!("transport.address=tcp:127.0.0.1:{}", free_port());
    let sets = [address.as_str(), "transport.connect_timeout=100ms"];
    scene.start_with(&["send", "send.toml", "--report", "send.HTML"], &sets).end().expect(1);
    let text = String::from_utf8(scene.read("send.HTML")).unwrap();
    assert!(text.contains("<h1>The migration did not begin; the guest is at its source.</h1>"), "{text}");
    assert!(text.contains("Connection refused"), "{text}");
}

#[test]
fn a_page_that_can_go_nowhere_is_refused_before_anything_begins() {
    let scene = Scene::new();
    scene.configure(&["ram"]);
    scene.write("from/ram", vec![7; 1 << 20]);
    let reports = ["send", "send.toml", "--report", "send.json", "--report", "absent/send.html"];
    scene.run(&reports).expect(2).says(&["there is no folder absent"]);
    assert!(!scene.names(".").contains(&"send.json".to_owned()));
}
