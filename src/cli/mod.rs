//! Floor 6: the program. Parses the command line, wires the floors below together, waits for signals.
//!
//! Owns commands, exit codes, signals and the order of starting and stopping. Does not know protocols.
//! Invariant: a daemon that has said it is ready ends only by a signal or by a bug, never for the network.

pub mod args;
pub mod exit;
mod generate;
mod init;
mod pki;

use std::process::ExitCode;

use clap::{Parser as _, error::ErrorKind};

use args::{Cli, Command, HubAction};
use exit::{Code, Outcome};

/// Runs the program on this process's arguments.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

/// Help and version are answers, not mistakes.
fn usage(error: &clap::Error) -> ExitCode {
    let asked = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
    // A closed pipe is the reader's choice.
    let _ = error.print();
    if asked { ExitCode::SUCCESS } else { ExitCode::from(Code::Usage as u8) }
}

fn run(command: Command) -> Outcome {
    match command {
        Command::Gen(args) => generate::run(&args),
        Command::Hub(args) => match args.action {
            Some(HubAction::Init(args)) => init::run(&args),
            None => todo!(),
        },
        _ => todo!(),
    }
}
