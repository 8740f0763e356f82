//! The place of a key in a TOML text, and the key at a place.

use std::ops::Range;

use toml_edit::{Item, TableLike, Value};

/// The byte range of the value at a dotted path, or of its key; if the key does not exist, of the nearest table
/// around it.
pub(super) fn span_of(root: &Item, path: &str, of_key: bool) -> Option<Range<usize>> {
    let mut node = Node::Item(root);
    let mut span = None;
    for step in path.split('.') {
        let Some((found, key)) = node.child(step) else { break };
        let value = found.span().filter(|span| !span.is_empty());
        span = if of_key { key.or(value) } else { value.or(key) }.or(span);
        node = found;
    }
    span
}

/// Does this dotted path exist?
pub(super) fn exists(root: &Item, path: &str) -> bool {
    path.split('.').try_fold(Node::Item(root), |node, step| node.child(step).map(|(child, _)| child)).is_some()
}

/// The dotted path of the innermost key whose name or value covers the byte at `offset`.
pub(super) fn path_at(root: &Item, offset: usize) -> String {
    let mut path = Vec::new();
    descend(Node::Item(root), offset, &mut path);
    path.join(".")
}

fn descend(node: Node<'_>, offset: usize, path: &mut Vec<String>) {
    for (name, key, child) in node.children() {
        let covers = |span: Option<Range<usize>>| span.is_some_and(|span| span.contains(&offset));
        path.push(name);
        let depth = path.len();
        descend(child, offset, path);
        if path.len() > depth || covers(key) || covers(child.span()) {
            return;
        }
        path.pop();
    }
}

/// An item, or a value in an array.
#[derive(Clone, Copy)]
enum Node<'a> {
    Item(&'a Item),
    Value(&'a Value),
    Table(&'a toml_edit::Table),
}

impl<'a> Node<'a> {
    fn span(self) -> Option<Range<usize>> {
        match self {
            Node::Item(item) => item.span(),
            Node::Value(value) => value.span(),
            Node::Table(table) => table.span(),
        }
    }

    fn table(self) -> Option<&'a dyn TableLike> {
        match self {
            Node::Item(item) => item.as_table_like(),
            Node::Value(value) => value.as_inline_table().map(|table| table as &dyn TableLike),
            Node::Table(table) => Some(table),
        }
    }

    /// Its entries: each with its name or index, and the place of its key.
    fn children(self) -> Vec<(String, Option<Range<usize>>, Node<'a>)> {
        if let Some(table) = self.table() {
            let entry = |(name, item): (&str, &'a Item)| {
                (name.to_owned(), table.key(name).and_then(toml_edit::Key::span), Node::Item(item))
            };
            return table.iter().map(entry).collect();
        }
        let numbered = |(number, node): (usize, Node<'a>)| (number.to_string(), None, node);
        let array = match self {
            Node::Item(Item::ArrayOfTables(tables)) => {
                return tables.iter().map(Node::Table).enumerate().map(numbered).collect();
            }
            Node::Item(item) => item.as_array(),
            Node::Value(value) => value.as_array(),
            Node::Table(_) => None,
        };
        array.into_iter().flatten().map(Node::Value).enumerate().map(numbered).collect()
    }

    fn child(self, step: &str) -> Option<(Node<'a>, Option<Range<usize>>)> {
        self.children().into_iter().find(|(name, ..)| name == step).map(|(_, key, node)| (node, key))
    }
}
