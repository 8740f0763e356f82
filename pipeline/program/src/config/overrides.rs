//! `--set key=value`: changes to a configuration from the command line.

use toml_edit::{DocumentMut, Item, Value};

/// One `--set`, parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Override {
    /// As it was given.
    pub(super) text: String,
    /// The dotted path before the `=`.
    pub(super) path: String,
    /// The offset of the value in `text`.
    pub(super) value_start: usize,
}

impl Override {
    /// Parses `key=value`, or returns the error.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let (path, _) = text.split_once('=').ok_or("there is no = in it")?;
        let steps = path.trim().split('.').map(str::trim).collect::<Vec<_>>();
        if steps.iter().any(|step| step.is_empty()) {
            return Err("a part of its key is empty".into());
        }
        Ok(Self { text: text.to_owned(), path: steps.join("."), value_start: path.len() + 1 })
    }

    /// The value as TOML; as a string if it is not valid TOML, so that `compress=none` needs no quotes.
    fn value(&self) -> Value {
        let text = self.text[self.value_start..].trim();
        text.parse().unwrap_or_else(|_| Value::from(text))
    }

    /// Puts the value into the document, and creates the tables on the way.
    pub(super) fn apply(&self, document: &mut DocumentMut) -> Result<(), String> {
        let mut item = document.as_item_mut();
        for step in self.path.split('.') {
            item = enter(item, step)?;
        }
        *item = Item::Value(self.value());
        Ok(())
    }

    /// Does the value at `path` come from this?
    pub(super) fn gives(&self, path: &str) -> bool {
        within(&self.path, path)
    }

    /// Does it set something in the table at `path`?
    pub(super) fn lies_in(&self, path: &str) -> bool {
        within(path, &self.path)
    }
}

fn within(outer: &str, inner: &str) -> bool {
    inner.strip_prefix(outer).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

fn enter<'a>(item: &'a mut Item, step: &str) -> Result<&'a mut Item, String> {
    if item.is_none() {
        *item = Item::Table(toml_edit::Table::new());
    }
    if item.is_array_of_tables() || item.is_array() {
        let index: usize =
            step.parse().map_err(|_| format!("{step:?} is not the number of an entry, counted from 0"))?;
        return item.get_mut(index).ok_or_else(|| format!("there is no entry {index}"));
    }
    let holds_keys = item.is_table_like();
    let table = item.as_table_like_mut().filter(|_| holds_keys);
    table.map(|table| table.entry(step).or_insert(Item::None)).ok_or_else(|| format!("{step:?} is a key of no table"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(document: &str, text: &str) -> Result<String, String> {
        let mut document: DocumentMut = document.parse().unwrap();
        Override::parse(text)?.apply(&mut document)?;
        Ok(document.to_string())
    }

    #[test]
    fn values_are_toml_or_else_text() {
        assert_eq!(set("", "a.b=4").unwrap(), "[a]\nb = 4\n");
        assert_eq!(set("", "a.b=64 MiB").unwrap(), "[a]\nb = \"64 MiB\"\n");
        assert_eq!(set("[a]\nb = 1 # why\n", "a.b = none").unwrap(), "[a]\nb = \"none\"\n");
        assert_eq!(set("[a]\nb = 1\n", "a.c=[0.0, 0.5]").unwrap(), "[a]\nb = 1\nc = [0.0, 0.5]\n");
    }

    #[test]
    fn entries_of_arrays_go_by_number() {
        assert_eq!(set("[[w]]\nb = 1\n[[w]]\nb = 2\n", "w.1.b=3").unwrap(), "[[w]]\nb = 1\n[[w]]\nb = 3\n");
        assert_eq!(set("w = [{ b = 1 }]\n", "w.0.b=3").unwrap(), "w = [{ b = 3 }]\n");
        assert_eq!(set("[[w]]\nb = 1\n", "w.4.b=3").unwrap_err(), "there is no entry 4");
    }

    #[test]
    fn what_is_no_override_is_refused() {
        assert_eq!(set("", "lanes").unwrap_err(), "there is no = in it");
        assert_eq!(set("", "a..b=1").unwrap_err(), "a part of its key is empty");
        assert_eq!(set("a = 1\n", "a.b=1").unwrap_err(), "\"b\" is a key of no table");
    }
}
