//! `culvert gen`: man pages and shell completions, made from the command line itself.
//!
//! Owns the names of the files. Does not know the commands. Invariant: what is written never disagrees with
//! `--help`.

use std::{fs, io, path::Path};

use clap::CommandFactory as _;
use clap_complete::Shell;

use super::{
    args::{Cli, GenArgs, Generated},
    exit::{Failure, Outcome},
};

/// The shells that get completions.
const SHELLS: [Shell; 3] = [Shell::Bash, Shell::Zsh, Shell::Fish];

/// Writes what was asked for.
pub(super) fn run(args: &GenArgs) -> Outcome {
    let written = fs::create_dir_all(&args.dir).and_then(|()| match args.what {
        Generated::Man => clap_mangen::generate_to(Cli::command(), &args.dir),
        Generated::Completions => completions(&args.dir),
    });
    written.map_err(|error| Failure::unavailable(anyhow::Error::new(error).context(args.dir.display().to_string())))
}

fn completions(dir: &Path) -> io::Result<()> {
    for shell in SHELLS {
        clap_complete::generate_to(shell, &mut Cli::command(), "culvert", dir)?;
    }
    Ok(())
}
