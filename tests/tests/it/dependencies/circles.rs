//! Which modules of a crate use which, read from its sources.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// A module by its path in the crate, such as `["wire", "hello"]`; empty for the root.
type Module = Vec<String>;

/// The modules of a crate, each in a file, with their code but without tests and comments.
fn modules(src: &Path) -> BTreeMap<Module, String> {
    let mut found = BTreeMap::new();
    let mut left = vec![src.to_owned()];
    while let Some(path) = left.pop() {
        if path.is_dir() {
            left.extend(path.read_dir().unwrap().map(|entry| entry.unwrap().path()));
            continue;
        }
        let inner = path.strip_prefix(src).unwrap().with_extension("");
        let mut module: Module = inner.iter().map(|part| part.to_string_lossy().into_owned()).collect();
        if matches!(module.last().map(String::as_str), Some("mod" | "lib" | "main")) {
            module.pop();
        }
        let is_test = module.iter().any(|part| part.ends_with("tests") || part == "testing" || part == "samples");
        if path.extension().is_some_and(|extension| extension == "rs") && !is_test {
            found.insert(module, code(&std::fs::read_to_string(path).unwrap()));
        }
    }
    found
}

/// The code of a file: tests are its last module, if it has any.
fn code(text: &str) -> String {
    let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    let lines = text.lines().map(|line| line.split("//").next().unwrap_or_default());
    let mut code = String::new();
    let mut is_of_tests = false;
    for line in lines {
        if !is_of_tests {
            code.push_str(line);
            code.push('\n');
        }
        is_of_tests = line.trim() == "#[cfg(test)]";
    }
    code
}

/// The paths that begin with `crate` or `super`, those of a `use` with braces one by one.
fn paths(code: &str) -> Vec<Vec<&str>> {
    let starts = ["crate::", "super::"].iter().flat_map(|start| code.match_indices(start)).map(|(at, _)| at);
    let is_first = |at: &usize| !code[..*at].ends_with(|before: char| before == ':' || before.is_alphanumeric());
    let mut found = Vec::new();
    for at in starts.filter(is_first) {
        expand(&mut Vec::new(), &mut code[at..].trim_start(), &mut found);
    }
    found
}

/// Reads one path or tree of paths from the front of `rest`, and adds its paths, with `prefix` before them.
fn expand<'a>(prefix: &mut Vec<&'a str>, rest: &mut &'a str, found: &mut Vec<Vec<&'a str>>) {
    let depth = prefix.len();
    loop {
        if let Some(tree) = rest.strip_prefix('{') {
            *rest = tree.trim_start();
            while !rest.is_empty() && !rest.starts_with('}') {
                expand(prefix, rest, found);
                let behind = rest.find([',', '}']).unwrap_or(rest.len());
                *rest = rest[behind..].trim_start_matches(',').trim_start();
            }
            *rest = rest.strip_prefix('}').unwrap_or(rest);
            break;
        }
        let end = rest.find(|next: char| next != '_' && !next.is_alphanumeric()).unwrap_or(rest.len());
        prefix.push(&rest[..end]);
        *rest = &rest[end..];
        let Some(next) = rest.strip_prefix("::") else {
            found.push(prefix.clone());
            break;
        };
        *rest = next;
    }
    prefix.truncate(depth);
}

/// The innermost module that a path in module `from` names.
fn resolve(modules: &BTreeMap<Module, String>, from: &Module, path: &[&str]) -> Module {
    let supers = path.iter().take_while(|&&part| part == "super").count();
    let mut module = if supers == 0 { Module::new() } else { from[..from.len().saturating_sub(supers)].to_vec() };
    for part in &path[supers.max(1)..] {
        module.push((*part).to_owned());
        if !modules.contains_key(&module) {
            module.pop();
            break;
        }
    }
    module
}

/// The modules that use each other in a circle. A module and its own parts may: a part sees its parent's private items.
fn circles(src: &Path) -> BTreeSet<Module> {
    let modules = modules(src);
    let uses = |from: &Module| -> BTreeSet<Module> {
        let used = paths(&modules[from]).into_iter().map(|path| resolve(&modules, from, &path));
        used.filter(|used| !used.starts_with(from) && !from.starts_with(used)).collect()
    };
    let used: BTreeMap<_, _> = modules.keys().map(|module| (module, uses(module))).collect();
    let mut left: BTreeSet<_> = modules.keys().cloned().collect();
    loop {
        let ends = |module: &&Module| {
            used[module].is_disjoint(&left) || !left.iter().any(|other| used[other].contains(*module))
        };
        let Some(end) = left.iter().find(ends).cloned() else { break left };
        left.remove(&end);
    }
}

#[test]
fn no_modules_use_each_other_in_a_circle() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for name in ["engine", "guests", "plan", "program", "report"].map(|name| format!("pipeline/{name}")) {
        assert_eq!(circles(&root.join(&name).join("src")), BTreeSet::new(), "{name}");
    }
    for name in ["stages", "transports"] {
        assert_eq!(circles(&root.join(name).join("src")), BTreeSet::new(), "{name}");
    }
}

/// Confirms that the check above detects a circle, through braces and `super` too.
#[test]
fn a_circle_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    std::fs::create_dir(dir.path().join("c")).unwrap();
    write("lib.rs", "mod a;\nmod b;\nmod c;\nmod d;\n");
    write("a.rs", "use crate::{\n    c::{self, One as Other},\n    d::Leaf,\n};\n");
    write(
        "b.rs",
        "// use crate::a::Three;\nuse crate::a::Two;\n#[cfg(test)]\nmod tests {\n    use crate::d::Leaf;\n}\n",
    );
    write("c/mod.rs", "mod inner;\npub use inner::One;\n");
    write("c/inner.rs", "fn f() -> super::Shared {\n    super::super::b::g()\n}\n");
    write("d.rs", "pub struct Leaf;\n");
    // `a` uses `c`, whose part uses `b`, which uses `a`. A parent's use of its part is not looked at, so there is no circle yet.
    assert_eq!(circles(dir.path()), BTreeSet::new());
    write("a.rs", "use crate::c::{inner::One, Other};\n");
    let names = |names: &[&str]| -> Module { names.iter().map(|&name| name.to_owned()).collect() };
    assert_eq!(circles(dir.path()), [names(&["a"]), names(&["b"]), names(&["c", "inner"])].into());
}
