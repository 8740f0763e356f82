//! Reports as other programs read them: the documented names are present, and the figures add up.

use std::fs;
use std::path::Path;

use serde_json::Value;

const TOP: &str = "schema role status error verified guest total_ms setup_ms downtime_ms downtime forecast decisions changes \
                   wire_bytes throughput_bytes_per_s memory_bound_bytes memory_peak_bytes bottleneck \
                   bottleneck_percent cpu_ms rounds stages lost_connections outages postcopy";
const GUEST: &str = "bytes pages blocks";
const BLOCK: &str = "id bytes page_size";
const DOWNTIME: &str = "pause_ms state_ms final_sync_ms final_transfer_ms load_ms verify_ms durable_ms prepare_ms start_ms \
                        handover_ms resume_ms";
const ROUND: &str = "round ms pages zero raw compressed xbzrle unchanged xbzrle_misses xbzrle_overflows bytes_in bytes_out \
                     dirty_after";
const STAGE: &str = "name lane busy_ms input_wait_ms output_wait_ms limit_wait_ms batches pages";

/// A report that was read and is consistent.
pub(crate) struct Report(Value);

impl Report {
    #[track_caller]
    pub(crate) fn read(file: &Path) -> Self {
        let text = fs::read(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let report = Self(serde_json::from_slice(&text).unwrap());
        report.has_its_names();
        report.adds_up();
        report
    }

    pub(crate) fn text(&self, name: &str) -> &str {
        self.0[name].as_str().unwrap_or_else(|| panic!("{name} is {}", self.0[name]))
    }

    pub(crate) fn number(&self, name: &str) -> u64 {
        number(&self.0, name)
    }

    pub(crate) fn verified(&self) -> Option<bool> {
        self.0["verified"].as_bool()
    }

    pub(crate) fn rounds(&self) -> &[Value] {
        self.0["rounds"].as_array().unwrap()
    }

    /// The sum of a figure over the rounds.
    pub(crate) fn in_rounds(&self, name: &str) -> u64 {
        self.rounds().iter().map(|round| number(round, name)).sum()
    }

    /// Did the controller make this decision at any time?
    pub(crate) fn decided(&self, what: &str) -> bool {
        self.at("/decisions").as_array().unwrap().iter().any(|decided| decided["decision"] == what)
    }

    /// A part of it.
    pub(crate) fn at(&self, pointer: &str) -> &Value {
        self.0.pointer(pointer).unwrap_or_else(|| panic!("no {pointer} in {:#}", self.0))
    }

    #[track_caller]
    fn has_its_names(&self) {
        let list = |value: &Value| value.as_array().unwrap().clone();
        names(&self.0, TOP);
        names(&self.0["guest"], GUEST);
        list(&self.0["guest"]["blocks"]).iter().for_each(|block| names(block, BLOCK));
        names(&self.0["downtime"], DOWNTIME);
        list(&self.0["rounds"]).iter().for_each(|round| names(round, ROUND));
        list(&self.0["stages"]).iter().for_each(|stage| names(stage, STAGE));
        assert_eq!(self.number("schema"), 1);
        assert!(["completed", "failed", "cancelled", "unconfirmed", "lost"].contains(&self.text("status")));
        assert_eq!(self.0["error"].is_null(), self.text("status") == "completed", "{:#}", self.0);
    }

    #[track_caller]
    fn adds_up(&self) {
        let blocks = self.0["guest"]["blocks"].as_array().unwrap();
        let sum: u64 = blocks.iter().map(|block| number(block, "bytes")).sum();
        assert_eq!(number(&self.0["guest"], "bytes"), sum);
        for (index, round) in self.rounds().iter().enumerate() {
            let kinds = ["zero", "raw", "compressed", "xbzrle", "unchanged"].map(|kind| number(round, kind));
            assert_eq!(kinds.iter().sum::<u64>(), number(round, "pages"), "{round:#}");
            assert_eq!(number(round, "round"), index as u64 + 1);
            let page = self.0["guest"]["blocks"][0]["page_size"].as_u64().unwrap();
            assert_eq!(number(round, "bytes_in"), number(round, "pages") * page, "{round:#}");
        }
        assert!(self.in_rounds("bytes_out") <= self.number("wire_bytes"), "{:#}", self.0);
        assert!(self.number("memory_peak_bytes") <= self.number("memory_bound_bytes"), "{:#}", self.0);
        let times = ["total_ms", "setup_ms", "downtime_ms"].map(|name| self.0[name].as_f64().unwrap_or(0.0));
        assert!(times[0] >= times[1] + times[2], "{times:?}");
        if !self.0["downtime_ms"].is_null() {
            let parts = DOWNTIME.split_whitespace().map(|part| self.0["downtime"][part].as_f64().unwrap());
            assert!((parts.sum::<f64>() - times[2]).abs() < 0.01, "{:#}", self.0["downtime"]);
        }
    }

    /// A source's report of a completed migration: the rounds scanned the pages that they report.
    #[track_caller]
    pub(crate) fn is_of_a_whole_migration(&self) {
        assert_eq!(self.text("status"), "completed");
        let rounds = self.rounds();
        // In postcopy the destination may have its last page before the source has noted that the last round is sent.
        let is_postcopy = !self.at("/postcopy").is_null();
        assert!(rounds.len() >= 2 || is_postcopy, "{rounds:#?}");
        // Hinted pages may have been skipped in any round.
        let excluded = |why: &str| number(&self.0["excluded"], why);
        let (hinted, out) = (excluded("hinted"), excluded("unplugged") + excluded("ignored"));
        let (first, all) = (number(&rounds[0], "pages"), number(&self.0["guest"], "pages"));
        // Of a round that was interrupted the last part is known.
        let is_whole = *self.at("/outages/lost") == 0;
        assert!(
            !is_whole || (first + out..=first + out + hinted).contains(&all),
            "{first} of {all} pages: {rounds:#?}"
        );
        // Pages that threads waited for are in no round.
        let urgent = self.0["postcopy"]["urgent_pages"].as_u64().unwrap_or(0);
        for (round, next) in rounds.iter().zip(&rounds[1..]) {
            // The last round also has the pages that the sync in the switchover found; a sample round has a part.
            assert!(
                next["sample"] == true || number(next, "pages") + hinted + urgent >= number(round, "dirty_after"),
                "{rounds:#?}"
            );
        }
        let last = &rounds[rounds.len() - 1];
        assert!(is_postcopy || number(last, "dirty_after") == 0, "{last:#}");
        for stage in ["scanner", "zero detector", "encoder", "sender", "bitmap sync"] {
            let known = self.0["stages"].as_array().unwrap();
            assert!(known.iter().any(|known| known["name"] == stage), "{stage} is not among {known:#?}");
        }
    }
}

fn number(value: &Value, name: &str) -> u64 {
    value[name].as_u64().unwrap_or_else(|| panic!("{name} is {}", value[name]))
}

/// Every name is present; there may be others.
#[track_caller]
fn names(value: &Value, names: &str) {
    let object = value.as_object().unwrap();
    for name in names.split_whitespace() {
        assert!(object.contains_key(name), "{name} is missing in {value:#}");
    }
}
