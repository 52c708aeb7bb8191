//! Reads typed values out of a TOML table and remembers everything that is wrong with it.
//!
//! Owns lines, types and the strictness about unknown keys. Does not know which keys exist: asking for one makes
//! it known. Invariant: a problem never ends the reading, so that one run shows all of them.
//!
//! serde would stop at the first problem and knows no line for a rule between two keys; this is why the tables are
//! read by hand.

use std::{cell::RefCell, fmt, ops::Range, path::PathBuf, time::Duration};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{files::Sources, problem::Problem, value::FromValue};
use crate::base::ByteSize;

/// One parsed file.
pub(super) struct Document<'a> {
    pub(super) path: PathBuf,
    text: &'a str,
    /// True if the text is not TOML: what is missing from the table then means nothing.
    pub(super) broken: bool,
    table: DeTable<'a>,
}

impl<'a> Document<'a> {
    /// Parses a file's text; every syntax error is reported.
    pub(super) fn parse(path: PathBuf, text: &'a str, sources: &Sources) -> Self {
        let (table, errors) = DeTable::parse_recoverable(text);
        for error in &errors {
            let line = error.span().map_or(0, |span| line_of(text, span.start));
            sources.problem(Problem { file: path.clone(), line, key: "TOML".into(), reason: error.message().into() });
        }
        Self { path, text, broken: !errors.is_empty(), table: table.into_inner() }
    }

    /// The table of the whole file.
    pub(super) fn root(&'a self, sources: &'a Sources) -> Section<'a> {
        Section { sources, document: self, table: Some(&self.table), at: 0..0, prefix: "", known: RefCell::default() }
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    text.as_bytes().iter().take(offset).filter(|byte| **byte == b'\n').count() + 1
}

/// A table of a document, or the absence of one, which reads like an empty table.
pub(super) struct Section<'a> {
    pub(super) sources: &'a Sources,
    pub(super) document: &'a Document<'a>,
    table: Option<&'a DeTable<'a>>,
    at: Range<usize>,
    prefix: &'static str,
    known: RefCell<Vec<&'static str>>,
}

/// Where a rule was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Location {
    pub(super) file: PathBuf,
    pub(super) line: usize,
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file.display(), self.line)
    }
}

impl<'a> Section<'a> {
    /// The value of a key, if it is there and good.
    pub(super) fn optional<T: FromValue>(&self, key: &'static str) -> Option<T> {
        let value = self.value(key)?;
        let mut faults = Vec::new();
        let read = T::from_value(value, &mut faults);
        for fault in faults {
            self.report(line_of(self.document.text, fault.at), key, fault.reason);
        }
        read
    }

    /// The value of a key that must be there.
    pub(super) fn required<T: FromValue>(&self, key: &'static str) -> Option<T> {
        if self.value(key).is_none() {
            self.problem(key, "is missing");
        }
        self.optional(key)
    }

    /// Overwrites a default if the key is there.
    pub(super) fn set<T: FromValue>(&self, key: &'static str, value: &mut T) {
        if let Some(read) = self.optional(key) {
            *value = read;
        }
    }

    /// A count; zero is refused.
    pub(super) fn count(&self, key: &'static str) -> Option<usize> {
        let count = self.optional(key)?;
        if count == 0 {
            self.problem(key, "must be at least 1");
        }
        Some(count)
    }

    /// A time limit; zero is refused.
    pub(super) fn timeout(&self, key: &'static str) -> Option<Duration> {
        let timeout: Duration = self.optional(key)?;
        if timeout.is_zero() {
            self.problem(key, "must be longer than 0s");
        }
        Some(timeout)
    }

    /// Overwrites a default count; zero is refused.
    pub(super) fn set_count(&self, key: &'static str, value: &mut usize) {
        *value = self.count(key).unwrap_or(*value);
    }

    /// Overwrites a default time limit; zero is refused.
    pub(super) fn set_timeout(&self, key: &'static str, value: &mut Duration) {
        *value = self.timeout(key).unwrap_or(*value);
    }

    /// Overwrites a default size; less than `least` is refused.
    pub(super) fn set_size(&self, key: &'static str, least: u64, value: &mut u64) {
        match self.optional::<ByteSize>(key) {
            Some(size) if size.0 < least => self.problem(key, format!("must be at least {}", ByteSize(least))),
            Some(size) => *value = size.0,
            None => {}
        }
    }

