//! Text that comes from elsewhere: a peer, a file, a command's output.
//!
//! Such text may hold anything: escape sequences that move the cursor, a newline and a line that looks like the program's own,
//! marks that reverse the direction of writing. [`Untrusted`] holds it, and shows it on one line, escaped and bounded, wherever it
//! is displayed. Frames and events carry this type, so that no outlet can forget to escape.

use std::borrow::Cow;
use std::fmt::{self, Write};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The most characters of a text that are shown.
pub const MAX_SHOWN: usize = 1024;

/// Text that may come from elsewhere. `Display` and `Debug` are safe on a terminal and in a log; see the [module](self).
///
/// It is compared, hashed, encoded and serialised as it is.
///
/// ```
/// # use memferry_stages::untrusted::Untrusted;
/// let reason = Untrusted::from("disk full\n\u{1b}[2Kmemferry: completed");
/// assert_eq!(reason.to_string(), r"disk full\n\u{1b}[2Kmemferry: completed");
/// ```
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Untrusted(String);

impl Untrusted {
    /// The text as it came, to be compared, encoded or given to something that escapes. It is not to be shown.
    #[must_use]
    pub fn raw(&self) -> &str {
        &self.0
    }

    /// Its bytes of UTF-8.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Is it the empty text?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Does it contain these words?
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
        write!(f, "{:?}", shown(&self.0))
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

/// A text as [`Untrusted`] shows it: on one line, without a character that is not seen as itself, and of at most [`MAX_SHOWN`]
/// characters.
#[must_use]
pub fn shown(text: &str) -> Cow<'_, str> {
    let end = text.char_indices().nth(MAX_SHOWN).map_or(text.len(), |(end, _)| end);
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
        write!(shown, "… ({} more bytes)", text.len() - end).unwrap_or_default();
    }
    Cow::Owned(shown)
}

/// Does a character move the cursor, change what stands around it, or stand for nothing that is seen?
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
    fn what_moves_a_cursor_or_turns_a_line_around_is_escaped() {
        let evil = "a\u{1b}[31mb\u{7}c\r\nmemferry: completed, verified\t\u{9b}2K\u{202e}dcba\u{2028}\u{0}\u{7f}";
        let text = Untrusted::from(evil);
        let expected =
            r"a\u{1b}[31mb\u{7}c\r\nmemferry: completed, verified\t\u{9b}2K\u{202e}dcba\u{2028}\u{0}\u{7f}";
        assert_eq!(text.to_string(), expected);
        assert_eq!(text.raw(), evil);
        assert!(!format!("{text:?}").contains(is_unsafe) && format!("{text:?}").starts_with('"'));
        for character in (0..=0x10_ffff).filter_map(char::from_u32).filter(|&character| is_unsafe(character)) {
            let text = Untrusted::from(String::from(character));
            assert!(!text.to_string().contains(is_unsafe), "{character:?}");
            assert!(!format!("{text:#?}{text:>9}").contains(is_unsafe), "{character:?}");
        }
    }

    #[test]
    fn plain_text_of_any_script_is_shown_as_it_is_and_what_was_escaped_is_not_escaped_again() {
        for plain in ["", r#"block "ram" at C:\images"#, "le disque est plein", "диск переполнен", "ディスク", "e\u{301}"]
        {
            assert_eq!(Untrusted::from(plain).to_string(), plain);
        }
        let once = Untrusted::from("\u{1b}\n").to_string();
        assert_eq!(Untrusted::from(once.as_str()).to_string(), once);
        assert_eq!(format!("[{:<6}] [{:>6}]", Untrusted::from("ram"), Untrusted::from("é")), "[ram   ] [     é]");
    }

    #[test]
    fn a_long_text_is_cut_and_says_so() {
        let long = "ä".repeat(MAX_SHOWN + 5);
        let shown = Untrusted::from(long.as_str()).to_string();
        assert_eq!(shown, format!("{}… (10 more bytes)", "ä".repeat(MAX_SHOWN)));
        let whole = "ä".repeat(MAX_SHOWN);
        assert_eq!(Untrusted::from(whole.as_str()).to_string(), whole);
    }
}
