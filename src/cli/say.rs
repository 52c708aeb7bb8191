//! What a command says to people and to programs behind pipes.
//!
//! Owns what a failed write means. Does not know what is said.
//! Invariant: no write makes a command panic, and a secret that could not be written is never taken for told.

use std::{
    fmt::Display,
    io::{self, Write},
};

use anyhow::Context as _;

use super::exit::{Failure, Outcome};

/// A line on standard output. A reader that has left, as `head` does, has seen enough.
pub(super) fn line(text: impl Display) -> Outcome {
    enough(write_line(&mut io::stdout().lock(), text))
}

/// A line on standard output that nobody can ask for twice: `otherwise` says what to do when it is lost.
pub(super) fn once(text: impl Display, otherwise: impl FnOnce() -> String) -> Outcome {
    kept(write_line(&mut io::stdout().lock(), text), otherwise)
}

/// A remark on standard error, which may be closed.
pub(super) fn aside(text: impl Display) {
    let _ = write_line(&mut io::stderr().lock(), text);
}

fn write_line(out: &mut impl Write, text: impl Display) -> io::Result<()> {
    writeln!(out, "{text}")?;
    out.flush()
}

fn enough(written: io::Result<()>) -> Outcome {
    match written {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written.context("standard output").map_err(Failure::unavailable),
    }
}

fn kept(written: io::Result<()>, otherwise: impl FnOnce() -> String) -> Outcome {
    written.context("standard output").with_context(otherwise).map_err(Failure::unavailable)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::exit::Code;

    #[test]
    fn a_reader_that_left_is_no_failure_and_a_full_disk_is() {
        let full = || Err(io::ErrorKind::StorageFull.into());
        assert!(enough(Err(io::ErrorKind::BrokenPipe.into())).is_ok());
        assert_eq!(enough(full()).unwrap_err().code(), Code::Unavailable);
        for lost in [full(), Err(io::ErrorKind::BrokenPipe.into())] {
            assert_eq!(kept(lost, || "ask again".into()).unwrap_err().code(), Code::Unavailable);
        }
    }
}
