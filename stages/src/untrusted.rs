//! Text that comes from elsewhere: a peer, a file, a command's output.
//!
//! Such text may hold escape sequences that move the cursor, a newline and a line that looks like the program's own, or marks
//! that reverse the direction of writing. [`Untrusted`] holds it, and displays it on one line, escaped and bounded. Frames and
//! events carry this type, so that no outlet can forget to escape (ARCHITECTURE.md, law 8: the peer is not trusted).

use std::borrow::Cow;
use std::fmt::{self, Write};
use std::path::Path;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The most characters of a text that are shown.
pub const MAX_SHOWN: usize = 1024;
/// The most names that a list of them shows.
const MAX_LISTED: usize = 16;

/// Text that may come from elsewhere. `Display` and `Debug` are safe on a terminal and in a log; see the [module](self).
///
/// It is compared, hashed, encoded and serialised unchanged.
///
/// ```
/// # use memferry_stages::untrusted::Untrusted;
/// let reason = Untrusted::from("disk full\n\u{1b}[2Kmemferry: completed");
/// assert_eq!(reason.to_string(), r"disk full\n\u{1b}[2Kmemferry: completed");
/// ```
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Untrusted(String);

impl Untrusted {
    /// The raw text, to be compared, encoded or passed to code that escapes it. It must not be shown.
    #[must_use]
    pub fn raw(&self) -> &str {
        &self.0
    }

    /// Its bytes of UTF-8.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether it is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether it contains these words.
    #[must_use]
    pub fn contains(&self, words: &str) -> bool {
        self.0.contains(words)
    }
}

impl From<String> for Untrusted {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl From<&str> for Untrusted {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

/// The name of a file, which may be chosen by others too.
impl From<&Path> for Untrusted {
    fn from(path: &Path) -> Self {
        Self(path.to_string_lossy().into_owned())
    }
}

impl PartialEq<str> for Untrusted {
    fn eq(&self, other: &str) -> bool {
        self.0 == other
    }
}

impl PartialEq<&str> for Untrusted {
    fn eq(&self, other: &&str) -> bool {
        self.0 == *other
    }
}

impl PartialEq<String> for Untrusted {
    fn eq(&self, other: &String) -> bool {
        self.0 == *other
    }
}

impl fmt::Display for Untrusted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&shown(&self.0))
    }
}

/// In quotes.
impl fmt::Debug for Untrusted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = end_of_shown(&self.0);
        write!(f, "{:?}", &self.0[..end])?;
        if end < self.0.len() { write!(f, "{}", More(self.0.len() - end)) } else { Ok(()) }
    }
}

impl Serialize for Untrusted {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Untrusted {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self)
    }
}

/// A text as [`Untrusted`] shows it: on one line, with every invisible or misleading character escaped, and of at most
/// [`MAX_SHOWN`] characters.
#[must_use]
pub fn shown(text: &str) -> Cow<'_, str> {
    let end = end_of_shown(text);
    let kept = &text[..end];
    if end == text.len() && !kept.contains(is_unsafe) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(kept.len() + 32);
    for character in kept.chars() {
        match character {
            '\n' => shown.push_str("\\n"),
            '\r' => shown.push_str("\\r"),
            '\t' => shown.push_str("\\t"),
            unsafe_one if is_unsafe(unsafe_one) => shown.extend(unsafe_one.escape_unicode()),
            plain => shown.push(plain),
        }
    }
    if end < text.len() {
        // A string takes everything.
        write!(shown, "{}", More(text.len() - end)).unwrap_or_default();
    }
    Cow::Owned(shown)
}

/// Bytes of a text that are shown.
fn end_of_shown(text: &str) -> usize {
    text.char_indices().nth(MAX_SHOWN).map_or(text.len(), |(end, _)| end)
}

/// How many bytes of a text are not shown.
struct More(usize);

impl fmt::Display for More {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "… ({} more bytes)", self.0)
    }
}

/// Names in quotes, the first few of them.
#[must_use]
pub fn listed<'a>(names: impl IntoIterator<Item = &'a Untrusted>) -> String {
    let names: Vec<_> = names.into_iter().collect();
    let (first, more) = names.split_at(names.len().min(MAX_LISTED));
    let first = first.iter().map(|name| format!("{name:?}")).collect::<Vec<_>>().join(", ");
    if more.is_empty() { first } else { format!("{first} and {} more", more.len()) }
}

