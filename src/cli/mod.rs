//! Floor 6: the program. Parses the command line, wires the floors below together, waits for signals.
//!
//! Owns commands, exit codes, signals and the order of starting and stopping. Does not know protocols.
//! Invariant: a daemon that has said it is ready ends only by a signal or by a bug, never for the network.

mod api;
pub mod args;
mod check;
mod connect;
mod daemon;
pub mod exit;
mod generate;
mod init;
mod logs;
mod pki;
mod places;
mod quickstart;
mod registry;
mod roles;
mod say;
mod streams;

use std::process::ExitCode;

use clap::{Parser as _, error::ErrorKind};

use args::{Cli, Command, HubAction};
use exit::{Code, Failure, Outcome};

use crate::{device::Device, hub::Hub, service::Service};

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
            None => daemon::run::<Hub>(args.config.as_deref()),
        },
        Command::Device(args) => daemon::run::<Device>(args.config.as_deref()),
        Command::Service(args) => daemon::run::<Service>(args.config.as_deref()),
        Command::Quickstart(args) => quickstart::run(&args),
        Command::Logs(args) => logs::run(&args),
        Command::Check(args) => once(check::run(&args)),
        Command::Registry(args) => once(registry::run(&args)),
        Command::DeviceStream(args) => once(streams::run(&args)),
        Command::Connect(args) => once(connect::run(&args)),
    }
}

/// Runs a command that ends by itself. Whatever still blocks then, such as a read of the terminal, is left behind.
fn once(command: impl Future<Output = Outcome>) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::unavailable)?;
    let ended = runtime.block_on(command);
    runtime.shutdown_background();
    ended
}
