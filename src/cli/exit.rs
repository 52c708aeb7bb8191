//! How a command ends: a number for programs, a line for people.
//!
//! Owns the exit codes. Does not know which command failed. Invariant: every failure has one of four codes, and its
//! chain of causes is printed once.

use std::process::ExitCode;

use super::say;
use crate::telemetry::log;

/// Why a command failed, with the code that says whose fault it is.
#[derive(Debug)]
pub struct Failure {
    code: Code,
    error: anyhow::Error,
}

/// The result of a command.
pub type Outcome<T = ()> = Result<T, Failure>;

/// The codes, from sysexits.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// EX_USAGE: the command was wrong.
    Usage = 64,
    /// EX_UNAVAILABLE: something outside is missing or refuses.
    Unavailable = 69,
    /// EX_SOFTWARE: culvert is wrong.
    Software = 70,
    /// EX_CONFIG: a configuration file or a file that it names is wrong.
    Config = 78,
}

impl Failure {
    /// The command as such cannot be done.
    pub fn usage(error: impl Into<anyhow::Error>) -> Self {
        Self { code: Code::Usage, error: error.into() }
    }

    /// Something outside is missing or refuses.
    pub fn unavailable(error: impl Into<anyhow::Error>) -> Self {
        Self { code: Code::Unavailable, error: error.into() }
    }

    /// A bug.
    pub fn software(error: impl Into<anyhow::Error>) -> Self {
        Self { code: Code::Software, error: error.into() }
    }

    /// A configuration file is wrong.
    pub fn config(error: impl Into<anyhow::Error>) -> Self {
        Self { code: Code::Config, error: error.into() }
    }

    /// The cause of that type, for whoever can do something about it.
    pub(super) fn cause<E: std::error::Error + Send + Sync + 'static>(&self) -> Option<&E> {
        self.error.downcast_ref()
    }

    /// The code.
    pub fn code(&self) -> Code {
        self.code
    }

    /// Prints the chain on standard error, and yields the process's exit code.
    pub fn report(&self) -> ExitCode {
        // The journal reads a line's priority from its start (sd-daemon(3)); without one an error is information.
        let priority = if log::stderr_is_the_journal() { "<3>" } else { "" };
        for line in self.text().lines() {
            say::aside(format_args!("{priority}{line}"));
        }
        ExitCode::from(self.code as u8)
    }

    /// The chain. The lines of a configuration check stand alone, so that editors can jump to them.
    fn text(&self) -> String {
        match self.error.downcast_ref::<crate::config::LoadError>() {
            Some(problems) => problems.to_string(),
            None => format!("culvert: {}", chain(&self.error)),
        }
    }
}

/// Each level's fact, from the outermost inwards, once: some errors of libraries repeat their cause.
fn chain(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |told, cause| match told {
        told if told.is_empty() => cause,
        told if told.contains(&cause) => told,
        told => told + ": " + &cause,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chain_is_one_line() {
        let error = anyhow::Error::new(std::io::Error::other("no route")).context("the hub cannot be reached");
        assert_eq!(Failure::unavailable(error).text(), "culvert: the hub cannot be reached: no route");
    }
}