    /// True if the key is there, good or not.
    pub(super) fn has(&self, key: &'static str) -> bool {
        self.value(key).is_some()
    }

    /// The table under a key.
    pub(super) fn section(&self, key: &'static str) -> Section<'a> {
        let value = self.value(key);
        let table = value.and_then(|value| value.get_ref().as_table());
        if value.is_some() && table.is_none() {
            self.problem(key, format!("must be a section: write [{key}] on a line of its own"));
        }
        self.below(key, table, value.map_or(0..0, Spanned::span))
    }

    /// The tables of an array of tables.
    pub(super) fn sections(&self, key: &'static str) -> Vec<Section<'a>> {
        let Some(value) = self.value(key) else { return Vec::new() };
        let Some(array) = value.get_ref().as_array() else {
            self.problem(key, format!("must be a list of sections: write [[{key}]] with two brackets"));
            return Vec::new();
        };
        let mut sections = Vec::new();
        for item in array.iter() {
            match item.get_ref().as_table() {
                Some(table) => sections.push(self.below(key, Some(table), item.span())),
                None => {
                    let line = line_of(self.document.text, item.span().start);
                    self.report(line, key, format!("must be a list of sections: write [[{key}]]"));
                }
            }
        }
        sections
    }

    /// Reports a problem at a key, or at the section if the key is not there.
    pub(super) fn problem(&self, key: &'static str, reason: impl Into<String>) {
        self.report(self.line(key), key, reason.into());
    }

    /// Says something that deserves attention but does not keep the configuration from being used.
    pub(super) fn warn(&self, key: &'static str, reason: impl Into<String>) {
        self.sources.warn(Problem {
            file: self.document.path.clone(),
            line: self.line(key),
            key: self.full_key(key),
            reason: reason.into(),
        });
    }

    /// Where the key, or else the section, was written.
    pub(super) fn location(&self, key: &'static str) -> Location {
        Location { file: self.document.path.clone(), line: self.line(key) }
    }

    /// Call it last: every key that nobody asked for is unknown.
    pub(super) fn finish(self) {
        let known = self.known.borrow();
        for key in self.table.into_iter().flat_map(DeTable::keys) {
            let name = key.get_ref().as_ref();
            if known.contains(&name) {
                continue;
            }
            let line = line_of(self.document.text, key.span().start);
            self.report(line, name, unknown_key(name, &known));
        }
    }

    fn value(&self, key: &'static str) -> Option<&'a Spanned<DeValue<'a>>> {
        if !self.known.borrow().contains(&key) {
            self.known.borrow_mut().push(key);
        }
        self.table?.get(key)
    }

    fn below(&self, key: &'static str, table: Option<&'a DeTable<'a>>, at: Range<usize>) -> Section<'a> {
        Section { sources: self.sources, document: self.document, table, at, prefix: key, known: RefCell::default() }
    }

    fn line(&self, key: &str) -> usize {
        let found = self.table.and_then(|table| table.get_key_value(key));
        line_of(self.document.text, found.map_or(self.at.start, |(key, _)| key.span().start))
    }

    fn full_key(&self, key: &str) -> String {
        if self.prefix.is_empty() { key.into() } else { format!("{}.{key}", self.prefix) }
    }

    fn report(&self, line: usize, key: &str, reason: String) {
        let file = self.document.path.clone();
        self.sources.problem(Problem { file, line, key: self.full_key(key), reason });
    }
}

/// Says what may have been meant.
fn unknown_key(name: &str, known: &[&'static str]) -> String {
    let file_key = format!("{name}_file");
    if known.contains(&file_key.as_str()) {
        return format!("unknown key; secrets and certificates come from files: use {file_key}");
    }
    let near = known.iter().map(|key| (distance(name, key), key)).min();
    match near {
        Some((steps, key)) if steps <= 1 + name.chars().count() / 4 => {
            format!("unknown key; did you mean {key}?")
        }
        _ => {
            let mut known = known.to_vec();
            known.sort_unstable();
            format!("unknown key; known here are {}", known.join(", "))
        }
    }
}

/// Levenshtein's distance, over at most 64 characters: keys are shorter.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(64).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().take(64).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let changed = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
