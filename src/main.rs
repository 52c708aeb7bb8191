//! The `culvert` program: see [`culvert::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    culvert::cli::main()
}
