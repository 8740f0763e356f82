//! Turns the TOML reader's message about a value into the fault and its remedy.

use super::fault::Fault;

/// The fault for a reader's `message` about the key at `path`.
pub(super) fn explain(message: &str, path: String) -> Fault {
    let words = quoted(message);
    if message.starts_with("unknown field") {
        return unknown(path, &words, "unknown key", "the keys here are");
    }
    if message.starts_with("unknown variant") {
        return unknown(path, &words, "unknown value", "it is one of");
    }
    if let (true, Some(field)) = (message.starts_with("missing field"), words.first()) {
        return missing(field, path);
    }
    if message.starts_with("wanted exactly 1 element") {
        return Fault::new(
            path,
            "one of several variants has to be chosen here",
            "keep one of the tables and delete the others",
        );
    }
    let message = message.replacen("invalid type: ", "this is the ", 1).replacen("invalid value: ", "this is the ", 1);
    match message.split_once(", expected ") {
        Some((what, expected)) => Fault::new(path, what, format!("write {}", plain(expected))),
        None => Fault::bare(path, message),
    }
}

fn missing(field: &str, path: String) -> Fault {
    let help = example(field).map(|example| format!("write {example}"));
    if matches!(field, "guest" | "transport") {
        return Fault { help, ..Fault::bare("", format!("there is no table `{field}`")) };
    }
    let what = format!("`{field}` is missing in `{path}`");
    Fault { help, ..Fault::bare(path, what) }
}

fn unknown(path: String, words: &[&str], what: &str, list: &str) -> Fault {
    let Some((word, known)) = words.split_first() else { return Fault::new(path, what, "delete it") };
    let all = known.iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", ");
    let help = match nearest(word, known) {
        Some(near) => format!("did you mean `{near}`? {list} {all}"),
        None => format!("{list} {all}"),
    };
    let names_key = path.rsplit('.').next() == Some(word);
    Fault { names_key, ..Fault::new(path, format!("{what} `{word}`"), help) }
}

/// The text between backticks.
fn quoted(message: &str) -> Vec<&str> {
    message.split('`').skip(1).step_by(2).collect()
}

/// A Rust type's name in plain words.
fn plain(expected: &str) -> &str {
    match expected {
        "u8" => "a whole number from 0 to 255, without quotes",
        "u16" => "a whole number from 0 to 65535, without quotes",
        "u32" | "u64" => "a whole number, without quotes",
        "i32" => "a whole number, without quotes",
        "f64" => "a number, without quotes",
        "a boolean" => "true or false, without quotes",
        "a string" => "text in quotes",
        "a sequence" => "a list in [ ]",
        other if other.starts_with("struct ") || other == "map" => "a table with its keys",
        other => other,
    }
}

/// An example of a required key.
fn example(field: &str) -> Option<&'static str> {
    Some(match field {
        "guest" => "a table [guest.workload], [guest.file] or [guest.kvm]",
        "transport" => r#"a table [transport] with address = "tcp:127.0.0.1:7777""#,
        "address" => r#"address = "tcp:127.0.0.1:7777", "unix:/run/memferry.sock" or "file:/var/tmp/guest.memferry""#,
        "images" => r#"images = [{ id = "ram", path = "/dev/shm/guest.ram" }]"#,
        "cut_after" => r#"cut_after = ["40 MiB", "90 MiB"]"#,
        "id" => r#"id = "ram": the name of the RAM block, the same at both ends"#,
        "path" => r#"path = "/dev/shm/guest.ram""#,
        "share" => "share = 0.5: of the memory",
        "size" => r#"size = "64 MiB": the length of the file"#,
        "pattern" => {
            r#"pattern = "sequential", "uniform", { zipf = { exponent = 1.1 } } or { hot-spot = { pages = 0.1, writes = 0.9 } }"#
        }
        "exponent" => "exponent = 1.1",
        "pages" => "pages = 0.1: the share of the pages that are hot",
        "writes" => "writes = 0.9: the share of the writes that go to the hot pages",
        _ => return None,
    })
}

/// The known word that is nearest to a mistyped one.
fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    let (distance, near) = known.iter().map(|candidate| (distance(word, candidate), *candidate)).min()?;
    let close = distance <= 1 + word.len() / 4;
    (close || near.starts_with(word) || word.starts_with(near)).then_some(near)
}

/// The number of letters to insert, delete or replace to turn one word into the other.
fn distance(from: &str, to: &str) -> usize {
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, b) in to.bytes().enumerate() {
            let replaced = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_count_letters() {
        assert_eq!([("", "abc"), ("lane", "lanes"), ("kitten", "sitting")].map(|(a, b)| distance(a, b)), [3, 1, 3]);
    }

    #[test]
    fn only_near_words_are_suggested() {
        let known = ["lanes", "connections", "checksum"];
        assert_eq!(nearest("lane", &known), Some("lanes"));
        assert_eq!(nearest("conections", &known), Some("connections"));
        assert_eq!(nearest("bandwidth", &known), None);
    }
}