/// The text of a JSON value without unsafe characters: those that JSON allows unescaped, but that are unsafe on a terminal, are
/// escaped as in JSON.
#[must_use]
pub fn shown_json(json: String) -> String {
    // JSON allows these control characters only between values, as layout.
    let is_left = |character: char| is_unsafe(character) && !character.is_ascii_control() || character == '\u{7f}';
    if !json.contains(is_left) {
        return json;
    }
    let mut shown = String::with_capacity(json.len() + 32);
    for character in json.chars() {
        if is_left(character) {
            for unit in character.encode_utf16(&mut [0; 2]) {
                // A string takes everything.
                write!(shown, "\\u{unit:04x}").unwrap_or_default();
            }
        } else {
            shown.push(character);
        }
    }
    shown
}

/// A text of several lines, each as [`Untrusted`] shows it but of any length: for messages that name an operator's own files and
/// addresses.
#[must_use]
pub fn shown_lines(text: &str) -> Cow<'_, str> {
    let is_unsafe = |character: char| character != '\n' && is_unsafe(character);
    if !text.contains(is_unsafe) {
        return Cow::Borrowed(text);
    }
    let shown =
        |character: char| if is_unsafe(character) { character.escape_debug().to_string() } else { character.into() };
    Cow::Owned(text.chars().map(shown).collect())
}

/// Whether a character moves the cursor, changes the text around it, or is invisible.
#[must_use]
pub fn is_unsafe(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{ad}'
                | '\u{61c}'
                | '\u{180e}'
                | '\u{200b}'..='\u{200f}'
                | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}'
                | '\u{feff}'
                | '\u{fff9}'..='\u{fffb}'
                | '\u{fffe}'..='\u{ffff}'
                | '\u{e0000}'..='\u{e007f}'
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_stay_lines_and_nothing_else_moves_the_cursor() {
        assert_eq!(shown_lines("a\nb"), "a\nb");
        assert_eq!(shown_lines("a\u{1b}[2K\n\u{7}\u{202e}b"), "a\\u{1b}[2K\n\\u{7}\\u{202e}b");
    }

    #[test]
    fn what_moves_a_cursor_or_turns_a_line_around_is_escaped() {
        let evil = "a\u{1b}[31mb\u{7}c\r\nmemferry: completed, verified\t\u{9b}2K\u{202e}dcba\u{2028}\u{0}\u{7f}";
        let text = Untrusted::from(evil);
        let expected = r"a\u{1b}[31mb\u{7}c\r\nmemferry: completed, verified\t\u{9b}2K\u{202e}dcba\u{2028}\u{0}\u{7f}";
        assert_eq!(text.to_string(), expected);
        assert_eq!(text.raw(), evil);
        assert_eq!(format!("{:?}", Untrusted::from("a\"\n")), r#""a\"\n""#);
        for character in (0..=0x10_ffff).filter_map(char::from_u32).filter(|&character| is_unsafe(character)) {
            let text = Untrusted::from(String::from(character));
            assert!(!text.to_string().contains(is_unsafe), "{character:?}");
            assert!(!format!("{text:#?}{text:>9}").contains(is_unsafe), "{character:?}");
        }
    }

    #[test]
    fn plain_text_of_any_script_is_shown_as_it_is_and_what_was_escaped_is_not_escaped_again() {
        for plain in
            ["", r#"block "ram" at C:\images"#, "le disque est plein", "диск переполнен", "ディスク", "e\u{301}"]
        {
            assert_eq!(Untrusted::from(plain).to_string(), plain);
        }
        let once = Untrusted::from("\u{1b}\n").to_string();
        assert_eq!(Untrusted::from(once.as_str()).to_string(), once);
        assert_eq!(format!("[{:<6}] [{:>6}]", Untrusted::from("ram"), Untrusted::from("é")), "[ram   ] [     é]");
    }

    #[test]
    fn lists_are_bounded_and_json_is_the_same_value() {
        let names: Vec<Untrusted> = (0..20).map(|number| format!("n{number}\n").into()).collect();
        assert_eq!(listed(&names[..2]), r#""n0\n", "n1\n""#);
        assert!(listed(&names).ends_with(r#""n15\n" and 4 more"#));
        let json = "{\n  \"a\": \"\u{9b}\u{7f}\u{e0001}ä\"\n}".to_owned();
        assert_eq!(shown_json(json), "{\n  \"a\": \"\\u009b\\u007f\\udb40\\udc01ä\"\n}");
    }

    #[test]
    fn a_long_text_is_cut_and_says_so() {
        let long = "ä".repeat(MAX_SHOWN + 5);
        let shown = Untrusted::from(long.as_str()).to_string();
        assert_eq!(shown, format!("{}… (10 more bytes)", "ä".repeat(MAX_SHOWN)));
        assert!(format!("{:?}", Untrusted::from(long.as_str())).ends_with("ä\"… (10 more bytes)"));
        let whole = "ä".repeat(MAX_SHOWN);
        assert_eq!(Untrusted::from(whole.as_str()).to_string(), whole);
    }
}
