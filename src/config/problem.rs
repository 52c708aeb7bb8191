//! What is wrong with a configuration, where, and why.
//!
//! Owns the form `file:line: key: reason`, one line per problem. Does not know what the keys mean.
//! Invariant: a [`LoadError`] holds at least one problem, and a problem prints as exactly one line.

use std::{
    fmt::{self, Write as _},
    path::PathBuf,
};

use super::footprint::Footprint;

/// Something wrong, or worth a warning, in a configuration file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// The file, as the caller or the configuration named it.
    pub file: PathBuf,
    /// The line, from 1; 0 if the problem is the file as a whole.
    pub line: usize,
    /// The key with its section, as in `limits.max_channels`; empty if it is the file as a whole.
    pub key: String,
    /// What is wrong and, where it helps, what to do.
    pub reason: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = OneLine(f);
        write!(out, "{}:", self.file.display())?;
        if self.line > 0 {
            write!(out, "{}:", self.line)?;
        }
        if !self.key.is_empty() {
            write!(out, " {}:", self.key)?;
        }
        write!(out, " {}", self.reason)
    }
}

/// Escapes control characters, which a file may carry in its keys and values.
struct OneLine<'a, 'b>(&'a mut fmt::Formatter<'b>);

impl fmt::Write for OneLine<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            if c.is_control() { write!(self.0, "{}", c.escape_default())? } else { self.0.write_char(c)? }
        }
        Ok(())
    }
}

/// Why a configuration was not loaded: every problem that was found, in the order of files and lines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadError {
    /// At least one.
    pub problems: Vec<Problem>,
    /// Every file that was read or missed, as it looked: a change of any of them is a reason to try again.
    pub files: Footprint,
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            write!(f, "{}{problem}", if index == 0 { "" } else { "\n" })?;
        }
        Ok(())
    }
}

impl std::error::Error for LoadError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_is_one_line_whatever_the_file_holds() {
        let mut problem =
            Problem { file: "a.toml".into(), line: 3, key: "lis\nten".into(), reason: "bad \u{1b}[31m".into() };
        assert_eq!(problem.to_string(), r"a.toml:3: lis\nten: bad \u{1b}[31m");
        problem.line = 0;
        problem.key.clear();
        assert_eq!(problem.to_string(), r"a.toml: bad \u{1b}[31m");
    }
}
