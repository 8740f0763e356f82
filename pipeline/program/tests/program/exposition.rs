//! A strict parser of Prometheus's text format, with the conventions that its linter checks.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{Read, Write};
use std::net::TcpStream;

/// A consistent page of metrics.
#[derive(Debug)]
pub(crate) struct Exposition {
    samples: HashMap<String, f64>,
    kinds: HashMap<String, String>,
}

impl Exposition {
    /// The page that an address serves; `None` if there is no answer.
    pub(crate) fn scrape(address: &str) -> Option<Self> {
        let mut connection = TcpStream::connect(address).ok()?;
        write!(connection, "GET /metrics HTTP/1.0\r\nHost: {address}\r\n\r\n").ok()?;
        let mut answer = String::new();
        connection.read_to_string(&mut answer).ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        assert!(head.starts_with("HTTP/1.0 200"), "{head}");
        assert!(head.to_lowercase().contains("content-type: text/plain"), "{head}");
        Some(Self::parse(body))
    }

    /// # Panics
    /// If the text is malformed.
    pub(crate) fn parse(text: &str) -> Self {
        let mut page = Self { samples: HashMap::new(), kinds: HashMap::new() };
        let mut helped = HashSet::new();
        let mut buckets: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
        assert!(text.is_empty() || text.ends_with('\n'));
        for line in text.lines().filter(|line| !line.is_empty()) {
            if let Some(help) = line.strip_prefix("# HELP ") {
                let name = help.split_once(' ').expect("a name and a text").0;
                assert!(helped.insert(name.to_owned()), "{name} has two texts");
            } else if let Some(kind) = line.strip_prefix("# TYPE ") {
                let (name, kind) = kind.split_once(' ').expect("a name and a kind");
                assert!(helped.contains(name), "{name} has no text");
                assert_eq!(kind == "counter", name.ends_with("_total"), "{name} is a {kind}");
                assert!(["counter", "gauge", "histogram"].contains(&kind), "{name} is a {kind}");
                assert!(page.kinds.insert(name.to_owned(), kind.to_owned()).is_none(), "{name} has two kinds");
            } else {
                let (series, value) = line.rsplit_once(' ').expect("a value");
                let value: f64 = value.parse().unwrap_or_else(|_| panic!("{line}"));
                page.is_right(series);
                let bound = ["{le=\"", ",le=\""].iter().find_map(|le| series.split_once(le));
                if let Some((rest, bound)) = bound {
                    let bound = bound.trim_end_matches("\"}").replace("+Inf", "inf").parse().unwrap();
                    buckets.entry(rest.to_owned()).or_default().push((bound, value));
                }
                assert!(page.samples.insert(series.to_owned(), value).is_none(), "{series} is there twice");
            }
        }
        for (series, buckets) in buckets {
            assert!(buckets.windows(2).all(|pair| pair[0].0 < pair[1].0 && pair[0].1 <= pair[1].1), "{series}");
            assert_eq!(buckets.last().unwrap().0, f64::INFINITY, "{series}");
        }
        page
    }

    /// The series belongs to a declared family, and its labels are well-formed.
    fn is_right(&self, series: &str) {
        let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
        let is_name = |text: &str| {
            let mut letters = text.chars();
            letters.next().is_some_and(|first| first.is_ascii_alphabetic() || first == '_')
                && letters.all(|letter| letter.is_ascii_alphanumeric() || letter == '_')
        };
        let parts = ["_bucket", "_sum", "_count"];
        let family = parts.iter().find_map(|part| {
            name.strip_suffix(part).filter(|family| self.kinds.get(*family).is_some_and(|kind| kind == "histogram"))
        });
        let family = family.unwrap_or(name);
        assert!(is_name(name) && self.kinds.contains_key(family), "{series} was not announced");
        let labels = labels.strip_suffix('}').unwrap_or_else(|| panic!("{series}"));
        for label in labels.split("\",").filter(|label| !label.is_empty()) {
            let (key, value) = label.split_once("=\"").unwrap_or_else(|| panic!("{series}"));
            assert!(is_name(key) && !value.contains('\n'), "{series}");
        }
    }

    /// The value of a series, which is written as on the page, labels in the same order.
    pub(crate) fn value(&self, series: &str) -> Option<f64> {
        self.samples.get(series).copied()
    }

    /// The sum over the series of a name that have all these labels.
    pub(crate) fn sum(&self, name: &str, labels: &[&str]) -> f64 {
        let of = |series: &&String| {
            series.split('{').next() == Some(name) && labels.iter().all(|label| series.contains(label))
        };
        self.samples.keys().filter(of).map(|series| self.samples[series]).sum()
    }

    pub(crate) fn kind(&self, name: &str) -> Option<&str> {
        self.kinds.get(name).map(String::as_str)
    }
}

#[test]
fn a_page_that_breaks_a_rule_is_refused() {
    let right = "# HELP a_total A.\n# TYPE a_total counter\na_total{b=\"c d\",e=\"f\"} 1\n";
    assert_eq!(Exposition::parse(right).value("a_total{b=\"c d\",e=\"f\"}"), Some(1.0));
    let wrong = [
        "a_total 1\n",
        "# HELP a A.\n# TYPE a counter\na 1\n",
        "# HELP a A.\n# TYPE a gauge\na 1\na 1\n",
        "# HELP a A.\n# TYPE a gauge\na{b} 1\n",
        "# HELP a A.\n# TYPE a gauge\na x\n",
        "# HELP a A.\n# TYPE a histogram\na_bucket{le=\"1\"} 2\na_bucket{le=\"+Inf\"} 1\n",
    ];
    for text in wrong {
        assert!(std::panic::catch_unwind(|| Exposition::parse(text)).is_err(), "{text}");
    }
}
